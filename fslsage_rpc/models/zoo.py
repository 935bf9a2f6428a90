"""The models by name: the built-in ones, torchvision's classifiers, and the user's own."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from fslsage_rpc.config.loading import changed_keys
from fslsage_rpc.config.own import checked_arguments, first_line, import_own, is_own, parameters
from fslsage_rpc.config.schema import Model
from fslsage_rpc.errors import InputError
from fslsage_rpc.language import model as gpt2
from fslsage_rpc.models.tracing import TokenShape

ImageShape = tuple[int, int, int]  # channels, height, width
TORCHVISION = "torchvision/"
ALL_READ = ("name", "cut", "memory_format", "auxiliary")
"""keys of the `model` section that concern every model"""


@dataclass(frozen=True)
class Entry:
    """A model that can be had by name.

    `make(classes, sample_shape)`, with the keys of the `model` section that it `reads` by name, gives it
    freshly initialised; it maps images `[B, C, H, W]` to logits `[B, classes]`, or `tokens` `[B, T]` to
    logits `[B, T, classes]`. `auxiliary` gives for a cut the module up to which the auxiliary model is by
    default a fresh copy of the server half; where it is None, that is linear. `pools`: a linear classifier of
    what is inside the model takes means over positions. `head`: the modules at the model's end that an
    auxiliary model ends with too; none: it gets a linear classifier. `for_alignment` is done to an auxiliary
    model, so that it can be differentiated twice. `reorders`: it may be given images in any order of
    memory and gains by `channels_last` on a CPU; `reorders_twice`: also where its auxiliary model is
    differentiated twice.
    """

    make: Callable[..., nn.Module]
    default_cut: str | None = None
    auxiliary: Callable[[str], str | None] = dict[str, str]().get
    reads: tuple[str, ...] = ()
    pools: bool = True
    tokens: bool = False
    head: tuple[str, ...] = ()
    for_alignment: Callable[[nn.Module], None] = lambda auxiliary: None
    reorders: bool = False
    reorders_twice: bool = False


def simple_conv(classes: int, image_shape: ImageShape) -> nn.Module:
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
        fc3=nn.Linear(192, classes),
    )
    return nn.Sequential(layers)


def resnet18(classes: int, image_shape: ImageShape) -> nn.Module:
    """torchvision's ResNet-18 with its 7x7 stem (arXiv 1512.03385); other channel counts get a stem of their
    own.
    """
    model: nn.Module = torchvision.models.resnet18(num_classes=classes)
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


def cifar_resnet(classes: int, image_shape: ImageShape, width: int | None, depth: int) -> nn.Module:
    """The ResNets for CIFAR of arXiv 1512.03385: three stages of (depth - 2) / 6 basic blocks, of `width`
    (None: 16), 2 `width` and 4 `width` channels.
    """
    width = width or 16
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
    blocks.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(inside, classes))
    model = nn.Sequential(blocks)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


ZOO = {
    "simple_conv": Entry(simple_conv, default_cut="pool2", pools=False),
    "resnet18": Entry(
        resnet18,
        default_cut="layer2",
        auxiliary={"layer1": "layer2", "layer2": "layer3", "layer3": "layer4"}.get,
        reorders=True,
        reorders_twice=True,
    ),
}
for depth in (56, 110):
    ZOO[f"resnet{depth}"] = Entry(
        partial(cifar_resnet, depth=depth),
        default_cut="layer1",
        auxiliary={"layer1": "layer2", "layer2": "layer3"}.get,
        reads=("width",),
        reorders=True,
    )
ZOO["gpt2"] = Entry(
    gpt2.make,
    default_cut="h.0",
    auxiliary=gpt2.third_block_behind,
    reads=("width", "layers", "heads", "dropout", "pretrained", "lora"),
    pools=False,
    tokens=True,
    head=("ln_f", "lm_head"),
    for_alignment=gpt2.attend_in_single_steps,
)


def find(name: str) -> Entry:
    """The model of that name: a built-in one, `torchvision/MODEL`, or `package.module:function`.

    Raises:
        InputError: there is none.
    """
    if name in ZOO:
        return ZOO[name]
    if name.startswith(TORCHVISION):
        known = torchvision.models.list_models(module=torchvision.models)
        model = name.removeprefix(TORCHVISION)
        if model in known:
            return Entry(partial(_torchvision, model), reorders=True)
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(TORCHVISION + n for n in near)}?" if near else "it has no such model"
        raise InputError(f"model.name: got {name!r}, expected one of torchvision's classifiers; {hint}")
    if is_own(name):
        function = import_own("model.name", name, "a function that returns a model")
        return Entry(partial(_users_own, name, function), reads=("arguments",))
    near = difflib.get_close_matches(name, ZOO, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"model.name: got {name!r}, expected one of {', '.join(ZOO)}, or {TORCHVISION}MODEL, "
        f"or package.module:function{hint}"
    )


def make(keys: Model, classes: int, sample_shape: Sequence[int]) -> nn.Module:
    """The model of a configuration, freshly initialised from torch's global generator.

    Raises:
        InputError: there is no such model, it has no such width or the like, or it cannot be made for such
            samples.
    """
    entry = find(keys.name)
    for key, (default, value) in changed_keys(asdict(Model()), asdict(keys)).items():
        if key.partition(".")[0] not in (*ALL_READ, *entry.reads):
            expected = "null" if default is None else default
            raise InputError(f"model.{key}: got {value}, expected {expected}: {keys.name} has no choice")
    of_texts = isinstance(sample_shape, TokenShape)
    if of_texts != entry.tokens and not is_own(keys.name):
        known = [name for name, one in ZOO.items() if one.tokens == of_texts]
        raise InputError(
            f"model.name: got {keys.name!r}, expected a model for {'texts' if of_texts else 'images'}, as "
            f"data.name has them: {', '.join(known)}, or package.module:function"
        )
    try:
        return entry.make(classes, sample_shape, **{name: getattr(keys, name) for name in entry.reads})
    except InputError:
        raise
    except Exception as error:  # torchvision's and the user's functions raise what they like
        raise refuse_samples(keys, sample_shape, error) from None


def refuse_samples(keys: Model, sample_shape: Sequence[int], error: Exception) -> InputError:
    """A model failed on samples of that shape."""
    shape = "x".join(map(str, sample_shape))
    samples = (
        "texts" if isinstance(sample_shape, TokenShape) else "images" if len(sample_shape) == 3 else "samples"
    )
    return InputError(
        f"model.name: got {keys.name!r}, which fails on {samples} of {shape} ({first_line(error)})"
    )


def _torchvision(model: str, classes: int, image_shape: ImageShape) -> nn.Module:
    """One of torchvision's classifiers, without the second losses of googlenet and inception_v3, and for
    images of this size where it takes but one.
    """
    if image_shape[0] != 3:
        raise ValueError(f"it takes 3 channels, not {image_shape[0]}")
    get_model: Callable[..., nn.Module] = torchvision.models.get_model
    keys: dict[str, Any] = {"num_classes": classes}
    if model in ("googlenet", "inception_v3"):
        keys |= {"aux_logits": False, "init_weights": True}
    elif model.startswith("vit"):
        keys |= {"image_size": image_shape[1]}
    elif model.startswith("maxvit"):
        keys |= {"input_size": image_shape[1:]}
    elif model.startswith("regnet"):
        with torch.device("cpu"):  # also where only sizes are asked for: it reads tensors that it makes
            return get_model(model, weights=None, **keys)
    return get_model(model, weights=None, **keys)


def _users_own(
    name: str,
    function: Callable[..., Any],
    classes: int,
    image_shape: ImageShape,
    arguments: dict[str, Any],
) -> nn.Module:
    """What the function makes of the arguments, `num_classes` and, if it has a parameter of that name,
    `image_shape` (or `sample_shape`, which is the same).
    """
    given: dict[str, Any] = {"num_classes": classes}
    names = {each.name for one in parameters(function) for each in one}
    given |= {shape: image_shape for shape in ("image_shape", "sample_shape") if shape in names}
    more = checked_arguments("model.arguments", name, function, arguments, given=given)
    with torch.device("cpu"):  # also where only sizes are asked for: it may read what it makes
        model = function(**given, **more)
    if not isinstance(model, nn.Module):
        raise TypeError(f"it returned {type(model).__name__}, not a torch.nn.Module")
    return model
