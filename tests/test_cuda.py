"""What needs a GPU: equality with the CPU, streams, device maps, averaging, bf16, graphs, no hidden waits.

Run by `launch/gpu_check.sh` too. All ranks of a job share one GPU.
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

from fslsage_rpc.comm.local import LocalWorld
from fslsage_rpc.comm.placement import SHARED_GPUS
from fslsage_rpc.comm.world import set_tf32
from fslsage_rpc.configuration import from_tree
from fslsage_rpc.parties.streams import WorkQueue, current_place
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support.rank_program import Outcome, run_job, train_locally, train_on_ranks
from support.unequal_clients import unequal_clients

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ALGORITHMS = ["fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg"]
SAME_IN_FP64 = 1e-8
"""the largest relative difference of weights after three rounds: the order of sums, and nothing else"""
SAME_WITH_GRAPHS = 1e-4
"""likewise of losses, with Adam, and learning rates that move, of which captured steps have fp32 digits"""
NEAR_IN_BF16 = 0.05
"""likewise of losses"""
PARTIES = ("client", "server", "auxiliary")
SLEEP_CYCLES = 100_000_000
"""of the device: some tens of milliseconds"""


def tree(folder: Path, algorithm: str, device: str = "cuda", **changes: Any) -> dict[str, Any]:
    """Three rounds of three unequal clients. With SGD: Adam makes a step of any rounding error."""
    return {
        **unequal_clients(folder, algorithm),
        "precision": "fp64",
        "device": device,
        "optimizer": {party: {"name": "sgd", "lr": 0.05} for party in PARTIES},
        "comm": {"timeout_seconds": 60},
        **changes,
    }


def assert_near(a: Outcome, b: Outcome, tolerance: float) -> None:
    """The same weights and losses, to a relative tolerance."""
    assert a.tensors.keys() == b.tensors.keys()
    for name, expected in a.tensors.items():
        difference = (b.tensors[name].double() - expected.double()).norm()
        assert difference <= tolerance * expected.double().norm(), name
    for expected_line, line in zip(a.lines, b.lines, strict=True):
        for key in ("train_loss", "test_loss"):
            assert line[key] == pytest.approx(expected_line[key], rel=tolerance), key
        for key in ("alignment", "drift"):
            assert line[key] == (expected_line[key] and pytest.approx(expected_line[key], rel=1e-4)), key


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    """The ranks that the tests start see the first GPU only."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = (before or "0").split(",")[0]
    yield
    if before is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trees")
    return [tree(folder, algorithm) for algorithm in ALGORITHMS]


@pytest.fixture(scope="module")
def local(trees: list[dict[str, Any]]) -> list[Outcome]:
    return [train_locally(tree) for tree in trees]


@pytest.fixture(scope="module")
def by_device_map(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Server and one client rank on one GPU."""
    return train_on_ranks(2, trees, tmp_path_factory.mktemp("jobs") / "mapped")


@pytest.fixture(scope="module")
def staged(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Server and two client ranks on one GPU, tensors through host memory."""
    through_host = [{**tree, "comm": {**tree["comm"], "device_maps": "never"}} for tree in trees]
    return train_on_ranks(3, through_host, tmp_path_factory.mktemp("jobs") / "staged")


@pytest.fixture(scope="module")
def graphed(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """By device map, with captured steps; what cannot be captured is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHS_OR_ERROR", "1")
        with_graphs = [{**tree, "graphs": "auto"} for tree in trees]
        return train_on_ranks(2, with_graphs, tmp_path_factory.mktemp("jobs") / "graphed")


@pytest.mark.parametrize("case", range(len(ALGORITHMS)), ids=ALGORITHMS)
class TestEquality:
    def test_a_gpu_computes_what_a_cpu_does(self, case: int, local: list[Outcome], tmp_path: Path) -> None:
        assert_near(train_locally(tree(tmp_path, ALGORITHMS[case], "cpu")), local[case], SAME_IN_FP64)

    def test_device_maps_and_streams_change_no_number(
        self, case: int, local: list[Outcome], by_device_map: list[Outcome]
    ) -> None:
        assert_near(local[case], by_device_map[case], SAME_IN_FP64)

    def test_nor_does_the_way_through_host_memory(
        self, case: int, local: list[Outcome], staged: list[Outcome]
    ) -> None:
        assert_near(local[case], staged[case], SAME_IN_FP64)

    def test_nor_do_graphs(self, case: int, local: list[Outcome], graphed: list[Outcome]) -> None:
        assert_near(local[case], graphed[case], SAME_IN_FP64)

    def test_the_bytes_are_those_of_the_cpu(
        self, case: int, by_device_map: list[Outcome], tmp_path: Path
    ) -> None:
        on_cpu = train_locally(tree(tmp_path, ALGORITHMS[case], "cpu"))
        for expected, line in zip(on_cpu.lines, by_device_map[case].lines, strict=True):
            assert line["wire_bytes"] == expected["wire_bytes"]  # one client rank has nobody to average with


def test_device_seconds_stand_beside_the_hosts_phases(
    local: list[Outcome], by_device_map: list[Outcome]
) -> None:
    for outcome in (local[0], by_device_map[0]):
        for round, line in enumerate(outcome.lines):
            seconds = line["device_seconds"]
            assert {"data", "forward_backward", "estimate", "averaging"} <= seconds["client"].keys()
            assert {"step", "drift", "averaging"} <= seconds["server"].keys()
            assert seconds["server"].get("alignment", 0.0) > 0 or round == 1
            assert not any(name.endswith("_wait") for name in seconds["client"])
            assert 0 < sum(seconds["client"].values()) <= 1.1 * line["round_seconds"]


def test_requests_by_device_map_are_timed_by_the_gpus_clock(
    by_device_map: list[Outcome], graphed: list[Outcome]
) -> None:
    for line in (line for outcome in by_device_map + graphed for line in outcome.lines):
        server = line["device_seconds"]["server"]
        for kind, times in line["requests"].items():
            assert times["round_trip_seconds"] > times["compute_seconds"] > 0
            assert times["queue_seconds"] >= 0
            assert times["wire_seconds"] > -1e-4 * times["count"]  # two processes read the clock
            if kind == "align":
                assert times["compute_seconds"] >= 0.9 * server["alignment"]


@pytest.mark.filterwarnings("error:graphs")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_captured_steps_follow_a_moving_rate(algorithm: str, tmp_path: Path) -> None:
    scheduler = {"name": "ExponentialLR", "arguments": {"gamma": 0.9}, "per": "step"}
    keys = {party: {"name": "adam", "lr": 1e-3, "scheduler": scheduler} for party in PARTIES}
    plain = tree(tmp_path, algorithm, optimizer=keys)
    config = from_tree({**plain, "graphs": "auto", "transport": "local"})
    trainer = Trainer(Experiment.prepare(config), LocalWorld(config))
    lines: list[dict[str, Any]] = []
    trainer.train(lambda line, reports: lines.append(line))
    for line, expected in zip(lines, train_locally(plain).lines, strict=True):
        for key in ("train_loss", "test_loss"):
            assert line[key] == pytest.approx(expected[key], rel=SAME_WITH_GRAPHS), key
    client = trainer.clients[0]
    assert (client.whole_steps if algorithm == "fedavg" else client.passes).shapes > 0
    if trainer.server and trainer.server.lanes:
        lane = trainer.server.lanes[0]
        assert sum(steps.shapes for steps in lane.steps.values()) > 0
        assert all(fit.steps.shapes > 0 for fit in trainer.server.fits.values())


@pytest.mark.filterwarnings("error:graphs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ["fsl_sage", "splitfed_v1"])
def test_resnet18_with_graphs_trains_as_without(algorithm: str, precision: str, tmp_path: Path) -> None:
    """To what its BatchNorms make of rounding: kernels may add in another order."""
    changes = {"precision": precision, "model": {"name": "resnet18"}, "rounds": 2}
    first, second = (
        train_locally(tree(tmp_path, algorithm, graphs=graphs, **changes)).lines
        for graphs in ("never", "auto")
    )
    for line, expected in zip(second, first, strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=NEAR_IN_BF16)


@pytest.mark.filterwarnings("error:graphs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resnet18_with_channels_last_trains_as_without(precision: str, tmp_path: Path) -> None:
    changes = {"precision": precision, "rounds": 2, "graphs": "auto"}
    first, second = (
        train_locally(
            tree(tmp_path, "fsl_sage", model={"name": "resnet18", "memory_format": each}, **changes)
        )
        for each in ("contiguous", "channels_last")
    )
    for line, expected in zip(second.lines, first.lines, strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=NEAR_IN_BF16)


def test_bf16_trains_like_fp32_locally_and_over_rpc(tmp_path: Path) -> None:
    wide = train_locally(tree(tmp_path, "fsl_sage", precision="fp32"))
    trees = [tree(tmp_path, name, precision="bf16") for name in ("fsl_sage", "splitfed_v1")]
    narrow = [train_locally(tree) for tree in trees]
    over_rpc = train_on_ranks(2, trees, tmp_path / "job")
    for line, other in zip(wide.lines, narrow[0].lines, strict=True):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=NEAR_IN_BF16)
        assert 2 * other["wire_bytes"]["smashed_up"] == line["wire_bytes"]["smashed_up"]
    for here, there in zip(narrow, over_rpc, strict=True):
        for line, other in zip(here.lines, there.lines, strict=True):
            assert other["train_loss"] == pytest.approx(line["train_loss"], rel=NEAR_IN_BF16)
            assert other["wire_bytes"]["smashed_up"] == line["wire_bytes"]["smashed_up"]
    assert {t.dtype for name, t in over_rpc[0].tensors.items() if name.endswith("floats")} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resnet18_is_aligned_through_its_batch_norms(precision: str, tmp_path: Path) -> None:
    changes = {"precision": precision, "model": {"name": "resnet18"}, "rounds": 1}
    outcome = train_locally(tree(tmp_path, "fsl_sage", **changes))
    alignment = outcome.lines[0]["alignment"]
    assert alignment is not None
    assert all(value is not None for value in alignment.values())


def command(folder: Path, *overrides: str) -> list[str]:
    """A run of the command line with the tensors' ways written down in `folder`/run."""
    config = folder / "config.json"
    config.write_text(json.dumps({**tree(folder, "fsl_sage"), "output": str(folder), "name": "run"}))
    return ["-m", "fslsage_rpc", "train", str(config), *overrides]


def test_environment_says_how_tensors_travel_and_what_averages(tmp_path: Path) -> None:
    for ranks, averaging in ((2, None), (3, "gloo")):  # two client ranks share the GPU: not for NCCL
        run_job(["--nproc_per_node", str(ranks), *command(tmp_path, "resume=never")], timeout=200)
        environment = json.loads((tmp_path / "run" / "environment.json").read_text())
        assert environment["averaging"] == averaging
        ways = environment["request_tensors"]
        assert len(ways) == ranks - 1
        assert all(way == "cuda:0 to the server's cuda:0 and back, by device map" for way in ways.values())


def test_nccl_among_ranks_that_share_a_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    overrides = ["ranks=3", "comm.averaging=nccl"]
    done = subprocess.run(
        [sys.executable, *command(tmp_path, *overrides)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stderr
    assert "fslsage_rpc: comm.averaging: got 'nccl'" in done.stderr
    assert "client ranks share a GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_nccl_averages_ranks_that_share_a_gpu_where_it_allows_that(
    trees: list[dict[str, Any]],
    local: list[Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.nccl.version() < (2, 30):
        pytest.skip("NCCL before 2.30 refuses ranks that share a GPU")
    monkeypatch.setenv(SHARED_GPUS, "1")
    by_nccl = [{**tree, "comm": {**tree["comm"], "averaging": "nccl"}} for tree in trees]
    for expected, outcome in zip(local, train_on_ranks(3, by_nccl, tmp_path / "job"), strict=True):
        assert_near(expected, outcome, SAME_IN_FP64)


def test_a_queue_starts_behind_the_place_that_it_is_given() -> None:
    device = torch.device("cuda", 0)
    first, second = WorkQueue.beside_others(device), WorkQueue.beside_others(device)
    with first.after(current_place(device)):
        torch.cuda._sleep(SLEEP_CYCLES)
        made = torch.ones(1000, device=device)
        place = current_place(device)
    with second.after(place):
        second.keep(made)
        total = made.sum()
    end = second.end()
    assert end is not None
    end.synchronize()
    assert total.item() == 1000
    with first.after(current_place(device)):
        torch.cuda._sleep(SLEEP_CYCLES)
        later = torch.full((1000,), 2.0, device=device)
    second.wait_for(first.end())
    with second.after(current_place(device)):
        total = later.sum()
    torch.cuda.synchronize(device)
    assert total.item() == 2000


@pytest.mark.parametrize("graphs", ["never", "auto"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_round_never_waits_for_the_device_inside(algorithm: str, graphs: str, tmp_path: Path) -> None:
    """torch refuses every copy to the host, and every other call that would wait for the GPU unseen."""
    config = from_tree({**tree(tmp_path, algorithm, precision="fp32", graphs=graphs), "transport": "local"})
    trainer = Trainer(Experiment.prepare(config), LocalWorld(config))
    for round in range(3):  # first use of the libraries; and all is captured
        trainer.train_round(round)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for round in (3, 4):  # the second of them aligns
            trainer.train_round(round)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tf32_is_off_unless_asked_for() -> None:
    device = torch.device("cuda", 0)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = a @ b
    errors = {}
    for allowed in (False, True):
        set_tf32(allowed)
        product = (a.float().to(device) @ b.float().to(device)).cpu().double()
        errors[allowed] = ((product - exact).norm() / exact.norm()).item()
    set_tf32(False)
    assert errors[False] < 1e-6
    if torch.cuda.get_device_capability(device) >= (8, 0):  # Ampere and later have TF32
        assert errors[True] > 10 * errors[False]


def test_masks_on_a_gpu_are_keyed_and_their_steps_not_captured(tmp_path: Path) -> None:
    model = {"name": "support.random_models:wet", "cut": "between", "auxiliary": {"until": None}}
    split, whole = (
        train_locally(tree(tmp_path, algorithm, model=model, graphs="auto"))
        for algorithm in ("splitfed_v1", "fedavg")
    )
    finals = [name for name in split.tensors if name.startswith("final ")]
    for name in finals:
        difference = (split.tensors[name] - whole.tensors[name]).norm()
        assert difference <= SAME_IN_FP64 * whole.tensors[name].norm(), name
    aligned = [train_locally(tree(tmp_path, "fsl_sage", model=model, graphs="auto")) for _ in range(2)]
    assert_near(*aligned, SAME_IN_FP64)
