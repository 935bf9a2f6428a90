"""The server of a finished model: it only predicts."""

import torch
from torch import Tensor, nn


class FinishedServer:
    """Owns the server half of a model that trains no more."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._model = model.to(device).eval()
        self._device = device

    def predict(self, z: Tensor) -> Tensor:
        """The outputs `[B, ...]` for smashed data z `[B, ...]`."""
        with torch.no_grad():
            outputs: Tensor = self._model(z.to(self._device))
        return outputs
