"""One client: its data, its half of the model, its auxiliary model, and the few things it computes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.device.graphs import Graphed, Tensors
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.models.flat import Weights, flatten, trainable
from fslsage_rpc.parties.alignment import cut_layer_gradient
from fslsage_rpc.parties.losses import Loss, LossSum
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.randomness import LocalStep
from fslsage_rpc.tasks.base import Batches


class NoAuxiliary(AttributeError):
    """The algorithm has no auxiliary model."""


@dataclass(frozen=True)
class TrainingKeys:
    """How clients draw their batches and masks."""

    seed: int
    local_epochs: int
    augment: bool


class Client:
    """A client and everything that stays with it between rounds: weights, optimizer state and samples.

    Every computation is entered on the timeline of the rank that hosts it.

    Args:
        make_auxiliary_optimizer: that of an auxiliary model which the client trains, of its parameters.
        graphs: the computations of a step are captured, but for those of models that draw masks.
    """

    def __init__(
        self,
        id: int,
        model: nn.Module,
        auxiliary: nn.Module | None,
        optimizer: ScheduledOptimizer,
        make_auxiliary_optimizer: Callable[[list[nn.Parameter]], ScheduledOptimizer],
        data: Batches,
        keys: TrainingKeys,
        timeline: Timeline,
        graphs: bool = False,
        loss: Loss = F.cross_entropy,
    ):
        self.id = id
        self.model = model
        self.weights = flatten(model)
        self.optimizer = optimizer
        self.data = data
        self._keys = keys
        self._loss = loss
        self._phase = partial(timeline.phase, row=f"client {id}")
        self._auxiliary = auxiliary
        self._make_auxiliary_optimizer = make_auxiliary_optimizer
        self._auxiliary_optimizer: ScheduledOptimizer | None = None
        self.losses = LossSum()  # of a client that trains the whole model
        self._at = LocalStep(client=id)
        self._masks = Masks(model, keys.seed)
        self._auxiliary_masks = Masks(auxiliary, keys.seed)
        self._captures_auxiliary = graphs and not self._auxiliary_masks
        self.passes = Graphed(graphs and not self._masks, optimizer)
        self.whole_steps = Graphed(graphs and not self._masks, optimizer)
        self.estimates = Graphed(self._captures_auxiliary)
        self._auxiliary_parameters = [] if auxiliary is None else trainable(auxiliary)
        if auxiliary is not None:
            self._auxiliary_weights = flatten(auxiliary)
            self.freeze_auxiliary()

    @property
    def auxiliary_weights(self) -> Weights:
        """The weights of the auxiliary model.

        Raises:
            NoAuxiliary: like `estimate` and `train_auxiliary`, where there is none.
        """
        if self._auxiliary is None:
            raise NoAuxiliary
        return self._auxiliary_weights

    def batches(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The client's training batches of a round, each made when it is asked for: x `[B, ...]`, y
        `[B, ...]`. What the client computes until the next belongs to that local step.
        """
        keys = self._keys
        batches = self.data.shuffled(keys.seed, round, self.id, keys.local_epochs, keys.augment)
        steps = count()

        def draw() -> tuple[Tensor, Tensor] | None:
            self._at = LocalStep(round, self.id, next(steps))
            with self._phase(Phase.DATA):
                return next(batches, None)

        return iter(draw, None)  # keeps no batch, as a generator's own variables would

    def forward(self, x: Tensor) -> Tensor:
        """Smashed data z `[B, ...]` of inputs x `[B, ...]`, to be given back to `backward`."""
        with self._phase(Phase.FORWARD_BACKWARD):
            self._masks.begin(self._at)
            return self.passes(self._forward, x, then=self._backward)[0]

    def estimate(self, z: Tensor, y: Tensor) -> Tensor:
        """The auxiliary model's estimate ĝ `[B, ...]` of the cut-layer gradient."""
        if self._auxiliary is None:
            raise NoAuxiliary
        with self._phase(Phase.ESTIMATE):
            self._auxiliary_masks.begin(self._at)
            return self.estimates(self._estimate, z, y)[0]

    def train_auxiliary(self, z: Tensor, y: Tensor) -> Tensor:
        """One optimizer step of the client's own auxiliary model on (z, y).

        Returns:
            The gradient of its loss with respect to z `[B, ...]`, at the weights before the step.
        """
        if self._auxiliary is None:
            raise NoAuxiliary
        optimizer = self._auxiliary_optimizer or self.own_auxiliary()
        with self._phase(Phase.ESTIMATE):
            self._auxiliary_masks.begin(self._at)
            (gradient,) = self.auxiliary_steps(self._auxiliary_step, z, y)
            optimizer.advance()
            return gradient

    def train_whole_model(self, x: Tensor, y: Tensor) -> None:
        """One optimizer step of a client whose model is the whole model."""
        with self._phase(Phase.FORWARD_BACKWARD):
            self._masks.begin(self._at)
            (loss,) = self.whole_steps(self._whole_step, x, y)
            self.optimizer.advance()
            self.losses.add(loss, len(y))

    def backward(self, z: Tensor, gradient: Tensor) -> None:
        """Back-propagate a cut-layer gradient `[B, ...]` through the client model and take one optimizer
        step.
        """
        with self._phase(Phase.FORWARD_BACKWARD):
            self.passes.finish(self._backward, z, gradient)
            self.optimizer.advance()

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

        That of a client that was away (`training/going_on.py`) may have None for an optimizer, which then
        starts anew, and counts the rounds that were missed.
        """
        self.weights.load_state(state["weights"])
        if state["optimizer"] is not None:
            self.optimizer.load_state(state["optimizer"])
        if self._auxiliary is not None:
            self.auxiliary_weights.load_state(state["auxiliary_weights"])
        if "auxiliary_optimizer" not in state:
            self.freeze_auxiliary()
        elif state["auxiliary_optimizer"] is not None:
            optimizer = self._auxiliary_optimizer or self.own_auxiliary()
            optimizer.load_state(state["auxiliary_optimizer"])
        for _ in range(state.get("rounds_missed", 0)):
            self.end_round()

    def own_auxiliary(self) -> ScheduledOptimizer:
        """From here on this client trains its auxiliary model, with a new optimizer."""
        for parameter in self._auxiliary_parameters:
            parameter.requires_grad_()
        optimizer = self._make_auxiliary_optimizer(self._auxiliary_parameters)
        self.auxiliary_steps = Graphed(self._captures_auxiliary, optimizer)
        self._auxiliary_optimizer = optimizer
        return optimizer

    @property
    def owns_auxiliary(self) -> bool:
        """Does this client train its auxiliary model?"""
        return self._auxiliary_optimizer is not None

    def freeze_auxiliary(self) -> None:
        """From here on the auxiliary model is the server's to fit: this client only loads and uses it."""
        self._auxiliary_optimizer = None
        for parameter in self._auxiliary_parameters:
            parameter.requires_grad_(False)

    def _forward(self, x: Tensor) -> Tensors:
        return (self.model(x),)

    def _backward(self, z: Tensor, gradient: Tensor) -> None:
        z.backward(gradient)
        self.optimizer.apply()

    def _whole_step(self, x: Tensor, y: Tensor) -> Tensors:
        loss = self._loss(self.model(x), y)
        loss.backward()
        self.optimizer.apply()
        return (loss,)

    def _estimate(self, z: Tensor, y: Tensor) -> Tensors:
        assert self._auxiliary is not None
        return (cut_layer_gradient(self._auxiliary, z, y, self._loss),)

    def _auxiliary_step(self, z: Tensor, y: Tensor) -> Tensors:
        assert self._auxiliary is not None
        assert self._auxiliary_optimizer is not None
        z = z.detach().requires_grad_()
        self._loss(self._auxiliary(z), y).backward()
        self._auxiliary_optimizer.apply()
        assert z.grad is not None
        return (z.grad,)
