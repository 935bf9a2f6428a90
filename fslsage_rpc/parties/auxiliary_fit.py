"""FSL-SAGE's alignment in numbers: an auxiliary model is fitted to the server model's cut-layer gradients."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from fslsage_rpc.config.schema import AlignmentKeys
from fslsage_rpc.device.graphs import Tensors
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.models.flat import Weights, copy_of, flatten, trainable
from fslsage_rpc.models.segment import differentiated_twice
from fslsage_rpc.parties.agreement import Agreement, FitRecord
from fslsage_rpc.parties.alignment_buffer import AlignmentBuffer, Batch
from fslsage_rpc.parties.coding import CodedWeights
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.losses import Loss
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.randomness import START, LocalStep

Target = tuple[Tensor, Tensor, Tensor]  # z [B, ...], y [B], g [B, ...]


def cut_layer_gradient(
    model: nn.Module, z: Tensor, y: Tensor, loss: Loss = F.cross_entropy, create_graph: bool = False
) -> Tensor:
    """grad_z loss(model(z), y), the loss being the mean over the batch; `[B, ...]` like z.

    With the server model it is the true gradient g, with an auxiliary model the estimate ĝ. Parameter
    gradients are not computed, except (`create_graph`) the graph through which ĝ depends on the parameters.
    """
    z = z.detach().requires_grad_()
    with differentiated_twice(create_graph):
        outputs = model(z)
    return torch.autograd.grad(loss(outputs, y), z, create_graph=create_graph)[0].contiguous()


@contextmanager
def untouched_statistics(model: nn.Module) -> Iterator[None]:
    """Train-mode forward passes that normalise by the batch but leave running statistics as they are."""
    tracking = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@dataclass
class FitInputs:
    """All that a fit behind the training depends on, as it was at its start: going on from a checkpoint makes
    the fit again.

    Attributes:
        targets: None until they are computed.
        rounds: that have ended since: the learning rate follows them once the fit is taken up.
    """

    at: LocalStep
    weights: Weights
    optimizer: dict[str, Any]
    targets: list[Target] | None = None
    rounds: int = 0

    def state(self) -> dict[str, Any]:
        """As it was at the start, but for the optimizer; the targets are there at the end of a round."""
        assert self.targets is not None
        return {
            "at": [self.at.round, self.at.client, self.at.step],
            "weights": self.weights.state(),
            "targets": [list(target) for target in self.targets],
            "rounds": self.rounds,
        }


class AuxiliaryFit:
    """One client's part of the server: its auxiliary model, that model's optimizer, and the alignment buffer.

    With graphs the optimizer's steps are captured; those of L-BFGS are not.

    Where fits run behind the training, or travel coded, there are two copies of the model. The one in use
    stays as it is until the client takes up the fitted one.

    Args:
        model: that the optimizer's parameters are of.

    Attributes:
        model, weights: those in use, by this client and for the drift.
        fitted: the weights that a fit moves; where there is one copy, the same.
        inputs: of a fit behind the training, until it is taken up.
        left_out: `[n]`, by how much the fitted weights differ from those in use; None before they have
            travelled, and where they do not travel coded.
        agreement: of estimates with the true gradients of uploads, since it was last read.
        record: of the last fit that was taken up, likewise.
    """

    def __init__(
        self, model: nn.Module, optimizer: ScheduledOptimizer, keys: AlignmentKeys, context: Context
    ):
        self._fitted_model = model
        self.fitted = flatten(model)
        self._apart = bool(keys.lag) or bool(context.codings.auxiliary)
        self.model = copy_of(model, context.device) if self._apart else model
        self.weights = flatten(self.model) if self._apart else self.fitted
        self.optimizer = optimizer
        self.inputs: FitInputs | None = None
        self.left_out: Tensor | None = None
        self._next: Weights | None = None  # handed out, to be in use from the next turn on
        self._made: FitRecord | None = None  # of the fit that is not taken up
        self.buffer = AlignmentBuffer(keys.buffer_size)
        self.context = context
        self.agreement = Agreement()
        self.record: FitRecord | None = None
        self.keys = keys
        self._masks = Masks(model, context.seed)
        self._masks_in_use = Masks(self.model, context.seed)
        self.steps = context.graphed(self._masks, optimizer)

    def compare(self, z: Tensor, y: Tensor, gradient: Tensor, at: LocalStep) -> None:
        """Measure the drift on an upload: the estimate beside its true gradient `[B, ...]`."""
        self._masks_in_use.begin(at)
        self.agreement.add(cut_layer_gradient(self.model, z, y, self.context.loss), gradient)

    def start(self) -> None:
        """A fit starts from the weights in use, and what was left out of them."""
        if self._apart:
            self.fitted.load(self.weights)
        if self.left_out is not None:
            self.fitted.floats += self.left_out

    def begin(self, at: LocalStep) -> FitInputs:
        """Start a fit behind the training. Nothing that comes before it is taken up changes its inputs."""
        self.start()
        optimizer = copy.deepcopy(self.optimizer.state())
        self.inputs = FitInputs(at, self.fitted.clone(), optimizer)
        return self.inputs

    def batches(self) -> list[Batch]:
        """Copies of the buffer's samples as they are now, oldest first, in batches."""
        return self.buffer.batches(self.keys.batch_size)

    def targets(
        self, server_model: nn.Module, at: LocalStep = START, batches: Sequence[Batch] | None = None
    ) -> list[Target]:
        """The buffer in batches, oldest first, with the server model's true gradients on them.

        They are computed by train-mode passes that leave every parameter and buffer of the server model as
        it was.

        Args:
            at: the local step of the alignment.
            batches: of the buffer as it was then; None: as it is.
        """
        masks = Masks(server_model, self.context.seed)
        targets = []
        with untouched_statistics(server_model):
            for number, (z, y) in enumerate(self.batches() if batches is None else batches):
                masks.begin_alignment(at, number, passes=0)
                targets.append((z, y, cut_layer_gradient(server_model, z, y, self.context.loss)))
        return targets

    def fit(
        self, targets: list[Target], at: LocalStep = START, before_each: Callable[[], None] = lambda: None
    ) -> FitRecord:
        """Fit the auxiliary model to true gradients (arXiv 2505.23182): minimise sum_samples ||ĝ - g||^2.

        Args:
            at: the local step of the alignment.
            before_each: called before the work on a batch; by what it raises the fit ends.
        """
        by = {"optimizer": self._fit_by_optimizer, "lbfgs": self._fit_by_lbfgs}[self.keys.solver]
        self._made = by(targets, at, before_each)
        return self._made

    def hand_out(self, at: LocalStep, number: int) -> Weights | CodedWeights:
        """The fitted weights as they travel to the client, who has them in use as it decodes them.

        A codec codes their change from those in use so far. What it leaves out is in the start of the next
        fit: error feedback.

        Args:
            at: the local step of the request.
            number: of the client's request in its round.
        """
        fitted, coding, timeline = self.fitted, self.context.codings.auxiliary, self.context.timeline
        if not coding:
            self._next = fitted
            return fitted.clone()
        with timeline.phase(Phase.ENCODE):
            change = coding.encode(fitted.floats - self.weights.floats, at.round, at.client, number)
        with timeline.phase(Phase.DECODE):
            self._next = Weights(self.weights.floats + coding.decode(change), fitted.integers)
        return CodedWeights(change, fitted.integers.clone())

    def take_up(self) -> None:
        """Have what was handed out in use from here on."""
        assert self._next is not None, "nothing was handed out"
        if self._apart:
            self.weights.load(self._next)
        if self.context.codings.auxiliary:
            self.left_out = self.fitted.floats - self.weights.floats
        self._next = None
        self.record, self._made = self._made, None
        if self.inputs is not None:
            for _ in range(self.inputs.rounds):
                self.optimizer.end_round()
            self.inputs = None

    def end_round(self) -> None:
        """The learning rate follows the rounds; that of a fit behind the training stays as it was."""
        if self.inputs is not None:
            self.inputs.rounds += 1
        else:
            self.optimizer.end_round()

    def take_records(self) -> tuple[dict[str, float] | None, dict[str, float] | None]:
        """The last fit's agreement and the drift of the round that has ended; None where there is none."""
        record, agreement = self.record, self.agreement
        self.record, self.agreement = None, Agreement()
        return record.read() if record else None, agreement.read()

    def _fit_by_optimizer(
        self, targets: list[Target], at: LocalStep, before_each: Callable[[], None]
    ) -> FitRecord:
        """Passes over the same batches, unshuffled, with a step on each and masks of their own.

        They are fewer than `epochs` where one lowers the objective by less than `tolerance` of it.
        """
        last, stops_early = math.inf, self.keys.tolerance is not None
        first = agreement = Agreement()
        for passes in range(1, self.keys.epochs + 1):
            watched = stops_early or passes in (1, self.keys.epochs)
            agreement = first if passes == 1 else Agreement()
            objectives: list[Tensor] = []
            for number, target in enumerate(targets):
                before_each()
                self._masks.begin_alignment(at, number, passes)
                objective, estimate = self.steps(self._step, *target)
                self.optimizer.advance()
                objectives.append(objective)
                if watched:
                    agreement.add(estimate, target[2])
            if self.keys.tolerance is not None:
                now = torch.stack(objectives).sum().item()  # waits for the device: only where it is asked for
                if now > (1 - self.keys.tolerance) * last:
                    break
                last = now
        return FitRecord(first, agreement, passes)

    def _fit_by_lbfgs(
        self, targets: list[Target], at: LocalStep, before_each: Callable[[], None]
    ) -> FitRecord:
        """L-BFGS on the whole buffer at once, with a strong Wolfe line search: at most `epochs` passes, the
        last search being brought to its end. It starts anew at every alignment. A line search needs one
        function, so all passes have the masks of the targets.

        The last pass of a search need not be at the weights that it ends with: these are looked at once more.
        """
        wide = self.weights.floats.dtype
        scale = torch.stack([true.to(wide).square().sum() for _, _, true in targets]).sum()
        solver = torch.optim.LBFGS(
            trainable(self._fitted_model),
            max_iter=self.keys.epochs,
            max_eval=self.keys.epochs,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        passes, first, last = 0, Agreement(), Agreement()

        def objective() -> Tensor:
            nonlocal passes
            passes += 1
            solver.zero_grad()
            # As a share of ||g||^2: the first step of the search assumes gradients of the order of 1.
            objectives = []
            for number, target in enumerate(targets):
                before_each()
                self._masks.begin_alignment(at, number, passes=0)
                accumulated, estimate = self._accumulate(target, scale)
                objectives.append(accumulated)
                if passes == 1:
                    first.add(estimate, target[2])
            return torch.stack(objectives).sum()

        solver.step(objective)
        solver.zero_grad()
        for number, (z, y, target) in enumerate(targets):
            self._masks.begin_alignment(at, number, passes=0)
            last.add(cut_layer_gradient(self._fitted_model, z, y, self.context.loss), target)
        return FitRecord(first, last, passes)

    def _step(self, *target: Tensor) -> Tensors:
        z, y, true = target
        accumulated = self._accumulate((z, y, true))
        self.optimizer.apply()
        return accumulated

    def _accumulate(self, target: Target, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """||ĝ - g||^2 / scale on one batch, whose gradient is added to the parameters', and ĝ `[B, ...]`."""
        z, y, true = target
        estimate = cut_layer_gradient(self._fitted_model, z, y, self.context.loss, create_graph=True)
        objective = (estimate.to(self.weights.floats.dtype) - true).square().sum() / scale
        objective.backward(inputs=trainable(self._fitted_model))
        return objective.detach(), estimate.detach()

    def state(self) -> dict[str, Any]:
        """Everything that stays from round to round."""
        inputs = self.inputs
        return {
            "weights": self.weights.state(),
            "optimizer": self.optimizer.state() if inputs is None else inputs.optimizer,
            "buffer": self.buffer.state(),
            **({} if self.left_out is None else {"left_out": self.left_out}),
            **({} if inputs is None else {"inputs": inputs.state()}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state. A fit that was behind the training is to be made again from its inputs."""
        device = self.weights.floats.device
        self.weights.load_state(state["weights"])
        self.optimizer.load_state(state["optimizer"])
        self.buffer.load_state(state["buffer"], device)
        left_out, inputs = state.get("left_out"), state.get("inputs")
        self.left_out = None if left_out is None else left_out.to(device, copy=True)
        self.inputs = None
        if inputs is not None:
            self.fitted.load_state(inputs["weights"])
            targets = [tuple(part.to(device, copy=True) for part in target) for target in inputs["targets"]]
            self.inputs = FitInputs(
                LocalStep(*inputs["at"]),
                self.fitted.clone(),
                copy.deepcopy(state["optimizer"]),
                targets,
                inputs["rounds"],
            )
