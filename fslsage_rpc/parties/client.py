"""One client: its data, its half of the model, its auxiliary model, and the few things it computes."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from fslsage_rpc.data.batches import ImageBatches
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.alignment import cut_layer_gradient


@dataclass(frozen=True)
class TrainingKeys:
    """How clients draw their batches."""

    seed: int
    local_epochs: int
    augment: bool


class Client:
    """A client and everything that stays with it between rounds: weights, optimizer state and samples.

    Every computation is entered on the timeline of the rank that hosts it.
    """

    def __init__(
        self,
        id: int,
        model: nn.Module,
        auxiliary: nn.Module | None,
        optimizer: Optimizer,
        data: ImageBatches,
        keys: TrainingKeys,
        timeline: Timeline,
    ):
        self.id = id
        self.model = model
        self.weights = flatten(model)
        self.optimizer = optimizer
        self.data = data
        self._keys = keys
        self._timeline = timeline
        self._auxiliary = auxiliary
        if auxiliary is not None:
            self._auxiliary_weights = flatten(auxiliary)
            auxiliary.requires_grad_(False)  # a client's own steps never move it

    @property
    def auxiliary_weights(self) -> Weights:
        """The weights of the auxiliary model, of an algorithm that has one."""
        return self._auxiliary_weights

    def batches(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The client's training batches of a round: x `[B, C, H, W]`, y `[B]`."""
        keys = self._keys
        batches = self.data.shuffled(keys.seed, round, self.id, keys.local_epochs, keys.augment)
        while True:
            with self._timeline.phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def forward(self, x: Tensor) -> Tensor:
        """Smashed data z `[B, ...]` of images x `[B, C, H, W]`, with its autograd graph."""
        with self._timeline.phase("forward_backward"):
            return self.model(x)

    def estimate(self, z: Tensor, y: Tensor) -> Tensor:
        """The auxiliary model's estimate ĝ `[B, ...]` of the cut-layer gradient."""
        assert self._auxiliary is not None, "the algorithm has no auxiliary model"
        with self._timeline.phase("estimate"):
            return cut_layer_gradient(self._auxiliary, z, y)

    def backward(self, z: Tensor, gradient: Tensor) -> None:
        """Back-propagate a cut-layer gradient `[B, ...]` through the client model and take one optimizer
        step.
        """
        with self._timeline.phase("forward_backward"):
            z.backward(gradient)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
