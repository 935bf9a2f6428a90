"""A client's auxiliary model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fslsage_rpc.device.graphs import Tensors
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.models.flat import flatten, trainable
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.randomness import LocalStep


class ClientAuxiliary:
    """An auxiliary model that the server fits, and the client only loads and uses; or that the client trains.

    Args:
        make_optimizer: that of a client which trains it, of its parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], ScheduledOptimizer],
        context: Context,
    ):
        self.weights = flatten(model)
        self._model, self._context = model, context
        self._make_optimizer = make_optimizer
        self._parameters = trainable(model)
        self._masks = Masks(model, context.seed)
        self.estimates = context.graphed(self._masks)
        self.freeze()

    def freeze(self) -> None:
        """From here on it is the server's to fit."""
        self.optimizer: ScheduledOptimizer | None = None
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def take_over(self) -> ScheduledOptimizer:
        """From here on the client trains it, with a new optimizer."""
        for parameter in self._parameters:
            parameter.requires_grad_()
        self.optimizer = self._make_optimizer(self._parameters)
        self.steps = self._context.graphed(self._masks, self.optimizer)
        return self.optimizer

    def estimate(self, z: Tensor, y: Tensor, at: LocalStep) -> Tensor:
        """The estimate ĝ `[B, ...]`: `Client.estimate`."""
        self._masks.begin(at)
        return self.estimates(self._estimate, z, y)[0]

    def train(self, z: Tensor, y: Tensor, at: LocalStep) -> Tensor:
        """One step on (z, y), and its gradient `[B, ...]`: `Client.train_auxiliary`."""
        optimizer = self.optimizer or self.take_over()
        self._masks.begin(at)
        (gradient,) = self.steps(self._step, z, y)
        optimizer.advance()
        return gradient

    def end_round(self) -> None:
        """A learning rate that follows the rounds moves on."""
        if self.optimizer is not None:
            self.optimizer.end_round()

    def state(self) -> dict[str, Any]:
        """Everything that stays from round to round."""
        state = {"auxiliary_weights": self.weights.state()}
        return state if self.optimizer is None else state | {"auxiliary_optimizer": self.optimizer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state. An optimizer that is None goes on as it is."""
        self.weights.load_state(state["auxiliary_weights"])
        if "auxiliary_optimizer" not in state:
            self.freeze()
        elif state["auxiliary_optimizer"] is not None:
            (self.optimizer or self.take_over()).load_state(state["auxiliary_optimizer"])

    def _estimate(self, z: Tensor, y: Tensor) -> Tensors:
        return (cut_layer_gradient(self._model, z, y, self._context.loss),)

    def _step(self, z: Tensor, y: Tensor) -> Tensors:
        assert self.optimizer is not None
        z = z.detach().requires_grad_()
        self._context.loss(self._model(z), y).backward()
        self.optimizer.apply()
        assert z.grad is not None
        return (z.grad,)
