"""Starts `delay.py` in the router's namespace and knows whether it still runs."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from emulation.links import Link
from emulation.network import Network
from fslsage_rpc.errors import InputError

PROGRAM = Path(__file__).with_name("delay.py")
END_SECONDS = 5.0


@contextmanager
def delays(network: Network, links: Mapping[int, Link]) -> Iterator[subprocess.Popen[bytes]]:
    """Delay the packets of all links that ask for it.

    Raises:
        InputError: the kernel has no NFQUEUE.
    """
    seconds = {rank: link.round_trip_seconds / 2 for rank, link in links.items() if link.round_trip_seconds}
    for rank in seconds:
        network.hold_packets(rank)
    queues = [f"{rank}={delay}" for rank, delay in seconds.items()]
    process = subprocess.Popen(
        ["ip", "netns", "exec", network.router, sys.executable, str(PROGRAM), *queues],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if process.stdout.readline() != b"ready\n":
            said = process.stderr.read().decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else "no reason given"
            raise InputError(f"--rtt: needs netem or NFQUEUE in the kernel; NFQUEUE is refused ({reason})")
        yield process
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(END_SECONDS)
