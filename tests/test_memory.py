"""What lasts is allocated apart from what comes and goes; optimizers have their states from the start."""

import ctypes
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from fslsage_rpc.config.schema import OptimizerKeys
from fslsage_rpc.device.memory import (
    LASTING_BYTES,
    give_back_free_pages,
    keep_large_blocks,
    lasting_blocks,
    one_heap,
)
from fslsage_rpc.parties.optimizers import OPTIMIZERS, ScheduledOptimizer

LARGE_BYTES = 2**28
"""no free block is so large that it would be taken instead; nobody touches the pages"""
FIELDS = ("arena", "free_blocks", "fast", "mapped_blocks", "mapped", "", "", "used", "free", "top")


class Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name or f"unused{place}", ctypes.c_size_t) for place, name in enumerate(FIELDS)]


def mapped_bytes() -> int:
    """In blocks of malloc that have pages of their own."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if not sys.platform.startswith("linux") or mallinfo2 is None:
        pytest.skip("not glibc 2.33 or later")
    mallinfo2.restype = Heap
    return mallinfo2().mapped


@pytest.mark.nightly
def test_blocks_that_last_have_pages_of_their_own() -> None:
    mapped_bytes()  # or skip
    # In this process earlier tests have left free blocks that may be large enough.
    in_a_process_of_its_own("look_at_blocks()")


def in_a_process_of_its_own(call: str) -> str:
    """Call a function of this module there.

    Returns:
        What it, or the C library, wrote to standard error.
    """
    program = f"import sys; sys.path[:0] = {sys.path!r}; import test_memory; test_memory.{call}"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, timeout=100).stderr


def look_at_blocks() -> None:
    with lasting_blocks():
        before = mapped_bytes()
        lasting = torch.empty(LARGE_BYTES, dtype=torch.uint8)
        assert mapped_bytes() - before >= lasting.nbytes
        del lasting
        assert mapped_bytes() == before
    passing = torch.empty(LARGE_BYTES, dtype=torch.uint8)
    assert mapped_bytes() == before
    del passing
    keep_large_blocks()  # as often as anybody likes
    assert mapped_bytes() == before


@pytest.mark.nightly
def test_pages_between_blocks_that_stay_are_given_back() -> None:
    mapped_bytes()  # or skip
    in_a_process_of_its_own("leave_free_pages()")


def leave_free_pages() -> None:
    keep_large_blocks()
    pairs = [(torch.ones(2**18), torch.ones(2**4)) for _ in range(64)]  # of floats: 1 MiB, and little
    staying = [little for _, little in pairs]
    before = resident_bytes()
    del pairs
    assert before - resident_bytes() < 2**20
    give_back_free_pages()
    assert before - resident_bytes() > 48 * 2**20
    assert all(little.sum() == 2**4 for little in staying)


def resident_bytes() -> int:
    """The memory of this process that is there."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.nightly
def test_threads_have_one_heap() -> None:
    mapped_bytes()  # or skip
    assert "Arena 1:" in in_a_process_of_its_own("allocate_on_a_thread(own_heap=True)")
    assert "Arena 1:" not in in_a_process_of_its_own("allocate_on_a_thread(own_heap=False)")


def allocate_on_a_thread(own_heap: bool) -> None:
    if not own_heap:
        one_heap()
    thread = threading.Thread(target=torch.ones, args=[LASTING_BYTES // 8])
    thread.start()
    thread.join()
    ctypes.CDLL(None).malloc_stats()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_that_are_there_from_the_start_change_no_step(name: str, weight_decay: float) -> None:
    mine, plain = nn.Linear(37, 11), nn.Linear(37, 11)
    plain.load_state_dict(mine.state_dict())
    keys = OptimizerKeys(name=name, weight_decay=weight_decay)  # type: ignore[arg-type]
    optimizer = ScheduledOptimizer(keys, mine.parameters())
    by_torch = OPTIMIZERS[name](plain.parameters(), lr=keys.lr, weight_decay=weight_decay, fused=True)
    if name != "sgd":
        state = optimizer.optimizer.state_dict()["state"]
        assert {key: tensor.abs().max().item() for key, tensor in state[0].items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), 0.0
        )
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), plain.parameters(), strict=True))
    x = torch.randn(5, 37)
    for _ in range(3):
        for model in (mine, plain):
            model(x).square().sum().backward()
        optimizer.step()
        by_torch.step()
        by_torch.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), plain.parameters(), strict=True))
