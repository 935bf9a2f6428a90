"""Classification of images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fslsage_rpc.config.own import is_own
from fslsage_rpc.config.schema import Config
from fslsage_rpc.data import datasets
from fslsage_rpc.data.batches import ImageBatches
from fslsage_rpc.data.datasets import LabelledImages
from fslsage_rpc.errors import InputError
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
        if is_own(self.config.data.name):
            self.load(train=False)
        else:
            datasets.prepare(self.config.data)

    def load(self, train: bool) -> LabelledImages:
        samples = datasets.load(self.config.data, train)
        if is_own(self.config.data.name):
            self._check(samples, "training" if train else "test")
        return samples

    def _check(self, samples: LabelledImages, which: str) -> None:
        """Are samples of the user's own such as the training samples said?"""
        shape, most = list(samples.images.shape[1:]), int(samples.labels.max())
        expected = list(self.spec.image_shape)
        name = self.config.data.name
        if samples.images.dtype != self.spec.dtype:
            raise InputError(
                f"data.name: got {name!r}, which gives {which} images of {samples.images.dtype}, expected "
                f"{self.spec.dtype} as in training"
            )
        if shape != expected or most >= self.spec.classes:
            raise InputError(
                f"data.name: got {name!r}, which gives {which} images {shape} with labels to {most}, "
                f"expected {expected} and {self.spec.classes - 1} as in training"
            )

    def batches(self, samples: LabelledImages, batch_size: int, device: torch.device) -> ImageBatches:
        return ImageBatches(samples, self.spec, batch_size, device, self.precision.weights)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, label_smoothing=self.config.loss.label_smoothing)

    def tally(self, outputs: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, y, reduction="sum").double()
        right = (outputs.argmax(1) == y).sum().double()
        return torch.stack([loss, right, torch.full_like(loss, len(y))])
