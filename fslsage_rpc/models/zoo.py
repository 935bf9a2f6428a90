"""The built-in models, each as an ordered chain of named blocks, with the blocks that it may be cut after."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

Blocks = OrderedDict[str, nn.Module]
ImageShape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    `blocks(classes, image_shape)`, and for a model with a `default_width` also `width=`, builds it, freshly
    initialised. `cuts` maps each block that the model may be cut after to the block up to which the auxiliary
    model is by default a fresh copy of the server half; None gives a linear auxiliary model.
    """

    blocks: Callable[..., Blocks]
    cuts: dict[str, str | None]
    default_cut: str
    default_width: int | None = None


def simple_conv(classes: int, image_shape: ImageShape) -> Blocks:
    """A network of two convolutions and three linear layers, for images of any size."""
    channels, height, width = image_shape
    rows, columns = (height + 3) // 4, (width + 3) // 4  # two pools, each of which halves and rounds up
    return OrderedDict(
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


def resnet18(classes: int, image_shape: ImageShape) -> Blocks:
    """torchvision's ResNet-18 with its 7x7 stem (arXiv 1512.03385); other channel counts get a stem of their
    own.
    """
    model = torchvision.models.resnet18(num_classes=classes)
    blocks = OrderedDict(model.named_children())
    channels = image_shape[0]
    if channels != 3:
        blocks["conv1"] = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    head = blocks.pop("fc")
    return OrderedDict(**blocks, flatten=nn.Flatten(), fc=head)


class ParameterFreeShortcut(nn.Module):
    """Every second pixel, with zeros for the new channels (option A of arXiv 1512.03385)."""

    def __init__(self, new_channels: int):
        super().__init__()
        self.before, self.behind = new_channels // 2, new_channels - new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, C, H, W]` to `[B, C + new_channels, ceil(H/2), ceil(W/2)]`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


def cifar_resnet(classes: int, image_shape: ImageShape, width: int, depth: int) -> Blocks:
    """The ResNets for CIFAR of arXiv 1512.03385: three stages of (depth - 2) / 6 basic blocks, of `width`, 2
    `width` and 4 `width` channels.
    """
    blocks: Blocks = OrderedDict(
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
    for module in nn.Sequential(blocks).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return blocks


ZOO = {
    "simple_conv": Entry(simple_conv, cuts={"norm1": None, "pool2": None}, default_cut="pool2"),
    "resnet18": Entry(
        resnet18, cuts={"layer1": "layer2", "layer2": "layer3", "layer3": "layer4"}, default_cut="layer2"
    ),
}
for depth in (56, 110):
    ZOO[f"resnet{depth}"] = Entry(
        partial(cifar_resnet, depth=depth),
        cuts={"layer1": "layer2", "layer2": "layer3"},
        default_cut="layer1",
        default_width=16,
    )
