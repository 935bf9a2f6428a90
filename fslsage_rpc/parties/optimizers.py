"""Optimizers and learning-rate schedulers of torch.optim, by the names that the configuration gives them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from fslsage_rpc.config.schema import OptimizerKeys
from fslsage_rpc.errors import InputError


def linear_warmup_decay(
    optimizer: torch.optim.Optimizer, warmup: float, total: float
) -> lr_scheduler.LambdaLR:
    """The learning rate in a line from 0 to its full height in `warmup` moves, and to 0 again at `total`."""
    if not 0 <= warmup < total:
        raise ValueError("0 <= warmup < total")

    def share(moves: int) -> float:
        return min(moves / warmup if warmup else 1.0, max(0.0, (total - moves) / (total - warmup)))

    return lr_scheduler.LambdaLR(optimizer, share)


SCHEDULES = {"LinearWarmupDecay": linear_warmup_decay}
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class ScheduledOptimizer:
    """An optimizer and the course of its learning rate."""

    def __init__(self, keys: OptimizerKeys, parameters: Iterable[nn.Parameter]):
        kind = OPTIMIZERS[keys.name]
        self.optimizer = kind(parameters, lr=keys.lr, weight_decay=keys.weight_decay, fused=True)
        self._allocate()
        self.stepped = False
        self._scheduler: lr_scheduler.LRScheduler | None = None
        if keys.scheduler.name is not None:
            name, arguments = keys.scheduler.name, keys.scheduler.arguments
            schedule: Callable[..., Any] = SCHEDULES.get(name) or getattr(lr_scheduler, name)
            self._scheduler = schedule(self.optimizer, **arguments)
        self._per_step = keys.scheduler.per == "step"
        self._rate: Tensor | None = None  # the learning rate where captured steps read it, if it moves

    def _allocate(self) -> None:
        """Make the optimizer's state now, all 0, each kind in one buffer. torch would make it in the first
        step, among a batch's activations, while it lasts (`device/memory.py`).
        """
        (group,) = self.optimizer.param_groups
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        rate, group["lr"] = group["lr"], 0.0  # the step moves no weight
        self.optimizer.step()
        group["lr"] = rate
        self.clear()
        states = list(self.optimizer.state.values())
        for name in states[0] if states else ():
            tensors = [state[name] for state in states]
            sizes = [tensor.numel() for tensor in tensors]
            buffer = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
            for state, tensor, part in zip(states, tensors, buffer.split(sizes), strict=True):
                state[name] = part.view(tensor.shape)

    def step(self) -> None:
        """Apply the gradients and clear them."""
        self.apply()
        self.advance()

    def apply(self) -> None:
        """The part of a step that computes; on a GPU it can be captured."""
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def advance(self) -> None:
        """The rest of a step: a schedule that counts in steps moves on."""
        self.stepped = True
        if self._scheduler is not None and self._per_step:
            self._scheduler.step()

    def end_round(self) -> None:
        """A schedule that counts in rounds moves on."""
        if self._scheduler is not None and not self._per_step:
            with warnings.catch_warnings():
                # The rate of an absent client moves on with everybody's, without a step of its own before.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._scheduler.step()

    def place_rate(self) -> None:
        """Put the learning rate, where it moves, to where captured steps read it: on a GPU as fp32, which
        is what its kernels take.
        """
        if self._scheduler is None:
            return
        (group,) = self.optimizer.param_groups
        if self._rate is None:
            device = group["params"][0].device
            wide = torch.float64 if device.type == "cpu" else torch.float32
            self._rate = torch.empty((), dtype=wide, device=device)
        self._rate.fill_(group["lr"])

    def constants(self) -> dict[str, Any]:
        """What a captured step has taken as it was: all settings but a learning rate that moves."""
        (group,) = self.optimizer.param_groups
        moving = ("params",) if self._scheduler is None else ("params", "lr")
        return {name: value for name, value in group.items() if name not in moving}

    @contextmanager
    def captured(self) -> Iterator[None]:
        """What is applied inside can be captured. Checkpoints never see the settings that this takes."""
        (group,) = self.optimizer.param_groups
        for_graphs: dict[str, Any] = {} if self._rate is None else {"lr": self._rate}
        if "capturable" in group:  # sgd has no such switch
            for_graphs["capturable"] = True
        before = {name: group[name] for name in for_graphs}
        group.update(for_graphs)
        try:
            yield
        finally:
            group.update(before)

    def state(self) -> dict[str, Any]:
        """What the next step depends on, besides the parameters. One that has made no step has no tensors."""
        optimizer = self.optimizer.state_dict()
        scheduler = None if self._scheduler is None else self._scheduler.state_dict()
        return {
            "optimizer": optimizer if self.stepped else optimizer | {"state": {}},
            "scheduler": scheduler,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on as the optimizer with this state would."""
        saved = state["optimizer"]
        self.stepped = bool(saved["state"])
        if not self.stepped:
            saved = saved | {"state": self.optimizer.state_dict()["state"]}  # as it was made
        self.optimizer.load_state_dict(saved)
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
        raise InputError(f"{wrong}, expected what {name} takes ({reason})") from None
