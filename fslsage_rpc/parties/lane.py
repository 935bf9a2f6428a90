"""A lane of the server: one server-model instance and what trains it."""

from collections import deque
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from fslsage_rpc.device.graphs import Tensors
from fslsage_rpc.measure.trace import Arrow
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.models.flat import flatten
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.losses import LossSum
from fslsage_rpc.parties.mailbox import Mailbox
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import Request
from fslsage_rpc.parties.snapshot import Snapshot
from fslsage_rpc.randomness import START, LocalStep


class Lane:
    """One server-model instance; it executes one request at a time, in the order of its mailbox.

    With a `snapshot` true gradients of alignments are computed beside it. `number`: among the server's lanes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: ScheduledOptimizer,
        order: str,
        context: Context,
        snapshot: Snapshot | None = None,
        number: int = 0,
    ):
        self.number = number
        self.model = model
        self.weights = flatten(model)
        self.optimizer = optimizer
        self.context = context
        self.mailbox = Mailbox(order)
        self.released: deque[Request] = deque()
        self.busy = False
        self.snapshot = snapshot
        self.losses = LossSum()
        self._masks = Masks(model, context.seed)
        self.steps = {gradient: context.graphed(self._masks, optimizer) for gradient in (False, True)}

    def phase(self, name: str, arrow: Arrow | None = None) -> AbstractContextManager[None]:
        """The lane's time inside is entered under this phase."""
        return self.context.timeline.phase(name, arrow=arrow)

    def train(self, z: Tensor, y: Tensor, gradient: bool, at: LocalStep = START) -> Tensor | None:
        """One optimizer step on smashed data z `[B, ...]` and labels y `[B]` of a client's local step.

        Returns:
            The true cut-layer gradient g = dL/dz `[B, ...]` at the weights before the step, if asked for.
        """
        self._masks.begin(at)
        loss, *gradients = self.steps[gradient](partial(self._step, gradient=gradient), z, y)
        self.optimizer.advance()
        self.losses.add(loss, len(y))
        return gradients[0] if gradients else None

    def _step(self, z: Tensor, y: Tensor, gradient: bool) -> Tensors:
        z = z.detach().requires_grad_(gradient)
        loss = self.context.loss(self.model(z), y)
        loss.backward()
        self.optimizer.apply()
        return (loss,) if z.grad is None else (loss, z.grad)

    def state(self) -> dict[str, Any]:
        """Everything that stays from round to round."""
        return {"weights": self.weights.state(), "optimizer": self.optimizer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.weights.load_state(state["weights"])
        self.optimizer.load_state(state["optimizer"])
