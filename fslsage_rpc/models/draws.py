"""Finds random numbers that a model draws in training and that nothing keys."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fslsage_rpc.models.dropout import KeyedMask
from fslsage_rpc.models.splitting import SplitModel
from fslsage_rpc.models.tracing import PROBE_BATCHES, probe_inputs


def unkeyed_draws(split: SplitModel, sample_shape: Iterable[int], auxiliary: bool) -> str | None:
    """Where one train-mode forward pass of two samples of zeros, on the CPU, takes numbers from one of the
    process's own generators: torch's, numpy's or Python's.

    The models and the generators are left as they were. On the way it counts how often the client's half
    calls its keyed layers, some of which the server's half may call, too (`Segment.calls_before`).

    Args:
        auxiliary: look at the auxiliary model as well.

    Returns:
        The innermost module in which it does, and the part of the model; None: nowhere.

    Raises:
        Exception: whatever a model raises in train mode.
    """
    parts = {"client half": split.client, "server half": split.server}
    if auxiliary:
        parts["auxiliary model"] = split.auxiliary
    found = None
    with torch.no_grad(), left_as_they_were(parts.values()):
        inputs = probe_inputs(split.client, sample_shape, PROBE_BATCHES[0])
        for name, part in parts.items():
            before = _generators()
            outputs = part(inputs)
            if found is None and _generators() != before:
                found = f"the {name}{_inside(part, inputs)}"
            if part is split.client:
                inputs = outputs
                calls = {layer.name: layer.calls for layer in _keyed(part)}
        for part in (split.server, split.auxiliary):
            part.calls_before = calls  # type: ignore[assignment]  # torch: tensors, modules
    return found


def _inside(part: nn.Module, inputs: Tensor) -> str:
    """The innermost module of a part that draws first; empty where the part's own operations do."""
    names: list[str] = []
    entered: list[Any] = []
    hooks = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(_generators())

    for name, module in part.named_modules():

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if entered.pop() != _generators():
                names.append(name)

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        part(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return f", in {names[0]}" if names and names[0] else ""


def _keyed(part: nn.Module) -> list[KeyedMask]:
    return [module for module in part.modules() if isinstance(module, KeyedMask)]


def _generators() -> tuple[Any, ...]:
    """The states of the process's own generators on the host, to be compared."""
    _, words, *rest = np.random.get_state()  # noqa: NPY002  # models draw from it
    return torch.get_rng_state().numpy().tobytes(), np.asarray(words).tobytes(), rest, random.getstate()


@contextmanager
def left_as_they_were(parts: Iterable[nn.Module]) -> Iterator[None]:
    """A forward pass moves running statistics and generators; put them back."""
    parts = list(parts)
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for part in parts
        for module in part.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    keyed = [layer for part in parts for layer in _keyed(part)]
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002  # models draw from it
    for layer in keyed:
        layer.begin(0, 0)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002  # models draw from it
        random.setstate(pythons)
        for owner, name, buffer, before in buffers:
            owner[name] = buffer.copy_(before)
        for layer in keyed:
            layer.begin(0, 0)
