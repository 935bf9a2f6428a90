"""Who had a host's cores: the CPU seconds of this process beside what the host's cores did meanwhile."""

import os
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fslsage_rpc.device.clock import clock
from fslsage_rpc.device.cores import usable_cores

BUSY = 0.05
"""the share of a host's cores that others may have had while its seconds are believed"""
STAT = Path("/proc/stat")
WORK, ALL = (0, 1, 2, 7), range(8)
"""columns of a core in /proc/stat: user, nice, system and steal, whatever the core did, of all its time.

Interrupts are no work of others: most of them are of the job's own network.
"""


@dataclass(frozen=True)
class CoreTimes:
    """Readings of the system's counters, or the seconds between two of them.

    `cpu_seconds`: of this process. `cores`: of each core that it may run on, the seconds of work for
    anybody, other virtual machines included, and all that were counted. Empty where the system does not
    tell.
    """

    host: str
    seconds: float
    cpu_seconds: float
    cores: dict[int, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def now(cls) -> "CoreTimes":
        """The counters as they are."""
        return cls(platform.node(), clock(), time.process_time(), _counters(usable_cores()))

    def since(self, earlier: "CoreTimes") -> "CoreTimes":
        """The seconds from an earlier reading to this one."""
        cores = {
            core: (work - earlier.cores[core][0], all - earlier.cores[core][1])
            for core, (work, all) in self.cores.items()
            if core in earlier.cores
        }
        return CoreTimes(
            self.host, self.seconds - earlier.seconds, self.cpu_seconds - earlier.cpu_seconds, cores
        )


def host_busy(ranks: Sequence[CoreTimes]) -> float | None:
    """The share of the cores of a job's ranks that went to others than these, of the host with most of it.

    The counters have ticks of 10 ms, so that of a round of 0.2 s is right to some hundredths only.

    Returns:
        None where no system has told, or the time was too short for its counters to move.
    """
    return max((share for share in busy_by_host(ranks).values() if share is not None), default=None)


def busy_by_host(ranks: Sequence[CoreTimes]) -> dict[str, float | None]:
    """The same for each host."""
    hosts = defaultdict(list)
    for rank in ranks:
        hosts[rank.host].append(rank)
    return {host: _others_share(each) for host, each in hosts.items()}


def _others_share(ranks: Sequence[CoreTimes]) -> float | None:
    cores: dict[int, tuple[float, float]] = {}
    for rank in ranks:
        cores |= rank.cores
    counted = sum(all for _, all in cores.values())
    if counted <= 0:
        return None
    others = sum(work for work, _ in cores.values()) - sum(rank.cpu_seconds for rank in ranks)
    return min(1.0, max(0.0, others / counted))


def mean_busy(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean over the seconds of some rounds, given as metrics lines; None where no round's is known."""
    known = [
        (line["round_seconds"], line["host_busy"]) for line in lines if line.get("host_busy") is not None
    ]
    total = sum(seconds for seconds, _ in known)
    return sum(seconds * share for seconds, share in known) / total if total else None


def _counters(cores: frozenset[int]) -> dict[int, tuple[float, float]]:
    """By core the seconds so far of work, and all that were counted."""
    found: dict[int, tuple[float, float]] = {}
    with suppress(OSError, ValueError, IndexError):
        tick = 1 / os.sysconf("SC_CLK_TCK")
        for line in STAT.read_text().splitlines():
            name, *columns = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
                ticks = [int(column) for column in columns]
                found[int(name[3:])] = (
                    tick * sum(ticks[i] for i in WORK),
                    tick * sum(ticks[i] for i in ALL if i < len(ticks)),
                )
    return found
