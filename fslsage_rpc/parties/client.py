"""One client: its data, its half of the model, its auxiliary model, and the few things it computes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.data.batches import ImageBatches
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.alignment import cut_layer_gradient
from fslsage_rpc.parties.losses import LossSum
from fslsage_rpc.parties.optimizers import ScheduledOptimizer


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
        optimizer: ScheduledOptimizer,
        auxiliary_optimizer: ScheduledOptimizer | None,
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
        self._phase = partial(timeline.phase, row=f"client {id}")
        self._auxiliary = auxiliary
        self._auxiliary_optimizer = auxiliary_optimizer
        self.losses = LossSum()  # of a client that trains the whole model
        if auxiliary is not None:
            self._auxiliary_weights = flatten(auxiliary)
            if auxiliary_optimizer is None:
                self.freeze_auxiliary()

    @property
    def auxiliary_weights(self) -> Weights:
        """The weights of the auxiliary model, of an algorithm that has one."""
        return self._auxiliary_weights

    def batches(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The client's training batches of a round: x `[B, C, H, W]`, y `[B]`."""
        keys = self._keys
        batches = self.data.shuffled(keys.seed, round, self.id, keys.local_epochs, keys.augment)
        while True:
            with self._phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def forward(self, x: Tensor) -> Tensor:
        """Smashed data z `[B, ...]` of images x `[B, C, H, W]`, with its autograd graph."""
        with self._phase("forward_backward"):
            return self.model(x)

    def estimate(self, z: Tensor, y: Tensor) -> Tensor:
        """The auxiliary model's estimate ĝ `[B, ...]` of the cut-layer gradient."""
        assert self._auxiliary is not None, "the algorithm has no auxiliary model"
        with self._phase("estimate"):
            return cut_layer_gradient(self._auxiliary, z, y)

    def train_auxiliary(self, z: Tensor, y: Tensor) -> Tensor:
        """One optimizer step of the client's own auxiliary model on (z, y).

        Returns:
            The gradient of its loss with respect to z `[B, ...]`, at the weights before the step.
        """
        assert self._auxiliary is not None
        assert self._auxiliary_optimizer is not None
        with self._phase("estimate"):
            z = z.detach().requires_grad_()
            F.cross_entropy(self._auxiliary(z), y).backward()
            self._auxiliary_optimizer.step()
            assert z.grad is not None
            return z.grad

    def train_whole_model(self, x: Tensor, y: Tensor) -> None:
        """One optimizer step of a client whose model is the whole model."""
        with self._phase("forward_backward"):
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.losses.add(loss, len(y))

    def backward(self, z: Tensor, gradient: Tensor) -> None:
        """Back-propagate a cut-layer gradient `[B, ...]` through the client model and take one optimizer
        step.
        """
        with self._phase("forward_backward"):
            z.backward(gradient)
            self.optimizer.step()

    def end_round(self) -> None:
        """Learning rates that follow the rounds move on; absent clients' too."""
        self.optimizer.end_round()
        if self._auxiliary_optimizer is not None:
            self._auxiliary_optimizer.end_round()

    def state(self) -> dict[str, Any]:
        """Everything that stays with the client from round to round, but its samples."""
        state = {"weights": self.weights.state(), "optimizer": self.optimizer.state()}
        if self._auxiliary is not None:
            state["auxiliary_weights"] = self.auxiliary_weights.state()
        if self._auxiliary_optimizer is not None:
            state["auxiliary_optimizer"] = self._auxiliary_optimizer.state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state.

        That of a client that was away (`returning.py`) may have None for an optimizer, which then starts
        anew, and counts the rounds that were missed.
        """
        self.weights.load_state(state["weights"])
        if state["optimizer"] is not None:
            self.optimizer.load_state(state["optimizer"])
        if self._auxiliary is not None:
            self.auxiliary_weights.load_state(state["auxiliary_weights"])
        if "auxiliary_optimizer" not in state:
            self.freeze_auxiliary()
        elif self._auxiliary_optimizer is not None and state["auxiliary_optimizer"] is not None:
            self._auxiliary_optimizer.load_state(state["auxiliary_optimizer"])
        for _ in range(state.get("rounds_missed", 0)):
            self.end_round()

    def freeze_auxiliary(self) -> None:
        """From here on the auxiliary model is the server's to fit: this client only loads and uses it."""
        self._auxiliary_optimizer = None
        if self._auxiliary is not None:
            self._auxiliary.requires_grad_(False)
