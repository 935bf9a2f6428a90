"""The alignment buffer: a client's newest uploads, on which the server aligns its auxiliary model."""

from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.device.memory import on_own_pages

Batch = tuple[Tensor, Tensor]  # z [B, ...], y [B]


class AlignmentBuffer:
    """The newest `size` samples of (z, y) that a client uploaded: first in, first out.

    They are copied into two rings that stay. Uploads that were kept themselves would lie scattered among what
    the server has in memory for a moment only. The free places between them would grow from round to round.
    """

    def __init__(self, size: int):
        self.size = size
        self._rings: Batch | None = None
        self._samples = 0
        self._end = 0  # where the next sample goes; once all places are taken, the oldest one's

    def __len__(self) -> int:
        return self._samples

    def add(self, z: Tensor, y: Tensor) -> None:
        """Keep a copy of a batch, dropping the oldest samples beyond the size."""
        batch = z[-self.size :], y[-self.size :]
        samples = min(self._samples + len(batch[1]), self.size)
        if self._rings is None or samples > len(self._rings[1]):
            self._rings = self._larger(samples, batch)
        for ring, new in zip(self._rings, batch, strict=True):
            before_the_end = min(len(new), len(ring) - self._end)
            ring[self._end : self._end + before_the_end] = new[:before_the_end]
            ring[: len(new) - before_the_end] = new[before_the_end:]
        self._samples = samples
        self._end = (self._end + len(batch[1])) % self.size

    def batches(self, size: int) -> list[Batch]:
        """Copies of the samples, oldest first, in batches of `size`; the last may be short."""
        assert self._rings is not None
        z, y = (torch.cat((ring[self._end : self._samples], ring[: self._end])) for ring in self._rings)
        return list(zip(z.split(size), y.split(size), strict=True))

    def state(self) -> dict[str, Any]:
        """All samples, oldest first, as one z `[n, ...]` and y `[n]`; nothing of an empty buffer."""
        if not self._samples:
            return {}
        ((z, y),) = self.batches(self._samples)
        return {"z": z, "y": y}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Hold these samples and no others."""
        self._rings = None
        self._samples = self._end = 0
        if state:
            self.add(state["z"].to(device), state["y"].to(device))

    def _larger(self, samples: int, batch: Batch) -> Batch:
        """Rings with so many places, the samples so far in the first ones."""
        z, y = (on_own_pages((samples, *new.shape[1:]), like=new) for new in batch)
        for ring, old in zip((z, y), self._rings or (), strict=False):
            ring[: self._samples] = old
        return z, y
