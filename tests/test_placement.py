"""Who is on which GPU, and what follows; the parts of the GPU path that a machine without one can try."""

import os
import threading
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._jit_internal import _extract_tensors  # type: ignore[attr-defined]

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.device import workers
from fslsage_rpc.device.clock import device_clock
from fslsage_rpc.device.cores import fair_threads, server_workers, usable_cores
from fslsage_rpc.device.placement import GpuPlace, set_tf32
from fslsage_rpc.device.streams import WorkQueue, current_place
from fslsage_rpc.device.workers import Workers
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.job.roll_call import Presence
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.coding import Coded
from fslsage_rpc.parties.requests import Answer, Push, Request
from fslsage_rpc.transport.choices import (
    SHARED_GPUS,
    choose_averaging,
    choose_channels,
    device_maps,
    hidden_gpus,
)
from fslsage_rpc.transport.rpc import _with_addresses
from support.forked_ranks import run_ranks
from support.user_input import mistake

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
OWN = [GpuPlace("a", "gpu 0"), GpuPlace("a", "gpu 1"), GpuPlace("b", "gpu 0")]
SHARED = [GpuPlace("a", "gpu 0"), GpuPlace("a", "gpu 0")]
WITHOUT = [GpuPlace("a", "gpu 0"), GpuPlace("a", None)]


def test_tensors_go_from_gpu_to_gpu_where_both_ends_have_one() -> None:
    assert device_maps([FIRST, FIRST], "auto") == {1: (FIRST, FIRST)}
    assert device_maps([SECOND, FIRST, CPU, SECOND], "auto") == {1: (FIRST, SECOND), 3: (SECOND, SECOND)}
    assert device_maps([CPU, FIRST, SECOND], "auto") == {}
    assert device_maps([FIRST, CPU], "auto") == {}
    assert device_maps([FIRST, FIRST], "never") == {}


def test_nccl_averages_where_every_client_rank_has_a_gpu_of_its_own() -> None:
    assert choose_averaging("auto", OWN, nccl_built=True) == "nccl"
    assert choose_averaging("nccl", OWN, nccl_built=True) == "nccl"
    assert choose_averaging("gloo", OWN, nccl_built=True) == "gloo"
    assert choose_averaging("auto", OWN, nccl_built=False) == "gloo"
    assert choose_averaging("auto", [GpuPlace.of(CPU)] * 2, nccl_built=True) == "gloo"


@pytest.mark.parametrize("wanted", ["auto", "gloo", "nccl"])
def test_one_client_rank_has_nobody_to_average_with(wanted: str) -> None:
    assert choose_averaging(wanted, OWN[:1], nccl_built=True) is None


def test_client_ranks_that_share_a_gpu_average_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARED_GPUS, raising=False)
    assert choose_averaging("auto", SHARED, nccl_built=True) == "gloo"
    with pytest.raises(InputError, match=r"comm\.averaging: got 'nccl'.*client ranks share a GPU"):
        choose_averaging("nccl", SHARED, nccl_built=True)
    for places in (WITHOUT, [GpuPlace.of(CPU)]):
        with pytest.raises(InputError, match=r"comm\.averaging: got 'nccl'.*not every client rank has a GPU"):
            choose_averaging("nccl", places, nccl_built=True)
    monkeypatch.setenv(SHARED_GPUS, "1")  # asked for by name, on the user's own account
    assert choose_averaging("nccl", SHARED, nccl_built=True) == "nccl"
    assert choose_averaging("auto", SHARED, nccl_built=True) == "gloo"


def test_cores_are_shared_out_among_the_ranks_that_may_use_them() -> None:
    both, first, second = (frozenset(cores) for cores in ({0, 1, 2, 3}, {0, 1}, {2, 3}))
    free = [("a", both), ("a", both), ("b", both)]  # as plain srun starts them
    assert [fair_threads(rank, free) for rank in range(3)] == [2, 2, 4]
    bound = [("a", first), ("a", second), ("b", first)]  # each to its own
    assert [fair_threads(rank, bound) for rank in range(3)] == [2, 2, 2]
    assert fair_threads(0, [("a", first)] * 5) == 1


HOST = ["cma", "mpt_uv", "basic"]
TO_FIRST = {1: (SECOND, FIRST)}


def seeing(host: str, *visible: str) -> GpuPlace:
    """A rank that computes on the first GPU that it sees."""
    return GpuPlace(host, next(iter(visible), None), frozenset(visible))


BOTH, FIRST_ALONE, SECOND_ALONE = seeing("a", "0", "1"), seeing("a", "0"), seeing("a", "1")
ELSEWHERE = seeing("b", "2")


def test_channels_are_those_that_tensors_need() -> None:
    by_cuda = ["cuda_xth", "cuda_ipc", "cuda_basic"]
    assert choose_channels(None, [BOTH, BOTH], {}) == HOST
    assert choose_channels(None, [BOTH, BOTH], TO_FIRST) == HOST + by_cuda
    assert choose_channels(None, [BOTH, BOTH, ELSEWHERE], TO_FIRST) == HOST + by_cuda
    assert choose_channels(None, [BOTH, BOTH, seeing("a")], TO_FIRST) == HOST + by_cuda
    own = ["cuda_gdr", "basic"]
    assert choose_channels(own, [BOTH, BOTH], TO_FIRST) == own


def test_cuda_ipc_is_left_out_where_a_host_hides_gpus_from_its_ranks() -> None:
    without = [*HOST, "cuda_xth", "cuda_basic"]
    for places in ([FIRST_ALONE, SECOND_ALONE], [ELSEWHERE, BOTH, FIRST_ALONE]):
        assert choose_channels(None, places, TO_FIRST) == without
    assert hidden_gpus([ELSEWHERE, BOTH, FIRST_ALONE]) == {"a": [1, 2]}
    assert hidden_gpus([ELSEWHERE, BOTH, BOTH, seeing("a")]) == {}
    assert choose_channels(["basic", "cuda_ipc"], [FIRST_ALONE, SECOND_ALONE], TO_FIRST)[1] == "cuda_ipc"


@pytest.mark.parametrize(
    ("wanted", "places", "expected"),
    [
        (["cuda_basic"], [BOTH, BOTH], "expected one of cma, mpt_uv, basic among"),
        (["cma", "cuda_basic"], [BOTH, ELSEWHERE], "expected one of mpt_uv, basic among"),
        (
            ["basic", "cuda_xth"],
            [BOTH, BOTH],
            "expected one of cuda_ipc, cuda_gdr, cuda_basic among",
        ),
        (["basic", "cuda_ipc"], [BOTH, ELSEWHERE], "expected one of cuda_gdr, cuda_basic among"),
    ],
)
def test_channels_that_lead_nowhere_are_bad_input(
    wanted: list[str], places: list[GpuPlace], expected: str
) -> None:
    message = mistake(choose_channels, wanted, places, TO_FIRST)
    assert message.startswith(f"comm.channels: got [{', '.join(wanted)}], {expected}")
    assert ("comm.device_maps=never" in message) == ("cuda" in expected)


def test_a_rank_tells_the_others_which_gpus_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(device: Any) -> SimpleNamespace:
        return SimpleNamespace(uuid=f"GPU-{torch.device(device).index}")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    there = Presence.here(3, SECOND)
    assert there.place.gpu == "GPU-1"
    assert there.place.visible == {"GPU-0", "GPU-1"}
    read = Presence.read(there.written().encode())
    assert (str(read), read.place, read.place.visible) == (str(there), there.place, there.place.visible)
    assert Presence.here(0, CPU).place.visible == frozenset()


@pytest.mark.nightly
def test_ranks_whose_threads_nobody_has_set_share_the_cores(tmp_path: Path) -> None:
    run_ranks(2, _assert_fair_threads, [], tmp_path, timeout=100)


def _assert_fair_threads() -> None:
    os.environ.pop("OMP_NUM_THREADS")
    torch.set_num_threads(2 + len(usable_cores()))
    world = open_world(from_tree({"device": "cpu", "comm": {"transports": ["uv"]}}))
    assert torch.get_num_threads() == max(1, len(usable_cores()) // 2)
    world.close()


@pytest.mark.nightly
def test_ranks_leave_their_priority_alone(tmp_path: Path) -> None:
    run_ranks(2, _assert_priority_stays, [], tmp_path, timeout=100)


def _assert_priority_stays() -> None:
    os.setsid()  # as the launchers do
    before = os.getpriority(os.PRIO_PROCESS, 0), _session_priority()
    world = open_world(from_tree({"device": "cpu", "comm": {"transports": ["uv"]}}))
    assert (os.getpriority(os.PRIO_PROCESS, 0), _session_priority()) == before
    world.close()


def _session_priority() -> str:
    """The weight that Linux gives this process's session, where it does."""
    autogroup = Path("/proc/self/autogroup")
    return autogroup.read_text() if autogroup.exists() else ""


def test_tensors_are_found_in_answers() -> None:
    gradient, weights = torch.ones(2), flatten(nn.BatchNorm1d(2))
    assert _extract_tensors(Answer(gradient, 0.0, 0.0)) == [gradient]
    assert len(_extract_tensors(Answer(weights, 0.0, 0.0))) == 2
    assert _extract_tensors(Answer(None, 0.0, 0.0)) == []


def test_an_empty_tensor_is_not_sent_from_a_gpu() -> None:
    full, empty = flatten(nn.BatchNorm1d(2)), flatten(nn.Linear(2, 2))
    assert _with_addresses(Answer(full, 0.0, 0.0)).value.integers is full.integers
    sent = _with_addresses(Answer(empty, 1.0, 2.0))
    assert isinstance(sent.value, Weights)
    assert sent.value.floats is empty.floats
    assert sent.value.integers.device == CPU
    assert (sent.queue_seconds, sent.compute_seconds) == (1.0, 2.0)
    z = Coded((torch.ones(0), torch.ones(3)), torch.Size([3]), torch.float32)
    request = _with_addresses(Request(1, 2, 3, Push(z, torch.zeros(3))))
    assert (request.client, request.number, request.step, request.body.z.shape) == (1, 2, 3, z.shape)
    assert request.body.z.parts[0].device == CPU
    assert request.body.z.parts[1] is z.parts[1]


def test_streams_and_device_clocks_do_nothing_on_a_cpu() -> None:
    assert current_place(CPU) is None
    assert device_clock(CPU) is None
    queue = WorkQueue.beside_others(CPU)
    with queue.after(current_place(CPU)):
        queue.keep(torch.ones(1))
    assert queue.end() is None
    timeline = Timeline(device=CPU)
    with timeline.phase("step"):
        pass
    assert timeline.take_device_seconds() == {}
    assert timeline.take()["step"] >= 0


def test_a_gpu_needs_one_thread_for_each_lane() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert server_workers(FIRST) >= server_workers(CPU) >= 1
        torch.set_num_threads(1)
        assert server_workers(FIRST) == server_workers(CPU)
    finally:
        torch.set_num_threads(threads)


def test_on_a_gpu_a_lane_and_a_fit_keep_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "server_workers", lambda device: 3)
    of_number: dict[int, set[int]] = defaultdict(set)
    meeting, done = threading.Barrier(3), threading.Semaphore(0)

    def note(number: int) -> None:
        meeting.wait(60)  # three of them run at a time
        of_number[number].add(threading.get_ident())
        done.release()

    def run(device: torch.device, numbers: list[int]) -> None:
        pool = Workers(device)
        for number in numbers:
            pool.start("lane", number, partial(note, number))
        assert all(done.acquire(timeout=60) for _ in numbers)
        pool.dissolve()

    run(FIRST, [0, 1, 2, 3, 4, 5] * 4)
    assert [len(of_number[number]) for number in range(6)] == [1] * 6
    assert of_number[0] == of_number[3] != of_number[1]
    run(CPU, [0, 0, 0])  # the first free thread


def test_tf32_is_switched_for_products_and_convolutions() -> None:
    def now() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]

    before = now()
    try:
        set_tf32(True)
        assert now() == ("tf32", "tf32")
        set_tf32(False)
        assert now() == ("ieee", "ieee")
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]
