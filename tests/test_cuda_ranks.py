"""Ranks that share a GPU: requests by device map and through host memory, averaging.

`launch/gpu_check.sh` runs each class in a process of its own; `launch/gpu_check.py` names them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fslsage_rpc.transport.choices import SHARED_GPUS
from launch.gpu_check import seconds_left
from support.cpu_reference import ALGORITHMS, assert_as_on_a_cpu, tree
from support.equality import assert_device_seconds
from support.rank_program import Outcome, run_job, train_locally, train_on_ranks

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NEAR_IN_BF16 = 0.05
"""the largest relative difference of losses"""


def job_seconds() -> float:
    """A job's time-out: it is to end before the measurement that it may be one of."""
    return max(5.0, min(100.0, seconds_left() - 3))


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    """The ranks that the tests start see the first GPU only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0])
        yield


IN_BF16 = ("fsl_sage", "splitfed_v1")
IN_HASTE = ("fsl_sage", "splitfed_v1", "cse_fsl")
"""of jobs with little time"""


class Job:
    """One job that trains with some algorithms, and is held to the numbers of a CPU.

    Attributes:
        device_maps, averaging, transports: keys of `comm`.
        variables: of the ranks.
    """

    ranks = 2
    algorithms: tuple[str, ...] = ALGORITHMS
    device_maps = averaging = "auto"
    transports: tuple[str, ...] | None = None
    graphs = "never"
    variables: tuple[tuple[str, str], ...] = ()

    @classmethod
    def trees(cls, folder: Path) -> dict[str, dict[str, Any]]:
        comm = {"timeout_seconds": 60, "device_maps": cls.device_maps, "averaging": cls.averaging}
        comm["transports"] = cls.transports and list(cls.transports)
        return {name: tree(folder, name, graphs=cls.graphs, comm=comm) for name in cls.algorithms}

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_its_numbers_are_those_of_a_cpu(self, algorithm: str, outcomes: dict[str, Outcome]) -> None:
        if algorithm not in self.algorithms:
            pytest.skip("no time")
        one_client_rank = self.ranks == 2  # it has nobody to average with
        assert_as_on_a_cpu(outcomes[algorithm], algorithm, bytes=one_client_rank)


@pytest.fixture(scope="class")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Outcomes of a class's job, by name of the tree."""
    folder, job = tmp_path_factory.mktemp("job"), request.cls
    trees = job.trees(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in job.variables:
            patch.setenv(name, value)
        found = train_on_ranks(job.ranks, list(trees.values()), folder / "ranks", job_seconds())
    return dict(zip(trees, found, strict=True))


class Mapped(Job):
    """Requests' tensors go by device map, and are timed by the GPU's clock."""

    def test_requests_are_timed_by_the_gpus_clock(self, outcomes: dict[str, Outcome]) -> None:
        for line in (line for outcome in outcomes.values() for line in outcome.lines):
            server = line["device_seconds"]["server"]
            for kind, times in line["requests"].items():
                assert times["round_trip_seconds"] > times["compute_seconds"] > 0
                assert times["queue_seconds"] >= 0
                assert times["wire_seconds"] > -1e-4 * times["count"]  # two processes read the clock
                if kind == "align":
                    assert times["compute_seconds"] >= 0.9 * server["alignment"]


class TestDeviceMaps(Mapped):
    @classmethod
    def trees(cls, folder: Path) -> dict[str, dict[str, Any]]:
        in_bf16 = {f"{name} bf16": tree(folder, name, precision="bf16") for name in IN_BF16}
        return super().trees(folder) | in_bf16

    def test_device_seconds_stand_beside_the_hosts_phases(self, outcomes: dict[str, Outcome]) -> None:
        assert_device_seconds(outcomes["fsl_sage"])

    @pytest.mark.parametrize("algorithm", IN_BF16)
    def test_bf16_trains_as_in_one_process(
        self, algorithm: str, outcomes: dict[str, Outcome], tmp_path: Path
    ) -> None:
        here = train_locally(tree(tmp_path, algorithm, precision="bf16"))
        there = outcomes[f"{algorithm} bf16"]
        for line, other in zip(here.lines, there.lines, strict=True):
            assert other["train_loss"] == pytest.approx(line["train_loss"], rel=NEAR_IN_BF16)
            assert other["wire_bytes"]["smashed_up"] == line["wire_bytes"]["smashed_up"]
        kept = {tensor.dtype for name, tensor in there.tensors.items() if name.endswith("floats")}
        assert kept == {torch.float32}


class TestHostMemory(Job):
    """Over uv: other jobs take shm where there are many cores."""

    ranks = 3
    device_maps = "never"
    transports = ("uv",)


class TestGraphsByDeviceMap(Mapped):
    graphs = "auto"


class TestGraphsThroughHostMemory(TestHostMemory):
    algorithms = IN_HASTE
    graphs = "auto"


class TestDelaysByDeviceMap(Job):
    """Late work changes no number."""

    algorithms = IN_HASTE
    variables = (("RANDOM_DELAYS", "1"),)


class TestDelaysThroughHostMemory(TestHostMemory):
    """Late work changes no number."""

    algorithms = IN_HASTE
    variables = (("RANDOM_DELAYS", "2"),)


class TestCommandLine:
    def command(self, folder: Path, *overrides: str) -> list[str]:
        """A run of the command line with the tensors' ways written down in `folder`/run."""
        config = folder / "config.json"
        config.write_text(json.dumps({**tree(folder, "fsl_sage"), "output": str(folder), "name": "run"}))
        return ["-m", "fslsage_rpc", "train", str(config), *overrides]

    def test_environment_says_how_tensors_travel_and_what_averages(self, tmp_path: Path) -> None:
        """Client ranks that share a GPU are averaged by Gloo."""
        run_job(["--nproc_per_node=3", *self.command(tmp_path, "resume=never")], job_seconds())
        environment = json.loads((tmp_path / "run" / "environment.json").read_text())
        assert environment["averaging"] == "gloo"
        ways = environment["request_tensors"]
        assert len(ways) == 2
        assert all(way == "cuda:0 to the server's cuda:0 and back, by device map" for way in ways.values())

    def test_nccl_among_ranks_that_share_a_gpu_is_refused_in_one_line(self, tmp_path: Path) -> None:
        command = [sys.executable, *self.command(tmp_path, "ranks=3", "comm.averaging=nccl")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=job_seconds(), check=False)
        assert done.returncode == 2, done.stderr
        assert "fslsage_rpc: comm.averaging: got 'nccl'" in done.stderr
        assert "client ranks share a GPU" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.nccl.version() < (2, 30),
    reason="NCCL before 2.30 refuses ranks that share a GPU",
)
class TestNccl(Job):
    """Client ranks that share the GPU are averaged by NCCL, where it allows that."""

    ranks = 3
    averaging = "nccl"
    variables = ((SHARED_GPUS, "1"),)
