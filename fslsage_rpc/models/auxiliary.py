"""The auxiliary model: what stands in for the server half when a client estimates its cut-layer gradient."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fslsage_rpc.config import Auxiliary
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.zoo import Blocks


def build_auxiliary(
    keys: Auxiliary,
    default_until: str | None,
    pools: bool,
    fresh_server: Callable[[], Blocks],
    smashed_shape: tuple[int, ...],
    classes: int,
) -> nn.Sequential:
    """A classifier of smashed data z `[B, *smashed_shape]`: the first blocks of a new server half (or none),
    average pooling where the whole model has it, and a linear layer.

    Args:
        default_until: the last block where the keys leave it open; None for none.
        pools: the whole model averages over positions before its classifier.
        fresh_server: makes a newly initialised server half.

    Raises:
        InputError: the server half has no such block.
    """
    kind = keys.kind or ("copy" if keys.until or default_until else "linear")
    if kind == "copy":
        stages = _first_blocks(fresh_server(), keys.until or default_until)
    elif keys.until is None:
        stages = OrderedDict()
    else:
        raise InputError(
            f"model.auxiliary.until: got {keys.until!r}, expected null, as model.auxiliary.kind is linear"
        )
    if pools:
        stages["avgpool"] = nn.AdaptiveAvgPool2d(1)
    stages["flatten"] = nn.Flatten()
    with torch.no_grad():
        features = nn.Sequential(stages).eval()(torch.zeros(1, *smashed_shape)).shape[1]
    stages["fc"] = nn.Linear(features, classes)
    auxiliary = nn.Sequential(stages).train()
    for module in auxiliary.modules():
        if isinstance(module, _NormBase):
            # Auxiliary models are always in train mode: running statistics are never read, so never written.
            module.track_running_stats = False
    return auxiliary


def _first_blocks(server: Blocks, until: str | None) -> Blocks:
    """The blocks of the server half up to and with `until`, a block's name or that of a block's part."""
    names = list(server)
    body = [name for name in names[: names.index("flatten")] if name != "avgpool"]
    if not body:
        raise InputError(
            "model.auxiliary: got a copy, expected {kind: linear}: only the classifier is behind this cut"
        )
    name, dot, part = (until or body[0]).partition(".")
    stage = server[name] if name in body else nn.Identity()
    parts = list(stage._modules) if isinstance(stage, nn.Sequential) else []
    if name not in body or (dot and part not in parts):
        expected = f"one of {', '.join(body)}, or a part of one, as {body[0]}.0"
        raise InputError(f"model.auxiliary.until: got {until!r}, expected {expected}")
    copied = OrderedDict((n, server[n]) for n in body[: body.index(name) + 1])
    if dot:
        copied[name] = nn.Sequential(
            OrderedDict((p, stage.get_submodule(p)) for p in parts[: parts.index(part) + 1])
        )
    return copied
