"""What a dataset and a model bring to an algorithm: everything that is different for images and for text."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fslsage_rpc.config.schema import Config
from fslsage_rpc.models.splitting import PRECISIONS, Precision, SplitModel, build


class Samples(Protocol):
    """The training or test samples of a dataset, on the CPU.

    `labels` `[N]` of int64 is what partitions divide by; it need not be what is predicted.
    """

    @property
    def labels(self) -> Tensor:
        """Classes that partitions divide by, `[N]` of int64."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held, each with the samples in front."""
        ...

    def subset(self, indices: Any) -> "Samples":
        """The samples at these indices, copied."""
        ...


class Batches(Protocol):
    """Samples on the training device, cut there into batches: inputs x `[B, ...]`, labels y `[B, ...]`."""

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples as stored, for evaluation."""
        ...

    def shuffled(
        self, seed: int, t: int, client: int, epochs: int, augment: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of one client in one round, drawn from keyed streams."""
        ...


@dataclass(frozen=True)
class Score:
    """How good a model is on a test set: the mean loss of a prediction, and the share of right ones.

    `metrics` has what else the task measures by.
    """

    loss: float
    accuracy: float
    metrics: dict[str, float] = field(default_factory=dict)


class Task(ABC):
    """A dataset, and the model that is trained on it.

    The client, server and auxiliary model come from `build`. What trains are their parameters that require a
    gradient; only those, and buffers, are averaged, sent and counted.

    Attributes:
        sample_shape: of one input, without the batch.
        label_shape: of one label: () where a sample has one prediction, (T,) where each of T positions has.
        label_dtype: of y.
        classes: that a prediction chooses from; what a model is made for.
        groups: the number of values of `Samples.labels`.
        metrics: the names of what it measures by besides loss and accuracy.
    """

    sample_shape: tuple[int, ...]
    label_shape: tuple[int, ...]
    label_dtype: torch.dtype = torch.int64
    classes: int
    groups: int
    metrics: tuple[str, ...] = ()

    def __init__(self, config: Config):
        self.config = config

    @property
    def precision(self) -> Precision:
        """The number formats of the training."""
        return PRECISIONS[self.config.precision]

    @property
    def label_bytes(self) -> int:
        """The size of one label on the wire."""
        return torch.Size(self.label_shape).numel() * self.label_dtype.itemsize

    @property
    @abstractmethod
    def train_samples(self) -> int:
        """How many there are to be divided among the clients."""

    @abstractmethod
    def prepare(self) -> None:
        """See that the dataset's files are there, downloading them if allowed.

        Raises:
            InputError: they are missing, or the model cannot be trained on this dataset.
        """

    @abstractmethod
    def load(self, train: bool) -> Samples:
        """The training or test samples.

        Raises:
            InputError: files are missing or damaged.
        """

    @abstractmethod
    def batches(self, samples: Any, batch_size: int, device: torch.device) -> Batches:
        """Samples of `load` (or a subset), ready to be drawn on a device."""

    def build(self) -> SplitModel:
        """The model of the configuration, cut in two, and its auxiliary model.

        Raises:
            InputError: there is no such model, cut or auxiliary model.
        """
        config, precision = self.config, self.precision
        return build(
            config.model, self.classes, self.sample_shape, config.seed, precision.weights, precision.autocast
        )

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch of outputs, the server's or the auxiliary model's; training lowers it."""

    @abstractmethod
    def tally(self, outputs: Tensor, y: Tensor) -> Tensor:
        """What evaluation adds up over batches: `[3]` of float64, the sum of the predictions' losses, how
        many were right, and how many there were.
        """

    def score(self, tally: Tensor) -> Score:
        """The score of all samples, from the sum of their batches' tallies."""
        loss, right, predictions = tally.tolist()
        return Score(loss / predictions, right / predictions)
