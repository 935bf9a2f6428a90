"""FSL-SAGE's alignment in numbers: an auxiliary model is fitted to the server model's cut-layer gradients."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from fslsage_rpc.config.schema import AlignmentKeys
from fslsage_rpc.device.graphs import Tensors
from fslsage_rpc.device.memory import on_own_pages
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.models.flat import Weights, flatten, trainable
from fslsage_rpc.models.segment import differentiated_twice
from fslsage_rpc.parties.coding import CodedWeights
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.losses import Loss
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.randomness import START, LocalStep

Batch = tuple[Tensor, Tensor]  # z [B, ...], y [B]
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


class AlignmentBuffer:
    """The newest `size` samples of (z, y) that a client uploaded: first in, first out.

    They are copied into two rings that stay. Uploads that were kept themselves would lie scattered among what
    the server has in memory for a moment only. The free places between them would grow from round to round.
    """

    def __init__(self, size: int):
        self.size = size
        self._rings: Batch | None = None
        self._samples = 0
        self._end = 0  # where the next sample goes; once all places are taken, the oldest one's

    def __len__(self) -> int:
        return self._samples

    def add(self, z: Tensor, y: Tensor) -> None:
        """Keep a copy of a batch, dropping the oldest samples beyond the size."""
        batch = z[-self.size :], y[-self.size :]
        samples = min(self._samples + len(batch[1]), self.size)
        if self._rings is None or samples > len(self._rings[1]):
            self._rings = self._larger(samples, batch)
        for ring, new in zip(self._rings, batch, strict=True):
            before_the_end = min(len(new), len(ring) - self._end)
            ring[self._end : self._end + before_the_end] = new[:before_the_end]
            ring[: len(new) - before_the_end] = new[before_the_end:]
        self._samples = samples
        self._end = (self._end + len(batch[1])) % self.size

    def batches(self, size: int) -> list[Batch]:
        """Copies of the samples, oldest first, in batches of `size`; the last may be short."""
        assert self._rings is not None
        z, y = (torch.cat((ring[self._end : self._samples], ring[: self._end])) for ring in self._rings)
        return list(zip(z.split(size), y.split(size), strict=True))

    def state(self) -> dict[str, Any]:
        """All samples, oldest first, as one z `[n, ...]` and y `[n]`; nothing of an empty buffer."""
        if not self._samples:
            return {}
        ((z, y),) = self.batches(self._samples)
        return {"z": z, "y": y}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Hold these samples and no others."""
        self._rings = None
        self._samples = self._end = 0
        if state:
            self.add(state["z"].to(device), state["y"].to(device))

    def _larger(self, samples: int, batch: Batch) -> Batch:
        """Rings with so many places, the samples so far in the first ones."""
        z, y = (on_own_pages((samples, *new.shape[1:]), like=new) for new in batch)
        for ring, old in zip((z, y), self._rings or (), strict=False):
            ring[: self._samples] = old
        return z, y


@dataclass
class Agreement:
    """How well estimates ĝ match true gradients g, over any number of samples.

    nmse = sum ||ĝ - g||^2 / sum ||g||^2; cosine = sum <ĝ, g> / sqrt(sum ||ĝ||^2 sum ||g||^2). The sums stay
    on the device until `nmse` or `cosine` is asked for.
    """

    sums: Tensor | None = None  # ||ĝ - g||^2, ||g||^2, ||ĝ||^2, <ĝ, g>

    def add(self, estimate: Tensor, gradient: Tensor) -> None:
        """Count one batch of estimates and true gradients, both `[B, ...]`."""
        e, g = estimate.detach().flatten().double(), gradient.detach().flatten().double()
        sums = torch.stack([(e - g).square().sum(), g.square().sum(), e.square().sum(), e @ g])
        self.sums = sums if self.sums is None else self.sums + sums

    def read(self) -> dict[str, float] | None:
        """nmse and cosine; None where nothing was counted, or all true gradients are 0, so that there is no
        scale.

        The cosine of an estimate that is 0 everywhere is 0.
        """
        if self.sums is None:
            return None
        error, true, estimated, product = self.sums.tolist()
        if true == 0:
            return None
        return {"nmse": error / true, "cosine": product / (true * estimated) ** 0.5 if estimated else 0.0}


@dataclass(frozen=True)
class FitRecord:
    """How well the estimates agreed with the targets before a fit, how well after it, and the passes made."""

    before: Agreement
    after: Agreement
    passes: int

    def read(self) -> dict[str, float]:
        """nmse and cosine, before and after, and passes; empty where the true gradients are all 0."""
        moments = (("before", self.before), ("after", self.after))
        record: dict[str, float] = {
            f"{key}_{moment}": value
            for moment, agreement in moments
            for key, value in (agreement.read() or {}).items()
        }
        return {**record, "passes": self.passes} if record else {}


class AuxiliaryFit:
    """One client's part of the server: its auxiliary model, that model's optimizer, and the alignment buffer.

    With graphs the optimizer's steps are captured; those of L-BFGS are not.

    Attributes:
        weights: those in use, by this client and for the drift; during a fit, those that are fitted.
        left_out: `[n]`, by how much the fitted weights differ from those in use; None before they have
            travelled, and where they do not travel coded.
        agreement: of estimates with the true gradients of uploads, since it was last read.
        record: of the last fit, likewise.
    """

    def __init__(
        self, model: nn.Module, optimizer: ScheduledOptimizer, keys: AlignmentKeys, context: Context
    ):
        self.model = model
        self.weights = flatten(model)
        self.optimizer = optimizer
        self.left_out: Tensor | None = None
        self._in_use: Tensor | None = None  # from the start of a fit to its handing out
        self.buffer = AlignmentBuffer(keys.buffer_size)
        self.context = context
        self.agreement = Agreement()
        self.record: FitRecord | None = None
        self.keys = keys
        self._masks = Masks(model, context.seed)
        self.steps = context.graphed(self._masks, optimizer)

    def compare(self, z: Tensor, y: Tensor, gradient: Tensor, at: LocalStep) -> None:
        """Measure the drift on an upload: the estimate beside its true gradient `[B, ...]`."""
        self._masks.begin(at)
        self.agreement.add(cut_layer_gradient(self.model, z, y, self.context.loss), gradient)

    def targets(self, server_model: nn.Module, at: LocalStep = START) -> list[Target]:
        """The buffer in batches, oldest first, with the server model's true gradients on them.

        They are computed by train-mode passes that leave every parameter and buffer of the server model as
        it was.

        Args:
            at: the local step of the alignment.
        """
        masks = Masks(server_model, self.context.seed)
        targets = []
        with untouched_statistics(server_model):
            for number, (z, y) in enumerate(self.buffer.batches(self.keys.batch_size)):
                masks.begin_alignment(at, number, passes=0)
                targets.append((z, y, cut_layer_gradient(server_model, z, y, self.context.loss)))
        return targets

    def fit(self, targets: list[Target], at: LocalStep = START) -> Weights:
        """Fit the auxiliary model to true gradients (arXiv 2505.23182): minimise sum_samples ||ĝ - g||^2.

        It starts from the weights in use, and what was left out of them.

        Args:
            at: the local step of the alignment.

        Returns:
            A copy of the fitted weights.
        """
        self.restore_left_out()
        before = self._agreement(targets, at)
        by = {"optimizer": self._fit_by_optimizer, "lbfgs": self._fit_by_lbfgs}[self.keys.solver]
        passes = by(targets, at)
        weights = self.weights.clone()
        self.record = FitRecord(before, self._agreement(targets, at), passes)
        return weights

    def restore_left_out(self) -> None:
        """Add to the weights in use what a codec has left out of them."""
        if self.context.codings.auxiliary:
            self._in_use = self.weights.floats.clone()
        if self.left_out is not None:
            self.weights.floats += self.left_out

    def hand_out(self, fitted: Weights, at: LocalStep, number: int) -> Weights | CodedWeights:
        """Fitted weights as they travel to the client; from here on they are in use as it decodes them.

        A codec codes their change from those in use so far. What it leaves out is in the start of the next
        fit: error feedback.

        Args:
            number: of the client's request in its round.
        """
        in_use, self._in_use = self._in_use, None
        if in_use is None:
            return fitted
        coding, timeline = self.context.codings.auxiliary, self.context.timeline
        with timeline.phase(Phase.ENCODE):
            change = coding.encode(fitted.floats - in_use, at.round, at.client, number)
        with timeline.phase(Phase.DECODE):
            torch.add(in_use, coding.decode(change), out=self.weights.floats)
            self.left_out = fitted.floats - self.weights.floats
        return CodedWeights(change, fitted.integers)

    def take_records(self) -> tuple[dict[str, float] | None, dict[str, float] | None]:
        """The last fit's agreement and the drift of the round that has ended; None where there is none."""
        record, agreement = self.record, self.agreement
        self.record, self.agreement = None, Agreement()
        return record.read() if record else None, agreement.read()

    def _fit_by_optimizer(self, targets: list[Target], at: LocalStep) -> int:
        """Passes over the same batches, unshuffled, with a step on each and masks of their own.

        They are fewer than `epochs` where one lowers the objective by less than `tolerance` of it.
        """
        last = math.inf
        for passes in range(1, self.keys.epochs + 1):
            objectives: list[Tensor] = []
            for number, target in enumerate(targets):
                self._masks.begin_alignment(at, number, passes)
                objectives += self.steps(self._step, *target)
                self.optimizer.advance()
            if self.keys.tolerance is not None:
                now = torch.stack(objectives).sum().item()  # waits for the device: only where it is asked for
                if now > (1 - self.keys.tolerance) * last:
                    return passes
                last = now
        return self.keys.epochs

    def _fit_by_lbfgs(self, targets: list[Target], at: LocalStep) -> int:
        """L-BFGS on the whole buffer at once, with a strong Wolfe line search: at most `epochs` passes, the
        last search being brought to its end. It starts anew at every alignment. A line search needs one
        function, so all passes have the masks of the targets.
        """
        wide = self.weights.floats.dtype
        scale = torch.stack([true.to(wide).square().sum() for _, _, true in targets]).sum()
        solver = torch.optim.LBFGS(
            trainable(self.model),
            max_iter=self.keys.epochs,
            max_eval=self.keys.epochs,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        passes = 0

        def objective() -> Tensor:
            nonlocal passes
            passes += 1
            solver.zero_grad()
            # As a share of ||g||^2: the first step of the search assumes gradients of the order of 1.
            objectives = []
            for number, target in enumerate(targets):
                self._masks.begin_alignment(at, number, passes=0)
                objectives.append(self._accumulate(target, scale))
            return torch.stack(objectives).sum()

        solver.step(objective)
        solver.zero_grad()
        return passes

    def _step(self, *target: Tensor) -> Tensors:
        z, y, true = target
        objective = self._accumulate((z, y, true))
        self.optimizer.apply()
        return (objective,)

    def _accumulate(self, target: Target, scale: Tensor | float = 1.0) -> Tensor:
        """||ĝ - g||^2 / scale on one batch; its gradient is added to the parameters'."""
        z, y, true = target
        estimate = cut_layer_gradient(self.model, z, y, self.context.loss, create_graph=True)
        objective = (estimate.to(self.weights.floats.dtype) - true).square().sum() / scale
        objective.backward(inputs=trainable(self.model))
        return objective.detach()

    def state(self) -> dict[str, Any]:
        """Everything that stays from round to round."""
        return {
            "weights": self.weights.state(),
            "optimizer": self.optimizer.state(),
            "buffer": self.buffer.state(),
            **({} if self.left_out is None else {"left_out": self.left_out}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.weights.load_state(state["weights"])
        self.optimizer.load_state(state["optimizer"])
        self.buffer.load_state(state["buffer"], self.weights.floats.device)
        left_out = state.get("left_out")
        self.left_out = None if left_out is None else left_out.to(self.weights.floats.device, copy=True)

    def _agreement(self, targets: list[Target], at: LocalStep) -> Agreement:
        agreement = Agreement()
        for number, (z, y, target) in enumerate(targets):
            self._masks.begin_alignment(at, number, passes=0)
            agreement.add(cut_layer_gradient(self.model, z, y, self.context.loss), target)
        return agreement
