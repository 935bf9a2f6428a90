"""Starts one rank in each namespace, waits for them, and leaves none behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from emulation import quota
from emulation.network import INTERFACE, Network, address
from emulation.stopping import StopRequests

INIT = Path(__file__).with_name("init.py")
PORT = 29500
POLL_SECONDS = 0.1
FAILURE_SECONDS = 10.0
"""how long the others may take to end by themselves after one has failed"""
STOP_SECONDS = 60.0
"""how long ranks may take to end by themselves when asked to"""
END_SECONDS = 5.0
WRONG_INPUT, STOPPED = 2, 75


class Ranks:
    """The processes of a job, each in its rank's network namespace and in a PID namespace of its own.

    Without the latter TensorPipe would copy tensors from process to process, past the link. Whatever ends
    this process ends them too: each has the end of a pipe from it.
    """

    def __init__(self, network: Network, arguments: Sequence[str], environment: Mapping[str, str]):
        """
        Args:
            arguments: of `python -m fslsage_rpc`.
            environment: of every rank, over this process's.
        """
        self._network = network
        self._command = [sys.executable, str(INIT), sys.executable, "-m", "fslsage_rpc", *arguments]
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []
        self._statuses: dict[int, int] = {}
        """of the ranks that have ended, in that order"""

    def start(self, groups: Mapping[int, Path]) -> None:
        """Start all; `groups` has the CPU group of the ranks that are in one."""
        isolate = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        for rank, namespace in enumerate(self._network.namespaces):
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *isolate, *self._command],
                env={
                    **os.environ,
                    **self._environment,
                    **rank_environment(rank, len(self._network.namespaces)),
                },
                stdin=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=partial(quota.join, groups[rank]) if rank in groups else None,
            )
            self._processes.append(process)

    def wait(self, stop: StopRequests, check: Callable[[], None]) -> int:
        """Wait for the ranks to end; after a failure or a stop request only for a while.

        Args:
            check: called again and again; may raise to end the job.

        Returns:
            The job's exit status: 0; 2 wrong input; 75 stopped after a checkpoint; 128 and the number of the
            signal with which the launcher was stopped; else 1.
        """
        deadline, passed_on = float("inf"), 0
        while len(self._statuses) < len(self._processes):
            time.sleep(POLL_SECONDS)
            check()
            self._note_ended(stop.count > 0)
            if any(status not in (0, STOPPED) for status in self._statuses.values()):
                deadline = min(deadline, time.monotonic() + FAILURE_SECONDS)
            if stop.count > passed_on:
                passed_on = stop.count
                self._signal(stop.signal)
                deadline = min(deadline, time.monotonic() + STOP_SECONDS) if passed_on == 1 else 0.0
            if time.monotonic() > deadline:
                self.end()
                self._note_ended(asked_to=True)
        status = job_status(list(self._statuses.values()))
        return 128 + stop.signal if stop.count and status not in (0, STOPPED) else status

    def end(self) -> None:
        """End all that still run, at once."""
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _note_ended(self, asked_to: bool) -> None:
        for rank, process in enumerate(self._processes):
            status = process.poll()
            if status is None or rank in self._statuses:
                continue
            first_failure = not any(self._statuses.values())
            self._statuses[rank] = status
            if status > 128 and first_failure and not asked_to and status - 128 in set(signal.Signals):
                name = signal.Signals(status - 128).name  # it could not say so itself
                print(f"wan.py: rank {rank} was ended by {name}", file=sys.stderr, flush=True)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError, ValueError):
                assert process.stdin is not None
                process.stdin.write(f"{number}\n".encode())
                process.stdin.flush()


def job_status(statuses: Sequence[int]) -> int:
    """The exit status of a job from those of its ranks, in the order in which they ended."""
    failures = [status for status in statuses if status]
    if not failures:
        return 0
    return failures[0] if failures[0] in (WRONG_INPUT, STOPPED) else 1


def rank_environment(rank: int, size: int) -> dict[str, str]:
    """What a rank must know of its job, and what keeps the libraries on its link."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // size))
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(PORT),
        "OMP_NUM_THREADS": threads,
        "TP_SOCKET_IFNAME": INTERFACE,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "NCCL_HOSTID": f"rank{rank}",
        "NCCL_NET": "Socket",
    }
