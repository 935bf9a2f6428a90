"""Narrower layers for an auxiliary model: every one of a copy gets a share of its channels."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fslsage_rpc.config.own import first_line
from fslsage_rpc.errors import InputError

Pair = tuple[int, int]
"""what a convolution of images has, which torch annotates as any number of integers"""
KEY = "model.auxiliary.width_multiplier"


def narrow(copy: nn.Module, run: Callable[[Tensor], Tensor], z: Tensor, multiplier: float) -> None:
    """Give every convolution and linear layer of a copy `multiplier` times its output channels, rounded, and
    each layer the inputs that then reach it; z keeps its own. New layers have torch's initialisation.

    Copies of convolutions (plain or depthwise), linear layers, BatchNorm and LayerNorm can be narrowed, if no
    shortcut adds z itself to a narrower tensor.

    Args:
        run: what calls the layers of the copy.
        z: smashed data `[B, *smashed_shape]`.

    Raises:
        InputError: this copy cannot be narrowed.
    """
    layers = {name: module for name, module in copy.named_modules() if module._parameters}
    done: set[nn.Module] = set()

    def adapt(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer in done:
            raise TypeError("a layer is used twice")
        done.add(layer)
        _adapt(layer, inputs[0], multiplier)

    hooks = [layer.register_forward_pre_hook(adapt) for layer in layers.values()]
    try:
        with torch.no_grad():
            copy.eval()
            run(z)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{KEY}: got {multiplier}, expected null, as this copy cannot be narrower ({first_line(error)})"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if layer not in done:
            raise InputError(
                f"{KEY}: got {multiplier}, expected null, as this copy cannot be narrower: "
                f"{name} is no layer of its own"
            )


def _adapt(layer: nn.Module, x: Tensor, multiplier: float) -> None:
    """A new layer in place of this one, for inputs like x."""
    fresh: nn.Module
    match layer:
        case nn.Conv2d():
            channels = x.shape[1]
            out = max(1, round(layer.out_channels * multiplier))
            groups = 1
            if layer.groups == layer.in_channels:
                groups, out = channels, channels * (layer.out_channels // layer.in_channels)
            elif layer.groups != 1:
                raise TypeError(f"it has {layer.groups} groups")
            fresh = nn.Conv2d(
                channels,
                out,
                cast(Pair, layer.kernel_size),
                cast(Pair, layer.stride),
                cast(Pair | str, layer.padding),
                cast(Pair, layer.dilation),
                groups,
                layer.bias is not None,
            )
            layer.in_channels, layer.out_channels, layer.groups = channels, out, groups
        case nn.Linear():
            layer.in_features, layer.out_features = (
                x.shape[-1],
                max(1, round(layer.out_features * multiplier)),
            )
            fresh = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        case nn.BatchNorm2d():
            layer.num_features = x.shape[1]
            fresh = nn.BatchNorm2d(layer.num_features)
        case nn.LayerNorm():
            # Subclasses (torchvision's LayerNorm2d) normalise the channels of [B, C, H, W].
            if len(layer.normalized_shape) > 1:
                raise TypeError("it has a LayerNorm over several dimensions")
            layer.normalized_shape = (x.shape[-1 if type(layer) is nn.LayerNorm else 1],)
            fresh = nn.LayerNorm(layer.normalized_shape)
        case _:
            raise TypeError(f"it has a {type(layer).__name__}")
    for name, weight in fresh.named_parameters():
        if layer._parameters.get(name) is not None:
            layer._parameters[name] = nn.Parameter(weight.detach().to(x.device))
    for name, statistic in fresh.named_buffers():
        layer._buffers[name] = statistic.to(x.device)
