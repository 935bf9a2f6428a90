"""The built-in models, each as an ordered chain of named blocks, with the blocks that it may be cut after."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torchvision
from torch import nn

Blocks = OrderedDict[str, nn.Module]
ImageShape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    `blocks(classes, image_shape)` builds it, freshly initialised. `cuts` maps each block that the model may
    be cut after to the stage behind it that the auxiliary model is a fresh copy of; None gives a linear
    auxiliary model.
    """

    blocks: Callable[[int, ImageShape], Blocks]
    cuts: dict[str, str | None]
    default_cut: str


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


ZOO = {
    "simple_conv": Entry(simple_conv, cuts={"norm1": None, "pool2": None}, default_cut="pool2"),
    "resnet18": Entry(
        resnet18, cuts={"layer1": "layer2", "layer2": "layer3", "layer3": "layer4"}, default_cut="layer2"
    ),
}
