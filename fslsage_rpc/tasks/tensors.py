"""Samples and batches of plain tensors, for tasks that change nothing in their samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.randomness import numpy_stream


@dataclass(frozen=True)
class TensorSamples:
    """Inputs x `[N, ...]`, what is to be predicted of them y `[N, ...]`, and labels `[N]` of int64, by which
    partitions divide; on the CPU.
    """

    x: Tensor
    y: Tensor
    labels: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held, each with the samples in front."""
        return self.x, self.y, self.labels

    def subset(self, indices: Any) -> "TensorSamples":
        """The samples at these indices, copied."""
        return TensorSamples(*(tensor[indices] for tensor in self.tensors))


class TensorBatches:
    """Samples on the training device, cut into batches there.

    Args:
        dtype: of all floating-point tensors.
    """

    def __init__(self, samples: TensorSamples, batch_size: int, device: torch.device, dtype: torch.dtype):
        self._x, self._y = (
            tensor.to(device, dtype if tensor.is_floating_point() else None)
            for tensor in (samples.x, samples.y)
        )
        self._batch_size = batch_size

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples as stored, for evaluation: x `[B, ...]` and y `[B, ...]`."""
        size = self._batch_size
        return zip(self._x.split(size), self._y.split(size), strict=True)

    def shuffled(
        self, seed: int, t: int, client: int, epochs: int, augment: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of one client in one round, in an order of their own in each epoch."""
        drawn = numpy_stream(seed, "shuffle", t, client)
        for _ in range(epochs):
            order = torch.from_numpy(drawn.permutation(len(self._y)))
            if self._x.device.type != "cpu":  # from pinned memory: the host does not wait
                order = order.pin_memory().to(self._x.device, non_blocking=True)
            for indices in order.split(self._batch_size):
                yield self._x[indices], self._y[indices]
