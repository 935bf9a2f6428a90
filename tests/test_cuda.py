"""One process on a GPU: numbers as on a CPU, streams, graphs, precisions, no hidden waits.

`launch/gpu_check.sh` runs each class, and the function, in a process of its own; `launch/gpu_check.py` names
them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.device.graphs import Graphed
from fslsage_rpc.device.placement import set_tf32
from fslsage_rpc.device.streams import WorkQueue, current_place, own_stream
from fslsage_rpc.job.local_world import LocalWorld
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support.cpu_reference import ALGORITHMS, PARTIES, SAME_IN_FP64, assert_as_on_a_cpu, tree
from support.equality import assert_device_seconds
from support.random_delays import delayed_phase
from support.rank_program import train_locally

pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SAME_WITH_GRAPHS = 1e-4
"""the largest relative difference of losses, with Adam, and learning rates that move, of which captured steps
have fp32 digits"""
NEAR_IN_BF16 = 0.05
"""likewise"""
SLEEP_CYCLES = 100_000_000
"""of the device: some tens of milliseconds"""
MIB = 2**20


@pytest.mark.filterwarnings("error:graphs")
@pytest.mark.parametrize("graphs", ["never", "auto"])
class TestEquality:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_a_gpu_computes_what_a_cpu_does(self, algorithm: str, graphs: str, tmp_path: Path) -> None:
        assert_as_on_a_cpu(train_locally(tree(tmp_path, algorithm, graphs=graphs)), algorithm)

    def test_device_seconds_stand_beside_the_hosts_phases(self, graphs: str, tmp_path: Path) -> None:
        assert_device_seconds(train_locally(tree(tmp_path, "fsl_sage", graphs=graphs)))


class TestDelays:
    @pytest.mark.parametrize("graphs", ["never", "auto"])
    @pytest.mark.parametrize("algorithm", ["fsl_sage", "splitfed_v1", "cse_fsl"])
    def test_late_work_changes_no_number(
        self, algorithm: str, graphs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Batches are drawn into pinned memory while the copies of earlier ones wait."""
        monkeypatch.setattr(Timeline, "phase", delayed_phase(0))
        assert_as_on_a_cpu(train_locally(tree(tmp_path, algorithm, graphs=graphs)), algorithm)


@contextmanager
def stream_for_captures() -> Iterator[None]:
    with torch.cuda.stream(own_stream(torch.device("cuda", 0))):
        yield


class TestCaptures:
    @pytest.mark.filterwarnings("error:graphs")
    @pytest.mark.parametrize("algorithm", ["fsl_sage", "splitfed_v1", "fedavg"])
    def test_captured_steps_follow_a_moving_rate(self, algorithm: str, tmp_path: Path) -> None:
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

    def test_masks_are_keyed_and_their_steps_not_captured(self, tmp_path: Path) -> None:
        model = {"name": "support.random_models:wet", "cut": "between", "auxiliary": {"until": None}}
        split, whole = (
            train_locally(tree(tmp_path, algorithm, model=model, graphs="auto"))
            for algorithm in ("splitfed_v1", "fedavg")
        )
        first, second = (
            train_locally(tree(tmp_path, "fsl_sage", model=model, graphs="auto")) for _ in range(2)
        )
        finals = {name for name in split.tensors if name.startswith("final ")}
        assert finals
        for one, other, names in ((split, whole, finals), (first, second, set(first.tensors))):
            for name in names:
                expected = other.tensors[name].double()
                difference = (one.tensors[name].double() - expected).norm()
                assert difference <= SAME_IN_FP64 * expected.norm(), name

    def test_a_failed_capture_is_survived(self) -> None:
        """A copy to the host fails, which no graph can hold; earlier graphs are replayed, later ones made."""
        x = torch.arange(1000.0, device="cuda")

        def waits(x: torch.Tensor) -> tuple[torch.Tensor]:
            y = 2 * x
            if torch.cuda.is_current_stream_capturing():
                y.sum().item()
            return (y,)

        with stream_for_captures():
            earlier = Graphed(True)
            for _ in range(2):
                earlier(lambda x: (torch.cos(x),), x)
            assert earlier.shapes == 1
            steps = Graphed(True)
            steps(waits, x)
            with pytest.warns(UserWarning, match="graphs: could not capture"):
                (y,) = steps(waits, x)
            assert torch.equal(y, 2 * x)
            assert torch.equal(steps(waits, x + 1)[0], 2 * x + 2)
            assert steps.shapes == 0
            assert torch.allclose(earlier(lambda x: (torch.cos(x),), x + 1)[0], torch.cos(x + 1))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert 0 <= torch.rand(10, device="cuda").min() < 1
        self._assert_shared_blocks_are_used_again()
        with stream_for_captures():
            later = Graphed(True)
            for shift in range(4):
                (y,) = later(lambda x: (torch.sin(x) + 1,), x + shift)
                assert torch.allclose(y, torch.sin(x + shift) + 1)
            assert later.shapes == 1
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _assert_shared_blocks_are_used_again(self) -> None:
        other = torch.cuda.Stream()
        before = torch.cuda.memory_reserved()
        for _ in range(20):
            block = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
            block.record_stream(other)
            del block
            torch.cuda.synchronize()
        assert torch.cuda.memory_reserved() - before <= 3 * 64 * MIB


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


class TestNoWaits:
    @pytest.mark.parametrize(
        ("algorithm", "graphs"),
        [*((algorithm, "never") for algorithm in ALGORITHMS), ("fsl_sage", "auto"), ("splitfed_v1", "auto")],
    )
    def test_a_round_never_waits_for_the_device_inside(
        self, algorithm: str, graphs: str, tmp_path: Path
    ) -> None:
        """torch refuses every copy to the host, and every other call that would wait for the GPU unseen."""
        keys = tree(tmp_path, algorithm, precision="fp32", graphs=graphs)
        config = from_tree({**keys, "transport": "local"})
        trainer = Trainer(Experiment.prepare(config), LocalWorld(config))
        for round in range(3):  # first use of the libraries; and all is captured
            trainer.train_round(round)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for round in (3, 4):  # the second of them aligns
                trainer.train_round(round)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestPrecision:
    def test_tf32_is_off_unless_asked_for(self) -> None:
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

    def test_bf16_trains_like_fp32(self, tmp_path: Path) -> None:
        wide, narrow = (
            train_locally(tree(tmp_path, "fsl_sage", precision=precision)) for precision in ("fp32", "bf16")
        )
        for line, other in zip(wide.lines, narrow.lines, strict=True):
            assert other["train_loss"] == pytest.approx(line["train_loss"], rel=NEAR_IN_BF16)
            assert 2 * other["wire_bytes"]["smashed_up"] == line["wire_bytes"]["smashed_up"]

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_resnet18_is_aligned_through_its_batch_norms(self, precision: str, tmp_path: Path) -> None:
        changes = {"precision": precision, "model": {"name": "resnet18"}, "rounds": 1}
        outcome = train_locally(tree(tmp_path, "fsl_sage", **changes))
        alignment = outcome.lines[0]["alignment"]
        assert alignment is not None
        assert all(value is not None for value in alignment.values())


def of_resnet18(folder: Path, algorithm: str, memory_format: str = "auto", **changes: Any) -> list[Any]:
    """Two rounds, in which a kernel that adds in another order has no time to make another training of it.

    BatchNorms of two samples, and larger steps, make of a millionth a tenth.
    """
    keys = {
        "model": {"name": "resnet18", "memory_format": memory_format},
        "clients": {"count": 3, "batch_size": 35},
        "optimizer": {party: {"name": "sgd", "lr": 1e-3} for party in PARTIES},
        "rounds": 2,
    }
    return train_locally(tree(folder, algorithm, **{**keys, **changes})).lines


@pytest.mark.filterwarnings("error:graphs")
class TestResnet18:
    @pytest.mark.parametrize(
        ("algorithm", "precision"),
        [("fsl_sage", "fp32"), ("fsl_sage", "tf32"), ("fsl_sage", "bf16"), ("splitfed_v1", "bf16")],
    )
    def test_with_graphs_it_trains_as_without(self, algorithm: str, precision: str, tmp_path: Path) -> None:
        keys = {"precision": "fp32", "tf32": True} if precision == "tf32" else {"precision": precision}
        first, second = (
            of_resnet18(tmp_path, algorithm, graphs=graphs, **keys) for graphs in ("never", "auto")
        )
        for line, expected in zip(second, first, strict=True):
            assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=NEAR_IN_BF16)

    def test_with_channels_last_it_trains_as_without(self, tmp_path: Path) -> None:
        first, second = (
            of_resnet18(tmp_path, "fsl_sage", memory_format, precision="bf16", graphs="auto")
            for memory_format in ("contiguous", "channels_last")
        )
        for line, expected in zip(second, first, strict=True):
            assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=NEAR_IN_BF16)
