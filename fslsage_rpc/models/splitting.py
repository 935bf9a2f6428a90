"""A model cut in two, and the auxiliary model that stands in for its server half."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fslsage_rpc.errors import InputError
from fslsage_rpc.models.zoo import ZOO, ImageShape
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


def check_cut(name: str, cut: str | None) -> str:
    """The block to cut after.

    Raises:
        InputError: the model has no such cut.
    """
    cuts = ZOO[name].cuts
    cut = ZOO[name].default_cut if cut is None else cut
    if cut not in cuts:
        raise InputError(f"model.cut: got {cut!r}, expected one of {', '.join(cuts)} for {name}")
    return cut


def build(
    name: str, cut: str | None, classes: int, image_shape: ImageShape, seed: int, dtype: torch.dtype
) -> SplitModel:
    """Build a model of the zoo from the seed, cut it, and make its auxiliary model.

    Weights depend on `seed` alone; torch's global generator is left as it was.

    Raises:
        InputError: the model has no such cut.
    """
    entry = ZOO[name]
    cut = check_cut(name, cut)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "model"))
        blocks = entry.blocks(classes, image_shape)
        names = list(blocks)
        behind = names.index(cut) + 1
        client = nn.Sequential(OrderedDict((n, blocks[n]) for n in names[:behind]))
        server = nn.Sequential(OrderedDict((n, blocks[n]) for n in names[behind:]))
        smashed_shape = _output_shape(client, image_shape)

        torch.manual_seed(keyed_seed(seed, "auxiliary"))
        stage = entry.cuts[cut]
        if stage is None:
            auxiliary = _with_head(OrderedDict(), smashed_shape, classes)
        else:
            fresh = entry.blocks(classes, image_shape)
            auxiliary = _with_head(OrderedDict([(stage, fresh[stage])]), smashed_shape, classes)
    for module in auxiliary.modules():
        if isinstance(module, _NormBase):
            # Auxiliary models are always in train mode: running statistics are never read, so never written.
            module.track_running_stats = False
    return SplitModel(client.to(dtype), server.to(dtype), auxiliary.to(dtype), smashed_shape)


def has_batch_norm(module: nn.Module) -> bool:
    """Does this module normalise over the batch (and so refuse a batch of one sample)?"""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _with_head(stages: OrderedDict[str, nn.Module], shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """The stages, average pooling where there are any, and a linear classifier."""
    if stages:
        shape = _output_shape(nn.Sequential(stages), shape)
        stages["avgpool"] = nn.AdaptiveAvgPool2d(1)
        shape = (shape[0], 1, 1)
    stages["flatten"] = nn.Flatten()
    stages["fc"] = nn.Linear(torch.Size(shape).numel(), classes)
    return nn.Sequential(stages)


def _output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that one sample of this shape leaves the module with."""
    module.eval()
    with torch.no_grad():
        shape = module(torch.zeros(1, *input_shape)).shape[1:]
    module.train()
    return tuple(shape)
