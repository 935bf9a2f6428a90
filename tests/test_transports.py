"""Every transport passes the conformance suite: the real one between threads, and between processes."""

import gc
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore, rpc

from fslsage_rpc.config.schema import Comm
from fslsage_rpc.device.placement import GpuPlace
from fslsage_rpc.job.connections import open_sockets
from fslsage_rpc.transport.base import Transport
from fslsage_rpc.transport.local import LocalTransport
from fslsage_rpc.transport.rpc import SERVER, RpcTransport
from support.forked_ranks import run_ranks
from support.stand_in_cuda import GPU, Cuda, cuda
from support.stand_in_rpc import Job, stand_in, transport_between_threads
from support.transport_conformance import (
    CHECKS,
    assert_errors_after_a_clients_death,
    assert_errors_after_the_servers_death,
)

__all__ = ["cuda"]
CPU = torch.device("cpu")
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


def test_a_transport_has_a_dozen_methods() -> None:
    assert len(Transport.__abstractmethods__) == 12


@each_check
def test_in_one_process(check: Callable[[Transport], None]) -> None:
    transport = LocalTransport(CPU)
    check(transport)
    transport.close()


@pytest.mark.timeout(120)
@each_check
@pytest.mark.parametrize(("device", "device_maps"), [(CPU, "auto"), (GPU, "auto"), (GPU, "never")])
def test_between_threads(
    check: Callable[[Transport], None],
    device: torch.device,
    device_maps: str,
    cuda: Cuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = Comm(device_maps=device_maps)  # type: ignore[arg-type]  # one of its literals
    job = Job(cuda, 4, device_maps != "never", seed=0)
    stand_in(job, monkeypatch)

    def work(rank: int) -> None:
        transport = transport_between_threads(job, rank, device, keys)
        check(transport)
        transport.close()

    job.run(work)
    cuda.check()


# On three ranks


@pytest.mark.gate
@pytest.mark.parametrize("elastic", ["", "elastic"])
def test_between_ranks(elastic: str, tmp_path: Path) -> None:
    run_ranks(3, _pass_the_suite, [elastic], tmp_path, timeout=150)


def _pass_the_suite(elastic: str) -> None:
    """One that is left behind is followed by another in the same process, where ranks may be lost."""
    if elastic:
        transport = _open("first", elastic)
        CHECKS[0](transport)
        transport.barrier()
        transport.abandon()
        del transport
        _assert_nothing_is_left()
    transport = _open("second", elastic)
    for check in CHECKS:
        check(transport)
    transport.close()
    del transport
    _assert_nothing_is_left()


@pytest.mark.gate
@pytest.mark.parametrize("dies", ["server", "client"])
def test_a_death_is_noticed(dies: str, tmp_path: Path) -> None:
    run_ranks(3, _notice, [dies], tmp_path, timeout=100)


def _notice(dies: str) -> None:
    transport = _open("only", "")
    if dies == "server":
        assert_errors_after_the_servers_death(transport)
    else:
        assert_errors_after_a_clients_death(transport)


def _open(prefix: str, elastic: str) -> RpcTransport:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    workers = [SERVER, *(f"{prefix}{number}" for number in range(1, ranks))]
    devices, places = [CPU] * ranks, [GpuPlace("here", None)] * ranks
    number, keys = rank if elastic else None, Comm(transports=["uv"], averaging="gloo")
    return RpcTransport(dist.PrefixStore(prefix, store), rank, keys, devices, places, workers, number)


def _assert_nothing_is_left() -> None:
    """No agent, no group, no connection but to the store, which torch keeps with its first RPC agent."""
    ends = time.monotonic() + 10
    while (left := _connections_between_ranks()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert left == []
    assert not dist.is_initialized()
    assert not rpc.api._is_current_rpc_agent_set()


def _connections_between_ranks() -> list[int]:
    """The ports of their other ends, and those of sockets that listen."""
    gc.collect()
    ports = []
    for descriptor in open_sockets().values():
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                ports.append(connection.getsockname()[1])
                ports[-1] = connection.getpeername()[1]  # fails where it listens
    return [port for port in ports if port != int(os.environ["MASTER_PORT"])]
