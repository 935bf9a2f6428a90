"""From stored images to normalised, augmented batches on the training device."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fslsage_rpc.data.datasets import LabelledImages, Spec
from fslsage_rpc.randomness import numpy_stream, torch_stream


def batch_sizes(samples: int, batch_size: int, epochs: int) -> list[int]:
    """The sizes of a client's batches in one round: `epochs` passes, the last batch of each may be short."""
    full, rest = divmod(samples, batch_size)
    return ([batch_size] * full + [rest] * (rest > 0)) * epochs


class ImageBatches:
    """Samples kept as they are stored on the training device, cut into batches there.

    Order and augmentation draw from streams keyed by (seed, purpose, round, client) on the CPU, so they are
    the same on every device.
    """

    def __init__(
        self, data: LabelledImages, spec: Spec, batch_size: int, device: torch.device, dtype: torch.dtype
    ):
        self.images = data.images.to(device)
        self.labels = data.labels.to(device)
        self.batch_size = batch_size
        self._spec = spec
        # (pixel / maximum - mean) / std, folded into one multiplication and one subtraction
        std = torch.tensor(spec.std, device=device, dtype=torch.float64).view(-1, 1, 1)
        mean = torch.tensor(spec.mean, device=device, dtype=torch.float64).view(-1, 1, 1)
        self._scale, self._shift = (1 / (spec.pixel_maximum * std)).to(dtype), (mean / std).to(dtype)

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples as stored, for evaluation: x `[B, C, H, W]` and y `[B]`."""
        for images, labels in zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        ):
            yield self._normalise(images), labels

    def shuffled(
        self, seed: int, t: int, client: int, epochs: int, augment: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of one client in one round: x `[B, C, H, W]` and y `[B]`."""
        shuffle = numpy_stream(seed, "shuffle", t, client)
        chance = torch_stream(seed, "augment", t, client)
        samples, positions = len(self.labels), 2 * self._spec.crop_padding + 1
        for _ in range(epochs):
            order = self._moved(torch.from_numpy(shuffle.permutation(samples)))
            corners = self._moved(torch.randint(positions, (samples, 2), generator=chance))
            mirrored = self._moved(torch.rand(samples, generator=chance) < 0.5)
            for first in range(0, samples, self.batch_size):
                here = slice(first, first + self.batch_size)
                crop = (corners[here], mirrored[here]) if augment else None
                yield self._batch(order[here], crop), self.labels[order[here]]

    def _moved(self, drawn: Tensor) -> Tensor:
        """What was drawn on the CPU, where the images are. From pinned memory: the host does not wait."""
        device = self.labels.device
        return drawn if device.type == "cpu" else drawn.pin_memory().to(device, non_blocking=True)

    def _batch(self, samples: Tensor, crop: tuple[Tensor, Tensor] | None) -> Tensor:
        images = self.images[samples]
        return self._normalise(images if crop is None else self._augment(images, *crop))

    def _normalise(self, images: Tensor) -> Tensor:
        return images.to(self._scale.dtype) * self._scale - self._shift

    def _augment(self, images: Tensor, corners: Tensor, mirrored: Tensor) -> Tensor:
        """Random crops of the zero-padded images, and mirror images where the dataset allows them."""
        padding = self._spec.crop_padding
        height, width = images.shape[-2:]
        # All crops as views [B, C, rows, columns, H, W], of which each image's is copied.
        windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        sample = torch.arange(len(images), device=images.device)
        crops = windows[sample, :, corners[:, 0], corners[:, 1]]
        return torch.where(mirrored.view(-1, 1, 1, 1), crops.flip(-1), crops) if self._spec.flip else crops
