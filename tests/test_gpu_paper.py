"""`launch/gpu_paper.sh` without a GPU: its data, whose turn it is, when it ends, and what it leaves."""

import hashlib
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cifar10_parts
import gpu_paper
import numpy as np
import pytest
import torch

from fslsage_rpc.config.loading import changed_keys, from_tree
from fslsage_rpc.data.datasets import CIFAR10
from fslsage_rpc.report import sources
from support.report_folders import line

IMAGES = 24
"""in each file"""
HELD_OUT = 10
SMALL = (
    *("device=cpu", "model.name=simple_conv", "model.cut=null", "model.auxiliary.until=null"),
    *("clients.count=2", "clients.batch_size=8", "algorithm.alignment.epochs=2"),
)
A, B = ("data_batch_1", "data_batch_2", "data_batch_3"), ("data_batch_4", "data_batch_5", "test_batch")
Costs = Callable[[str, int], float]
"""seconds of a round of an algorithm"""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let made-up files pass for those of CIFAR-10."""
    sums = {name: hashlib.md5(batch(name)).hexdigest() for name in (*A, *B)}
    monkeypatch.setattr(cifar10_parts, "MD5", sums)
    monkeypatch.setattr(cifar10_parts, "HELD_OUT", HELD_OUT)
    cifar10_parts.read.cache_clear()
    yield
    cifar10_parts.read.cache_clear()


def batch(name: str) -> bytes:
    """A file as CIFAR-10 has them; all its pixels are the number of the file."""
    number = [*A, *B].index(name)
    data = np.full((IMAGES, 3 * 32 * 32), number, dtype=np.uint8)
    return pickle.dumps({"data": data, "labels": [i % 10 for i in range(IMAGES)]})


def write(root: Path, *names: str) -> str:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(batch(name))
    return str(root)


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (A, [0] * IMAGES + [1] * IMAGES + [2] * (IMAGES - HELD_OUT), [2] * HELD_OUT),
        (B, [3] * IMAGES + [4] * IMAGES, [5] * IMAGES),
        ((*A, *B), [file for file in range(5) for _ in range(IMAGES)], [5] * IMAGES),
        (A[1:2], [1] * (IMAGES - HELD_OUT), [1] * HELD_OUT),
    ],
)
def test_the_files_that_are_there(
    tmp_path: Path, names: tuple[str, ...], train: list[int], test: list[int]
) -> None:
    config = from_tree(
        {"data": {"name": "cifar10_parts:Cifar10Parts", "root": write(tmp_path, *names), "test_limit": 9}}
    )
    task = cifar10_parts.Cifar10Parts(config)
    assert task.load(train=True).images[:, 0, 0, 0].tolist() == train
    assert task.load(train=False).images[:, 2, 31, 31].tolist() == test[:9]
    assert task.load(train=False).labels.dtype == torch.int64
    assert (task.spec.mean, task.spec.crop_padding, task.spec.flip) == (CIFAR10.mean, 4, True)
    assert task.train_samples == len(train)
    said = cifar10_parts.read(str(tmp_path)).said
    assert said.startswith(f"{len(train)} training images of data_batch")
    assert ("held out" in said) == ("test_batch" not in names)


def damaged(root: Path) -> None:
    write(root, *A)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"no pickle")


@pytest.mark.parametrize(
    ("prepare", "overrides", "said"),
    [
        (lambda root: None, [], "data_batch_1, data_batch_2"),
        (lambda root: write(root, "test_batch"), [], "no training images"),
        (damaged, [], "data_batch_2 is damaged"),
        (lambda root: write(root, *A), ["data.train_limit=1000"], "data.train_limit: got 1000"),
        (lambda root: write(root, *A), ["transport=rpc"], "transport: got an override"),
        (lambda root: write(root, *A), ["data={name: digits}"], "data: got an override"),
        (lambda root: write(root, *A), ["clients.cuont=2"], "did you mean clients.count"),
        (lambda root: write(root, *A), ["ranks=5"], "ranks: got an override"),
        (lambda root: (root / "out").mkdir() or (root / "out" / "x").touch(), [], "FOLDER: got"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], object],
    overrides: list[str],
    said: str,
) -> None:
    prepare(tmp_path)
    assert gpu_paper.main(["60", str(tmp_path), str(tmp_path / "out"), *SMALL, *overrides]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1
    assert not output.out
    assert not (tmp_path / "out" / "environment.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "SECONDS"),
        (["abc", "data"], "SECONDS"),
        (["nan", "data"], "SECONDS"),
        (["inf", "data"], "SECONDS"),
        (["60", "data", "clients.count=3"], "FOLDER: got 'clients.count=3', expected a folder before"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_paper.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_it_leaves_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    data = write(tmp_path / "data", *B)
    assert gpu_paper.main(["600", data, str(out), *SMALL, "rounds=3", "evaluation.every=3"]) == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    each = [f"{name}/{file}" for name in gpu_paper.ALGORITHMS for file in ("config.yaml", "metrics.jsonl")]
    assert files == sorted([*each, "environment.json", "table.md"])
    assert len(files) <= 8
    runs, _ = sources.read([str(path) for path in out.iterdir() if path.is_dir()])
    environment = json.loads((out / "environment.json").read_text())
    assert environment["ranks"][0]["device"] == "cpu"
    for run in runs:
        assert [one["test_accuracy"] is not None for one in run.lines] == [True, False, True]
        assert run.environment == environment
        assert changed_keys(runs[0].config, run.config).keys() <= {"name", "algorithm.name"}
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "simple_conv" in text
    assert "48 training images of data_batch_4, data_batch_5; tested on test_batch" in text


class StandIn:
    """A stand-in for trainers, whose rounds take seconds of a stand-in clock.

    Attributes:
        turns: the algorithm, round and evaluation of all turns.
    """

    def __init__(self, costs: Costs):
        self.now = 100.0
        self.turns: list[tuple[str, int, bool]] = []
        self._costs = costs

    def trainer(self, experiment: Any, world: Any) -> Any:
        recorder = SimpleNamespace(last=None)
        name = experiment.config.algorithm.name

        def complete_round(t: int, on_round: Callable[..., None], evaluate: bool) -> bool:
            self.turns.append((name, t, evaluate))
            self.now += self._costs(name, t)
            accuracy = t / 100 if evaluate else None
            recorder.last = line(t, accuracy, evaluation_seconds=0.0)
            on_round(recorder.last, ())
            return False

        return SimpleNamespace(complete_round=complete_round, recorder=recorder)

    def run(self, monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: float) -> int:
        monkeypatch.setattr(gpu_paper, "Trainer", self.trainer)
        monkeypatch.setattr(gpu_paper, "clock", lambda: self.now)
        data = write(folder / "data", "data_batch_1")
        return gpu_paper.main([str(seconds), data, str(folder / "out"), *SMALL])


def test_they_take_turns_and_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of all is not begun where an alignment of the one, known by the first, would end too late."""
    stand_in = StandIn(lambda name, t: 50.0 if name == "fsl_sage" and t % 10 == 0 else 2.0)
    assert stand_in.run(monkeypatch, tmp_path, seconds=140.0) == 0
    turns = [(name, round) for round in range(10) for name in gpu_paper.ALGORITHMS]
    assert [turn[:2] for turn in stand_in.turns] == turns
    assert stand_in.now - 100.0 == 50.0 + 29 * 2.0
    evaluated = {round for _, round, evaluate in stand_in.turns if evaluate}
    assert evaluated == {0, 1, 9}  # a round without an alignment was not known before the second


@pytest.mark.parametrize("seconds", [0.0, 20.0])
def test_the_first_round_of_each_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    stand_in = StandIn(lambda name, t: 10.0)
    assert stand_in.run(monkeypatch, tmp_path, seconds) == 0
    assert stand_in.turns == [(name, 0, True) for name in gpu_paper.ALGORITHMS]
    assert (tmp_path / "out" / "table.md").exists()


@pytest.mark.parametrize("at", [0, 1])
def test_one_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    def costs(name: str, t: int) -> float:
        if (name, t) == ("cse_fsl", at):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return 10.0

    stand_in = StandIn(costs)
    assert stand_in.run(monkeypatch, tmp_path, seconds=100.0) == 1
    rounds = {name: sum(turn[0] == name for turn in stand_in.turns) for name in gpu_paper.ALGORITHMS}
    assert rounds == {"fsl_sage": 4, "cse_fsl": at + 1, "splitfed_v1": 4}
    assert f"cse_fsl: given up in round {at + 1}: OutOfMemoryError: CUDA" in capsys.readouterr().out
    assert "`cse_fsl`: given up" in (tmp_path / "out" / "table.md").read_text()
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert ("cse_fsl" in folders) == (at > 0)


def test_all_that_fail_leave_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, t: int) -> float:
        raise RuntimeError(name)

    assert StandIn(fail).run(monkeypatch, tmp_path, seconds=100.0) == 1
    assert "`splitfed_v1`: given up in round 1" in (tmp_path / "out" / "table.md").read_text()


def test_a_round_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of time, another thread writes the table and ends the process."""
    ended = threading.Event()
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    def costs(name: str, t: int) -> float:
        if t == 1:
            assert ended.wait(60)
            raise RuntimeError("the process has ended")
        return 0.0

    monkeypatch.setattr(os, "_exit", end)
    StandIn(costs).run(monkeypatch, tmp_path, seconds=gpu_paper.ENDING_SECONDS + 0.5)
    assert statuses == [0]
    said = capsys.readouterr().out
    assert said.index("Out of time") < said.index("| `splitfed_v1` | 1 |") < said.index("given up in round 2")


def test_the_settings_are_the_papers(tmp_path: Path) -> None:
    """Without overrides only what the paper leaves open is changed."""
    for config in gpu_paper.configurations("data", tmp_path, []):
        assert (config.clients.count, config.clients.batch_size, config.rounds) == (10, 256, 200)
        assert (config.algorithm.upload_every, config.algorithm.align_every) == (5, 10)
        assert config.algorithm.alignment.epochs == 100
        assert (config.transport, config.graphs, config.checkpoint.every) == ("local", "auto", None)
        assert (config.data.partition, config.data.augment) == ("iid", True)
        assert config.stop.paper_gib == 200
        assert config.name == config.algorithm.name
