"""Classification of images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fslsage_rpc.config import Config
from fslsage_rpc.data import datasets
from fslsage_rpc.data.batches import ImageBatches
from fslsage_rpc.data.datasets import LabelledImages
from fslsage_rpc.models.splitting import SplitModel, build
from fslsage_rpc.tasks.base import Task


class ImageTask(Task):
    """Images `[B, C, H, W]` to logits `[B, classes]`, trained on the cross-entropy with labels `[B]`."""

    label_shape = ()

    def __init__(self, config: Config):
        super().__init__(config)
        self.spec = datasets.spec_of(config.data)
        self.sample_shape = self.spec.image_shape
        self.classes = self.groups = self.spec.classes

    @property
    def train_samples(self) -> int:
        return min(self.config.data.train_limit or self.spec.train_samples, self.spec.train_samples)

    def prepare(self) -> None:
        datasets.prepare(self.config.data)

    def load(self, train: bool) -> LabelledImages:
        return datasets.load(self.config.data, train)

    def batches(self, samples: LabelledImages, batch_size: int, device: torch.device) -> ImageBatches:
        return ImageBatches(samples, self.spec, batch_size, device, self.precision.weights)

    def build(self) -> SplitModel:
        config, precision = self.config, self.precision
        return build(
            config.model, self.classes, self.sample_shape, config.seed, precision.weights, precision.autocast
        )

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, label_smoothing=self.config.loss.label_smoothing)

    def tally(self, outputs: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, y, reduction="sum").double()
        right = (outputs.argmax(1) == y).sum().double()
        return torch.stack([loss, right, torch.full_like(loss, len(y))])
