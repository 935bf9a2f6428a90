"""Rounds count from 1 in files and on screen; folders in which they count from 0 are read as if not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fslsage_rpc
from fslsage_rpc.cli import main
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.notebook import Run
from fslsage_rpc.report import tables
from fslsage_rpc.report.series import group
from fslsage_rpc.report.sources import read
from fslsage_rpc.runs.checkpoint_files import complete_folders, extent_of, read_manifest
from fslsage_rpc.runs.metrics_file import encoded
from fslsage_rpc.runs.round_numbers import from_one, from_zero, summary_from_one
from fslsage_rpc.runs.run_folder import RunFolder
from support.commands import said
from support.equality import without_seconds
from support.report_folders import write_run
from support.run_folders import copied, finished, lines
from support.trees import BENCH, tree

EVERY_ROUND = {"evaluation": {"every": 1}}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three rounds of six."""
    return fslsage_rpc.train(tree(tmp_path_factory.mktemp("half"), EVERY_ROUND, rounds=3))


def made_older(folder: Path) -> Path:
    """A run folder as versions have left it in which rounds count from 0."""
    written = [
        {key: value for key, value in line.items() if key != "train_loss_of"} for line in lines(folder)
    ]
    written = from_zero(written)
    (folder / "metrics.jsonl").write_bytes(encoded(written))
    for checkpoint in complete_folders(folder / "checkpoints"):
        manifest = read_manifest(checkpoint)
        replace(manifest, metrics=extent_of(encoded(written[: manifest.rounds]))).write()
    summary = finished(folder).summary
    del summary["first_round"], summary["diverged"]
    summary["test_accuracy"]["best_round"] -= 1
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def steps(folder: Path) -> list[int]:
    """The steps of TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("test_accuracy")]


def test_files_and_screen_have_the_same_numbers(half: Run) -> None:
    assert [line["round"] for line in half.rounds] == [1, 2, 3]
    best = half.summary["test_accuracy"]["best_round"]
    assert half.rounds[best - 1]["test_accuracy"] == half.summary["test_accuracy"]["best"]
    assert half.summary["first_round"] == 1


def test_a_complete_older_run_is_shown_as_it_was(
    half: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = half.summary["test_accuracy"]["best_round"]
    folder = made_older(copied(half, tmp_path))
    assert finished(folder).summary["test_accuracy"]["best_round"] == best - 1
    again = fslsage_rpc.train(folder / "config.yaml", f"output={tmp_path}")
    assert f" in round {best} " in capsys.readouterr().out
    assert again.summary["test_accuracy"] == half.summary["test_accuracy"]
    assert [line["round"] for line in again.rounds] == [1, 2, 3]


@pytest.mark.parametrize("cut_short", [False, True])
def test_an_older_run_is_gone_on_with(
    half: Run, cut_short: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the start that counts its rounds anew is cut short."""
    pytest.importorskip("tensorboard")
    keys = tree(tmp_path, EVERY_ROUND)
    folder = made_older(copied(half, tmp_path))
    if cut_short:
        with RunFolder(from_tree(keys), print) as begun:
            begun.start({}, json.loads((folder / "partition.json").read_text()))
        assert [line["round"] for line in lines(folder)] == [1, 2, 3]
        capsys.readouterr()
    on = fslsage_rpc.train(keys)
    printed = capsys.readouterr().out
    assert printed.startswith(f"goes on from round 3 ({folder}/checkpoints/round-000003)\nround 4/6 ")
    whole = fslsage_rpc.train(keys, f"output={tmp_path / 'whole'}")
    assert [line["round"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]
    expected = without_seconds(whole.rounds)
    for line in expected[:3]:
        del line["train_loss_of"]
    assert without_seconds(on.rounds) == expected
    assert on.summary["test_accuracy"] == whole.summary["test_accuracy"]
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_of_an_older_run_leaves_the_one_before(
    half: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tree(tmp_path, EVERY_ROUND)
    folder = made_older(copied(half, tmp_path))
    with RunFolder(from_tree(keys), print) as begun:
        begun.start({}, json.loads((folder / "partition.json").read_text()))
    (folder / "checkpoints" / "round-000003" / "rank-0.pt").write_bytes(b"")
    fslsage_rpc.train(keys)
    assert "goes on from round 2 (" in capsys.readouterr().out
    assert [line["round"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "over"), [("cse_fsl", "uploads"), ("splitfed_v2", "batches"), ("my.own:Kind", "unknown")]
)
def test_a_report_reads_older_runs_rightly(name: str, over: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [0.5, 0.75], algorithm={"name": name})
    older = [{k: v for k, v in line.items() if k != "train_loss_of"} for line in from_zero(lines(folder))]
    (folder / "metrics.jsonl").write_bytes(encoded(older))
    runs, _ = read([str(folder)])
    assert [line["round"] for line in runs[0].lines] == [1, 2]
    table = tables.runs_table(group(runs))
    row = dict(zip(table.headers, table.rows[0], strict=True))
    assert (row["rounds"], row["last train loss, over"]) == ("2", f"0.2500, {over}")


def test_a_benchmark_counts_from_one(tmp_path: Path) -> None:
    config = tmp_path / "bench.json"
    config.write_text(json.dumps({**BENCH, "output": str(tmp_path), "transport": "local"}))
    assert main(["bench", str(config)]) == 0
    for file in (tmp_path / "small" / "rounds").iterdir():
        assert [json.loads(line)["round"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_events_count_as_rounds_do() -> None:
    lost: dict[str, Any] = {"event": "loss", "round": 0}
    first: dict[str, Any] = {"round": 0, "train_loss": 1.0}
    assert from_one([lost, first]) == [{**lost, "round": 1}, {**first, "round": 1}]
    assert from_one(from_one([lost, first])) == from_one([lost, first])


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("fsl_sage", "uploads"),
        ("cse_fsl", "uploads"),
        ("splitfed_v1", "batches"),
        ("splitfed_v2", "batches"),
        ("fedavg", "batches"),
    ],
)
def test_a_train_loss_says_over_what_it_is(
    name: str, over: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(tree(tmp_path, {"algorithm": {"name": name}}, rounds=1)))
    printed = said(capsys, "train", tmp_path / "run.json").stdout
    (line,) = lines(tmp_path / "run")
    assert line["train_loss_of"] == over
    assert f"train loss {line['train_loss']:.4f} ({over})" in printed


def test_older_lines_that_diverged_are_called_so(tmp_path: Path) -> None:
    """Older versions gave them the accuracy of some class."""
    good = {"round": 0, "train_loss": 2.0, "test_loss": 1.0, "test_accuracy": 0.5}
    bad = {"round": 1, "train_loss": None, "test_loss": None, "test_accuracy": 0.1}
    lines = from_one([good, bad])
    assert lines[0] == {**good, "round": 1}
    assert lines[1] == {**bad, "round": 2, "test_accuracy": None, "diverged": True}
    older = {"test_accuracy": {"last": 0.1, "best": 0.5, "best_round": 0}, "rounds": 2}
    summary = summary_from_one(older, lines)
    assert summary["diverged"] == 2
    assert summary["test_accuracy"] == {"last": 0.5, "best": 0.5, "best_round": 1}
    finite = summary_from_one(older, lines[:1])
    assert finite["diverged"] is None
    assert finite["test_accuracy"] == {"last": 0.1, "best": 0.5, "best_round": 1}
    nothing = summary_from_one(older, lines[1:])
    assert nothing["test_accuracy"] == {"last": None, "best": None, "best_round": None}
