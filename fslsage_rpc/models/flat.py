"""A model's weights as one contiguous buffer, so that averaging or sending it is one operation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Weights:
    """All numbers of one model (or the weighted sum of several).

    `floats` `[n]` holds every parameter and floating-point buffer, `integers` `[k]` every integer buffer
    (BatchNorm's counters), in the order of `named_parameters` and `named_buffers`.
    """

    floats: Tensor
    integers: Tensor

    @property
    def bytes(self) -> int:
        """|C|, |S| or |A| of the paper ledger: the size of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (self.floats, self.integers))

    def clone(self) -> "Weights":
        """A copy that no later training step changes."""
        return Weights(self.floats.clone(), self.integers.clone())

    def to(self, device: torch.device) -> "Weights":
        """The same numbers on a device."""
        return Weights(self.floats.to(device), self.integers.to(device))

    def load(self, other: "Weights") -> None:
        """Take over the other's numbers in place."""
        self.floats.copy_(other.floats)
        self.integers.copy_(other.integers)

    def state(self) -> dict[str, Any]:
        """The tensors themselves, by name: what a checkpoint keeps."""
        return {"floats": self.floats, "integers": self.integers}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over such a state in place, from any device."""
        self.load(Weights(**state))


def flatten(module: nn.Module) -> Weights:
    """Move a module's parameters and buffers into one contiguous buffer, of which they become views.

    Optimizers and state_dicts work as before. All floating-point tensors must share one dtype, all integer
    ones int64.

    Raises:
        TypeError: a buffer or parameter has another dtype.
    """
    floats: list[Tensor] = []
    integers: list[Tensor] = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype == (floats[0] if floats else tensor).dtype:
            floats.append(tensor)
        elif tensor.dtype == torch.int64:
            integers.append(tensor)
        else:
            raise TypeError(f"{name} is {tensor.dtype}: weights are floating-point of one type or int64")
    device = floats[0].device if floats else torch.device("cpu")
    return Weights(_adopt(floats, torch.float32, device), _adopt(integers, torch.int64, device))


def module_bytes(module: nn.Module) -> int:
    """The size of all parameters and buffers of a module."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _adopt(tensors: list[Tensor], empty_dtype: torch.dtype, device: torch.device) -> Tensor:
    """One buffer with the tensors' values; each tensor becomes a view into it."""
    if not tensors:
        return torch.empty(0, dtype=empty_dtype, device=device)
    buffer = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    first = 0
    for tensor in tensors:
        tensor.data = buffer[first : first + tensor.numel()].view(tensor.shape)
        first += tensor.numel()
    return buffer


def weighted_sum(members: Sequence[Weights], shares: Sequence[float], like: Weights) -> Weights:
    """sum_i shares_i * floats_i and the maximum of the integers, as new buffers shaped like `like`.

    With shares that add up to 1 this is the weighted mean; no members give zeros, which is what a rank
    without participants adds to the others' sums.
    """
    total = Weights(torch.zeros_like(like.floats), torch.zeros_like(like.integers))
    for member, share in zip(members, shares, strict=True):
        total.floats.add_(member.floats, alpha=share)
        torch.maximum(total.integers, member.integers, out=total.integers)
    return total


def load_mean(models: Mapping[int, Weights], shares: Mapping[int, float]) -> None:
    """Give all models the weighted mean of those that have a share."""
    members = [models[client] for client in shares]
    mean = weighted_sum(members, list(shares.values()), like=members[0])
    for weights in models.values():
        weights.load(mean)
