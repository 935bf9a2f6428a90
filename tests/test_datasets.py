"""The datasets: the embedded digits, and torchvision's, whose files may be missing, damaged or downloaded."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from fslsage_rpc.config.schema import Data
from fslsage_rpc.data import datasets
from fslsage_rpc.data.datasets import SPECS, LabelledImages, load, prepare
from support.image_files import idx, write_mnist
from support.user_input import mistake

# Digits


@pytest.mark.parametrize(("train", "samples"), [(True, 1437), (False, 360)])
def test_digits_are_1437_training_and_360_test_images_of_ten_classes(train: bool, samples: int) -> None:
    data = load(Data(), train)
    assert (data.images.shape, data.images.dtype) == ((samples, 1, 8, 8), torch.uint8)
    assert data.images.max() == SPECS["digits"].pixel_maximum == 16
    assert (data.labels.shape, data.labels.dtype) == ((samples,), torch.int64)
    assert data.labels.unique().tolist() == list(range(10))


def fingerprints(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    """Each sample's pixels and label."""
    return [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]


def test_digits_training_and_test_samples_are_disjoint_and_cover_all() -> None:
    halves = [load(Data(), train) for train in (True, False)]
    divided = [pair for half in halves for pair in fingerprints(half.images.numpy(), half.labels.numpy())]
    with np.load(datasets.DIGITS, allow_pickle=False) as file:
        assert sorted(divided) == sorted(fingerprints(file["images"], file["labels"]))


def test_digits_split_is_stratified() -> None:
    train, test = (load(Data(), train).labels.bincount() for train in (True, False))
    exact = (train + test) * (360 / 1797)
    assert (test - exact).abs().max() < 1


def test_digits_split_depends_on_no_global_random_state() -> None:
    first = [load(Data(), train) for train in (True, False)]
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    datasets._digits_split.cache_clear()
    for data, again in zip(first, [load(Data(), train) for train in (True, False)], strict=True):
        assert torch.equal(data.images, again.images)
        assert torch.equal(data.labels, again.labels)


def test_digits_mean_and_deviation_are_those_of_the_training_samples() -> None:
    pixels = load(Data(), train=True).images.double() / 16
    assert pixels.mean().item() == pytest.approx(SPECS["digits"].mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(SPECS["digits"].std[0], abs=1e-3)


def test_digits_need_no_files(tmp_path: Path) -> None:
    prepare(Data(root=str(tmp_path / "absent"), download=False))
    assert not (tmp_path / "absent").exists()


# Limits and subsets


def test_a_limit_takes_the_first_samples_of_its_half_only() -> None:
    for train, keys in ((True, Data(train_limit=100)), (False, Data(test_limit=100))):
        whole, cut = load(Data(), train), load(keys, train)
        assert torch.equal(cut.images, whole.images[:100])
        assert torch.equal(cut.labels, whole.labels[:100])
        assert len(load(keys, not train).labels) == len(load(Data(), not train).labels)


def test_the_first_100_training_digits_hold_every_class() -> None:
    assert load(Data(train_limit=100), train=True).labels.bincount(minlength=10).min() > 0


@pytest.mark.parametrize(
    ("name", "half", "samples"),
    [("digits", "train", 1437), ("digits", "test", 360), ("mnist", "train", 7), ("mnist", "test", 4)],
)
def test_a_limit_may_be_the_whole_set_and_no_more(tmp_path: Path, name: Any, half: str, samples: int) -> None:
    write_mnist(tmp_path)
    keys = Data(name=name, root=str(tmp_path), download=False)
    limit = f"{half}_limit"
    assert len(load(replace(keys, **{limit: samples}), half == "train").labels) == samples
    message = mistake(load, replace(keys, **{limit: samples + 1}), half == "train")
    assert message == f"data.{limit}: got {samples + 1}, expected at most {samples} for {name}"


def test_a_subset_is_a_copy() -> None:
    data = LabelledImages(torch.arange(4).view(4, 1, 1, 1), torch.tensor([5, 6, 7, 8]))
    subset = data.subset(np.array([3, 1]))
    assert (subset.images.flatten().tolist(), subset.labels.tolist()) == ([3, 1], [8, 6])
    for part in (subset.images, subset.labels):
        part.zero_()
    assert (data.images.flatten().tolist(), data.labels.tolist()) == ([0, 1, 2, 3], [5, 6, 7, 8])


# Files


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_files_are_read_as_they_are(tmp_path: Path, name: Any, folder: str, train: bool) -> None:
    images, labels = write_mnist(tmp_path, folder)[train]
    keys = Data(name=name, root=str(tmp_path), download=False)
    prepare(keys)
    data = load(keys, train)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.images.shape == (len(labels), *SPECS[name].image_shape)
    assert np.array_equal(data.images.squeeze(1).numpy(), images)
    assert data.labels.tolist() == labels.tolist()


DAMAGES = {
    "empty": b"",
    "a web page": b"<html>404 Not Found</html>",
    "cut short": idx(np.zeros((4, 28, 28)))[:-1],
    "cut in the header": idx(np.zeros((4, 28, 28)))[:20],
    "unknown type": bytes([0, 0, 10, 3]) + bytes(12),
    "floats": bytes([0, 0, 13, 1]) + bytes([0, 0, 0, 1]) + bytes(4),
}


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("splits", [["train"], ["t10k"], ["train", "t10k"]], ids="+".join)
def test_a_damaged_file_is_an_input_error(
    tmp_path: Path, splits: list[str], content: bytes, download: bool
) -> None:
    write_mnist(tmp_path)
    for split in splits:
        (tmp_path / f"MNIST/raw/{split}-images-idx3-ubyte").write_bytes(content)
    keys = Data(name="mnist", root=str(tmp_path), download=download)
    message = mistake(lambda: (prepare(keys), load(keys, train="train" in splits)))
    assert message.startswith(f"data.root: got {tmp_path}, ")


@pytest.mark.parametrize("name", sorted(datasets.TORCHVISION))
def test_missing_files_are_named_where_downloading_is_off(tmp_path: Path, name: Any) -> None:
    keys = Data(name=name, root=str(tmp_path), download=False)
    assert SPECS[name].files
    for message in (mistake(prepare, keys), mistake(load, keys, True), mistake(load, keys, False)):
        assert message.startswith(f"data.root: got {tmp_path}, where files of {name} are missing or damaged")
        assert all(file in message for file in SPECS[name].files)
    assert not list(tmp_path.iterdir())


def test_a_relative_root_is_shown_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = mistake(load, Data(name="mnist", root="data", download=False), True)
    assert message.startswith(f"data.root: got {tmp_path / 'data'}, ")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("train", [True, False])
def test_cifar_images_become_channel_first(monkeypatch: pytest.MonkeyPatch, name: Any, train: bool) -> None:
    def cifar(root: str, train: bool, download: bool) -> SimpleNamespace:
        rng = np.random.default_rng(int(train))
        images = rng.integers(0, 256, (6 if train else 3, 32, 32, 3), dtype=np.uint8)
        return SimpleNamespace(data=images, targets=rng.integers(0, 10, len(images)).tolist())

    monkeypatch.setitem(datasets.TORCHVISION, name, cifar)
    data, original = load(Data(name=name), train), cifar("", train, False)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.images.is_contiguous()
    assert np.array_equal(data.images.numpy(), np.moveaxis(original.data, 3, 1))
    assert data.labels.tolist() == original.targets


# Downloads


class Mirror:
    """Stands in for torchvision's MNIST where files are downloaded, and notes when and with which timeout."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.downloads: list[tuple[str, float | None]] = []

    def __call__(self, root: str, train: bool = True, download: bool = False) -> torchvision.datasets.MNIST:
        if download:
            self.downloads.append((root, socket.getdefaulttimeout()))
            if self.failure:
                raise self.failure
            write_mnist(Path(root))
        return torchvision.datasets.MNIST(root, train)


@pytest.fixture(params=[None, 123.0])
def mirror(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Mirror]:
    """The mirror, under a default timeout of the user's sockets that must be the same afterwards."""
    mirror, default = Mirror(), socket.getdefaulttimeout()
    monkeypatch.setitem(datasets.TORCHVISION, "mnist", mirror)
    socket.setdefaulttimeout(request.param)
    yield mirror
    after = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default)
    assert after == request.param


def test_files_are_downloaded_with_a_socket_timeout_where_they_are_missing_and_that_is_on(
    tmp_path: Path, mirror: Mirror
) -> None:
    keys = Data(name="mnist", root=str(tmp_path))
    assert "missing or damaged" in mistake(prepare, replace(keys, download=False))
    assert mirror.downloads == []
    prepare(keys)
    prepare(keys)
    assert mirror.downloads == [(str(tmp_path), datasets.DOWNLOAD_TIMEOUT_SECONDS)]
    assert len(load(keys, train=True).labels) == 7


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError("no route to host"), "no route to host"),
        (TimeoutError("timed out"), "timed out"),
        (PermissionError(13, "Permission denied", "data"), "Permission denied"),
        (RuntimeError("Error downloading train:\nTried a mirror\n"), "Error downloading train:"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_download_is_an_input_error(
    tmp_path: Path, mirror: Mirror, failure: Exception, reason: str
) -> None:
    mirror.failure = failure
    message = mistake(prepare, Data(name="mnist", root=str(tmp_path)))
    assert message.startswith(f"data.root: got {tmp_path}, ")
    assert "the download failed" in message
    assert reason in message
    assert all(file in message for file in SPECS["mnist"].files)


def test_ranks_that_share_a_folder_download_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloading, most_at_once = [], []

    class Slow:
        def __init__(self, root: str, train: bool = True, download: bool = False):
            if not download:
                raise RuntimeError("not there")
            downloading.append(self)
            time.sleep(0.05)
            most_at_once.append(len(downloading))
            downloading.remove(self)

    monkeypatch.setitem(datasets.TORCHVISION, "cifar10", Slow)
    keys = Data(name="cifar10", root=str(tmp_path / "new"))
    with ThreadPoolExecutor(3) as ranks:
        for done in [ranks.submit(datasets.prepare, keys) for _ in range(3)]:
            done.result()
    assert most_at_once == [1, 1, 1]
