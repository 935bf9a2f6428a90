"""The training loss of a round, summed on the device so that no step waits for it."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""the mean loss of a batch of a model's outputs, given their labels y"""


class LossSum:
    """The sum of losses over samples, and the number of samples, of batches trained on."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._samples = 0

    def add(self, loss: Tensor, samples: int) -> None:
        """Count a batch of so many samples by its mean loss."""
        summed = loss.detach().to(torch.float64) * samples
        self._sum = summed if self._sum is None else self._sum + summed
        self._samples += samples

    def take(self) -> tuple[float, int]:
        """The sum and the number so far; both start again from zero."""
        taken = (0.0 if self._sum is None else self._sum.item(), self._samples)
        self._sum, self._samples = None, 0
        return taken
