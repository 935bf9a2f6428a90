"""Hashes of samples, by which ranks and runs see that theirs are the same."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.tasks.base import Samples
from fslsage_rpc.units import MIB

HASHED_BYTES = 256 * MIB
"""of a tensor; of a larger one every k-th sample is hashed"""
SHOWN_DIGITS = 12


def sample_hashes(samples: Samples) -> dict[str, Any]:
    """The number of samples, and the SHA-256 of their labels and of all their tensors."""
    return {
        "count": len(samples.labels),
        "labels": _hash(samples.labels),
        "contents": _hash(*samples.tensors),
    }


def different_samples(which: str, got: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """How samples differ by these hashes, if they do: the key, what it gave and what was expected.

    Args:
        which: training or test.
    """
    if got["count"] != expected["count"]:
        return f"data.name: got {got['count']} {which} samples, expected {expected['count']}"
    for part in ("labels", "contents"):
        if got[part] != expected[part]:
            hashes = [each[part][:SHOWN_DIGITS] for each in (got, expected)]
            return f"data.name: got {which} samples with {part} of hash {hashes[0]}, expected {hashes[1]}"
    return None


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        chosen = tensor[:: max(1, -(-tensor.nbytes // HASHED_BYTES))]
        digest.update(chosen.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
