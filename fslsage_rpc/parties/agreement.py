"""How well estimates agree with true gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """How well the estimates agreed with the targets on the first pass of a fit and on the last one, and the
    passes made. On a pass each batch is compared before its step.
    """

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
