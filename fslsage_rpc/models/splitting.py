"""A model cut in two, and the auxiliary model that stands in for its server half."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fslsage_rpc.config import Model
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.auxiliary import build_auxiliary
from fslsage_rpc.models.zoo import ZOO, Blocks, ImageShape
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


class AutocastSequential(nn.Sequential):
    """A chain of blocks that computes under autocast; its weights stay as they are.

    Only the forward pass is inside: autograd computes every gradient, and the gradient of a gradient, in the
    type of the forward operation that it belongs to.

    Args:
        computes: the type that autocast chooses where it can.
        gives: the type of what leaves the chain.
    """

    def __init__(self, blocks: OrderedDict[str, nn.Module], computes: torch.dtype, gives: torch.dtype):
        super().__init__(blocks)
        self.computes, self.gives = computes, gives

    def forward(self, input: Tensor) -> Tensor:
        """The chain's output, in the type that it gives."""
        # The cache of cast weights is one for all threads, and here each weight is used once in a pass.
        with torch.autocast(input.device.type, self.computes, cache_enabled=False):
            output = super().forward(input)
        return output.to(self.gives)


def _chain(blocks: OrderedDict[str, nn.Module], autocast: torch.dtype | None, logits: bool) -> nn.Sequential:
    """Blocks in a row; under autocast, where there is one, smashed data stays in its type and logits are
    widened for the loss.
    """
    if autocast is None:
        return nn.Sequential(blocks)
    return AutocastSequential(blocks, autocast, torch.float32 if logits else autocast)


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
    autocast: torch.dtype | None

    def whole(self) -> nn.Sequential:
        """The uncut model, of the same blocks."""
        blocks = OrderedDict((*self.client.named_children(), *self.server.named_children()))
        return _chain(blocks, self.autocast, logits=True)


def build(
    keys: Model,
    classes: int,
    image_shape: ImageShape,
    seed: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
) -> SplitModel:
    """Build a model of the zoo from the seed, cut it, and make its auxiliary model.

    Weights depend on `seed` alone; torch's global generator is left as it was.

    Args:
        dtype: of the weights.
        autocast: see `Precision`.

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
    for half in (client, server, auxiliary):
        half.to(dtype)
    return SplitModel(
        client=_chain(OrderedDict(client.named_children()), autocast, logits=False),
        server=_chain(OrderedDict(server.named_children()), autocast, logits=True),
        auxiliary=_chain(OrderedDict(auxiliary.named_children()), autocast, logits=True),
        smashed_shape=smashed_shape,
        autocast=autocast,
    )


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
