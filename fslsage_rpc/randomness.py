"""Random numbers keyed by what they are for, never by process, thread or call order.

The stream of (seed, purpose, round, client) is the same on 2 ranks and on 9, whoever draws first.
"""

import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


class LocalStep(NamedTuple):
    """A local step of a client in a round, to which every computation of the training belongs."""

    round: int = 0
    client: int = 0
    step: int = 0


START = LocalStep()


def keyed_seed(seed: int, purpose: str, t: int = 0, client: int = 0, *within: int) -> int:
    """A 63-bit seed for one purpose of one client in one round, or for a part of it.

    It is the first 64-bit word of numpy's `SeedSequence([seed, crc32(purpose), round, client, *within])`,
    without its top bit.
    """
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), t, client, *within])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def numpy_stream(seed: int, purpose: str, t: int = 0, client: int = 0) -> np.random.Generator:
    """A numpy generator for one purpose of one client in one round."""
    return np.random.default_rng(keyed_seed(seed, purpose, t, client))


def torch_stream(seed: int, purpose: str, t: int = 0, client: int = 0) -> "torch.Generator":
    """A torch CPU generator for one purpose of one client in one round."""
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, purpose, t, client))
