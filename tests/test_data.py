"""Datasets, their division among clients, batches and the federation that follows from them."""

import hashlib
import itertools
import json
import math
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslsage_rpc.config import Data
from fslsage_rpc.data import datasets
from fslsage_rpc.data.batches import ImageBatches, batch_sizes
from fslsage_rpc.data.datasets import SPECS, LabelledImages, Spec, load, prepare
from fslsage_rpc.data.partitions import Partition, dirichlet, partition, summary
from fslsage_rpc.errors import InputError
from fslsage_rpc.federation import Federation
from fslsage_rpc.randomness import torch_stream

CPU = torch.device("cpu")
DIGIT_LABELS = load(Data(), train=True).labels.numpy()


def one_line(error: InputError) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1, repr(message)
    return message


# Digits


def fingerprints(data: LabelledImages) -> list[bytes]:
    """Each sample's pixels and label as bytes, sorted."""
    return sorted(
        image.tobytes() + bytes([label])
        for image, label in zip(data.images.numpy(), data.labels.tolist(), strict=True)
    )


def test_digits_are_1437_training_and_360_test_images() -> None:
    for train, samples in ((True, 1437), (False, 360)):
        data = load(Data(), train)
        assert data.images.shape == (samples, 1, 8, 8)
        assert data.images.dtype == torch.uint8
        assert data.images.max() == SPECS["digits"].pixel_maximum == 16
        assert data.labels.shape == (samples,)
        assert data.labels.dtype == torch.int64
        assert data.labels.unique().tolist() == list(range(10))


def test_digits_training_and_test_samples_are_disjoint_and_cover_all() -> None:
    with np.load(datasets.DIGITS, allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"].astype(np.int64))
    train, test = load(Data(), train=True), load(Data(), train=False)
    together = LabelledImages(torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels]))
    assert fingerprints(together) == fingerprints(LabelledImages(images, labels))


def test_digits_split_is_stratified() -> None:
    train, test = (load(Data(), train).labels.bincount() for train in (True, False))
    exact = (train + test) * (360 / 1797)
    assert (test - exact).abs().max() < 1


def test_digits_split_depends_on_no_global_random_state() -> None:
    first = load(Data(), train=True)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    datasets._digits_split.cache_clear()
    test, again = load(Data(), train=False), load(Data(), train=True)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(test.images, load(Data(), train=False).images)


def test_digits_mean_and_deviation_are_those_of_the_training_samples() -> None:
    pixels = load(Data(), train=True).images.double() / 16
    assert pixels.mean().item() == pytest.approx(SPECS["digits"].mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(SPECS["digits"].std[0], abs=1e-3)


def test_limits_take_the_first_samples() -> None:
    for train, keys in ((True, Data(train_limit=100)), (False, Data(test_limit=100))):
        whole, cut = load(Data(), train), load(keys, train)
        assert torch.equal(cut.images, whole.images[:100])
        assert torch.equal(cut.labels, whole.labels[:100])
        assert len(load(keys, not train).labels) == len(load(Data(), not train).labels)


def test_the_first_100_training_digits_hold_every_class() -> None:
    assert load(Data(train_limit=100), train=True).labels.bincount(minlength=10).min() > 0


def test_a_limit_may_be_the_whole_set_and_no_more() -> None:
    assert len(load(Data(train_limit=1437), train=True).labels) == 1437
    for train, keys, expected in (
        (True, Data(train_limit=1438), "data.train_limit: got 1438, expected at most 1437 for digits"),
        (False, Data(test_limit=361), "data.test_limit: got 361, expected at most 360 for digits"),
    ):
        with pytest.raises(InputError) as caught:
            load(keys, train)
        assert one_line(caught.value) == expected


def test_a_subset_is_a_copy() -> None:
    data = load(Data(), train=True)
    subset = data.subset(np.array([3, 1]))
    assert torch.equal(subset.images, data.images[[3, 1]])
    assert subset.labels.tolist() == [data.labels[3], data.labels[1]]
    before = data.images[3].clone()
    subset.images.zero_()
    assert torch.equal(data.images[3], before)


# Partitions


def check_partition(parts: Partition, samples: int, clients: int) -> None:
    """Every sample at most once, no client empty, indices sorted."""
    assert len(parts) == clients
    assert all(len(part) > 0 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < samples


SCHEMES = [
    Data(partition="iid"),
    Data(partition="dirichlet", alpha=1.0),
    Data(partition="dirichlet", alpha=0.01),
    Data(partition="shards", shards=2),
]
SCHEME_IDS = ["iid", "dirichlet 1", "dirichlet 0.01", "shards"]


@pytest.mark.parametrize("keys", SCHEMES, ids=SCHEME_IDS)
@pytest.mark.parametrize("clients", [1, 7, 100])
def test_every_sample_goes_to_at_most_one_client_and_no_client_is_empty(keys: Data, clients: int) -> None:
    check_partition(partition(keys, DIGIT_LABELS, clients, seed=0), len(DIGIT_LABELS), clients)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    scheme=st.sampled_from(["iid", "dirichlet", "shards"]),
    alpha=st.sampled_from([1e-300, 1e-8, 0.1, 1.0, 1e6, 1e308]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_labels_can_be_divided(
    labels: list[int], scheme: str, alpha: float, seed: int, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    keys = Data(partition=scheme, alpha=alpha, shards=1)  # type: ignore[arg-type]
    parts = partition(keys, np.array(labels), clients, seed)
    check_partition(parts, len(labels), clients)
    sizes = {len(part) for part in parts}
    if scheme == "dirichlet":
        assert sizes == {len(labels) // clients}
    else:
        assert sum(map(len, parts)) == len(labels)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("clients", [1, 3, 10, 1437])
def test_iid_parts_cover_all_samples_and_differ_by_at_most_one(clients: int) -> None:
    sizes = [len(part) for part in partition(Data(partition="iid"), DIGIT_LABELS, clients, seed=0)]
    assert sum(sizes) == len(DIGIT_LABELS)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("alpha", [1e-300, 1e-8, 0.1, 1.0, 100.0, 1e308])
@pytest.mark.parametrize("clients", [3, 10, 1437])
def test_dirichlet_parts_are_of_equal_size_whatever_alpha(alpha: float, clients: int) -> None:
    parts = partition(Data(partition="dirichlet", alpha=alpha), DIGIT_LABELS, clients, seed=0)
    assert {len(part) for part in parts} == {1437 // clients}


@pytest.mark.parametrize("alpha", [1e-300, 1e-8])
def test_a_very_small_alpha_gives_most_clients_one_class(alpha: float) -> None:
    labels = np.repeat(np.arange(10), 100)
    parts = partition(Data(partition="dirichlet", alpha=alpha), labels, 100, seed=0)
    pure = [labels[part[0]] for part in parts if len(np.unique(labels[part])) == 1]
    assert len(pure) >= 60
    assert len(set(pure)) >= 8, "not always the same class"


def test_a_class_that_runs_out_leaves_its_share_to_the_others() -> None:
    labels = np.array([0] * 4 + [1] * 96)
    parts = dirichlet(labels, 2, 1e6, np.random.default_rng(0))  # about 25 of each class wanted
    assert [len(part) for part in parts] == [50, 50]
    assert np.bincount(labels[parts[0]]).tolist() == [4, 46]
    assert np.bincount(labels[parts[1]]).tolist() == [0, 50]


def skew(alpha: float) -> float:
    """Mean total variation distance of the clients' label shares to the whole set's, over five seeds."""
    whole = np.bincount(DIGIT_LABELS) / len(DIGIT_LABELS)
    return float(
        np.mean(
            [
                np.abs(np.bincount(DIGIT_LABELS[part], minlength=10) / len(part) - whole).sum() / 2
                for seed in range(5)
                for part in partition(Data(partition="dirichlet", alpha=alpha), DIGIT_LABELS, 10, seed)
            ]
        )
    )


def test_dirichlet_skew_falls_as_alpha_grows() -> None:
    skews = [skew(alpha) for alpha in (0.01, 0.1, 1.0, 10.0, 1000.0)]
    assert all(more > less + 0.01 for more, less in itertools.pairwise(skews))
    assert skews[0] > 0.5
    assert skews[-1] < 0.15


def test_shards_give_each_client_few_classes() -> None:
    parts = partition(Data(partition="shards", shards=2), DIGIT_LABELS, 10, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(1437))
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 2
    # 20 shards of at most 72 label-sorted samples; a class has at least 139, so a shard spans at most two
    assert max(len(np.unique(DIGIT_LABELS[part])) for part in parts) <= 4
    assert np.mean([len(np.unique(DIGIT_LABELS[part])) for part in parts]) < 4


def test_one_shard_per_client_and_class_gives_each_client_one_class() -> None:
    labels = np.tile(np.arange(10), 20)
    parts = partition(Data(partition="shards", shards=1), labels, 10, seed=0)
    assert sorted(np.unique(labels[part]).tolist() for part in parts) == [[c] for c in range(10)]


@pytest.mark.parametrize("keys", SCHEMES, ids=SCHEME_IDS)
def test_a_partition_follows_from_its_seed_alone(keys: Data) -> None:
    first = partition(keys, DIGIT_LABELS, 5, seed=3)
    np.random.seed(1)  # noqa: NPY002
    again = partition(keys, DIGIT_LABELS, 5, seed=3)
    other = partition(keys, DIGIT_LABELS, 5, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        (Data(partition="iid"), 1437),
        (Data(partition="dirichlet"), 1437),
        (Data(partition="shards", shards=2), 718),
        (Data(partition="shards", shards=1000), 1),
    ],
)
def test_more_clients_than_samples_are_refused(keys: Data, most: int) -> None:
    assert len(partition(keys, DIGIT_LABELS, most, seed=0)) == most
    with pytest.raises(InputError) as caught:
        partition(keys, DIGIT_LABELS, most + 1, seed=0)
    message = one_line(caught.value)
    assert message.startswith(f"clients.count: got {most + 1}, expected at most {most}: ")
    assert "1437 training samples" in message


def from_file(path: Path, clients: int = 2, samples: int = 10) -> Partition:
    keys = Data(partition="file", partition_file=str(path))
    return partition(keys, np.zeros(samples, dtype=np.int64), clients, seed=0)


def test_a_partition_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    path.write_text("[[9, 0, 4], [3]]")
    assert [part.tolist() for part in from_file(path)] == [[0, 4, 9], [3]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "which is not valid JSON"),
        ("", "which is not valid JSON"),
        ("[[1], [2]", "which is not valid JSON"),
        ("[" * 100_000, "which is not valid JSON"),
        ("caf\udce9", "which is not valid JSON"),  # the byte E9, which is no UTF-8
        ("{}", "expected a list of 2 lists (clients.count) of sample indices"),
        ("3", "expected a list of 2 lists (clients.count) of sample indices"),
        ("null", "expected a list of 2 lists (clients.count) of sample indices"),
        ("[[1]]", "expected a list of 2 lists (clients.count) of sample indices"),
        ("[[1], [2], [3]]", "expected a list of 2 lists (clients.count) of sample indices"),
        ("[[1], 2]", "expected a list of 2 lists (clients.count) of sample indices"),
        ('[[1], {"2": 2}]', "expected a list of 2 lists (clients.count) of sample indices"),
        ("[[1], []]", "where client 1 has no samples"),
        ("[[1], [10]]", "where client 1 has 10, expected indices 0 to 9"),
        ("[[-1], [2]]", "where client 0 has -1, expected indices 0 to 9"),
        ("[[1.0], [2]]", "where client 0 has 1.0, expected indices 0 to 9"),
        ("[[true], [2]]", "where client 0 has True, expected indices 0 to 9"),
        ('[["1"], [2]]', "where client 0 has '1', expected indices 0 to 9"),
        ('[["a\\nb"], [2]]', "where client 0 has 'a\\nb', expected indices 0 to 9"),
        ("[[null], [2]]", "where client 0 has None, expected indices 0 to 9"),
        ("[[NaN], [2]]", "where client 0 has nan, expected indices 0 to 9"),
        ("[[[1]], [2]]", "where client 0 has [1], expected indices 0 to 9"),
        ("[[1, 1], [2]]", "where sample 1 appears twice, expected every sample at most once"),
        ("[[1, 2], [2]]", "where sample 2 appears twice, expected every sample at most once"),
    ],
)
def test_a_wrong_partition_file_is_named(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "parts.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        from_file(path)
    message = one_line(caught.value)
    assert message.startswith(f"data.partition_file: got {path}")
    assert reason in message
    assert "expected" in message


def test_a_partition_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "absent.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(InputError) as caught:
            from_file(path)
        expected = f"data.partition_file: got {path}, which cannot be read ({reason}), expected a JSON file"
        assert one_line(caught.value) == expected


def test_the_summary_counts_labels_and_hashes_the_indices() -> None:
    labels = np.array([0, 2, 2, 0, 1, 2])
    parts = [np.array([0, 1, 3]), np.array([2, 5], dtype=np.int32)]
    assert summary(parts, labels, classes=4) == [
        {
            "client": 0,
            "samples": 3,
            "labels": [2, 0, 1, 0],
            "sha256": hashlib.sha256(struct.pack("<3q", 0, 1, 3)).hexdigest(),
        },
        {
            "client": 1,
            "samples": 2,
            "labels": [0, 0, 2, 0],
            "sha256": hashlib.sha256(struct.pack("<2q", 2, 5)).hexdigest(),
        },
    ]


def test_the_summary_of_a_real_partition_adds_up_and_is_json() -> None:
    parts = partition(Data(), DIGIT_LABELS, 4, seed=0)
    lines = json.loads(json.dumps(summary(parts, DIGIT_LABELS, 10)))
    assert [line["samples"] for line in lines] == [sum(line["labels"]) for line in lines] == [359] * 4
    assert len({line["sha256"] for line in lines}) == 4


# Batches


@pytest.mark.parametrize(
    ("samples", "batch_size", "epochs", "expected"),
    [
        (10, 4, 1, [4, 4, 2]),
        (10, 4, 2, [4, 4, 2, 4, 4, 2]),
        (8, 4, 2, [4, 4, 4, 4]),
        (3, 4, 1, [3]),
        (4, 4, 1, [4]),
        (1, 1, 3, [1, 1, 1]),
    ],
)
def test_the_last_batch_of_each_pass_may_be_short(
    samples: int, batch_size: int, epochs: int, expected: list[int]
) -> None:
    assert batch_sizes(samples, batch_size, epochs) == expected


@given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 4))
def test_batches_hold_every_sample_once_per_pass(samples: int, batch_size: int, epochs: int) -> None:
    sizes = batch_sizes(samples, batch_size, epochs)
    assert len(sizes) == epochs * math.ceil(samples / batch_size)
    assert sum(sizes) == samples * epochs
    assert max(sizes) <= batch_size


def numbered(spec: Spec, samples: int, seed: int = 0) -> LabelledImages:
    """Random images whose labels are their numbers."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, spec.pixel_maximum + 1, (samples, *spec.image_shape), dtype=np.uint8)
    return LabelledImages(torch.from_numpy(images), torch.arange(samples))


def by_hand(image: np.ndarray, spec: Spec) -> np.ndarray:
    """(pixel / maximum - mean) / std per channel, in double precision."""
    out = np.empty(image.shape)
    for channel in range(image.shape[0]):
        out[channel] = (image[channel] / spec.pixel_maximum - spec.mean[channel]) / spec.std[channel]
    return out


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_batches_in_order_are_the_normalised_images(name: str, dtype: torch.dtype, tolerance: float) -> None:
    spec = SPECS[name]
    data = numbered(spec, 10)
    batches = list(ImageBatches(data, spec, 4, CPU, dtype).in_order())
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert all(x.shape == (len(y), *spec.image_shape) for x, y in batches)
    assert all(x.dtype == dtype and y.dtype == torch.int64 for x, y in batches)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(10))
    expected = np.stack([by_hand(image, spec) for image in data.images.numpy()])
    assert np.abs(torch.cat([x for x, _ in batches]).numpy() - expected).max() <= tolerance


@pytest.mark.parametrize("augment", [False, True])
def test_shuffled_batches_hold_every_sample_once_per_epoch(augment: bool) -> None:
    spec = SPECS["digits"]
    data = numbered(spec, 50)
    batches = list(ImageBatches(data, spec, 16, CPU, torch.float32).shuffled(0, 1, 2, 3, augment))
    assert [len(y) for _, y in batches] == batch_sizes(50, 16, 3)
    assert all(x.shape == (len(y), 1, 8, 8) and x.dtype == torch.float32 for x, y in batches)
    epochs = torch.cat([y for _, y in batches]).view(3, 50).tolist()
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"


def test_unaugmented_batches_hold_the_normalised_images_of_their_labels() -> None:
    spec = SPECS["cifar10"]
    data = numbered(spec, 9)
    for x, y in ImageBatches(data, spec, 4, CPU, torch.float64).shuffled(0, 0, 0, 1, augment=False):
        expected = np.stack([by_hand(data.images[number].numpy(), spec) for number in y.tolist()])
        assert np.abs(x.numpy() - expected).max() <= 1e-13


@pytest.mark.parametrize("name", ["cifar10", "mnist", "digits"])
def test_augmentation_is_a_crop_of_the_padded_image_and_a_flip_where_allowed(name: str) -> None:
    spec, samples, epochs = SPECS[name], 23, 2
    padding, (channels, height, width) = spec.crop_padding, spec.image_shape
    data = numbered(spec, samples)
    batches = list(ImageBatches(data, spec, 5, CPU, torch.float64).shuffled(7, 3, 1, epochs, augment=True))
    chance = torch_stream(7, "augment", round=3, client=1)
    flips = 0
    for epoch in range(epochs):
        corners = torch.randint(2 * padding + 1, (samples, 2), generator=chance).tolist()
        coins = torch.rand(samples, generator=chance).tolist()
        images, numbers = (
            torch.cat(tensors)[epoch * samples : (epoch + 1) * samples]
            for tensors in zip(*batches, strict=True)
        )
        for position in range(samples):
            original = data.images[int(numbers[position])].numpy()
            padded = np.zeros((channels, height + 2 * padding, width + 2 * padding))
            padded[:, padding : padding + height, padding : padding + width] = original
            top, left = corners[position]
            crop = padded[:, top : top + height, left : left + width]
            if spec.flip and coins[position] < 0.5:
                crop = crop[:, :, ::-1]
                flips += 1
            assert np.abs(images[position].numpy() - by_hand(crop, spec)).max() <= 1e-13
    assert (0 < flips < samples * epochs) == spec.flip


def epoch_by_number(
    seed: int, round: int, client: int, augment: bool = True
) -> tuple[list[int], torch.Tensor]:
    """The order of one epoch of 40 numbered images, and the images as they came, by number."""
    spec = SPECS["cifar10"]
    batches = ImageBatches(numbered(spec, 40), spec, 16, CPU, torch.float32)
    images, numbers = (
        torch.cat(t) for t in zip(*batches.shuffled(seed, round, client, 1, augment), strict=True)
    )
    return numbers.tolist(), images[numbers.argsort()]


def test_order_and_augmentation_follow_from_seed_round_and_client_alone() -> None:
    order, images = epoch_by_number(1, 2, 3)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    again_order, again_images = epoch_by_number(1, 2, 3)
    assert order == again_order
    assert torch.equal(images, again_images)
    for other in ((9, 2, 3), (1, 9, 3), (1, 2, 9), (2, 1, 3), (1, 3, 2)):
        other_order, other_images = epoch_by_number(*other)
        assert order != other_order
        assert not torch.equal(images, other_images)


def test_augmentation_does_not_change_the_order() -> None:
    assert epoch_by_number(1, 2, 3, augment=True)[0] == epoch_by_number(1, 2, 3, augment=False)[0]


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    spec = SPECS["digits"]
    orders = [
        torch.cat(
            [
                y
                for _, y in ImageBatches(numbered(spec, 30), spec, size, CPU, torch.float32).shuffled(
                    0, 0, 0, 2, True
                )
            ]
        )
        for size in (1, 7, 64)
    ]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_batches_leave_the_stored_images_and_the_global_generator_alone() -> None:
    spec = SPECS["cifar10"]
    data = numbered(spec, 12)
    before, state = data.images.clone(), torch.get_rng_state()
    batches = ImageBatches(data, spec, 5, CPU, torch.float32)
    assert len(list(batches.shuffled(0, 0, 0, 1, augment=True))) == len(list(batches.in_order())) == 3
    assert torch.equal(data.images, before)
    assert torch.equal(torch.get_rng_state(), state)


# torchvision's datasets


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format of the MNIST files."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


MNIST_FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def write_mnist(root: Path, name: str) -> dict[bool, tuple[np.ndarray, np.ndarray]]:
    """Seven training and four test images; returns them by `train`."""
    raw = root / MNIST_FOLDERS[name] / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = {}
    for train, prefix, count in ((True, "train", 7), (False, "t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        samples[train] = images, labels
    return samples


@pytest.mark.parametrize("name", sorted(MNIST_FOLDERS))
@pytest.mark.parametrize("train", [True, False])
def test_mnist_files_are_read_as_they_are(tmp_path: Path, name: Any, train: bool) -> None:
    images, labels = write_mnist(tmp_path, name)[train]
    keys = Data(name=name, root=str(tmp_path), download=False)
    prepare(keys)
    data = load(keys, train)
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (len(labels), *SPECS[name].image_shape)
    assert np.array_equal(data.images.squeeze(1).numpy(), images)
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == labels.tolist()


def test_limits_hold_for_torchvision_datasets_too(tmp_path: Path) -> None:
    samples = write_mnist(tmp_path, "mnist")
    keys = Data(name="mnist", root=str(tmp_path), download=False, train_limit=2, test_limit=5)
    assert load(keys, train=True).labels.tolist() == samples[True][1][:2].tolist()
    with pytest.raises(InputError) as caught:
        load(keys, train=False)
    assert one_line(caught.value) == "data.test_limit: got 5, expected at most 4 for mnist"


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>404 Not Found</html>", id="a web page"),
        pytest.param(idx(np.zeros((4, 28, 28)))[:-1], id="cut short"),
        pytest.param(idx(np.zeros((4, 28, 28)))[:20], id="cut in the header"),
        pytest.param(bytes([0, 0, 10, 3]) + bytes(12), id="unknown type"),
        pytest.param(bytes([0, 0, 13, 1]) + bytes([0, 0, 0, 1]) + bytes(4), id="floats"),
    ],
)
@pytest.mark.parametrize("splits", [["train"], ["t10k"], ["train", "t10k"]], ids="+".join)
def test_a_damaged_file_is_an_input_error(
    tmp_path: Path, splits: list[str], content: bytes, download: bool
) -> None:
    write_mnist(tmp_path, "mnist")
    for split in splits:
        (tmp_path / f"MNIST/raw/{split}-images-idx3-ubyte").write_bytes(content)
    keys = Data(name="mnist", root=str(tmp_path), download=download)

    def prepare_and_load() -> None:
        prepare(keys)
        load(keys, train="train" in splits)

    with pytest.raises(InputError) as caught:
        prepare_and_load()
    assert one_line(caught.value).startswith(f"data.root: got {tmp_path}, ")


@pytest.mark.parametrize("name", sorted(datasets.TORCHVISION))
def test_missing_files_are_named_where_downloading_is_off(tmp_path: Path, name: Any) -> None:
    keys = Data(name=name, root=str(tmp_path), download=False)
    for attempt in (lambda: prepare(keys), lambda: load(keys, train=True), lambda: load(keys, train=False)):
        with pytest.raises(InputError) as caught:
            attempt()
        message = one_line(caught.value)
        assert message.startswith(f"data.root: got {tmp_path}, where files of {name} are missing")
        assert SPECS[name].files
        assert all(file in message for file in SPECS[name].files)
    assert not list(tmp_path.iterdir())


def test_a_relative_root_is_shown_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data\.root: got /"):
        load(Data(name="mnist", root="data", download=False), train=True)


class FakeCIFAR:
    """Stands in for torchvision's class: its files are there once the flag is set, or a download was made."""

    there = True
    failure: Exception | None = None
    downloads: tuple[tuple[str, float | None], ...] = ()

    def __init__(self, root: str, train: bool = True, download: bool = False):
        cls = type(self)
        if download:
            cls.downloads += ((root, socket.getdefaulttimeout()),)
            if cls.failure is not None:
                raise cls.failure
            cls.there = True
        if not cls.there:
            raise RuntimeError("Dataset not found or corrupted.")
        rng = np.random.default_rng(int(train))
        self.data = rng.integers(0, 256, (6 if train else 3, 32, 32, 3), dtype=np.uint8)
        self.targets = rng.integers(0, 10, len(self.data)).tolist()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCIFAR]:
    fresh = type("Fresh", (FakeCIFAR,), {})
    for name in ("cifar10", "cifar100"):
        monkeypatch.setitem(datasets.TORCHVISION, name, fresh)
    return fresh


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("train", [True, False])
def test_cifar_images_become_channel_first(fake: type[FakeCIFAR], name: Any, train: bool) -> None:
    original = fake("anywhere", train=train)
    data = load(Data(name=name), train)
    assert data.images.shape == (len(original.targets), 3, 32, 32)
    assert data.images.dtype == torch.uint8
    assert data.images.is_contiguous()
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == original.targets
    for sample, channel, row, column in itertools.product((0, 2), range(3), (0, 5, 31), (0, 7, 30)):
        assert data.images[sample, channel, row, column] == original.data[sample, row, column, channel]


def test_nothing_is_downloaded_where_the_files_are_there(fake: type[FakeCIFAR]) -> None:
    prepare(Data(name="cifar10", download=True))
    assert fake.downloads == ()


def test_nothing_is_downloaded_where_that_is_off(fake: type[FakeCIFAR]) -> None:
    fake.there = False
    with pytest.raises(InputError, match="missing or damaged"):
        prepare(Data(name="cifar10", download=False))
    assert fake.downloads == ()


def test_digits_need_no_files(tmp_path: Path) -> None:
    prepare(Data(root=str(tmp_path / "absent"), download=False))
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("before", [None, 123.0])
def test_missing_files_are_downloaded_with_a_socket_timeout(
    fake: type[FakeCIFAR], before: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.there = False
    default = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(before)
        prepare(Data(name="cifar10", root="somewhere"))
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(default)
    assert fake.downloads == (("somewhere", datasets.DOWNLOAD_TIMEOUT_SECONDS),)
    assert len(load(Data(name="cifar10"), train=True).labels) == 6


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OSError("no route to host"), "no route to host"),
        (TimeoutError("timed out"), "timed out"),
        (PermissionError(13, "Permission denied", "data"), "Permission denied"),
        (
            RuntimeError("Error downloading train:\nTried a mirror, got:\nnothing\n"),
            "Error downloading train:",
        ),
    ],
)
def test_a_failed_download_is_an_input_error(fake: type[FakeCIFAR], failure: Exception, reason: str) -> None:
    fake.there, fake.failure = False, failure
    default = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(123.0)
        with pytest.raises(InputError) as caught:
            prepare(Data(name="cifar10", root="somewhere"))
        assert socket.getdefaulttimeout() == 123.0
    finally:
        socket.setdefaulttimeout(default)
    message = one_line(caught.value)
    assert message.startswith(f"data.root: got {Path('somewhere').absolute()}, ")
    assert "the download failed" in message
    assert reason in message
    assert all(file in message for file in SPECS["cifar10"].files)


# The federation


def federation(samples: list[int], participation: float = 1.0, seed: int = 0) -> Federation:
    return Federation(samples, participation, batch_size=4, local_epochs=2, seed=seed)


@pytest.mark.parametrize(
    ("participation", "clients", "expected"),
    [
        (0.1, 30, 3),  # and not 4
        (0.7, 10, 7),
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.29, 100, 29),
        (0.5, 5, 3),
        (0.34, 3, 2),
        (0.01, 3, 1),
        (1e-6, 4, 1),
        (1e-12, 4, 1),
        (1.0, 1, 1),
        (1.0, 7, 7),
        (0.999, 7, 7),
    ],
)
def test_participants_are_the_share_of_the_clients_rounded_up(
    participation: float, clients: int, expected: int
) -> None:
    participants = federation([1] * clients, participation).participants(0)
    assert len(participants) == expected
    assert participants == sorted(set(participants))
    assert set(participants) <= set(range(clients))


def test_participants_follow_from_seed_and_round_alone() -> None:
    samples = [1] * 20
    rounds = [federation(samples, 0.3).participants(round) for round in range(30)]
    again = federation(samples, 0.3)
    np.random.seed(1)  # noqa: NPY002
    assert [again.participants(round) for round in reversed(range(30))] == rounds[::-1]
    assert len({tuple(clients) for clients in rounds}) > 20
    assert set().union(*rounds) == set(range(20))
    assert [federation(samples, 0.3, seed=1).participants(round) for round in range(30)] != rounds


def test_shares_are_the_sample_shares_of_the_participants_and_add_to_one() -> None:
    samples = [3, 10, 1, 7, 29, 5, 13]
    for round in range(10):
        partial = federation(samples, 0.5)
        shares = partial.shares(round)
        assert list(shares) == partial.participants(round)
        total = sum(samples[client] for client in shares)
        assert shares == {client: samples[client] / total for client in shares}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-12)


def test_steps_are_epochs_times_batches_rounded_up() -> None:
    clients = federation([1, 4, 5, 12])
    assert [clients.steps(client) for client in range(4)] == [2, 2, 4, 6]
    assert clients.batch_sizes == [[1, 1], [4, 4], [4, 1, 4, 1], [4, 4, 4, 4, 4, 4]]
    assert clients.samples == [1, 4, 5, 12]
