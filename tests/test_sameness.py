"""Ranks that train on something else than rank 0 are named, and so is a run that goes on with other data."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import fslsage_rpc
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.own import source_hash
from fslsage_rpc.config.schema import AggregationKeys
from fslsage_rpc.errors import RankRefused
from fslsage_rpc.job.local_world import LocalWorld
from fslsage_rpc.models.flat import Weights, check_shares
from fslsage_rpc.parties.aggregation import Aggregator
from fslsage_rpc.tasks import hashes as hashes_module
from fslsage_rpc.tasks.hashes import sample_hashes
from fslsage_rpc.tasks.tensors import TensorSamples
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.sameness import Basis, compare_ranks
from fslsage_rpc.training.trainer import Trainer
from fslsage_rpc.transport.local import LocalTransport
from support.commands import fslsage
from support.trees import merged, tree
from support.user_input import mistake

HERE = "test_sameness"
OWN = {"data": {"name": f"{HERE}:images", "partition": "iid", "train_limit": None, "test_limit": None}}
HOST = platform.node()
fewer = False
"""does `images` give fewer training samples?"""


def images(root: str, train: bool) -> tuple[Tensor, Tensor]:
    count = 197 if train and (fewer or os.environ.get("RANK") == os.environ.get("ODD_RANK", "")) else 200
    return torch.arange(count * 16).view(count, 1, 4, 4).to(torch.uint8), torch.arange(count) % 4


class Others(LocalTransport):
    def __init__(self, others: list[Basis], rank: int):
        super().__init__(torch.device("cpu"))
        self.others, self.rank = others, rank

    def gather(self, value: Any) -> list[Any]:
        return self.others


class Ranks(LocalWorld):
    """Rank 2 of three, in the place that it has after a loss; the others are as they are told."""

    def __init__(self, config: Any, others: list[Basis], generation: int = 0, rank: int = 0):
        super().__init__(config)
        self.generation, self.transport = generation, Others(others, rank)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return Experiment.prepare(from_tree(tree(tmp_path_factory.mktemp("runs"), OWN)))


@pytest.fixture(scope="module")
def basis(experiment: Experiment) -> Basis:
    return Basis.of(experiment, LocalWorld(experiment.config))


def other(basis: Basis, **changes: Any) -> Basis:
    return dataclasses.replace(basis, rank=2, host="b", **changes)


DIFFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"training": {"count": 197}}, "data.name: got 197 training samples, expected 200"),
    (
        {"training": {"labels": "a" * 64}},
        "data.name: got training samples with labels of hash aaaaaaaaaaaa, expected ",
    ),
    (
        {"training": {"contents": "b" * 64}},
        "data.name: got training samples with contents of hash bbbbbbbbbbbb, expected ",
    ),
    ({"config": {"seed": 7}}, "seed: got 7, expected 0"),
    ({"config": {"data": {"arguments": {"x": None}}}}, "data.arguments: got {'x': None}, expected {}"),
    ({"config": {"model": {"cut": "norm2"}}}, "model.cut: got 'norm2', expected None"),
    ({"versions": {"torch": "2.11.0"}}, f"torch: got version 2.11.0, expected {torch.__version__}"),
    (
        {"sources": {"data.name": "c" * 64}},
        "data.name: got a module whose source has hash cccccccccccc, expected ",
    ),
    ({"partition": "d" * 64}, "data.partition: got other samples for the clients, expected the same"),
]


@pytest.mark.parametrize(("changes", "said"), DIFFERENCES)
def test_the_rank_that_differs_is_named_with_what_it_has(
    experiment: Experiment, basis: Basis, changes: dict[str, Any], said: str
) -> None:
    whole = {
        name: merged(vars(basis)[name], value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    odd = other(basis, **whole)
    world = Ranks(experiment.config, [basis, dataclasses.replace(basis, rank=1), odd])
    message = mistake(compare_ranks, experiment, world)
    assert message.startswith(f"rank 2 (host b): {said}")
    assert message.endswith(" as on rank 0")


def test_ranks_that_are_alike_or_see_files_in_other_places_go_on(
    experiment: Experiment, basis: Basis
) -> None:
    places = {"device": "auto", "data": {"root": "/scratch"}, "comm": {"interface": "eth1"}}
    elsewhere = other(basis, config=merged(basis.config, places))
    compare_ranks(experiment, Ranks(experiment.config, [basis, elsewhere]))


def test_of_a_run_under_way_only_the_newcomer_is_refused(experiment: Experiment, basis: Basis) -> None:
    odd = other(basis, config=merged(basis.config, {"seed": 7}))
    compare_ranks(experiment, Ranks(experiment.config, [basis, odd], generation=2))
    with pytest.raises(RankRefused, match=r"rank 2 \(host b\): seed: got 7"):
        compare_ranks(experiment, Ranks(experiment.config, [basis, odd], generation=2, rank=1))


def test_every_sample_counts_and_of_a_large_tensor_every_kth(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(50, 3, dtype=torch.float64), torch.arange(50)
    hashes = sample_hashes(TensorSamples(x, y, y % 2))
    assert hashes["count"] == 50
    for i in (0, 27, 49):
        changed = x.clone()
        changed[i, 1] += 1
        assert sample_hashes(TensorSamples(changed, y, y % 2))["contents"] != hashes["contents"]
    assert sample_hashes(TensorSamples(x, y, 1 - y % 2))["labels"] != hashes["labels"]
    assert sample_hashes(TensorSamples(x.float(), y, y % 2))["contents"] != hashes["contents"]
    monkeypatch.setattr(hashes_module, "HASHED_BYTES", x.nbytes // 2)
    every_second = sample_hashes(TensorSamples(x, y, y % 2))["contents"]
    for i, same in ((27, True), (28, False)):
        changed = x.clone()
        changed[i, 1] += 1
        assert (sample_hashes(TensorSamples(changed, y, y % 2))["contents"] == every_second) == same


def test_the_source_of_a_name_is_its_modules_and_that_of_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "inner_of_sameness.py").write_text("def net():\n    return 1\n")
    (tmp_path / "outer_of_sameness.py").write_text("from inner_of_sameness import net\n")
    __import__("outer_of_sameness")
    name = "outer_of_sameness:net"
    hashes = [source_hash(name), source_hash("inner_of_sameness:net")]
    (tmp_path / "inner_of_sameness.py").write_text("def net():\n    return 2\n")
    hashes += [source_hash(name), source_hash("inner_of_sameness:net")]
    assert len({*hashes, None}) == 5
    assert source_hash("builtins:print") is None


# A run that goes on


@pytest.fixture
def begun(tmp_path: Path) -> dict[str, Any]:
    """A run of two rounds, and what to ask for to go on with it."""
    fslsage_rpc.train(tree(tmp_path, OWN, rounds=2))
    return tree(tmp_path, OWN, rounds=3)


def test_other_samples_are_refused_by_name(begun: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "fewer", True)
    message = mistake(fslsage_rpc.train, begun)
    assert message.startswith("data.name: got 197 training samples, expected 200 as in the run in ")
    assert "goes on from round 2; choose another name=" in message


def test_other_test_samples_are_refused_too(begun: dict[str, Any]) -> None:
    path = Path(begun["output"]) / begun.get("name", "run") / "environment.json"
    environment = json.loads(path.read_text())
    environment["samples"]["test"]["contents"] = "0" * 64
    path.write_text(json.dumps(environment))
    assert mistake(fslsage_rpc.train, begun).startswith("data.name: got test samples with contents of hash ")


def test_other_code_and_versions_are_worth_a_warning(
    begun: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(begun["output"]) / begun.get("name", "run") / "environment.json"
    environment = json.loads(path.read_text())
    environment["versions"]["numpy"] = "1.0"
    environment["sources"]["data.name"] = "0" * 64
    path.write_text(json.dumps(environment))
    fslsage_rpc.train(begun)
    said = capsys.readouterr().out
    assert "warning: numpy is version " in said
    assert "has had 1.0" in said
    assert "warning: data.name: the source of the module is not what the run in " in said


@pytest.mark.parametrize(
    "found", ["", "[]", "{}", '{"samples": {"training": 3}, "versions": [], "sources": {}}']
)
def test_a_run_that_says_nothing_of_its_data_goes_on(begun: dict[str, Any], found: str) -> None:
    (Path(begun["output"]) / begun.get("name", "run") / "environment.json").write_text(found)
    fslsage_rpc.train(begun)


# Shares


def test_an_average_takes_no_shares_of_another_sum() -> None:
    models = {client: Weights(torch.ones(3), torch.zeros(1, dtype=torch.int64)) for client in range(3)}
    average = Aggregator(AggregationKeys(), models, 3)
    thirds = dict.fromkeys(range(3), 1 / 3)
    for shares in ({**thirds, 2: 1 / 3 - 0.0025}, {0: float("nan"), 1: 1.0}):
        with pytest.raises(ValueError, match=r"shares of an average add up to .*, not to 1"):
            average.aggregate(shares)
    average.aggregate(thirds)
    check_shares([7 / 10_007] * 1429 + [4 / 10_007])


def test_shares_of_ranks_that_know_other_clients_end_the_run(experiment: Experiment) -> None:
    """Each rank's own shares add up to 1, as they do where one has counted fewer samples."""

    class Two(LocalTransport):
        def gather(self, value: Any) -> list[Any]:
            report, stop, share, finite = value
            return [(report, stop, share, finite), (report, stop, -0.0025, finite)]

    world = LocalWorld(experiment.config)
    world.transport = Two(world.device)
    trainer = Trainer(Experiment.prepare(experiment.config), world)
    with pytest.raises(ValueError, match=r"add up to 0\.9975, not to 1"):
        trainer.train(lambda line, reports: None)


# On ranks

WRONG = f"rank 2 (host {HOST}): data.name: got 197 training samples, expected 200 as on rank 0"
BENCH = {"rounds": 3, "bench": {"variants": {"a": ["algorithm.name=fedavg"]}, "reference": "a"}}


def with_an_odd_rank(command: str, keys: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command on three ranks, of which the last has fewer samples."""
    (folder / "run.yaml").write_text(yaml.safe_dump(tree(folder, OWN, keys, transport="rpc", ranks=3)))
    path = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    return fslsage(command, folder / "run.yaml", ODD_RANK="2", PYTHONPATH=path, COLUMNS="300")


@pytest.mark.gate
@pytest.mark.parametrize(("command", "keys"), [("train", {}), ("bench", BENCH)])
def test_ranks_with_other_samples_end_with_one_line(
    command: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    done = with_an_odd_rank(command, keys, tmp_path)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("fslsage_rpc: ")]
    assert said == [f"fslsage_rpc: {WRONG}"]


@pytest.mark.gate
def test_check_warns_of_them(tmp_path: Path) -> None:
    done = with_an_odd_rank("check", {}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert WRONG in done.stdout
