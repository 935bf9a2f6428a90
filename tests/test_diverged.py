"""A run whose losses or weights are no longer finite: it is called diverged, and has no accuracy."""

import json
import math
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import fslsage_rpc
from fslsage_rpc.bench.statistics import BenchRun, summarise
from fslsage_rpc.bench.table import diverged_lines
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Bench
from fslsage_rpc.config.variants import bench_variants
from fslsage_rpc.errors import Diverged
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.report import comparison, tables
from fslsage_rpc.report.page import to_markdown
from fslsage_rpc.report.series import group
from fslsage_rpc.report.sources import read
from fslsage_rpc.runs.checkpoint_files import complete_folders
from fslsage_rpc.runs.screen import Screen
from fslsage_rpc.training.evaluation import evaluate_run
from support.commands import said
from support.job_processes import outer_environment
from support.report_folders import line, write_bench, write_run
from support.run_folders import finished, lines
from support.trees import tree

ALGORITHMS = ("fsl_sage", "cse_fsl", "splitfed_v1", "splitfed_v2", "fedavg")
LOCAL_LAUNCHER = str(Path(__file__).parent.parent / "launch" / "local.sh")
RUN_SECONDS = 100
SOARING = {
    "name": "sgd",
    "lr": 0.01,
    "weight_decay": 0.0,
    "scheduler": {"name": "ExponentialLR", "arguments": {"gamma": 1e32}},
}
"""a learning rate of 1e30 in the second round"""


def diverging(output: Path, name: str = "fsl_sage", **keys: Any) -> dict[str, Any]:
    """A run of four rounds, the first of which is sound."""
    soaring = {"client": SOARING, "server": SOARING}
    changes = {"algorithm": {"name": name}, "optimizer": soaring, "evaluation": {"every": 1}}
    return tree(output, changes, rounds=4, **keys)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_ends_after_the_round_in_which_it_has_diverged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Diverged, match=r"^diverged in round 2: a loss or a weight is not finite$"):
        fslsage_rpc.train(diverging(tmp_path, name))
    folder = tmp_path / "run"
    sound, last = lines(folder)
    assert "diverged" not in sound
    assert last["diverged"] is True
    assert [last[key] for key in ("test_accuracy", "test_loss")] == [None, None]
    summary = finished(folder).summary
    assert summary["diverged"] == 2
    scores = {"last": sound["test_accuracy"], "best": sound["test_accuracy"], "best_round": 1}
    assert summary["test_accuracy"] == scores
    (checkpoint,) = complete_folders(folder / "checkpoints")
    assert checkpoint.name == "round-000001"
    printed = capsys.readouterr().out
    assert "│ diverged in round 2 " in printed
    how = f"a loss or a weight is not finite; the last checkpoint is {checkpoint}"
    assert printed.splitlines()[-1] == f"diverged in round 2: {how}"
    assert (folder / "DIVERGED").exists()


def test_it_is_not_started_again_but_goes_on_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(diverging(tmp_path)))
    assert said(capsys, "train", config).returncode == 1
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = said(capsys, "train", config)
    assert (again.returncode, again.stderr) == (1, "")
    assert again.stdout.splitlines()[-1].startswith("This run has diverged in round 2 already. To go on: ")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    on = said(capsys, "train", config, "stop.diverged=false")
    assert (on.returncode, on.stderr) == (0, "")
    assert "goes on from round 1 (" in on.stdout
    run = finished(tmp_path / "run")
    assert [line["round"] for line in run.rounds] == [1, 2, 3, 4]
    assert [line["test_accuracy"] is None for line in run.rounds] == [False, True, True, True]
    assert [line.get("diverged") for line in run.rounds] == [None, True, True, True]
    assert (run.summary["diverged"], run.summary["test_accuracy"]["best_round"]) == (2, 1)
    assert not (tmp_path / "run" / "DIVERGED").exists()
    assert said(capsys, "train", config, "stop.diverged=false").returncode == 0
    assert math.isnan(evaluate_run(tmp_path / "run").accuracy)
    assert said(capsys, "train", config).returncode == 1  # its last checkpoint is of a diverged round


def test_a_run_that_diverges_at_once_has_no_accuracy(tmp_path: Path) -> None:
    fast = {"name": "sgd", "lr": 1e30}
    keys = tree(tmp_path, {"optimizer": {"client": fast, "server": fast}}, rounds=2)
    with pytest.raises(Diverged, match="in round 1:"):
        fslsage_rpc.train(keys)
    scores = finished(tmp_path / "run").summary["test_accuracy"]
    assert scores == {"last": None, "best": None, "best_round": None}


@pytest.mark.parametrize(("value", "finite"), [(1e38, True), (math.inf, False), (math.nan, False)])
def test_one_weight_is_enough(value: float, finite: bool) -> None:
    floats = torch.ones(1000)
    floats[7] = value
    assert Weights(floats, torch.ones(0, dtype=torch.int64)).finite() == finite
    assert Weights(torch.ones(0), torch.ones(0, dtype=torch.int64)).finite()


def test_tensorboard_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Diverged):
        fslsage_rpc.train(diverging(tmp_path))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("diverged/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (2, [b"diverged in round 2"])
    assert [event.step for event in events.Scalars("test_accuracy")] == [1]
    assert events.Scalars("train_loss/uploads")[0].step == 1


def test_a_report_says_so_of_runs_and_benches(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [0.5, None, None], algorithm={"name": "fedavg"})
    written = [line(0, 0.5), line(1, None, diverged=True), line(2, None, diverged=True, train_loss=None)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in written))
    runs, benches = read([str(folder), str(write_bench(tmp_path / "bench", diverged=3))])
    page = to_markdown(comparison.compose(group(runs), benches))
    assert "| 0.5000, diverged in round 2 |" in page
    assert tables.bench_table(benches[0]).rows[0][0] == "FSL-SAGE: wide, diverged in round 3"


def test_a_benchmark_says_so_and_goes_on() -> None:
    keys = {"bench": {"variants": {"a": [], "b": []}, "reference": "b"}}
    assert not any(variant.stop.diverged for variant in bench_variants(from_tree(keys)).values())
    figures = {
        "round_seconds": 1.0,
        "test_accuracy": None,
        "phases": {"client": {}, "server": {}},
        "requests": {},
        "wire_bytes": {},
        "paper_bytes": 0,
        "cpu_seconds": {"ranks": [1.0]},
        "host_busy": None,
    }
    measured = [
        {**figures, "round": round} | ({"diverged": True} if round > 2 else {}) for round in (1, 2, 3, 4)
    ]
    record = summarise([BenchRun("a", 0, 1, measured, [1.0] * 4)], Bench(variants={"a": []}, reference="a"))
    assert record["a"]["diverged"] == 3
    (sentence,) = diverged_lines({"variants": record})
    assert sentence.startswith("a: diverged in round 3; ")


@pytest.mark.parametrize("width", [40, 60, 78])
def test_a_narrow_terminal_loses_no_number(width: int) -> None:
    summary = {
        "algorithm": "fsl_sage",
        "rounds": 50,
        "test_accuracy": {"last": 0.9861, "best": 0.9875, "best_round": 49},
        "training_seconds": 2513.25,
        "phases": {"client": {"forward_backward": 1250.125}, "server": {"idle": 2000.5}},
        "wire_bytes": {"initial_broadcast": 123_456_789_012, "smashed_up": 1},
        "paper_bytes_total": 98_765_432_109,
    }
    written = StringIO()
    console = Console(file=written, width=width)
    Screen(from_tree({"name": "narrow"}), console).show_summary(summary, Path("runs/narrow"))
    words = written.getvalue().split()
    for number in ("0.9861", "0.9875", "2513.25", "50.2650", "1250.12", "25.0025", "49.7%", "2000.50"):
        assert number in words, written.getvalue()
    for number in ("117737.57", "2354.75", "100.0%", "94190.06", "1883.80"):
        assert number in words, written.getvalue()
    assert max(map(len, written.getvalue().splitlines())) <= width


@pytest.mark.gate
def test_all_ranks_end_with_status_1_and_one_line(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(diverging(tmp_path, transport="rpc", ranks=3)))
    done = subprocess.run(
        [sys.executable, "-m", "fslsage_rpc", "train", str(config)],
        capture_output=True,
        text=True,
        env=outer_environment(),
        timeout=RUN_SECONDS,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("diverged in round 2: ")


@pytest.mark.nightly
def test_the_launcher_does_not_start_it_again(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(diverging(tmp_path, transport="rpc")))
    for last in ("diverged in round 2: ", "This run has diverged in round 2 already. "):
        done = subprocess.run(
            [LOCAL_LAUNCHER, "train", str(config), "ranks=3"],
            capture_output=True,
            text=True,
            env={**outer_environment(), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            timeout=RUN_SECONDS,
        )
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout.splitlines()[-1].startswith(last)
        assert done.stdout.count("Run folder: ") == 1
