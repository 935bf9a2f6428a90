"""Measures the links of a network before a job uses them, and says what was asked and what was found."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emulation.links import Link
from emulation.network import Network, address
from emulation.system import CommandFailed

PROBE = Path(__file__).with_name("probe.py")
WARM_UP_SECONDS = 0.3
WARM_UP_ROUND_TRIPS = 10
"""what a connection's slow start takes"""
PROBE_SECONDS = 60.0
QUIET_SECONDS = 0.25
SETTLE_SECONDS = 5.0

Measured = dict[str, float]
"""up_bits_per_second, down_bits_per_second, round_trip_seconds"""


def measure(network: Network, links: Mapping[int, Link], check: Callable[[], None]) -> dict[int, Measured]:
    """Measure the link of each client rank, one after another; about 3 s and 30 round trips each.

    Args:
        check: called between two links; may raise to end it.

    Raises:
        CommandFailed: a probe cannot reach the other or takes too long.
    """
    server = ["ip", "netns", "exec", network.namespaces[0], sys.executable, str(PROBE), "serve", address(0)]
    with subprocess.Popen(
        server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as serving:
        assert serving.stdin is not None
        assert serving.stdout is not None
        try:
            if serving.stdout.readline() != b"ready\n":
                raise CommandFailed("the probe in the server's namespace did not start")
            measured = {}
            for rank, link in links.items():
                check()
                measured[rank] = _measure(network.namespaces[rank], rank, link)
        finally:
            serving.stdin.close()
            serving.terminate()
    settle(network)
    return measured


def settle(network: Network) -> None:
    """Wait until nothing moves any more, so that what is counted next is the job's."""
    before, deadline = network.counters(), time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(QUIET_SECONDS)
        now = network.counters()
        if now == before:
            return
        before = now


def _measure(namespace: str, rank: int, link: Link) -> Measured:
    warm_up = WARM_UP_SECONDS + WARM_UP_ROUND_TRIPS * (link.round_trip_seconds or 0.0)
    probe = [sys.executable, str(PROBE), "measure", address(0), str(warm_up)]
    command = ["ip", "netns", "exec", namespace, *probe]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS + 2 * warm_up,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"the link of client rank {rank} could not be measured: it is too slow") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise CommandFailed(f"the link of client rank {rank} could not be measured: {said[-1]}")
    measured: Measured = json.loads(done.stdout)
    return measured


def describe(
    links: Mapping[int, Link],
    measured: Mapping[int, Measured],
    speeds: Mapping[int, float],
    delayed_by: str | None,
) -> dict[str, Any]:
    """Asked and measured, as the results are stamped with it; null where nothing is asked.

    Rates are in bit/s, headers included (once, where packets cross unsegmented), times in seconds.
    """
    return {
        "clients": {
            str(rank): {"asked": vars(link), "measured": measured[rank], "cpu_share": speeds.get(rank)}
            for rank, link in links.items()
        },
        "delayed_by": delayed_by,
        "congestion_control": "reno",
    }


def table(links: Mapping[int, Link], measured: Mapping[int, Measured], speeds: Mapping[int, float]) -> str:
    """A line for each client rank: asked -> measured."""
    rows = [("client rank", "up", "down", "round trip", "CPU")]
    for rank, link in links.items():
        found = measured[rank]
        up = f"{_rate(link.up_bits_per_second)} -> {_rate(found['up_bits_per_second'])}"
        down = f"{_rate(link.down_bits_per_second)} -> {_rate(found['down_bits_per_second'])}"
        trip = f"{_time(link.round_trip_seconds)} -> {_time(found['round_trip_seconds'])}"
        rows.append((str(rank), up, down, trip, f"{100 * speeds[rank]:g} %" if rank in speeds else "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(["links, asked -> measured:", *lines])


def _rate(bits_per_second: float | None) -> str:
    return "-" if bits_per_second is None else f"{bits_per_second / 1e6:.4g} Mbit/s"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"
