"""FSL-SAGE's alignment: a client's auxiliary model is fitted to the server model's cut-layer gradients."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.streams import WorkQueue

Batch = tuple[Tensor, Tensor]  # z [B, ...], y [B]
Target = tuple[Tensor, Tensor, Tensor]  # z [B, ...], y [B], g [B, ...]


def cut_layer_gradient(model: nn.Module, z: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
    """grad_z CE(model(z), y), the loss being the mean over the batch; `[B, ...]` like z.

    With the server model it is the true gradient g, with an auxiliary model the estimate ĝ. Parameter
    gradients are not computed, except (`create_graph`) the graph through which ĝ depends on the parameters.
    """
    z = z.detach().requires_grad_()
    loss = F.cross_entropy(model(z), y)
    return torch.autograd.grad(loss, z, create_graph=create_graph)[0]


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
    """The newest `size` samples of (z, y) that a client uploaded: first in, first out."""

    def __init__(self, size: int):
        self.size = size
        self._batches: deque[Batch] = deque()
        self._samples = 0

    def __len__(self) -> int:
        return self._samples

    def add(self, z: Tensor, y: Tensor) -> None:
        """Keep a batch, dropping the oldest samples beyond the size."""
        self._batches.append((z, y))
        self._samples += len(y)
        while self._samples > self.size:
            z, y = self._batches.popleft()
            excess = min(self._samples - self.size, len(y))
            if excess < len(y):
                self._batches.appendleft((z[excess:].clone(), y[excess:].clone()))
            self._samples -= excess

    def batches(self, size: int) -> list[Batch]:
        """The samples, oldest first, in batches of `size`; the last may be short."""
        z, y = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        return list(zip(z.split(size), y.split(size), strict=True))


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
    """How well the estimates agreed with the targets before a fit, and how well after it."""

    before: Agreement
    after: Agreement

    def read(self) -> dict[str, float]:
        """nmse and cosine, before and after; empty where the true gradients are all 0."""
        moments = (("before", self.before), ("after", self.after))
        return {
            f"{key}_{moment}": value
            for moment, agreement in moments
            for key, value in (agreement.read() or {}).items()
        }


@dataclass
class AuxiliaryFit:
    """What the server keeps for one client: its auxiliary model, that model's optimizer, and the alignment
    buffer.

    `timeline` and `queue`: of the thread that fits.
    """

    model: nn.Module
    weights: Weights
    optimizer: ScheduledOptimizer
    buffer: AlignmentBuffer
    epochs: int
    batch_size: int
    timeline: Timeline
    queue: WorkQueue = field(default_factory=WorkQueue)

    def targets(self, server_model: nn.Module) -> list[Target]:
        """The buffer in batches, oldest first, with the server model's true gradients on them.

        They are computed by train-mode passes that leave every parameter and buffer of the server model as
        it was.
        """
        with untouched_statistics(server_model):
            return [
                (z, y, cut_layer_gradient(server_model, z, y))
                for z, y in self.buffer.batches(self.batch_size)
            ]

    def fit(self, targets: list[Target]) -> tuple[Weights, FitRecord]:
        """Fit the auxiliary model to true gradients (arXiv 2505.23182): `epochs` passes of the optimizer over
        the same batches, unshuffled, minimise sum_samples ||ĝ - g||^2.

        Returns:
            A copy of the fitted weights, and how well the estimates agree with the targets.
        """
        before, wide = self._agreement(targets), self.weights.floats.dtype
        for _ in range(self.epochs):
            for z, y, target in targets:
                estimate = cut_layer_gradient(self.model, z, y, create_graph=True)
                error = estimate.to(wide) - target
                error.square().sum().backward(inputs=list(self.model.parameters()))
                self.optimizer.step()
        return self.weights.clone(), FitRecord(before, self._agreement(targets))

    def _agreement(self, targets: list[Target]) -> Agreement:
        agreement = Agreement()
        for z, y, target in targets:
            agreement.add(cut_layer_gradient(self.model, z, y), target)
        return agreement
