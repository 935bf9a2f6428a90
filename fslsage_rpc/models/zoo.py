"""The models by name: the built-in ones, torchvision's classifiers, and the user's own."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from fslsage_rpc.config.own import checked_arguments, first_line, import_own, is_own, parameters
from fslsage_rpc.config.schema import Count, Model
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.tracing import TokenShape

ImageShape = tuple[int, int, int]  # channels, height, width
TORCHVISION = "torchvision/"


@dataclass(frozen=True)
class ModelEntry:
    """A function that makes a model, and what is to be known of that model. It is called as the function is.

    Attributes:
        make: the function, of `num_classes`, of `image_shape` or `sample_shape` if it has such a parameter,
            and of `model.arguments`. Its model maps images `[B, C, H, W]` to logits `[B, num_classes]`, or
            tokens `[B, T]` to logits `[B, T, num_classes]`.
        default_cut: the module whose output is the smashed data, where `model.cut` is null.
        auxiliary: gives for a cut the module up to which the auxiliary model is by default a fresh copy of
            the server half. Where that is None, the auxiliary model is linear.
        samples: it is for these alone.
        pools: a linear classifier of what is inside the model takes means over positions.
        head: the modules at the model's end that an auxiliary model ends with, too. Where there are none, an
            auxiliary model gets a linear classifier.
        for_alignment: is done to an auxiliary model, so that it can be differentiated twice.
        on_meta: `make` reads no tensor that it makes, so sizes can be found without memory.
    """

    make: Callable[..., nn.Module]
    default_cut: str | None = None
    auxiliary: Callable[[str], str | None] = dict[str, str]().get
    samples: Literal["images", "texts"] | None = None
    pools: bool = True
    head: tuple[str, ...] = ()
    for_alignment: Callable[[nn.Module], None] = lambda auxiliary: None
    on_meta: bool = False

    def __call__(self, *arguments: Any, **more: Any) -> nn.Module:
        """Make the model."""
        return self.make(*arguments, **more)


def simple_conv(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """A network of two convolutions and three linear layers, for images of any size."""
    channels, height, width = image_shape
    rows, columns = (height + 3) // 4, (width + 3) // 4  # two pools, each of which halves and rounds up
    layers = OrderedDict(
        conv1=nn.Conv2d(channels, 64, 5, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(3, stride=2, padding=1),
        norm1=nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1),
        conv2=nn.Conv2d(64, 64, 5, padding=2),
        relu2=nn.ReLU(),
        norm2=nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1),
        pool2=nn.MaxPool2d(3, stride=2, padding=1),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * rows * columns, 384),
        relu3=nn.ReLU(),
        fc2=nn.Linear(384, 192),
        relu4=nn.ReLU(),
        fc3=nn.Linear(192, num_classes),
    )
    return nn.Sequential(layers)


def resnet18(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """torchvision's ResNet-18 with its 7x7 stem (arXiv 1512.03385); other channel counts get a stem of their
    own.
    """
    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    if image_shape[0] != 3:
        model.conv1 = nn.Conv2d(image_shape[0], 64, 7, stride=2, padding=3, bias=False)
    return model


class ParameterFreeShortcut(nn.Module):
    """Every second pixel, with zeros for the new channels (option A of arXiv 1512.03385)."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.before, self.behind = new_channels // 2, new_channels - new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, C, H, W]` to `[B, C + new_channels, ceil(H/2), ceil(W/2)]`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


def cifar_resnet(depth: int, num_classes: int, image_shape: ImageShape, width: Count = 16) -> nn.Module:
    """The ResNets for CIFAR of arXiv 1512.03385: three stages of (depth - 2) / 6 basic blocks.

    They are of `width`, 2 `width` and 4 `width` channels.
    """
    blocks: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
    )
    inside = width
    for number, channels in enumerate((width, 2 * width, 4 * width), start=1):
        first = BasicBlock(inside, channels)
        if channels != inside:
            first = BasicBlock(inside, channels, 2, ParameterFreeShortcut(channels - inside))
        rest = [BasicBlock(channels, channels) for _ in range((depth - 2) // 6 - 1)]
        blocks[f"layer{number}"] = nn.Sequential(first, *rest)
        inside = channels
    blocks.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(inside, num_classes))
    model = nn.Sequential(blocks)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


built_in = partial(ModelEntry, samples="images", on_meta=True)
ZOO = {
    "simple_conv": built_in(simple_conv, default_cut="pool2", pools=False),
    "resnet18": built_in(
        resnet18,
        default_cut="layer2",
        auxiliary={"layer1": "layer2", "layer2": "layer3", "layer3": "layer4"}.get,
    ),
}
for depth in (56, 110):
    ZOO[f"resnet{depth}"] = built_in(
        partial(cifar_resnet, depth),
        default_cut="layer1",
        auxiliary={"layer1": "layer2", "layer2": "layer3"}.get,
    )


def find(name: str) -> ModelEntry:
    """The model of that name: a built-in one, `torchvision/MODEL`, or `package.module:name`.

    Raises:
        InputError: there is none.
    """
    if name in ZOO:
        return ZOO[name]
    if name.startswith(TORCHVISION):
        known = torchvision.models.list_models(module=torchvision.models)
        model = name.removeprefix(TORCHVISION)
        if model in known:
            on_meta = not model.startswith("regnet")
            return built_in(partial(_torchvision, model), on_meta=on_meta)
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(TORCHVISION + n for n in near)}?" if near else "it has no such model"
        raise InputError(f"model.name: got {name!r}, expected one of torchvision's classifiers; {hint}")
    if is_own(name):
        own = import_own("model.name", name, "a function that returns a model")
        return own if isinstance(own, ModelEntry) else ModelEntry(own)
    near = difflib.get_close_matches(name, ZOO, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"model.name: got {name!r}, expected one of {', '.join(ZOO)}, or {TORCHVISION}MODEL, "
        f"or package.module:function{hint}"
    )


def make(keys: Model, classes: int, sample_shape: Sequence[int]) -> nn.Module:
    """The model of a configuration, freshly initialised from torch's global generator.

    Raises:
        InputError: there is no such model, it takes no such arguments, or it cannot be made for such samples.
    """
    entry = find(keys.name)
    samples = _kind(sample_shape)
    if entry.samples not in (None, samples):
        raise InputError(
            f"model.name: got {keys.name!r}, a model for {entry.samples}, expected one for {samples}, as "
            "data.name has them"
        )
    try:
        names = {each.name for one in parameters(entry.make) for each in one}
        given: dict[str, Any] = {"num_classes": classes}
        given |= {shape: sample_shape for shape in ("image_shape", "sample_shape") if shape in names}
        more = checked_arguments("model.arguments", keys.name, entry.make, keys.arguments, given=given)
        with nullcontext() if entry.on_meta else torch.device("cpu"):
            model = entry.make(**given, **more)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it returned {type(model).__name__}, not a torch.nn.Module")
        return model
    except InputError:
        raise
    except Exception as error:  # torchvision's and the user's functions raise what they like
        raise refuse_samples(keys, sample_shape, error) from None


def refuse_samples(keys: Model, sample_shape: Sequence[int], error: Exception) -> InputError:
    """A model failed on samples of that shape."""
    samples = f"{_kind(sample_shape)} of {'x'.join(map(str, sample_shape))}"
    return InputError(f"model.name: got {keys.name!r}, which fails on {samples} ({first_line(error)})")


def _kind(sample_shape: Sequence[int]) -> str:
    if isinstance(sample_shape, TokenShape):
        return "texts"
    return "images" if len(sample_shape) == 3 else "samples"


def _torchvision(model: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """One of torchvision's classifiers, without the second losses of googlenet and inception_v3, and for
    images of this size where it takes but one.
    """
    if image_shape[0] != 3:
        raise ValueError(f"it takes 3 channels, not {image_shape[0]}")
    get_model: Callable[..., nn.Module] = torchvision.models.get_model
    keys: dict[str, Any] = {"num_classes": num_classes}
    if model in ("googlenet", "inception_v3"):
        keys |= {"aux_logits": False, "init_weights": True}
    elif model.startswith("vit"):
        keys |= {"image_size": image_shape[1]}
    elif model.startswith("maxvit"):
        keys |= {"input_size": image_shape[1:]}
    return get_model(model, weights=None, **keys)
