"""The division of the training samples among the clients, by every scheme and by file."""

import hashlib
import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslsage_rpc.config.schema import Data
from fslsage_rpc.data.datasets import load
from fslsage_rpc.data.partitions import Partition, dirichlet, partition, summary
from support.user_input import mistake

DIGIT_LABELS = load(Data(), train=True).labels.numpy()
ALPHAS = [1e-300, 1e-8, 0.01, 0.1, 1.0, 100.0, 1e308]
SCHEMES = {
    "iid": Data(partition="iid"),
    **{f"dirichlet {alpha}": Data(partition="dirichlet", alpha=alpha) for alpha in ALPHAS},
    **{f"shards {shards}": Data(partition="shards", shards=shards) for shards in (1, 2, 1000)},
}


def check(keys: Data, labels: np.ndarray, clients: int, seed: int = 0) -> None:
    """Divide and check: every sample at most once, no client empty, indices sorted, sizes all but equal."""
    parts = partition(keys, labels, clients, seed)
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < len(labels)
    assert all((np.diff(part) > 0).all() for part in parts)
    sizes = [len(part) for part in parts]
    assert len(sizes) == clients
    assert min(sizes) > 0
    if keys.partition == "dirichlet":
        assert set(sizes) == {len(labels) // clients}
    else:
        assert sum(sizes) == len(labels)
        assert max(sizes) - min(sizes) <= (keys.shards if keys.partition == "shards" else 1)


def most_clients(keys: Data) -> int:
    return 1437 // keys.shards if keys.partition == "shards" else 1437


every_scheme = pytest.mark.parametrize("keys", SCHEMES.values(), ids=SCHEMES)


@every_scheme
def test_every_sample_goes_to_at_most_one_client_and_no_client_is_empty(keys: Data) -> None:
    for clients in {1, 3, 10, 100, most_clients(keys)}:
        if clients <= most_clients(keys):
            check(keys, DIGIT_LABELS, clients)


@every_scheme
def test_more_clients_than_samples_are_refused(keys: Data) -> None:
    most = most_clients(keys)
    message = mistake(partition, keys, DIGIT_LABELS, most + 1, 0)
    assert message.startswith(f"clients.count: got {most + 1}, expected at most {most}: ")
    assert "1437 training samples" in message


def test_more_shards_than_samples_are_refused() -> None:
    message = mistake(partition, Data(partition="shards", shards=1438), DIGIT_LABELS, 1, 0)
    assert message == "data.shards: got 1438, expected at most 1437, the training samples"


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    scheme=st.sampled_from(["iid", "dirichlet", "shards"]),
    alpha=st.sampled_from([1e-300, 1e-8, 0.1, 1.0, 1e6, 1e308]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_labels_can_be_divided(
    labels: list[int], scheme: Any, alpha: float, seed: int, data: st.DataObject
) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    check(Data(partition=scheme, alpha=alpha, shards=1), np.array(labels), clients, seed)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet 0.01", "dirichlet 1.0", "shards 2"])
def test_a_partition_follows_from_its_seed_alone(scheme: str) -> None:
    keys, clients = SCHEMES[scheme], 5
    first = partition(keys, DIGIT_LABELS, clients, seed=3)
    np.random.seed(1)  # noqa: NPY002
    again = partition(keys, DIGIT_LABELS, clients, seed=3)
    other = partition(keys, DIGIT_LABELS, clients, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


# Skew


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
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[4, 46], [0, 50]]


def skew(alpha: float) -> float:
    """Mean total variation distance of the clients' label shares to the whole set's, over five seeds."""
    keys, whole = Data(partition="dirichlet", alpha=alpha), np.bincount(DIGIT_LABELS) / len(DIGIT_LABELS)
    parts = [part for seed in range(5) for part in partition(keys, DIGIT_LABELS, 10, seed)]
    shares = np.stack([np.bincount(DIGIT_LABELS[part], minlength=10) / len(part) for part in parts])
    return float(np.abs(shares - whole).sum(1).mean() / 2)


def test_dirichlet_skew_falls_as_alpha_grows() -> None:
    skews = [skew(alpha) for alpha in (0.01, 0.1, 1.0, 10.0, 1000.0)]
    assert all(more > less + 0.01 for more, less in itertools.pairwise(skews))
    assert skews[0] > 0.5
    assert skews[-1] < 0.15


def test_shards_give_each_client_few_classes() -> None:
    parts = partition(Data(partition="shards", shards=2), DIGIT_LABELS, 10, seed=0)
    classes = [len(np.unique(DIGIT_LABELS[part])) for part in parts]
    # 20 shards of at most 72 label-sorted samples; a class has at least 139, so a shard spans at most two
    assert max(classes) <= 4
    assert np.mean(classes) < 4


def test_one_shard_per_client_and_class_gives_each_client_one_class() -> None:
    labels = np.tile(np.arange(10), 20)
    parts = partition(Data(partition="shards", shards=1), labels, 10, seed=0)
    assert sorted(np.unique(labels[part]).tolist() for part in parts) == [[c] for c in range(10)]


# Partition files


def from_file(path: Path) -> Partition:
    """The partition of ten samples between two clients that a file gives."""
    keys = Data(partition="file", partition_file=str(path))
    return partition(keys, np.zeros(10, dtype=np.int64), clients=2, seed=0)


def test_a_partition_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    path.write_text("[[9, 0, 4], [3]]")
    assert [part.tolist() for part in from_file(path)] == [[0, 4, 9], [3]]


WRONG_FILES = {
    "which is not valid JSON, expected one list of indices per client": [
        *("{", "", "[[1], [2]", "[" * 100_000, "caf\udce9")  # the last with the byte E9, which is no UTF-8
    ],
    "expected a list of 2 lists (clients.count) of sample indices": [
        *("{}", "3", "null", "[[1]]", "[[1], [2], [3]]", "[[1], 2]", '[[1], {"2": 2}]')
    ],
    "where client 1 has no samples, expected at least one each": ["[[1], []]"],
    "where sample 2 appears twice, expected every sample at most once": ["[[2, 2], [3]]", "[[1, 2], [2]]"],
}


def test_a_wrong_partition_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    for reason, contents in WRONG_FILES.items():
        for content in contents:
            path.write_bytes(content.encode(errors="surrogateescape"))
            assert mistake(from_file, path) == f"data.partition_file: got {path}, {reason}"


@pytest.mark.parametrize("index", [10, -1, 1.0, True, "1", "a\nb", None, math.nan, [1]], ids=ascii)
def test_what_is_no_index_of_a_sample_is_named(tmp_path: Path, index: Any) -> None:
    path = tmp_path / "parts.json"
    path.write_text(json.dumps([[2], [1, index]]))
    reason = f"where client 1 has {index!r}, expected indices 0 to 9"
    assert mistake(from_file, path) == f"data.partition_file: got {path}, {reason}"


def test_a_partition_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    reasons = {tmp_path / "absent.json": "No such file or directory", tmp_path: "Is a directory"}
    for path, reason in reasons.items():
        expected = f"data.partition_file: got {path}, which cannot be read ({reason}), expected a JSON file"
        assert mistake(from_file, path) == expected


# The summary


def test_the_summary_counts_labels_and_hashes_the_indices_in_plain_numbers() -> None:
    labels = np.array([0, 2, 2, 0, 1, 2])
    parts = [np.array([0, 1, 3]), np.array([2, 5], dtype=np.int32)]
    one, other = (hashlib.sha256(struct.pack(f"<{len(part)}q", *part)).hexdigest() for part in parts)
    assert json.loads(json.dumps(summary(parts, labels, classes=4))) == [
        {"client": 0, "samples": 3, "labels": [2, 0, 1, 0], "sha256": one},
        {"client": 1, "samples": 2, "labels": [0, 0, 2, 0], "sha256": other},
    ]
