"""Tensors as they travel where a codec is configured."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fslsage_rpc.config.schema import CodecKeys, CodecsKeys
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.codecs import Codec, Kind, create
from fslsage_rpc.randomness import keyed_seed


@dataclass(frozen=True)
class Coded:
    """A tensor as a codec has written it; `shape` and `dtype` are those of the tensor."""

    parts: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes that travel."""
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(tuple(part.to(device) for part in self.parts), self.shape, self.dtype)


@dataclass(frozen=True)
class CodedWeights:
    """Fitted weights of an auxiliary model: their change from those in use, coded, and its integers."""

    change: Coded
    integers: Tensor

    @property
    def nbytes(self) -> int:
        """The bytes that travel."""
        return self.change.nbytes + self.integers.nbytes

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(self.change.to(device), self.integers.to(device))


class Coding:
    """One kind of what travels, by its codec, or as it is where there is none; then false.

    Args:
        seed: of the run, by which a codec draws.
    """

    def __init__(self, keys: CodecKeys, kind: Kind, seed: int):
        self._codec: Codec | None = create(keys, kind)
        self._name, self._kind, self._seed = keys.name, kind, seed

    def __bool__(self) -> bool:
        return self._codec is not None

    def encode(self, x: Tensor, t: int, client: int, number: int) -> Coded:
        """The tensor as it travels.

        Args:
            t: the round, and `number`: that of the client's request in it, to which x belongs.

        Raises:
            InputError: the user's own codec has said another size.
        """
        assert self._codec is not None
        key = keyed_seed(self._seed, f"codec of {self._kind}", t, client, number)
        with torch.no_grad():
            parts = self._codec.encode(x.detach(), torch.Generator(x.device).manual_seed(key))
        coded = Coded(parts, x.shape, x.dtype)
        said = self._codec.nbytes(x.shape, x.dtype)
        if said not in (None, coded.nbytes):
            raise InputError(
                f"comm.codec.{self._kind}: got {self._name!r}, whose nbytes is {said} for {x.dtype} "
                f"{list(x.shape)}, where the parts have {coded.nbytes} bytes"
            )
        return coded

    def decode(self, coded: Coded) -> Tensor:
        """The tensor as it arrives, of the shape and type that it had."""
        assert self._codec is not None
        with torch.no_grad():
            return self._codec.decode(coded.parts, coded.shape, coded.dtype)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int | None:
        """The bytes that such a tensor is coded in; None where they depend on its values."""
        if self._codec is None:
            return shape.numel() * dtype.itemsize
        return self._codec.nbytes(shape, dtype)


class Codings:
    """The three kinds."""

    def __init__(self, keys: CodecsKeys | None = None, seed: int = 0):
        keys = keys or CodecsKeys()
        self.smashed = Coding(keys.smashed, "smashed", seed)
        self.gradient = Coding(keys.gradient, "gradient", seed)
        self.auxiliary = Coding(keys.auxiliary, "auxiliary", seed)

    def weights_nbytes(self, weights: Weights) -> int | None:
        """The bytes of an auxiliary model; None where they depend on its values."""
        change = self.auxiliary.nbytes(weights.floats.shape, weights.floats.dtype)
        return None if change is None else change + weights.integers.nbytes
