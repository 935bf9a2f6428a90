"""The self-launching form: starts this program's own ranks on this host and passes signals on to them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from torch.distributed import TCPStore

from fslsage_rpc.job.stopping import NOBODY_READS, STOPPED, answering_signals

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0
"""how long the other ranks have to end by themselves once one has failed"""
LOOPBACK = "127.0.0.1"


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m fslsage_rpc ARGUMENTS` as so many ranks and wait for them.

    Returns:
        The exit status: 0; 2 where the ranks found the input wrong; 75 where they have stopped on request;
        141 where nobody reads their output; 128 and its number after a signal; else 1.
    """
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = TCPStore(  # the ranks', here so that it outlives each of them
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    with LocalRanks(arguments) as job:
        status = job.run(ranks, port)
    del store
    return status


class LocalRanks:
    """The processes of the ranks. A context: none outlives it."""

    def __init__(self, arguments: Sequence[str]):
        self._command = [sys.executable, "-m", "fslsage_rpc", *arguments]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signalled: int | None = None

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def run(self, ranks: int, port: int) -> int:
        """Start them, to meet in a store at this port, and wait for their end.

        Returns:
            See `launch`.
        """
        with answering_signals(self._pass_on):
            self._start(ranks, port)
            if self._signalled:  # before all of them were there
                self._send(signal.SIGTERM)
            return self._status(self._wait())

    def _start(self, ranks: int, port: int) -> None:
        """Each in a session of its own: a terminal's Ctrl-C reaches them through this process alone."""
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        outer = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
        common = {
            "OMP_NUM_THREADS": threads,
            **outer,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for: no rank hosts the store
        }
        for rank in range(ranks):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._processes.append(subprocess.Popen(self._command, env=environment, start_new_session=True))

    def _wait(self) -> dict[int, int]:
        """Wait for their end; when one has failed, not for long.

        Returns:
            The ranks' statuses, in the order of their ends.
        """
        statuses: dict[int, int] = {}
        deadline = float("inf")
        while len(statuses) < len(self._processes):
            time.sleep(POLL_SECONDS)
            for rank, process in enumerate(self._processes):
                if rank not in statuses and process.poll() is not None:
                    statuses[rank] = process.returncode
            failed = any(status not in (0, STOPPED) for status in statuses.values())
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_SECONDS
                self._send(signal.SIGTERM)  # for ranks that have yet to meet: they would wait for long
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
        return statuses

    def _status(self, statuses: dict[int, int]) -> int:
        failures = {rank: status for rank, status in statuses.items() if status}
        if not failures:
            return 0
        rank, first = next(iter(failures.items()))
        if 2 in failures.values():  # the rank that has said so; others that saw it may have ended first
            return 2
        if first in (STOPPED, NOBODY_READS):
            return first
        if self._signalled:
            return 128 + self._signalled
        if all(status < 0 for status in failures.values()):  # no rank is left that could have said so
            name = signal.Signals(-first).name
            print(f"fslsage_rpc: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
        return 1

    def _pass_on(self, number: int) -> None:
        """Ask the ranks to stop, as this process is asked."""
        self._signalled = number
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)  # nothing where it has ended
