"""Codecs of a user's own, and algorithms that put them to the test."""

from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.algorithms import Algorithm
from fslsage_rpc.parties.codecs import Codec
from fslsage_rpc.parties.requests import Align, Exchange, Push


class Raw(Codec):
    """Everything, as it is."""

    def encode(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, parts: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0]

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize


class Miscounted(Raw):
    """Says the bytes of fp32, whatever it is given."""

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return 4 * shape.numel()


class NonZero(Codec):
    """The values that are not 0, and a mask: how many bytes that takes depends on them."""

    def encode(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return x[x != 0], x != 0

    def decode(self, parts: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values, mask = parts
        return torch.zeros(shape, dtype=dtype, device=mask.device).masked_scatter_(mask, values)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> None:
        return None


class Twice(Algorithm):
    """Two requests in each step, of different smashed data."""

    def client_step(self, client: Any, t: int, step: int, x: Tensor, y: Tensor) -> Any:
        z = client.forward(x)
        yield Push(z.relu(), y)
        client.backward(z, (yield Exchange(z, y)))


class TrainedThenAligned(Algorithm):
    """Has the server fit a model that the client has trained meanwhile."""

    auxiliary = "aligned"

    def client_step(self, client: Any, t: int, step: int, x: Tensor, y: Tensor) -> Any:
        z = client.forward(x)
        yield Push(z, y)
        gradient = client.train_auxiliary(z, y)
        client.auxiliary_weights.load((yield Align()))
        client.backward(z, gradient)
