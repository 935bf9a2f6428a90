"""Codecs: how smashed data, cut-layer gradients and auxiliary models travel, in fewer bytes or with noise.

Sender and receiver agree on the decoded value, whatever their devices: decoding rounds in the same places.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from fslsage_rpc.config.own import checked_arguments, first_line, import_class, is_own, refuse_arguments
from fslsage_rpc.config.schema import CodecKeys, NonNegative, Positive, Share
from fslsage_rpc.errors import InputError

Kind = Literal["smashed", "gradient", "auxiliary"]
Parts = tuple[Tensor, ...]

BLOCK = 1024
"""numbers of an auxiliary model that share a scale"""
LEVELS = 255
"""steps between the smallest and the largest number that one byte tells apart"""
INDEX_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class Codec(ABC):
    """How one kind of tensor travels: smashed data z or gradients g `[B, ...]`, or a flat change of an
    auxiliary model's weights `[n]`.

    A codec keeps nothing from one tensor to the next, so it may serve any number of threads.
    """

    def __init__(self, kind: Kind):
        self.kind = kind

    @abstractmethod
    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        """The tensors that travel for x, on its device; x is detached and stays as it is.

        Args:
            generator: on x's device, keyed by seed, round, client and request. All draws come from it.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor of this shape and type that the parts stand for, on their device; they stay as they are.

        It draws nothing, and may be one of the parts itself.
        """

    @abstractmethod
    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int | None:
        """Bytes of the parts for an x of this shape and type; None where they depend on its values."""


class Bf16(Codec):
    """Rounds to bfloat16, 8 bits of precision, which keeps the range of fp32. The identity where x has it."""

    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        return (x.to(torch.bfloat16),)

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * torch.bfloat16.itemsize


class Int8(Codec):
    """One byte a number, affine in each group: x = low + scale * level, of 256 levels from the group's
    smallest number to its largest.

    The error is at most half a step, `scale = (largest - smallest) / 255`, beside the rounding of the type.
    Scale and low travel too, in fp32, or in fp64 for fp64. Groups of smashed data are the channels of images
    `[B, C, H, W]` over the batch, and the positions of texts `[B, T, D]`. Otherwise they are samples, as
    gradients of different samples differ in size. Weights are cut into blocks of 1,024. A group of one value
    is exact. One with a number that is not finite decodes to NaN, and so does one whose range is not.

    Args:
        stochastic: round up with the probability of the fraction, so that errors have mean 0; an error is
            less than a whole step then.
    """

    def __init__(self, kind: Kind, stochastic: bool = False):
        super().__init__(kind)
        self._stochastic = stochastic

    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        shape, within = self._groups(x.shape)
        groups = self._filled(x).reshape(shape).to(_wide(x.dtype))
        low = high = groups
        for dimension in within:  # by turns: torch is slow where several are reduced at once
            low, high = low.amin(dimension, keepdim=True), high.amax(dimension, keepdim=True)
        span = high - low
        low = low + 0 * span  # NaN where the span is infinite or NaN
        scale = (span / LEVELS).clamp(min=torch.finfo(span.dtype).tiny)  # of which the reciprocal is finite
        levels = (groups - low).mul_(scale.reciprocal())
        if self._stochastic:
            # Just below a level the sum may round up to the next, which a byte does not have above the last.
            draws = torch.rand(levels.shape, generator=generator, dtype=levels.dtype, device=x.device)
            levels.add_(draws).clamp_(max=LEVELS)
        else:
            levels.add_(0.5)
        coded = levels.flatten()[: x.numel()].to(torch.uint8)  # without fractions
        return coded.view(x.shape), torch.stack([scale.flatten(), low.flatten()])

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        levels, (scale, low) = parts
        grouped, within = self._groups(shape)
        numbers = self._filled(levels).reshape(grouped).to(scale.dtype)
        of_groups = [1 if place in within else size for place, size in enumerate(numbers.shape)]
        # Two roundings: a device that multiplied and added in one would have other last digits.
        numbers.mul_(scale.view(of_groups)).add_(low.view(of_groups))
        return numbers.flatten()[: shape.numel()].view(shape).to(dtype)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        grouped, within = self._groups(shape)
        groups = math.prod(size for place, size in enumerate(grouped) if place not in within)
        return shape.numel() + 2 * groups * _wide(dtype).itemsize

    def _groups(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape in which x is looked at, and the dimensions of it along which a group lies."""
        if self.kind == "auxiliary":
            return (math.ceil(shape.numel() / BLOCK), BLOCK), (1,)
        if self.kind == "smashed" and len(shape) == 4:
            return (shape[0], shape[1], shape[2] * shape[3]), (0, 2)
        leading = 2 if self.kind == "smashed" and len(shape) == 3 else 1
        return (shape[:leading].numel(), shape[leading:].numel()), (1,)

    def _filled(self, x: Tensor) -> Tensor:
        """Weights to whole blocks, by repeats of the last number, which change no block's range."""
        missing = -x.numel() % BLOCK if self.kind == "auxiliary" else 0
        return torch.cat([x, x[-1:].expand(missing)]) if missing else x


class TopK(Codec):
    """The numbers of the largest magnitude, with their places; the others decode to 0.

    Each sample keeps `share` of its numbers to the nearest integer, one at least; so does an auxiliary model
    as a whole. A NaN counts as the largest. Places travel in the smallest integer type that holds them.
    """

    def __init__(self, kind: Kind, share: Share = 0.1):
        super().__init__(kind)
        self._share = share

    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        rows, size = self._rows(x.shape)
        numbers = x.reshape(rows, size)
        places = numbers.abs().topk(self._kept(size), sorted=False).indices
        return numbers.gather(1, places), places.to(_index_type(size))

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values, places = parts
        return values.new_zeros(self._rows(shape)).scatter_(1, places.long(), values).view(shape).to(dtype)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        rows, size = self._rows(shape)
        return rows * self._kept(size) * (dtype.itemsize + _index_type(size).itemsize)

    def _rows(self, shape: torch.Size) -> tuple[int, int]:
        return (1, shape.numel()) if self.kind == "auxiliary" else (shape[0], shape[1:].numel())

    def _kept(self, size: int) -> int:
        return max(1, round(self._share * size))


class Gaussian(Codec):
    """Smashed data of bounded norm with noise: z * min(1, clip / ||z||) + sigma * N(0, 1), sample by sample.

    This is the Gaussian mechanism's formula, as of Abadi et al. (arXiv 1607.00133) for gradients. No privacy
    budget is claimed: labels travel as they are, and nothing is accounted for over uploads. A sample with a
    number that is not finite decodes to NaN.

    Args:
        clip: the largest L2 norm of a sample before noise.
        sigma: standard deviation of the noise on every number, in the units of z.
    """

    def __init__(self, kind: Kind, clip: Positive, sigma: NonNegative):
        if kind != "smashed":
            raise InputError(f"comm.codec.{kind}: got 'gaussian', which is for smashed data only")
        super().__init__(kind)
        self._clip, self._sigma = clip, sigma

    def encode(self, x: Tensor, generator: torch.Generator) -> Parts:
        samples = x.flatten(1).to(_wide(x.dtype))
        norms = torch.linalg.vector_norm(samples, dim=1, keepdim=True)
        norms.masked_fill_(norms.isinf(), math.nan)  # or the sample would become 0
        noise = torch.randn(samples.shape, generator=generator, dtype=samples.dtype, device=x.device)
        coded = noise.mul_(self._sigma).addcmul_(samples, (self._clip / norms).clamp(max=1))
        return (coded.view(x.shape).to(x.dtype),)

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0]

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        return shape.numel() * dtype.itemsize


CODECS: dict[str, type[Codec]] = {"bf16": Bf16, "int8": Int8, "topk": TopK, "gaussian": Gaussian}


def create(keys: CodecKeys, kind: Kind) -> Codec | None:
    """The codec of a configuration for one kind of tensor; None for `none`.

    Raises:
        InputError: there is none of that name, or its arguments are not what it takes.
    """
    key = f"comm.codec.{kind}"
    if keys.name == "none":
        refuse_arguments(f"{key}.arguments", keys.name, keys.arguments)
        return None
    made = _find(key, keys.name)
    more: dict[str, Any] = checked_arguments(f"{key}.arguments", keys.name, made, keys.arguments, first=1)
    try:
        return made(kind, **more)
    except InputError:
        raise
    except Exception as error:  # the user's class may raise anything
        raise InputError(f"{key}: got {keys.name!r}, which fails ({first_line(error)})") from None


@torch.no_grad()
def try_out(keys: CodecKeys, kind: Kind, shape: torch.Size, dtype: torch.dtype) -> None:
    """Find what can be found wrong with a codec: the user's own codes a random tensor on the CPU.

    Raises:
        InputError: see `create`; or it fails, or is not what `Codec` says.
    """
    codec = create(keys, kind)
    if codec is None or not is_own(keys.name):
        return
    try:
        wrong = _misbehaviour(codec, shape, dtype)
    except Exception as error:  # the user's class may raise anything
        wrong = f"which fails on {dtype} {list(shape)} ({first_line(error)})"
    if wrong:
        raise InputError(f"comm.codec.{kind}: got {keys.name!r}, {wrong}")


def _find(key: str, name: str) -> type[Codec]:
    if not is_own(name):
        return CODECS[name]
    found: type[Codec] = import_class(key, name, Codec, "fslsage_rpc.parties.codecs.Codec")
    return found


def _misbehaviour(codec: Codec, shape: torch.Size, dtype: torch.dtype) -> str | None:
    """Where a codec is not what `Codec` says, on a random tensor of this shape; None where it is."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    given, said = x.clone(), codec.nbytes(shape, dtype)
    coded: list[Any] = [codec.encode(x, torch.Generator().manual_seed(1)) for _ in range(2)]
    on = f"for {dtype} {list(shape)}"
    if not torch.equal(x, given):
        return "whose encode changes the tensor that it is given"
    for parts in coded:
        if not (isinstance(parts, tuple) and all(isinstance(part, Tensor) for part in parts)):
            return f"whose encode gives {type(parts).__name__} {on}, expected a tuple of tensors"
    size = sum(part.nbytes for part in coded[0])
    if said is not None and said != size:
        return f"whose nbytes is {said} {on}, where the parts have {size} bytes"
    decoded: list[Any] = [codec.decode(parts, shape, dtype) for parts in (*coded, coded[0])]
    for each in decoded:
        if not isinstance(each, Tensor):
            return f"whose decode gives {type(each).__name__} {on}, expected a tensor"
        if (each.shape, each.dtype) != (shape, dtype):
            return f"whose decode gives {each.dtype} {list(each.shape)} {on}"
    if not all(torch.equal(each, decoded[0]) for each in decoded):
        return "which decodes to other numbers the second time: draws come from encode's generator"
    return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _index_type(size: int) -> torch.dtype:
    """The smallest integer type that holds all places among so many numbers."""
    return next(kind for kind in INDEX_TYPES if size - 1 <= torch.iinfo(kind).max)
