"""The image datasets: the embedded digits, synthetic images, torchvision's and the user's own, as uint8 image
tensors.
"""

import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from fslsage_rpc.config.own import checked_arguments, first_line, import_own, is_own
from fslsage_rpc.config.schema import Data
from fslsage_rpc.errors import HostError, InputError
from fslsage_rpc.randomness import keyed_seed, numpy_stream, torch_stream

DIGITS = Path(__file__).with_name("digits.npz")
DIGITS_TEST_SAMPLES = 360
SYNTHETIC_TEST_SAMPLES = 10_000
MOST_CLASSES = 100_000
"""a label of a smaller dataset that goes beyond is no class: a model has an output for each"""
DOWNLOAD_TIMEOUT_SECONDS = 10.0  # of each read: a slow link may take its time, a dead one not
DAMAGED = (
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(AssertionError, MemoryError, pickle.UnpicklingError),
)
"""what torchvision raises on files that are missing or not what they should be"""


@dataclass(frozen=True)
class Spec:
    """What is known of a dataset before it is loaded.

    `mean` and `std` per channel apply to pixels divided by `pixel_maximum`. `files` are below `data.root`.
    `dtype` is the one of the stored images.
    """

    train_samples: int
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    pixel_maximum: int = 255
    files: tuple[str, ...] = ()
    dtype: torch.dtype = torch.uint8


@dataclass(frozen=True)
class LabelledImages:
    """`images` `[N, C, H, W]` of uint8, or of floating point as a user's function may give them, and `labels`
    `[N]` of int64, on the CPU.
    """

    images: Tensor
    labels: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held, each with the samples in front."""
        return self.images, self.labels

    def subset(self, indices: Any) -> "LabelledImages":
        """The samples at these indices, copied."""
        return LabelledImages(self.images[indices], self.labels[indices])


# The FSL-SAGE paper normalises CIFAR with ImageNet's figures.
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR10 = Spec(
    train_samples=50_000,
    classes=10,
    image_shape=(3, 32, 32),
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
    crop_padding=4,
    flip=True,
    files=tuple(
        f"cifar-10-batches-py/{n}" for n in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    ),
)
MNIST = Spec(
    train_samples=60_000,
    classes=10,
    image_shape=(1, 28, 28),
    mean=(0.1307,),
    std=(0.3081,),
    crop_padding=2,
    flip=False,
    files=tuple(f"MNIST/raw/{n}" for n in MNIST_FILES),
)
SPECS = {
    "digits": Spec(
        train_samples=1437,
        classes=10,
        image_shape=(1, 8, 8),
        mean=(0.305,),
        std=(0.376,),
        crop_padding=0,  # a pixel is an eighth of the image: no augmentation
        flip=False,
        pixel_maximum=16,
    ),
    "synthetic": replace(CIFAR10, files=()),
    "cifar10": CIFAR10,
    "cifar100": replace(CIFAR10, classes=100, files=("cifar-100-python/train", "cifar-100-python/test")),
    "mnist": MNIST,
    "fashion_mnist": replace(
        MNIST,
        mean=(0.286,),
        std=(0.353,),
        flip=True,
        files=tuple(f"FashionMNIST/raw/{n}" for n in MNIST_FILES),
    ),
}
TORCHVISION = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "mnist": torchvision.datasets.MNIST,
    "fashion_mnist": torchvision.datasets.FashionMNIST,
}


def spec_of(keys: Data) -> Spec:
    """What is known of the dataset; of the user's own, what its training samples say.

    Raises:
        InputError: the user's function fails, or gives something else than images and labels.
    """
    if not is_own(keys.name):
        return SPECS[keys.name]
    images, labels = _load_own(keys, train=True)
    _, channels, height, width = images.shape
    taken_as_they_are = images.is_floating_point()
    mean, std = ((0.0,) * channels, (1.0,) * channels) if taken_as_they_are else _statistics(images)
    return Spec(
        train_samples=len(labels),
        classes=int(labels.max()) + 1,
        image_shape=(channels, height, width),
        mean=mean,
        std=std,
        crop_padding=0,
        flip=False,
        pixel_maximum=1 if taken_as_they_are else 255,
        dtype=images.dtype,
    )


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels / 255, by channel; exact sums, so the same on every rank. A
    channel of one value has 1 for its deviation.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    shares = counts / counts.sum(1, keepdim=True).double()
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(torch.where((counts > 0).sum(1) > 1, std, 1.0).tolist())


def prepare(keys: Data) -> None:
    """See that the dataset's files are there, downloading them if allowed.

    Raises:
        InputError: files are missing and may not, or cannot, be downloaded.
    """
    try:
        load(keys, train=False)
    except HostError:
        if not keys.download or keys.name not in TORCHVISION:
            raise
        with _one_process_at_a_time(Path(keys.root)):
            _download(keys)


def _download(keys: Data) -> None:
    """Fetch what is still missing; nothing, where another process has just done so."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        TORCHVISION[keys.name](keys.root, download=True)
    except DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise _missing_files(keys, f"missing, and the download failed ({reason})") from None
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Keep the ranks that share a folder from downloading into it at the same time."""
    try:
        import fcntl
    except ImportError:  # Windows, where a job has one process
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".download.lock").open("w")
    except OSError as error:
        raise HostError(f"data.root: got {folder}, which cannot be written ({error.strerror})") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(keys: Data, train: bool) -> LabelledImages:
    """The training or test samples, cut to `train_limit` or `test_limit`.

    Raises:
        InputError: files are missing or damaged.
    """
    limit = keys.train_limit if train else keys.test_limit
    match keys.name:
        case "digits":
            images, labels = _load_digits(train)
        case "synthetic":
            images, labels = _make_synthetic(train)
        case name if is_own(name):
            images, labels = _load_own(keys, train)
        case _:
            images, labels = _load_torchvision(keys, train)
    if limit is not None and limit > len(labels):
        which = "train" if train else "test"
        raise InputError(f"data.{which}_limit: got {limit}, expected at most {len(labels)} for {keys.name}")
    return LabelledImages(images[:limit], labels[:limit])


def _load_own(keys: Data, train: bool) -> tuple[Tensor, Tensor]:
    """What the user's function gives: images `[N, C, H, W]` of uint8 or floats, and N labels from 0 on.

    Where it draws from torch's generator, every rank gets the same.
    """
    function = import_own("data.name", keys.name, "a function that returns images and labels")
    which = "training" if train else "test"
    given = {"root": keys.root, "train": train}
    more = checked_arguments("data.arguments", keys.name, function, keys.arguments, given=given)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(0, f"own {which} samples"))
            images, labels = map(torch.as_tensor, function(**given, **more))
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        raise InputError(f"data.name: got {keys.name!r}, which fails ({first_line(error)})") from None
    whole = not (labels.is_floating_point() or labels.is_complex())
    pixels = images.dtype == torch.uint8 or images.is_floating_point()
    if not pixels or images.dim() != 4 or not whole or labels.shape != images.shape[:1]:
        raise InputError(
            f"data.name: got {keys.name!r}, which gives {images.dtype} {list(images.shape)} and "
            f"{labels.dtype} {list(labels.shape)}, expected uint8 or float images [N, C, H, W] and N integer "
            "labels"
        )
    images, labels = images.cpu().contiguous(), labels.to("cpu", torch.int64)
    if not images.numel():
        raise InputError(f"data.name: got {keys.name!r}, which gives no {which} samples")
    if labels.min() < 0:
        raise InputError(f"data.name: got {keys.name!r}, which gives {which} labels below 0")
    most, classes = int(labels.max()), max(MOST_CLASSES, len(labels))
    if most >= classes:
        raise InputError(
            f"data.name: got {keys.name!r}, which gives a {which} label of {most}, expected labels 0 to "
            f"{classes - 1}"
        )
    if images.is_floating_point() and not images.float().isfinite().all():
        raise InputError(f"data.name: got {keys.name!r}, whose {which} images are not all finite numbers")
    return images, labels


def _load_torchvision(keys: Data, train: bool) -> tuple[Tensor, Tensor]:
    """Torchvision reads CIFAR's files, which are pickles, only once all their MD5 sums are right, and
    unpickles no others.
    """
    spec = SPECS[keys.name]
    try:
        dataset = TORCHVISION[keys.name](keys.root, train=train, download=False)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets, dtype=torch.int64)
        images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images.unsqueeze(1)
        sound = (
            images.dtype == torch.uint8
            and images.shape == (len(labels), *spec.image_shape)
            and 0 <= labels.min() <= labels.max() < spec.classes
        )
    except DAMAGED:
        sound = False
    if not sound:
        raise _missing_files(keys, "missing or damaged")
    return images.contiguous(), labels


def _missing_files(keys: Data, what: str) -> HostError:
    folder = Path(keys.root).absolute()
    files = ", ".join(SPECS[keys.name].files)
    return HostError(
        f"data.root: got {folder}, where files of {keys.name} are {what}; expected there: {files}"
    )


def _make_synthetic(train: bool) -> tuple[Tensor, Tensor]:
    """Images of CIFAR-10's shape for measuring speed where no data is at hand: a coarse pattern for each
    class under noise, the same in every run.
    """
    spec = SPECS["synthetic"]
    channels, height, width = spec.image_shape
    patterns = torch.randint(160, (spec.classes, channels, 4, 4), generator=torch_stream(0, "patterns"))
    patterns = patterns.repeat_interleave(height // 4, 2).repeat_interleave(width // 4, 3).to(torch.uint8)
    samples = spec.train_samples if train else SYNTHETIC_TEST_SAMPLES
    drawn = torch_stream(0, "synthetic train" if train else "synthetic test")
    labels = torch.randint(spec.classes, (samples,), generator=drawn)
    noise = torch.randint(96, (samples, channels, height, width), dtype=torch.uint8, generator=drawn)
    return noise.add_(patterns[labels]), labels


def _load_digits(train: bool) -> tuple[Tensor, Tensor]:
    with np.load(DIGITS, allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"].astype(np.int64))
    chosen = torch.from_numpy(_digits_split()[0 if train else 1])
    return images[chosen], labels[chosen]


@cache
def _digits_split() -> tuple[np.ndarray, np.ndarray]:
    """Indices of 1,437 training and 360 test digits: stratified, the same in every run whatever its seed."""
    with np.load(DIGITS, allow_pickle=False) as file:
        labels = file["labels"]
    # Largest remainders: each class gives its share of the 360, rounded so that they add up.
    exact = np.bincount(labels) * (DIGITS_TEST_SAMPLES / len(labels))
    counts = np.floor(exact).astype(int)
    most_cut = np.argsort(counts - exact, kind="stable")
    counts[most_cut[: DIGITS_TEST_SAMPLES - counts.sum()]] += 1
    test = np.zeros(len(labels), dtype=bool)
    for digit, count in enumerate(counts):
        members = np.flatnonzero(labels == digit)
        test[numpy_stream(0, "digits split", client=digit).permutation(members)[:count]] = True
    # Mixed, so that train_limit takes a fair sample.
    mixed = numpy_stream(0, "digits order").permutation(len(labels))
    return mixed[~test[mixed]], mixed[test[mixed]]
