"""Optimizers and learning-rate schedulers of torch.optim, by the names that the configuration gives them."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from fslsage_rpc.config import OptimizerKeys
from fslsage_rpc.errors import InputError

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class ScheduledOptimizer:
    """An optimizer and the course of its learning rate."""

    def __init__(self, keys: OptimizerKeys, parameters: Iterable[nn.Parameter]):
        kind = OPTIMIZERS[keys.name]
        self.optimizer = kind(parameters, lr=keys.lr, weight_decay=keys.weight_decay, fused=True)
        self._scheduler: lr_scheduler.LRScheduler | None = None
        if keys.scheduler.name is not None:
            kind = getattr(lr_scheduler, keys.scheduler.name)
            self._scheduler = kind(self.optimizer, **keys.scheduler.arguments)
        self._per_step = keys.scheduler.per == "step"

    def step(self) -> None:
        """Apply the gradients and clear them."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._scheduler is not None and self._per_step:
            self._scheduler.step()

    def end_round(self) -> None:
        """A schedule that counts in rounds moves on."""
        if self._scheduler is not None and not self._per_step:
            with warnings.catch_warnings():
                # The rate of an absent client moves on with everybody's, without a step of its own before.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._scheduler.step()

    def state(self) -> dict[str, Any]:
        """What the next step depends on, besides the parameters."""
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on as the optimizer with this state would."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def check_scheduler(keys: OptimizerKeys, party: str) -> None:
    """Try the scheduler's arguments on torch.

    Raises:
        InputError: torch does not take them.
    """
    name, arguments = keys.scheduler.name, keys.scheduler.arguments
    wrong = f"optimizer.{party}.scheduler.arguments: got {arguments}"
    if name is None and arguments:
        raise InputError(f"{wrong}, expected {{}}, as optimizer.{party}.scheduler.name is null")
    try:
        trial = ScheduledOptimizer(keys, [nn.Parameter(torch.zeros(1))])
        trial.step()
        trial.end_round()
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{wrong}, expected what torch.optim.lr_scheduler.{name} takes ({reason})") from None
