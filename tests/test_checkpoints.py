"""A run that goes on from a checkpoint ends as one that was never cut off; damaged ones are left out."""

import functools
import json
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fslsage_rpc
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import OptimizerKeys, SchedulerKeys
from fslsage_rpc.errors import InputError
from fslsage_rpc.notebook import Run
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.server import Server
from fslsage_rpc.runs import checkpoints, screen
from fslsage_rpc.runs.checkpoint_files import (
    MANIFEST,
    Manifest,
    RankState,
    complete_folders,
    extent_of,
    part_path,
    read_manifest,
    remove_all_but,
    write_part,
)
from fslsage_rpc.runs.metrics_file import MetricsFile
from fslsage_rpc.runs.run_folder import RunFolder
from fslsage_rpc.training.trainer import Trainer
from support.batch_norm_model import CUT
from support.equality import assert_equal, assert_identical, assert_whole, without_seconds
from support.rank_program import run_on_ranks
from support.run_folders import copied, everything, finished
from support.trees import CLIENTS, Tree, tree
from support.user_input import DEFAULTS, mistake

ABSENT = {"clients": {"count": CLIENTS, "batch_size": 16, "participation": 0.5}}  # 2 of 3 in each round
WARM = {"algorithm": {"name": "fsl_sage", "start": "warm_start"}, **ABSENT}
BEHIND = {"algorithm": {"alignment": {"lag": 1}}}  # the run is cut in the middle of fits
COSINE = {"name": "CosineAnnealingLR", "arguments": {"T_max": 20}}
STEPS = {"optimizer": {party: {"scheduler": {**COSINE, "per": "step"}} for party in ("client", "server")}}
CODED = {"smashed": {"name": "int8", "arguments": {"stochastic": True}}, "auxiliary": "topk"}
ROUNDS = {"optimizer": {"auxiliary": {"lr": 3e-3, "scheduler": {**COSINE, "per": "round"}}}}
CASES: dict[str, list[Tree]] = {
    "fsl_sage": [],
    "fsl_sage, warm, absent, falling": [WARM, STEPS, ROUNDS],
    "fsl_sage, batch norm": [
        {
            "model": {"name": "support.batch_norm_model:residual", "cut": CUT},
            "data": {"partition": "iid", "train_limit": 60},
        }
    ],
    "fsl_sage, coded, absent": [{"comm": {"codec": CODED}}, ABSENT],
    "fsl_sage, behind, falling": [BEHIND, STEPS, ROUNDS],
    "fsl_sage, behind, coded, absent": [BEHIND, {"comm": {"codec": CODED}}, ABSENT],
    "splitfed_v1": [{"algorithm": {"name": "splitfed_v1"}}, STEPS],
    "splitfed_v2": [{"algorithm": {"name": "splitfed_v2"}}, ABSENT],
    "cse_fsl": [{"algorithm": {"name": "cse_fsl"}}, ABSENT, ROUNDS],
    "fedavg": [{"algorithm": {"name": "fedavg"}}, ABSENT],
    "fsl_sage, adam": [{"aggregation": {"name": "adam"}}, ABSENT],
    "splitfed_v1, momentum": [
        {"algorithm": {"name": "splitfed_v1"}, "aggregation": {"name": "momentum"}},
        ABSENT,
    ],
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(output: Path) -> dict[str, Run]:
    """Each case, never cut off."""
    return {
        case: fslsage_rpc.train(tree(output, *changes, name=f"whole-{number}"))
        for number, (case, changes) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def halves(output: Path) -> dict[str, Run]:
    """Each case, after 3 rounds."""
    return {
        case: fslsage_rpc.train(tree(output, *changes, name=f"half-{number}", rounds=3))
        for number, (case, changes) in enumerate(CASES.items())
    }


# Going on


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_and_three_more_are_six(
    case: str,
    whole: dict[str, Run],
    halves: dict[str, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert halves[case].summary["rounds"] == 3
    folder = copied(halves[case], tmp_path)
    capsys.readouterr()
    run = fslsage_rpc.train(tree(tmp_path, *CASES[case], name=folder.name))
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("warning: ")]
    assert said[0] == f"goes on from round 3 ({folder}/checkpoints/round-000003)"
    assert said[1].startswith("round 4/6")
    assert_identical(whole[case], run)
    assert_whole(run)


@pytest.mark.gate
def test_three_ranks_go_on_from_where_two_were(whole: dict[str, Run], tmp_path: Path) -> None:
    """What one client rank has written is read by two; the whole equals that of a single process."""
    cases = [case for case in CASES if "batch norm" not in case]  # which would blow the rounding up
    trees = [
        tree(tmp_path, *CASES[case], name=f"run-{number}", transport="rpc")
        for number, case in enumerate(cases)
    ]
    run_on_ranks(2, [{**keys, "rounds": 3} for keys in trees], tmp_path, timeout=100)
    folders = [tmp_path / keys["name"] for keys in trees]
    for folder in folders:
        saved = read_manifest(folder / "checkpoints" / "round-000003")
        assert [part.clients for part in saved.parts] == [[], [0, 1, 2]]
    said = run_on_ranks(3, trees, tmp_path, timeout=100)
    for case, folder in zip(cases, folders, strict=True):
        assert f"goes on from round 3 ({folder}/checkpoints/round-000003)" in said
        run = finished(folder)
        assert_whole(run)
        saved = read_manifest(folder / "checkpoints" / "round-000006")
        assert [part.clients for part in saved.parts] == [[], [0, 2], [1]]
        assert_equal(everything(whole[case]), everything(run))
        for mine, its in zip(whole[case].rounds, run.rounds, strict=True):
            for key in ("train_loss", "test_loss", "test_accuracy", "participants", "paper_bytes_total"):
                evaluated = mine[key] is not None
                assert its[key] == (pytest.approx(mine[key], rel=1e-10) if evaluated else None), key


@pytest.mark.nightly
def test_over_rpc_too_three_rounds_and_three_more_are_six(tmp_path: Path) -> None:
    """Each rank goes on from its own part: to the last bit, for every algorithm."""
    whole, halves = (
        [
            tree(tmp_path, *changes, name=f"{kind}-{number}", transport="rpc")
            for number, changes in enumerate(CASES.values())
        ]
        for kind in ("whole", "half")
    )
    run_on_ranks(3, whole, tmp_path, timeout=150)
    run_on_ranks(3, [{**keys, "rounds": 3} for keys in halves], tmp_path, timeout=150)
    said = run_on_ranks(3, halves, tmp_path, timeout=150)
    for one, other in zip(whole, halves, strict=True):
        folder = tmp_path / other["name"]
        assert f"goes on from round 3 ({folder}/checkpoints/round-000003)" in said
        assert_identical(*(finished(tmp_path / keys["name"]) for keys in (one, other)))
        assert_whole(finished(folder))


class CutOff(Exception):
    """In place of whatever ends a run."""


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_was_cut_off_goes_on(
    every: int, whole: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "fsl_sage, warm, absent, falling"
    keys = tree(tmp_path, *CASES[case], checkpoint={"every": every})
    ended = 0

    def cut_off(self: Server) -> None:
        nonlocal ended
        ended += 1
        if ended == 5:
            raise CutOff
        end_round(self)

    end_round = Server.end_round
    with monkeypatch.context() as patch:
        patch.setattr(Server, "end_round", cut_off)
        with pytest.raises(CutOff):
            fslsage_rpc.train(keys)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    rounds = [folder.name for folder in complete_folders(tmp_path / "run" / "checkpoints")]
    assert rounds == {1: ["round-000004", "round-000003"], 2: ["round-000004", "round-000002"]}[every]
    run = fslsage_rpc.train(keys)
    assert_identical(whole[case], run)
    assert_whole(run)


def test_a_run_that_lacked_only_its_summary_trains_no_more(
    halves: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(halves["fsl_sage"], tmp_path)
    for name in ("summary.json", "model.pt"):
        (folder / name).unlink()
    capsys.readouterr()
    run = fslsage_rpc.train(tree(tmp_path, name=folder.name, rounds=3))
    assert "round 4/" not in capsys.readouterr().out
    assert_identical(halves["fsl_sage"], run)


def test_the_ends_of_a_run_count_the_rounds_before(
    whole: dict[str, Run], halves: dict[str, Run], tmp_path: Path
) -> None:
    folder = copied(halves["fsl_sage"], tmp_path)
    totals = [line["paper_bytes_total"] for line in whole["fsl_sage"].rounds]
    gib = (totals[3] + totals[4]) / 2 / 2**30
    run = fslsage_rpc.train(tree(tmp_path, name=folder.name, stop={"paper_gib": gib}))
    assert len(run.rounds) == 5  # the first whose total is beyond
    assert run.rounds[-1]["paper_bytes_total"] == totals[4]
    reached = fslsage_rpc.train(tree(tmp_path, name=folder.name, stop={"accuracy": 1e-6}))
    assert len(reached.rounds) == 5
    assert_whole(reached)


def test_without_checkpoints_nothing_is_written_and_nothing_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tree(tmp_path, {"algorithm": {"name": "fedavg"}}, rounds=1, checkpoint={"every": None})
    run = fslsage_rpc.train(keys)
    assert not (run.folder / "checkpoints").exists()
    (run.folder / "summary.json").unlink()
    fslsage_rpc.train(keys)
    replaced = f"warning: the unfinished run in {run.folder} is replaced: it has no checkpoint to go on from"
    assert replaced in capsys.readouterr().out.splitlines()


# Writing


def test_the_newest_stay(halves: dict[str, Run], tmp_path: Path) -> None:
    folders = complete_folders(halves["fsl_sage"].folder / "checkpoints")
    assert [folder.name for folder in folders] == ["round-000003", "round-000002"]
    keys = tree(tmp_path, {"algorithm": {"name": "fedavg"}}, rounds=5, checkpoint={"every": 2, "keep": 5})
    run = fslsage_rpc.train(keys)
    folders = sorted((run.folder / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["round-000002", "round-000004", "round-000005"]
    assert {file.name for folder in folders for file in folder.iterdir()} == {MANIFEST, "rank-0.pt"}
    longer = fslsage_rpc.train({**keys, "rounds": 6, "checkpoint": {"every": 9, "keep": 1}})
    assert [folder.name for folder in (longer.folder / "checkpoints").iterdir()] == ["round-000006"]


def test_a_checkpoint_that_others_have_begun_stays(tmp_path: Path) -> None:
    """A rank may write its next part while rank 0 still makes the last one the newest."""
    folders = [tmp_path / f"round-{rounds:06d}" for rounds in (1, 2, 3)]
    for folder in folders:
        folder.mkdir()
    remove_all_but(tmp_path, folders[1:2], until=2)
    assert sorted(tmp_path.iterdir()) == folders[1:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_every_file_is_synced_before_it_gets_its_name_and_the_manifest_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def note_sync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append(f"rename {source.relative_to(tmp_path)} {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    folder = tmp_path / "round-000001"
    parts = [write_part(folder, rank, RankState(1, {}, None, {})) for rank in (0, 1)]
    assert complete_folders(tmp_path) == []
    Manifest(folder, 1, parts, extent_of(b"")).write()
    expected = []
    for name in ("rank-0.pt", "rank-1.pt", "manifest.json"):
        path = f"round-000001/{name}.tmp"
        expected += [f"sync {path}", f"rename {path} {name}", "sync round-000001"]
    assert done == [*expected, "sync ."]
    assert complete_folders(tmp_path) == [folder]


def test_a_checkpoint_is_written_while_the_next_round_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits for the next round to begin: were it waited for before, this would not end well."""
    begun = {rounds: threading.Event() for rounds in range(4)}
    begun[3].set()  # there is none after the last
    train_round, write_part = Trainer.train_round, checkpoints.write_part

    def begin(self: Trainer, t: int) -> float:
        begun[t].set()
        return train_round(self, t)

    def write(folder: Path, rank: int, state: Any) -> Any:
        assert begun[state.rounds].wait(timeout=20)
        return write_part(folder, rank, state)

    monkeypatch.setattr(Trainer, "train_round", begin)
    monkeypatch.setattr(checkpoints, "write_part", write)
    run = fslsage_rpc.train(tree(tmp_path, {"algorithm": {"name": "fedavg"}}, rounds=3))
    assert read_manifest(complete_folders(run.folder / "checkpoints")[0]).rounds == 3


def test_an_unwritable_folder_costs_the_checkpoints_not_the_training(
    halves: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    run = fslsage_rpc.train(tree(tmp_path, rounds=3))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3
    assert warnings[0].startswith("warning: no checkpoint after round 1 (rank 0: ")
    assert "checkpoints" in warnings[0]
    assert warnings[0].endswith("); there is none; the run goes on")
    losses = [line["train_loss"] for line in halves["fsl_sage"].rounds]
    assert [line["train_loss"] for line in run.rounds] == losses


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk is to a program: the system takes a part of what is written and then says no."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_checkpoints_and_leaves_the_last_good_one(
    whole: dict[str, Run], halves: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(halves["fsl_sage"], tmp_path)
    keys = tree(tmp_path, name=folder.name)
    capsys.readouterr()
    with files_no_larger_than(64 * 2**10):
        message = mistake(fslsage_rpc.train, keys)
    assert message == f"output: got '{tmp_path}', where {folder} cannot be written (File too large)"
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said if line.startswith("round ")] == [
        f"round {number}/6" for number in (4, 5, 6)
    ]
    last = f"the last one is {folder}/checkpoints/round-000003; the run goes on"
    for number in (4, 5, 6):
        path = f"{folder}/checkpoints/round-00000{number}/rank-0.pt"
        said.remove(f"warning: no checkpoint after round {number} (rank 0: {path}: File too large); {last}")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"round-000002", "round-000003"}
    assert_identical(whole["fsl_sage"], fslsage_rpc.train(keys))  # once there is room


def test_a_line_that_the_disk_does_not_take_is_written_with_the_next(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.begin(b'{"round": 1}\n')
    with files_no_larger_than(20):
        for round in (2, 3):
            with pytest.raises(OSError, match="File too large"):
                file.append({"round": round})
        with pytest.raises(OSError, match="File too large"):
            file.extent()
    file.append({"round": 4})
    text = "".join(f'{{"round": {round}}}\n' for round in range(1, 5))
    assert file.path.read_text() == text
    assert file.extent().bytes == len(text)


# Reading


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def renumber(path: Path) -> None:
    path.write_text(path.read_text().replace('"rounds": 3', '"rounds": 4'))


DAMAGE = {
    "part cut": (cut, "checkpoints/round-000003/rank-0.pt", "truncated ("),
    "part altered": (alter, "checkpoints/round-000003/rank-0.pt", "altered ("),
    "part gone": (Path.unlink, "checkpoints/round-000003/rank-0.pt", "No such file or directory"),
    "manifest cut": (cut, "checkpoints/round-000003/manifest.json", "truncated or altered"),
    "manifest altered": (renumber, "checkpoints/round-000003/manifest.json", "altered ("),
    "metrics cut": (cut, "metrics.jsonl", "truncated ("),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    kind: str, halves: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, name, what = DAMAGE[kind]
    folder = copied(halves["fsl_sage"], tmp_path)
    (folder / "summary.json").unlink()
    damage(folder / name)
    capsys.readouterr()
    run = fslsage_rpc.train(tree(tmp_path, name=folder.name, rounds=3))
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"warning: {folder / name}: {what}")
    assert first.endswith(": this checkpoint is left out")
    assert second == f"goes on from round 2 ({folder}/checkpoints/round-000002)"
    assert_identical(halves["fsl_sage"], run)


def test_a_complete_run_whose_checkpoints_are_all_damaged_is_not_replaced(
    halves: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(halves["fsl_sage"], tmp_path)
    for checkpoint in complete_folders(folder / "checkpoints"):
        alter(part_path(checkpoint, 0))
    message = mistake(fslsage_rpc.train, tree(tmp_path, name=folder.name))
    assert message.startswith("rounds: got 6, expected 3 as in the complete run in ")
    assert "which has no checkpoint to go on from" in message
    assert (folder / "summary.json").exists()
    (folder / "summary.json").unlink()
    capsys.readouterr()
    run = fslsage_rpc.train(tree(tmp_path, name=folder.name, rounds=3))  # one that was cut off starts anew
    assert capsys.readouterr().out.count(": this checkpoint is left out") == 2
    assert_identical(halves["fsl_sage"], run)


def test_no_damage_to_a_manifest_is_more_than_a_warning(halves: dict[str, Run], tmp_path: Path) -> None:
    folder = copied(halves["fsl_sage"], tmp_path)
    path = folder / "checkpoints" / "round-000003" / MANIFEST
    sound, drawn = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(sound)
        for place in drawn.integers(len(data), size=drawn.integers(1, 4)):
            data[place] = drawn.integers(256)
        path.write_bytes(data[: drawn.integers(len(data) // 2, 2 * len(data))])
        with RunFolder(from_tree(tree(tmp_path, name=folder.name)), lambda message: None) as found:
            pass
        assert found.manifest is not None
        assert found.manifest.rounds == 2 or json.loads(path.read_bytes()) == json.loads(sound)


FREE = {"rounds", "ranks", "output", "stop", "comm", "checkpoint", "evaluation", "trace", "bench", "sweep"}


def other(value: Any) -> Any:
    """Another than this one; a run folder only compares."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"other": value} if isinstance(value, dict) else f"{value}-other"


@pytest.mark.parametrize("key", sorted(DEFAULTS.keys() - {"name", "resume"}))
def test_what_may_differ_and_what_may_not(key: str, halves: dict[str, Run], tmp_path: Path) -> None:
    folder = copied(halves["fsl_sage"], tmp_path / "runs")
    (folder / "summary.json").unlink()
    config = from_tree(tree(tmp_path / "runs", name=folder.name, rounds=3))
    *sections, last = key.split(".")
    section = functools.reduce(getattr, sections, config)
    was = getattr(section, last)
    setattr(section, last, other(was))
    if key == "output":
        folder.parent.rename(config.output)
    if key.split(".")[0] in FREE and not key.startswith("comm.codec."):
        with RunFolder(config, warn=pytest.fail) as found:
            assert len(found.lines) == 3
        return
    message = mistake(RunFolder, config, pytest.fail)
    named, _, rest = message.partition(": got ")
    assert named == key
    assert rest.endswith(
        f" as in the run in {folder}; choose another name=, or resume=never to replace that run"
    )


def test_fewer_rounds_than_there_are_are_refused(halves: dict[str, Run], tmp_path: Path) -> None:
    folder = copied(halves["fsl_sage"], tmp_path)
    (folder / "summary.json").unlink()
    fewer = from_tree(tree(tmp_path, name=folder.name, rounds=2))
    message = mistake(RunFolder, fewer, pytest.fail)
    assert message.startswith("rounds: got 2, expected 3 or more, as the run in ")


def test_other_samples_are_refused(halves: dict[str, Run], tmp_path: Path) -> None:
    folder = copied(halves["fsl_sage"], tmp_path)
    parts = json.loads((folder / "partition.json").read_text())
    parts[1]["sha256"] = "0" * 64
    (folder / "partition.json").write_text(json.dumps(parts))
    with pytest.raises(InputError, match=r"partition\.json: got other samples for the clients"):
        fslsage_rpc.train(tree(tmp_path, name=folder.name))


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 7]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 8},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_and_schedule_goes_on(name: str, optimizer: str, tmp_path: Path) -> None:
    arguments = {**SCHEDULERS[name], "cycle_momentum": False} if name == "CyclicLR" else SCHEDULERS[name]
    scheduler = SchedulerKeys(name=name, arguments=arguments, per="step")  # type: ignore[arg-type]
    keys = OptimizerKeys(name=optimizer, lr=0.1, scheduler=scheduler)  # type: ignore[arg-type]

    def steps(trained: ScheduledOptimizer, parameter: nn.Parameter) -> None:
        for step in range(5):
            parameter.grad = torch.cos(parameter.detach() + step)
            trained.step()

    here, there = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    saved, resumed = ScheduledOptimizer(keys, [here]), ScheduledOptimizer(keys, [there])
    steps(saved, here)
    torch.save(checkpoints.snapshot(saved.state()), tmp_path / "state.pt")
    there.data.copy_(here.data)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(saved, here)
    steps(resumed, there)
    assert torch.equal(here, there)
    assert saved.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


# Many clients


def many(output: Path, algorithm: str, **keys: Any) -> Tree:
    """40 clients, 2 of them in each round."""
    return tree(
        output,
        {"clients": {"count": 40, "batch_size": 2, "participation": 0.05}, "algorithm": {"name": algorithm}},
        {"data": {"train_limit": 160, "partition": "iid"}, **keys},
        STEPS,
        {"optimizer": {"auxiliary": {"scheduler": {**COSINE, "per": "round"}}}},
        name=algorithm,
    )


@pytest.mark.parametrize("algorithm", ["fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg"])
def test_clients_that_never_took_part_cost_next_to_nothing(algorithm: str, tmp_path: Path) -> None:
    halves = fslsage_rpc.train(many(tmp_path, algorithm, rounds=3))
    model = (halves.folder / "model.pt").stat().st_size
    took_part = {client for line in halves.rounds for client in line["participants"]}
    assert len(took_part) <= 6
    parts = (halves.folder / "checkpoints" / "round-000003").glob("*.pt")
    # For each that did, optimizer states of at most three models; what all share; 4 kB for each that did not.
    assert sum(file.stat().st_size for file in parts) < (3 * len(took_part) + 4) * model + 40 * 4096
    whole = fslsage_rpc.train(many(tmp_path / "whole", algorithm, rounds=6))
    again = fslsage_rpc.train(many(tmp_path, algorithm, rounds=6))
    assert_identical(whole, again)


def test_a_checkpoint_that_holds_everything_of_every_client_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions wrote such ones."""
    whole = fslsage_rpc.train(many(tmp_path / "whole", "fsl_sage", rounds=6))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints._KeptWeights, "copy_of", lambda self, weights: weights.clone())
        stepped = property(lambda optimizer: True, lambda optimizer, value: None)
        patched.setattr(ScheduledOptimizer, "_stepped", stepped, raising=False)
        halves = fslsage_rpc.train(many(tmp_path, "fsl_sage", rounds=3))
    model = (halves.folder / "model.pt").stat().st_size
    assert (halves.folder / "checkpoints" / "round-000003" / "rank-0.pt").stat().st_size > 20 * model
    again = fslsage_rpc.train(many(tmp_path, "fsl_sage", rounds=6))
    assert without_seconds(again.rounds) == without_seconds(whole.rounds)
    models = [torch.load(run.folder / "model.pt") for run in (whole, again)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_weights_that_differ_in_a_bit_are_not_taken_for_equal() -> None:
    integers = torch.tensor([1])
    floats = [torch.zeros(1000), torch.zeros(1000), -torch.zeros(1000), torch.zeros(1000), torch.ones(0)]
    floats[3][501] = float("nan")
    states = [{"floats": each, "integers": integers} for each in [*floats, floats[3].clone()]]
    copies = checkpoints.snapshot(states)
    for state, copied_state in zip(states, copies, strict=True):
        for name, tensor in copied_state.items():
            assert tensor is not state[name]
            assert tensor.numpy().tobytes() == state[name].numpy().tobytes()
    places = [state["floats"].data_ptr() for state in copies]
    assert places[0] == places[1]
    assert len({*places[:4]}) == 3
    assert len({state["integers"].data_ptr() for state in copies}) == 1
    moments = checkpoints.snapshot([torch.zeros(3), torch.zeros(3)])
    assert moments[0].data_ptr() != moments[1].data_ptr()  # optimizers step the tensors that they load


def test_a_run_says_what_its_first_checkpoint_takes_if_that_is_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fslsage_rpc.train(tree(tmp_path, name="small", rounds=3))
    assert "the first checkpoint" not in capsys.readouterr().out
    monkeypatch.setattr(screen, "LARGE_CHECKPOINT_BYTES", 1)
    keys = {"checkpoint": {"every": 2, "keep": 9}}
    run = fslsage_rpc.train(tree(tmp_path, keys, name="large", rounds=4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("round 3/4")
    written = (run.folder / "checkpoints" / "round-000002" / "rank-0.pt").stat().st_size
    assert lines[3] == f"the first checkpoint takes {written / 2**20:.2f} MiB"
    fslsage_rpc.train(tree(tmp_path, {"checkpoint": {"every": None}}, name="none", rounds=3))
    assert "the first checkpoint" not in capsys.readouterr().out
