"""Models that draw random numbers in training, for configurations: `support.random_models:FUNCTION`."""

import random
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth


class Wet(nn.Module):
    """One dropout layer that both halves call, and one of each other kind."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.stem = nn.Conv2d(1, 6, 3, 2)
        self.between = nn.Identity()
        self.depth = StochasticDepth(0.3, "row")
        self.channels = nn.Dropout2d(0.2)
        self.body = nn.Linear(54, 12)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.between(self.drop(self.stem(x)))
        z = self.channels(z + self.depth(z)).flatten(1)
        return self.head(self.drop(self.drop(self.body(z)).tanh()))


def wet(num_classes: int) -> nn.Module:
    return Wet(num_classes)


def copied(num_classes: int) -> nn.Module:
    """A model of which an auxiliary model can have a copy with dropout in it."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 9),
        nn.Dropout(0.3),
        nn.Linear(9, 9),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(9, num_classes),
    )


class Drawing(nn.Module):
    """Draws what it is told to."""

    def __init__(self, draw: Callable[[Tensor], Tensor]):
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(x) if self.training else x


def drawing(draw: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6),
        nn.Sequential(nn.ReLU(), Drawing(draw)),
        nn.Linear(6, 10),
    )


def functional(num_classes: int) -> nn.Module:
    return drawing(lambda x: F.dropout(x, 0.5))


def attention(num_classes: int) -> nn.Module:
    return drawing(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)[0])


def pythons(num_classes: int) -> nn.Module:
    return drawing(lambda x: x * random.random())


def numpys(num_classes: int) -> nn.Module:
    return drawing(lambda x: x * np.random.rand())  # noqa: NPY002


def nothing(num_classes: int) -> nn.Module:
    return drawing(lambda x: F.scaled_dot_product_attention(x[None], x[None], F.dropout(x[None], 0.0))[0])
