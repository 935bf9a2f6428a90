"""How the training samples are divided among the clients: every sample used at most once, no client empty."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fslsage_rpc.config.schema import Data
from fslsage_rpc.errors import InputError
from fslsage_rpc.randomness import numpy_stream

Partition = list[np.ndarray]  # per client, sorted indices into the training samples


def partition(keys: Data, labels: np.ndarray, clients: int, seed: int) -> Partition:
    """The training-sample indices of every client.

    Args:
        labels: `[N]`, the training labels.

    Raises:
        InputError: some client would have no sample, or the partition file is unusable.
    """
    if keys.partition == "file":
        parts = _from_file(Path(str(keys.partition_file)), len(labels), clients)
    else:
        most = len(labels) // (keys.shards if keys.partition == "shards" else 1)
        if most == 0:
            raise InputError(
                f"data.shards: got {keys.shards}, expected at most {len(labels)}, the training samples"
            )
        if clients > most:
            raise InputError(
                f"clients.count: got {clients}, expected at most {most}: "
                f"there are {len(labels)} training samples for data.partition {keys.partition!r}"
            )
        if keys.partition == "iid":
            parts = iid(len(labels), clients, numpy_stream(seed, "partition"))
        elif keys.partition == "dirichlet":
            parts = dirichlet(labels, clients, keys.alpha, numpy_stream(seed, "partition"))
        else:
            parts = shards(labels, clients, keys.shards, numpy_stream(seed, "partition"))
    return [np.sort(part) for part in parts]


def iid(samples: int, clients: int, rng: np.random.Generator) -> Partition:
    """A random division into parts whose sizes differ by at most one."""
    return np.array_split(rng.permutation(samples), clients)


def dirichlet(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> Partition:
    """Equal-sized parts with class proportions drawn from Dirichlet(alpha), one draw per client.

    Each client takes floor(N / clients) samples. A class that runs out leaves its share to the client's other
    classes in their proportions, or, when none of those is left either, to the classes that remain by what
    they hold.
    """
    classes = int(labels.max()) + 1
    stock = [list(rng.permutation(np.flatnonzero(labels == c))) for c in range(classes)]
    size = len(labels) // clients
    # Very small alphas underflow to a draw of zeros (NaN after normalising): one class, drawn uniformly.
    draws = rng.dirichlet(np.full(classes, alpha), clients)
    degenerate = ~np.isfinite(draws).all(axis=1)
    draws[degenerate] = np.eye(classes)[rng.integers(classes, size=int(degenerate.sum()))]
    parts: Partition = []
    for proportions in draws:
        part: list[int] = []
        while len(part) < size:
            held = np.array([len(pool) for pool in stock])
            wanted = np.where(held > 0, proportions, 0.0)
            wanted = wanted if wanted.sum() > 0 else held.astype(float)
            counts = rng.multinomial(size - len(part), wanted / wanted.sum())
            for pool, count in zip(stock, np.minimum(counts, held), strict=True):
                part += [pool.pop() for _ in range(count)]
        parts.append(np.array(part))
    return parts


def shards(labels: np.ndarray, clients: int, per_client: int, rng: np.random.Generator) -> Partition:
    """The FedAvg paper's pathological division: label-sorted shards, `per_client` of them dealt to each
    client.
    """
    mixed = rng.permutation(len(labels))
    pieces = np.array_split(mixed[np.argsort(labels[mixed], kind="stable")], clients * per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, per_client)
    return [np.concatenate([pieces[i] for i in row]) for row in dealt]


def summary(parts: Partition, labels: np.ndarray, classes: int) -> list[dict[str, Any]]:
    """The lines of `partition.json`: per client its sample count, label histogram and the SHA-256 of its
    indices.
    """
    return [
        {
            "client": client,
            "samples": len(part),
            "labels": np.bincount(labels[part], minlength=classes).tolist(),
            "sha256": hashlib.sha256(np.ascontiguousarray(part, dtype="<i8").tobytes()).hexdigest(),
        }
        for client, part in enumerate(parts)
    ]


def divided(keys: Data, samples: int) -> int:
    """How many of so many training samples are given to clients: all, or those that the partition file lists.

    Raises:
        InputError: the partition file is unusable.
    """
    if keys.partition != "file":
        return samples
    return sum(map(len, _lists(Path(str(keys.partition_file)))))


def _lists(path: Path, clients: int | None = None) -> list[list[Any]]:
    """What the partition file holds, whatever stands in its lists, for so many clients or any."""
    wrong = f"data.partition_file: got {path}"
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{wrong}, which cannot be read ({error.strerror}), expected a JSON file") from None
    except (ValueError, RecursionError):
        raise InputError(
            f"{wrong}, which is not valid JSON, expected one list of indices per client"
        ) from None
    are_lists = isinstance(lists, list) and bool(lists) and all(isinstance(part, list) for part in lists)
    if not are_lists or len(lists) != (clients or len(lists)):
        count = f"{clients} lists (clients.count)" if clients else "lists"
        raise InputError(f"{wrong}, expected a list of {count} of sample indices")
    checked: list[list[Any]] = lists
    return checked


def _from_file(path: Path, samples: int, clients: int) -> Partition:
    wrong, lists = f"data.partition_file: got {path}", _lists(path, clients)
    used: set[int] = set()
    for client, part in enumerate(lists):
        if not part:
            raise InputError(f"{wrong}, where client {client} has no samples, expected at least one each")
        for index in part:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < samples:
                raise InputError(
                    f"{wrong}, where client {client} has {index!r}, expected indices 0 to {samples - 1}"
                )
            if index in used:
                raise InputError(
                    f"{wrong}, where sample {index} appears twice, expected every sample at most once"
                )
            used.add(index)
    return [np.array(part) for part in lists]
