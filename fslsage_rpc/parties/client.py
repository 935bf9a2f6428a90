"""One client: its data, its half of the model, its auxiliary model, and the few things it computes."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from fslsage_rpc.device.graphs import Tensors
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.client_auxiliary import ClientAuxiliary
from fslsage_rpc.parties.coding import Coded, CodedWeights
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.losses import LossSum
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import Body, SmashedData
from fslsage_rpc.randomness import LocalStep


class NoAuxiliary(AttributeError):
    """The algorithm has no auxiliary model."""


class Client:
    """A client and everything that stays with it between rounds: weights, optimizer state and samples.

    Args:
        draw: the training batches of a round, by its number from 0: x `[B, ...]`, y `[B, ...]`.
        context: whose timeline is that of the rank.
    """

    def __init__(
        self,
        client_id: int,
        model: nn.Module,
        optimizer: ScheduledOptimizer,
        draw: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
        context: Context,
        auxiliary: ClientAuxiliary | None = None,
    ):
        self.id = client_id
        self.model = model
        self.weights = flatten(model)
        self.optimizer = optimizer
        self.losses = LossSum()  # of a client that trains the whole model
        self.codings = context.codings
        self._draw = draw
        self._loss = context.loss
        self._phase = partial(context.timeline.phase, row=f"client {client_id}")
        self._auxiliary = auxiliary
        self._at = LocalStep(client=client_id)
        self._masks = Masks(model, context.seed)
        self.passes = context.graphed(self._masks, optimizer)
        self.whole_steps = context.graphed(self._masks, optimizer)

    @property
    def auxiliary(self) -> ClientAuxiliary:
        """The auxiliary model.

        Raises:
            NoAuxiliary: like `estimate` and `train_auxiliary`, where there is none.
        """
        if self._auxiliary is None:
            raise NoAuxiliary
        return self._auxiliary

    @property
    def auxiliary_weights(self) -> Weights:
        """Those of the auxiliary model."""
        return self.auxiliary.weights

    def batches(self, t: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The client's training batches of a round, each made when it is asked for: x `[B, ...]`, y
        `[B, ...]`. What the client computes until the next belongs to that local step.
        """
        batches, steps = self._draw(t), count()

        def draw() -> tuple[Tensor, Tensor] | None:
            self._at = LocalStep(t, self.id, next(steps))
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
        auxiliary = self.auxiliary
        with self._phase(Phase.ESTIMATE):
            return auxiliary.estimate(z, y, self._at)

    def train_auxiliary(self, z: Tensor, y: Tensor) -> Tensor:
        """One optimizer step of the client's own auxiliary model on (z, y).

        Returns:
            The gradient of its loss with respect to z `[B, ...]`, at the weights before the step.
        """
        auxiliary = self.auxiliary
        with self._phase(Phase.ESTIMATE):
            return auxiliary.train(z, y, self._at)

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

    def encode(self, body: Body, number: int) -> Body:
        """The client's request of this number as it travels: its smashed data are coded."""
        if not (self.codings.smashed and isinstance(body, SmashedData) and isinstance(body.z, Tensor)):
            return body
        with self._phase(Phase.ENCODE):
            return type(body)(self.codings.smashed.encode(body.z, self._at.round, self.id, number), body.y)

    def decode(self, answer: Any) -> Any:
        """An answer as it arrives; of an auxiliary model, what the server has in use from here on."""
        if not isinstance(answer, Coded | CodedWeights):
            return answer
        with self._phase(Phase.DECODE):
            if isinstance(answer, Coded):
                return self.codings.gradient.decode(answer)
            change = self.codings.auxiliary.decode(answer.change)
            return Weights(self.auxiliary.weights.floats + change, answer.integers)

    def end_round(self) -> None:
        """Learning rates that follow the rounds move on; absent clients' too."""
        self.optimizer.end_round()
        if self._auxiliary is not None:
            self._auxiliary.end_round()

    def state(self) -> dict[str, Any]:
        """Everything that stays with the client from round to round, but its samples."""
        state = {"weights": self.weights.state(), "optimizer": self.optimizer.state()}
        return state if self._auxiliary is None else state | self._auxiliary.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state.

        That of a client that was away (`training/going_on.py`) may have None for an optimizer, which then
        starts anew, and counts the rounds that were missed.
        """
        self.weights.load_state(state["weights"])
        if state["optimizer"] is not None:
            self.optimizer.load_state(state["optimizer"])
        if self._auxiliary is not None:
            self._auxiliary.load_state(state)
        for _ in range(state.get("rounds_missed", 0)):
            self.end_round()

    @property
    def owns_auxiliary(self) -> bool:
        """Does this client train its auxiliary model?"""
        return self._auxiliary is not None and self._auxiliary.optimizer is not None

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
