"""CIFAR-10 as far as its files are there, as `data.name: cifar10_parts:Cifar10Parts`.

Without `test_batch` the last training images that there are become the test set.
"""

import hashlib
import pickle
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision

from fslsage_rpc.config.schema import Config
from fslsage_rpc.data.datasets import LabelledImages
from fslsage_rpc.errors import HostError, InputError
from fslsage_rpc.tasks.images import ImageTask

FOLDER = "cifar-10-batches-py"
TEST_FILE = "test_batch"
TRAIN_FILES = tuple(name for name, _ in torchvision.datasets.CIFAR10.train_list)
MD5 = dict(torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list)
HELD_OUT = 5_000
"""training images that are the test set where there is no other"""


@dataclass(frozen=True)
class Parts:
    """The images that there are; `said` tells which, in a few words."""

    train: LabelledImages
    test: LabelledImages
    said: str


class Cifar10Parts(ImageTask):
    """The built-in `cifar10` in all but its files: normalised and augmented alike."""

    def __init__(self, config: Config):
        super().__init__(replace(config, data=replace(config.data, name="cifar10")))
        self.spec = replace(self.spec, train_samples=len(read(config.data.root).train.labels))

    def prepare(self) -> None:
        read(self.config.data.root)

    def load(self, train: bool) -> LabelledImages:
        parts = read(self.config.data.root)
        samples, key = (parts.train, "train") if train else (parts.test, "test")
        limit = self.config.data.train_limit if train else self.config.data.test_limit
        if limit is not None and limit > len(samples.labels):
            raise InputError(
                f"data.{key}_limit: got {limit}, expected at most {len(samples.labels)} with {parts.said}"
            )
        return samples.subset(slice(limit))


@cache
def read(root: str) -> Parts:
    """All files that are there, read once in a process.

    Raises:
        HostError: none of the training files is there, or a file is damaged.
    """
    folder = Path(root) / FOLDER
    names = [name for name in TRAIN_FILES if (folder / name).exists()]
    if not names:
        raise HostError(
            f"DATA: got {root}, where {FOLDER} has no training images; expected one or more of "
            f"{', '.join(TRAIN_FILES)}, and {TEST_FILE} if it is there"
        )
    files = [_read_file(folder / name) for name in names]
    train = LabelledImages(
        torch.cat([file.images for file in files]), torch.cat([file.labels for file in files])
    )
    if (folder / TEST_FILE).exists():
        test, tested_on = _read_file(folder / TEST_FILE), TEST_FILE
    else:
        if len(train.labels) <= HELD_OUT:
            raise HostError(
                f"DATA: got {root}, which has {len(train.labels)} images, too few to hold some out"
            )
        test, train = train.subset(slice(-HELD_OUT, None)), train.subset(slice(-HELD_OUT))
        tested_on = f"the {HELD_OUT:,} images after them, held out as there is no {TEST_FILE}"
    said = f"{len(train.labels):,} training images of {', '.join(names)}; tested on {tested_on}"
    return Parts(train, test, said)


def _read_file(path: Path) -> LabelledImages:
    """One file of 10,000 images; a pickle, which is opened only where its MD5 sum is right."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise HostError(f"DATA: {path} cannot be read ({error.strerror})") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise HostError(f"DATA: {path} is damaged: its MD5 sum is not that of CIFAR-10's {path.name}")
    batch = pickle.loads(content, encoding="latin1")
    images = torch.from_numpy(np.ascontiguousarray(batch["data"])).view(-1, 3, 32, 32)
    return LabelledImages(images, torch.tensor(batch["labels"], dtype=torch.int64))
