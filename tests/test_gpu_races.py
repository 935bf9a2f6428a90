"""Whole runs on a stand-in for CUDA, which finds races: none are there, and every number is that of a CPU."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.job.local_world import LocalWorld
from fslsage_rpc.runs.checkpoint_files import RankState
from fslsage_rpc.runs.checkpoints import snapshot
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support.batch_norm_model import CUT
from support.equality import assert_same_bits
from support.rank_program import Outcome, train
from support.stand_in_cuda import Cuda, Process, cuda
from support.stand_in_rpc import train_on_threads
from support.unequal_clients import unequal_clients

__all__ = ["cuda"]
pytestmark = pytest.mark.filterwarnings("error:graphs")  # that something could not be captured

ALGORITHMS = ["fsl_sage", "splitfed_v1", "cse_fsl"]
HALVED = {"name": "ExponentialLR", "arguments": {"gamma": 0.5}, "per": "round"}
"""a rate of 2**-7 stays a number that fp32, in which a GPU's captured steps read it, has exactly"""
CORES = 3
"""of the server's host, for as many threads of lanes and of fits"""


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: CORES)


def config(folder: Path, algorithm: str, device: str = "cuda", **changes: Any) -> Config:
    """Unequal clients, short last batches, rates that move; FSL-SAGE aligns, measures drift and warms up."""
    tree = unequal_clients(folder, algorithm)
    tree |= {"rounds": 2, "precision": "fp64", "device": device, "graphs": "never"}
    tree["optimizer"] = {"client": {"name": "adam", "lr": 2**-7, "scheduler": HALVED}}
    if algorithm == "fsl_sage":
        tree |= {"rounds": 3, "model": {"name": "support.batch_norm_model:residual", "cut": CUT}}
        tree["algorithm"] |= {"align_every": 1, "measure_drift": True, "start": "warm_start"}
    return from_tree({**tree, **changes})


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same runs without the stand-in, by algorithm."""
    folder = tmp_path_factory.mktemp("cpu")

    @cache
    def outcome(algorithm: str) -> Outcome:
        keys = config(folder, algorithm, "cpu", transport="local")
        return train(Experiment.prepare(keys), LocalWorld(keys))

    return outcome


@pytest.mark.parametrize("graphs", ["never", "auto"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
class TestNoRace:
    def test_in_one_process(
        self, algorithm: str, graphs: str, on_a_cpu: Any, cuda: Cuda, tmp_path: Path
    ) -> None:
        expected = on_a_cpu(algorithm)
        with cuda.inside(Process(cuda, "the process")):
            keys = config(tmp_path, algorithm, transport="local", graphs=graphs)
            assert_same_bits(expected, train(Experiment.prepare(keys), LocalWorld(keys)))
        cuda.check()
        assert (cuda.replays > 2 * cuda.captures > 0) == (graphs == "auto")

    @pytest.mark.parametrize("device_maps", ["auto", "never"])
    def test_between_ranks(
        self,
        algorithm: str,
        graphs: str,
        device_maps: str,
        on_a_cpu: Any,
        cuda: Cuda,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected = on_a_cpu(algorithm)
        keys = config(tmp_path, algorithm, graphs=graphs, comm={"device_maps": device_maps})
        assert_same_bits(expected, train_on_threads(cuda, keys, monkeypatch))
        cuda.check()
        assert (cuda.replays > 2 * cuda.captures > 0) == (graphs == "auto")


@pytest.mark.parametrize("device_maps", ["auto", "never"])
def test_nor_in_whatever_order_two_client_ranks_are_served(
    device_maps: str, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"server": {"order": "arrival"}, "comm": {"device_maps": device_maps}}
    keys = config(tmp_path, "fsl_sage", graphs="auto", **changes)
    train_on_threads(cuda, keys, monkeypatch, ranks=3, seed=1)
    cuda.check()
    assert cuda.replays > cuda.captures > 0


@pytest.mark.parametrize("device_maps", ["auto", "never"])
@pytest.mark.parametrize("algorithm", ["fsl_sage", "splitfed_v1"])
def test_nor_where_tensors_travel_coded(
    algorithm: str, device_maps: str, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecs = {"smashed": "int8", "gradient": "int8", "auxiliary": "topk"}
    alone = config(tmp_path, algorithm, "cpu", transport="local", comm={"codec": codecs})
    expected = train(Experiment.prepare(alone), LocalWorld(alone))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())  # none is drawn from
    keys = config(tmp_path, algorithm, comm={"codec": codecs, "device_maps": device_maps})
    assert_same_bits(expected, train_on_threads(cuda, keys, monkeypatch))
    cuda.check()


class InMemory:
    """Stands for `Checkpoints`."""

    def complete(self) -> None:
        pass

    def begin(self, rounds: int, last: bool, state: Callable[[int], RankState]) -> None:
        self.saved: RankState = snapshot(state(rounds))


def train_in_two_parts(experiment: Experiment, world: Any) -> Outcome:
    """As a run that stops after its first round, and is gone on with."""
    lines: list[dict[str, Any]] = []
    checkpoints: Any = InMemory()
    first = Trainer(replace(experiment), world)
    first.train(lambda line, reports: lines.append(line), checkpoints, stop_requested=lambda: True)
    return train(experiment, world, checkpoints.saved, lines)


@pytest.mark.parametrize("graphs", ["never", "auto"])
def test_nor_where_a_run_is_gone_on_with(
    graphs: str, on_a_cpu: Any, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers that are not full yet grow in a lane's stream."""
    expected = on_a_cpu("fsl_sage")
    keys = config(tmp_path, "fsl_sage", graphs=graphs)
    assert_same_bits(expected, train_on_threads(cuda, keys, monkeypatch, training=train_in_two_parts))
    cuda.check()


@pytest.mark.parametrize("place", ["begin", "end"])
def test_where_captures_fail_the_run_goes_on_without(
    place: str, on_a_cpu: Any, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first three do, and leave torch's allocator and random generator as up to torch 2.11."""
    expected = on_a_cpu("splitfed_v1")
    cuda.refuses[place] = 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keys = config(tmp_path, "splitfed_v1", graphs="auto")
        assert_same_bits(expected, train_on_threads(cuda, keys, monkeypatch))
    said = {str(warning.message) for warning in caught if "graphs" in str(warning.message)}
    assert said == {"graphs: could not capture (CUDA error: operation not permitted): such steps run without"}
    cuda.check()
    assert not cuda.refuses[place]
    assert cuda.replays > 0
    for process in cuda.processes:
        assert not process.captures
        assert not process.deferred
        assert not process.draws_captured
