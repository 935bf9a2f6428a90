"""A model's weights as one contiguous buffer, so that averaging or sending it is one operation."""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SHARE_TOLERANCE = 1e-9
"""by which fp64 shares, each rounded, may miss their sum of 1"""


@dataclass
class Weights:
    """All numbers of one model that training changes (or the weighted sum of several).

    `floats` `[n]` holds every trainable parameter and floating-point buffer, `integers` `[k]` every integer
    buffer (BatchNorm's counters), in the order of `named_parameters` and `named_buffers`.
    """

    floats: Tensor
    integers: Tensor

    @property
    def nbytes(self) -> int:
        """|C|, |S| or |A| of the paper ledger: the size of all trainable parameters and buffers."""
        return self.floats.nbytes + self.integers.nbytes

    def finite(self) -> bool:
        """Is every number finite? Waits for the device, and takes no memory to speak of."""
        return not self.floats.numel() or bool(torch.stack(self.floats.aminmax()).isfinite().all())

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
    """Move a module's trainable parameters and its buffers into one contiguous buffer, of which they become
    views.

    Optimizers and state_dicts work as before. Frozen parameters, and buffers that no state_dict holds, stay
    where they are: they are in no average and on no wire. All floating-point tensors must share one dtype,
    all integer ones int64.

    Raises:
        TypeError: a buffer or parameter has another dtype.
    """
    floats, integers = sorted_weights(module)
    device = next((t.device for t in (*floats, *module.parameters())), torch.device("cpu"))
    return Weights(_adopt(floats, torch.float32, device), _adopt(integers, torch.int64, device))


def sorted_weights(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """A module's trainable parameters and its buffers, those of floating-point numbers and those of integers.

    Raises:
        TypeError: a buffer or parameter has another dtype.
    """
    floats: list[Tensor] = []
    integers: list[Tensor] = []
    for name, tensor in _weights(module):
        if tensor.is_floating_point() and tensor.dtype == (floats[0] if floats else tensor).dtype:
            floats.append(tensor)
        elif tensor.dtype == torch.int64:
            integers.append(tensor)
        else:
            raise TypeError(f"{name} is {tensor.dtype}: weights are floating-point of one type or int64")
    return floats, integers


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen: what optimizers step, and what is averaged and sent."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def parameter_count(module: nn.Module) -> int:
    """How many numbers of a module's `Weights.floats`, the first ones, are parameters and not of buffers."""
    return sum(parameter.numel() for parameter in trainable(module))


def module_bytes(module: nn.Module) -> int:
    """The size of a module's `Weights`: of all trainable parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _weights(module))


def copy_of(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy on a device with weights of its own; frozen parameters are shared by all copies."""
    frozen = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
    return copy.deepcopy(module, frozen).to(device)


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that training changes: trainable parameters, and the buffers that a state_dict holds."""
    yield from ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    kept = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


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


def check_shares(shares: Iterable[float]) -> None:
    """See that an average is one: shares of another sum would shrink or grow all weights, round by round.

    Raises:
        ValueError: they do not add up to 1, but for rounding.
    """
    total = math.fsum(shares)
    if not abs(total - 1) <= SHARE_TOLERANCE:
        raise ValueError(f"shares of an average add up to {total!r}, not to 1")
