"""A residual network with BatchNorm that is small enough for tests, `support.batch_norm_model:residual`."""

from torch import Tensor, nn

CUT = "blocks.0"
SMASHED_SAMPLE = 8 * 4 * 4
"""numbers of a sample's smashed data, of an image of 8 by 8"""


class Block(nn.Module):
    """As resnet18's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Residual(nn.Module):
    """A stem, three blocks and a linear classifier."""

    def __init__(self, num_classes: int, image_shape: tuple[int, ...]):
        super().__init__()
        self.stem = nn.Conv2d(image_shape[0], 8, 3, stride=2, padding=1, bias=False)
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


def residual(num_classes: int, image_shape: tuple[int, ...]) -> nn.Module:
    return Residual(num_classes, image_shape)
