"""The server of a finished model: it only predicts."""

import torch
from torch import Tensor, nn


class FinishedServer:
    """Owns the server half of a model that trains no more."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._model = model.to(device).eval()
        self._device = device

    def predict_last(self, z: Tensor) -> Tensor:
        """Logits `[B, classes]` at the last position, from smashed data z `[B, T, ...]`."""
        with torch.no_grad():
            logits: Tensor = self._model(z.to(self._device))
            return logits[:, -1].clone()
