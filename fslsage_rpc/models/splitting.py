"""A model cut in two, and the auxiliary model that stands in for its server half."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fslsage_rpc.config.own import first_line, is_own
from fslsage_rpc.config.schema import Model
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.auxiliary import build_auxiliary
from fslsage_rpc.models.cuts import LISTED, cut_nodes, refusal
from fslsage_rpc.models.dropout import key_masks
from fslsage_rpc.models.segment import Segment, keep_input
from fslsage_rpc.models.tracing import Uncuttable, opening, segment, trace
from fslsage_rpc.models.zoo import find, make, refuse_samples
from fslsage_rpc.randomness import keyed_seed


@dataclass(frozen=True)
class Precision:
    """The number formats of a training."""

    weights: torch.dtype
    """of parameters, buffers, optimizer states, images and losses"""
    autocast: torch.dtype | None = None
    """what layers compute in where torch's autocast finds that safe; None: in that of the weights"""

    @property
    def smashed(self) -> torch.dtype:
        """What smashed data and its gradient are in, on the wire too."""
        return self.autocast or self.weights


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "fp64": Precision(torch.float64),
    "bf16": Precision(torch.float32, torch.bfloat16),
}


@dataclass
class SplitModel:
    """The three models that all clients and the server start from.

    `client` maps inputs `[B, ...]` (images `[B, C, H, W]`) to smashed data z `[B, *smashed_shape]`; `server`
    and `auxiliary` map z to logits `[B, *outputs_shape]`. Weights have the names of the whole model, each in
    one half; `uncut` goes from inputs to logits and shares the weights of both. Their dropout and stochastic
    depth is keyed (`models/dropout.py`).
    """

    client: nn.Module
    server: nn.Module
    auxiliary: nn.Module
    uncut: nn.Module
    smashed_shape: tuple[int, ...]
    outputs_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        key_masks(self.client, self.server, self.uncut, self.auxiliary)

    def whole(self) -> nn.Module:
        """The uncut model, of the same weights."""
        return self.uncut


def build(
    keys: Model,
    classes: int,
    sample_shape: Sequence[int],
    seed: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
) -> SplitModel:
    """Build a model from the seed, cut it, and make its auxiliary model.

    Weights depend on `seed` alone; torch's global generator is left as it was.

    Args:
        dtype: of the weights.
        autocast: see `Precision`.

    Raises:
        InputError: there is no such model, or it has no such cut, width or auxiliary model, or it cannot take
            such images.
    """
    entry = find(keys.name)
    cut = keys.cut or entry.default_cut
    if cut is None:
        raise InputError(f"model.cut: got null, expected a module of {keys.name} ({LISTED})")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "model"))
        model = make(keys, classes, sample_shape)
        halves, smashed_shape, outputs_shape = _halves(keys, cut, model, sample_shape, dtype)
        torch.manual_seed(keyed_seed(seed, "auxiliary"))
        fresh = partial(make, keys, classes, sample_shape)
        try:
            auxiliary = build_auxiliary(keys.auxiliary, cut, entry, model, fresh, sample_shape, classes)
        except Exception as error:  # what the user's own entry says of its model need not be so
            if isinstance(error, InputError) or not is_own(keys.name):
                raise
            wrong = f"model.name: got {keys.name!r}, of which no auxiliary model can be made"
            raise InputError(f"{wrong} ({first_line(error)})") from None
        auxiliary.to(dtype)
    client, server, uncut = halves
    if keys.memory_format == "channels_last":
        for part in (client, server, uncut, auxiliary):
            part.reorder_images(once=True, twice=True)
    if autocast is not None:
        client.compute_in(autocast, gives=autocast)
        for part in (server, uncut, auxiliary):
            part.compute_in(autocast, gives=torch.float32)  # logits are widened for the loss
    return SplitModel(client, server, auxiliary, uncut, smashed_shape, outputs_shape)


def _halves(
    keys: Model, cut: str, model: nn.Module, sample_shape: Sequence[int], dtype: torch.dtype
) -> tuple[list[Segment], tuple[int, ...], tuple[int, ...]]:
    """Client half, server half and the uncut model, and the shapes of a sample's smashed data and outputs."""
    try:
        traces = trace(model, opening(cut), sample_shape)
        nodes = cut_nodes(model, traces, cut, trains=True)
    except Uncuttable as error:
        raise refusal("model.cut", cut, model, sample_shape, error) from None
    except Exception as error:  # whatever it raises on images that it is not for
        raise refuse_samples(keys, sample_shape, error) from None
    smashed_shape = traces[False].shape(nodes[False])
    outputs_shape = traces[False].shape(traces[False].output)
    assert smashed_shape is not None
    assert outputs_shape is not None
    model.to(dtype)
    ends = {t: (one.input, nodes[t], one.output) for t, one in traces.items()}
    client, server, uncut = (
        {t: segment(model, traces[t], ends[t][first], ends[t][last]) for t in traces}
        for first, last in ((0, 1), (1, 2), (0, 2))
    )
    keep_input(model, server, smashed_shape)
    return (
        [Segment(model, graphs) for graphs in (client, server, uncut)],
        tuple(smashed_shape),
        tuple(outputs_shape),
    )


def has_batch_norm(module: nn.Module) -> bool:
    """Does this module normalise over the batch (and so refuse a batch of one sample)?"""
    return any(isinstance(m, _BatchNorm) for m in module.modules())
