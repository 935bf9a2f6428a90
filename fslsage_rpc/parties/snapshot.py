"""A copy of the server model as it was at a request's turn."""

import threading

import torch
from torch import nn

from fslsage_rpc.models.flat import Weights, copy_of, flatten


class Snapshot:
    """A copy of a lane's model on which another thread computes an alignment's true gradients, while the lane
    trains on.

    There is one: with a copy for every alignment that waits to be fitted, the server would need the memory of
    as many models. Whoever finds it taken computes on the lane.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model = copy_of(model, device)
        self._weights = flatten(self.model)
        self._free = threading.Lock()

    def take(self, weights: Weights) -> bool:
        """Make it the copy of these weights, if it is free; until it is given back, from any thread."""
        if not self._free.acquire(blocking=False):
            return False
        self._weights.load(weights)
        return True

    def give_back(self) -> None:
        """What was computed on it is there."""
        self._free.release()
