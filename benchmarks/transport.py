"""Uploads by RPC against `dist.send` of the same tensors, side by side, and what one small call costs.

    python benchmarks/transport.py [comm.transports=[uv] ...]

Starts two ranks, joined as in any run. For each size the client rank sends smashed data to the server, by
turns with `dist.send` over Gloo and by the requests of the program, four of them under way at a time as in
`comm.upload_window`. A sample begins with a barrier and ends when the last answer is there. About a minute.

Prints MiB/s of both, and last, one a line, the medians of the paired ratios RPC / dist.send. Also what a
small call costs, and by turns one that carries an RRef to the server, which the program's do not.
"""

import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from rank_job import overrides_on_ranks
from torch.distributed import rpc
from torch.futures import Future

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.device.clock import clock
from fslsage_rpc.device.memory import keep_large_blocks
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.parties.requests import Answer, Push, Request

SIZES = [2.0**power for power in range(-2, 6)]
"""of smashed data, in MiB"""
MIB = 2**20
SAMPLE_MIB = 128
PAIRS = 7
WINDOW = 4
SMALL_CALLS = 300


@rpc.functions.async_execution
def submit(request: Request) -> Future[Answer]:
    """On the server's rank: answers at once, in the way that the program's server does."""
    return served(request)


@rpc.functions.async_execution
def submit_to(server: rpc.RRef, request: Request) -> Future[Answer]:
    """The same, of a call that says by an RRef whom it is for."""
    return server.local_value()(request)


def served(request: Request) -> Future[Answer]:
    """On the server's rank: what the RRef is to."""
    future: Future[Answer] = Future()
    future.set_result(Answer(None, 0.0, 0.0))
    return future


def reference() -> rpc.RRef:
    """On the server's rank."""
    return rpc.RRef(served)


def upload(body: Push, count: int) -> None:
    """So many uploads, a few of them under way at a time."""
    under_way: list[Future[Answer]] = []
    for number in range(count):
        if len(under_way) == WINDOW:
            under_way.pop(0).wait()
        under_way.append(rpc.rpc_async("server", submit, args=(Request(0, number, 0, body),), timeout=0))
    for future in under_way:
        future.wait()


def seconds_of(work: Callable[[], None]) -> float:
    """Collective: of one sample."""
    dist.barrier()
    started = clock()
    work()
    return clock() - started


def compare(sends: bool, size: float) -> tuple[float, float, float]:
    """Collective: MiB/s by dist.send and by RPC, and the median of the paired ratios (0 on the receiver)."""
    count = max(4, int(SAMPLE_MIB / size))
    z = torch.randn(int(size * MIB / 4))
    body, done = Push(z, torch.zeros(1, dtype=torch.int64)), torch.zeros(1)

    def by_send() -> None:
        for _ in range(count):
            dist.send(z, 0) if sends else dist.recv(z, 1)
        dist.recv(done, 0) if sends else dist.send(done, 1)

    def by_rpc() -> None:
        if sends:
            upload(body, count)

    pairs = [(seconds_of(by_send), seconds_of(by_rpc)) for _ in range(PAIRS + 1)][1:]
    dist.barrier()
    if not sends:
        return 0.0, 0.0, 0.0
    send, call = (count * size / statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return send, call, statistics.median(by_send / by_call for by_send, by_call in pairs)


def main() -> None:
    """As one rank of a job; without one, start it."""
    overrides = overrides_on_ranks(__file__, __doc__, 2)
    world = open_world(from_tree({"ranks": 2, "device": "cpu"}, overrides))
    keep_large_blocks()  # as in every round
    sends = world.transport.client_rank == 0
    ratios = {}
    if sends:
        transports = world.transport.describe()["rpc_transports"]
        print(f"transports {transports}, {os.cpu_count()} cores", flush=True)
    for size in SIZES:
        send, call, ratio = compare(sends, size)
        if sends:
            ratios[size] = ratio
            print(f"{size:6.2f} MiB   dist.send {send:6.0f} MiB/s   RPC {call:6.0f} MiB/s", flush=True)
    if sends:
        small = Push(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        plain, carrying = compare_small_calls(small)
        ratio = statistics.median(with_it / without for without, with_it in zip(plain, carrying, strict=True))
        without, with_it = (1e6 * statistics.median(calls) for calls in (plain, carrying))
        print(f"one small call {without:.0f} us, with an RRef {with_it:.0f} us", flush=True)
        print(f"small call with an RRef / without {ratio:.2f}", flush=True)
        for size, ratio in ratios.items():
            print(f"{size:.2f} MiB RPC / dist.send {ratio:.2f}", flush=True)
    world.close()


def compare_small_calls(body: Push) -> tuple[list[float], list[float]]:
    """Seconds there and back, without an RRef and with one, by turns."""
    server = rpc.rpc_sync("server", reference)
    request = Request(0, 0, 0, body)
    ways = [(submit, (request,)), (submit_to, (server, request))]
    seconds: list[list[float]] = [[], []]
    for turn in range(SMALL_CALLS):
        for way in (0, 1) if turn % 2 else (1, 0):
            function, arguments = ways[way]
            started = clock()
            rpc.rpc_async("server", function, args=arguments, timeout=0).wait()
            seconds[way].append(clock() - started)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    main()
