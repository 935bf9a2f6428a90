"""A model cut in two, and the auxiliary model that stands in for its server half."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fslsage_rpc.config import Model
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.auxiliary import build_auxiliary
from fslsage_rpc.models.zoo import ZOO, Blocks, ImageShape
from fslsage_rpc.randomness import keyed_seed

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass
class SplitModel:
    """The three models that all clients and the server start from.

    `client` maps images `[B, C, H, W]` to smashed data z `[B, *smashed_shape]`; `server` and `auxiliary` map
    z to logits `[B, classes]`. Block and parameter names are those of the whole model.
    """

    client: nn.Sequential
    server: nn.Sequential
    auxiliary: nn.Sequential
    smashed_shape: tuple[int, ...]

    def whole(self) -> nn.Sequential:
        """The uncut model, of the same blocks."""
        return nn.Sequential(OrderedDict((*self.client.named_children(), *self.server.named_children())))


def build(keys: Model, classes: int, image_shape: ImageShape, seed: int, dtype: torch.dtype) -> SplitModel:
    """Build a model of the zoo from the seed, cut it, and make its auxiliary model.

    Weights depend on `seed` alone; torch's global generator is left as it was.

    Raises:
        InputError: the model has no such cut, width or auxiliary model.
    """
    entry = ZOO[keys.name]
    width = {} if entry.default_width is None else {"width": keys.width or entry.default_width}
    if keys.width is not None and not width:
        raise InputError(f"model.width: got {keys.width}, expected null: {keys.name} has one width")
    cut = keys.cut or entry.default_cut
    if cut not in entry.cuts:
        raise InputError(f"model.cut: got {cut!r}, expected one of {', '.join(entry.cuts)} for {keys.name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "model"))
        blocks = entry.blocks(classes, image_shape, **width)
        names = list(blocks)
        behind = names.index(cut) + 1
        client = nn.Sequential(OrderedDict((n, blocks[n]) for n in names[:behind]))
        server = nn.Sequential(OrderedDict((n, blocks[n]) for n in names[behind:]))
        smashed_shape = _output_shape(client, image_shape)

        def fresh_server() -> Blocks:
            fresh = entry.blocks(classes, image_shape, **width)
            return OrderedDict((n, fresh[n]) for n in names[behind:])

        torch.manual_seed(keyed_seed(seed, "auxiliary"))
        auxiliary = build_auxiliary(
            keys.auxiliary, entry.cuts[cut], "avgpool" in blocks, fresh_server, smashed_shape, classes
        )
    return SplitModel(client.to(dtype), server.to(dtype), auxiliary.to(dtype), smashed_shape)


def has_batch_norm(module: nn.Module) -> bool:
    """Does this module normalise over the batch (and so refuse a batch of one sample)?"""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that one sample of this shape leaves the module with."""
    module.eval()
    with torch.no_grad():
        shape = module(torch.zeros(1, *input_shape)).shape[1:]
    module.train()
    return tuple(shape)
