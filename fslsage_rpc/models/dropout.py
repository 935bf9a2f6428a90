"""Dropout and stochastic depth whose masks are keyed, as all random numbers of a run are.

The mask of a layer follows from the run's seed, the local step and the layer's name in the whole model: it
does not depend on which half the layer is in, or on the thread, rank or order in which it is computed.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from fslsage_rpc.randomness import LocalStep, keyed_seed

SEEDS = 2**63
NEXT_CALL = 0x1E3779B97F4A7C15
"""between the seeds of a layer's calls in one pass; odd"""
Shape = tuple[int, ...]


class KeyedMask(nn.Module):
    """A layer that, in train mode, multiplies its input by a random mask: 0 with probability p, else 1 / (1 -
    p). It has no weights.

    Every copy draws from a generator of its own, seeded anew for each call by the key of the pass and the
    call's number in it. So a call that a backward pass repeats (`torch.utils.checkpoint`) has the same mask,
    if it was the only one.

    Args:
        name: in the whole model.
        shape: of the mask for an input, which it is broadcast to.
    """

    def __init__(self, name: str, p: float, shape: Callable[[Tensor], Shape]):
        super().__init__()
        self.name, self.p = name, p
        self.calls = 0
        """the number of its next call in this pass of the whole model"""
        self._first_call = 0
        self._shape = shape
        self._name_hash = zlib.crc32(name.encode())
        self._generator: torch.Generator | None = None
        self.begin(0, 0)

    def begin(self, key: int, first_call: int) -> None:
        """A pass of the model begins.

        Args:
            key: of the pass.
            first_call: how often this layer has been called in the same pass, in the other half of the model.
        """
        self._seed = key + self._name_hash
        self.calls = self._first_call = first_call

    def forward(self, x: Tensor) -> Tensor:
        """The masked input, of its shape; the input itself in eval mode."""
        if not self.training or self.p == 0:
            return x
        # Contiguous, whatever the input: which of its numbers stay must not depend on their order in memory.
        mask = torch.empty(self._shape(x), dtype=x.dtype, device=x.device)
        mask.bernoulli_(1 - self.p, generator=self._seeded(x.device))
        return x * (mask if self.p == 1 else mask.div_(1 - self.p))

    def extra_repr(self) -> str:
        """As torch's own layers say it."""
        return f"p={self.p}"

    def _seeded(self, device: torch.device) -> torch.Generator:
        """The generator on a device, at the start of the next call's numbers."""
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
        return self._generator.manual_seed((self._seed + self._next_call() * NEXT_CALL) % SEEDS)

    def _next_call(self) -> int:
        if torch._C._current_graph_task_id() == -1:
            self.calls += 1
            return self.calls - 1
        if self.calls - self._first_call != 1:
            raise RuntimeError(f"{self.name} is called more than once, and again in the backward pass")
        return self._first_call

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_generator": None}


def _whole(x: Tensor) -> Shape:
    return tuple(x.shape)


def _by_sample(x: Tensor) -> Shape:
    return x.shape[0], *[1] * (x.dim() - 1)


def _by_batch(x: Tensor) -> Shape:
    return (1,) * x.dim()


def _by_channel(unbatched: int, x: Tensor) -> Shape:
    """Of `[B, C, ...]`, or of `[C, ...]` where it has as many dimensions as `unbatched`."""
    kept = 1 if x.dim() == unbatched else 2
    return *x.shape[:kept], *[1] * (x.dim() - kept)


SHAPES: dict[type[nn.Module], Callable[[Tensor], Shape]] = {
    nn.Dropout: _whole,
    nn.Dropout1d: partial(_by_channel, 2),
    nn.Dropout2d: partial(_by_channel, 0),  # torch takes [B, C, L], too
    nn.Dropout3d: partial(_by_channel, 4),
}


def key_masks(*parts: nn.Module) -> None:
    """Replace the dropout and stochastic depth of a model's parts by keyed layers of the same names.

    Layers with p = 0 stay, and so do subclasses of torch's, whose forward pass may be another. A layer that
    several parts share is one layer afterwards, too.
    """
    replaced: dict[nn.Module, KeyedMask] = {}  # by the layer itself: the id of one thrown away is used again
    for part in parts:
        for path, owner in list(part.named_modules()):
            for child_name, child in owner._modules.items():
                if child is None:
                    continue
                name = f"{path}.{child_name}" if path else child_name
                keyed = replaced.get(child) or _keyed(name, child)
                if keyed is not None:
                    replaced[child] = keyed
                    owner._modules[child_name] = keyed.train(child.training)


def _keyed(name: str, layer: nn.Module) -> KeyedMask | None:
    """What a layer is replaced by; None where it stays."""
    shape: Callable[[Tensor], Shape]
    if type(layer) is StochasticDepth:
        shape = _by_batch if layer.mode == "batch" else _by_sample
    elif type(layer) in SHAPES:
        shape = SHAPES[type(layer)]
    else:
        return None
    p = cast(float, layer.p)  # torch types no attribute of a module
    return KeyedMask(name, p, shape) if p else None


class Masks:
    """The keyed layers of one copy of a model, or of a part of it; false where it has none.

    Args:
        model: which may have `calls_before`: by a layer's name, how often the half before it calls it.
        seed: of the run.
    """

    def __init__(self, model: nn.Module | None, seed: int):
        modules = () if model is None else model.modules()
        self._layers = [layer for layer in modules if isinstance(layer, KeyedMask)]
        self._calls_before: dict[str, int] = getattr(model, "calls_before", {})
        self._seed = seed

    def __bool__(self) -> bool:
        return bool(self._layers)

    def begin(self, at: LocalStep) -> None:
        """The next pass of the model is one of this local step: the client's half, the server's and the
        auxiliary model's take the same masks in layers of the same name.
        """
        if self._layers:
            self._begin(keyed_seed(self._seed, "dropout", *at))

    def begin_alignment(self, at: LocalStep, batch: int, passes: int) -> None:
        """The next pass is one over a batch of the alignment buffer, after so many passes over all of it.

        Pass 0 takes the targets, and compares the estimates with them.
        """
        if self._layers:
            self._begin(keyed_seed(self._seed, "alignment dropout", *at, batch, passes))

    def _begin(self, key: int) -> None:
        for layer in self._layers:
            layer.begin(key, self._calls_before.get(layer.name, 0))
