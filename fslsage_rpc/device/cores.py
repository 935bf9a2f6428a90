"""The cores of a host, and how many threads the ranks there have on them."""

import os
from collections.abc import Sequence

import torch

Cores = tuple[str, frozenset[int]]
"""a host, and the cores of it that a rank may run on"""


def usable_cores() -> frozenset[int]:
    """The cores of this host that this process may run on."""
    known = hasattr(os, "sched_getaffinity")
    return frozenset(os.sched_getaffinity(0) if known else range(os.cpu_count() or 1))


def fair_threads(rank: int, cores: Sequence[Cores]) -> int:
    """A rank's share of its cores, which others may use too (all of a host, or none where ranks are bound).

    Args:
        cores: by rank.
    """
    host, mine = cores[rank]
    sharing = sum(other == host and bool(theirs & mine) for other, theirs in cores)
    return max(1, len(mine) // sharing)


def server_workers(device: torch.device) -> int:
    """Lanes that a server here executes at the same time, and fits likewise: cores over threads of each.

    A GPU's work takes one thread of the host, which queues it.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(1, len(usable_cores()) // threads)
