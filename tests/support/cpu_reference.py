"""Reference values of a CPU, which a GPU is held to without computing them again.

    PYTHONPATH=.:tests python3 tests/support/cpu_reference.py

makes cpu_reference.json anew, for a change that is to change numbers.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from support.rank_program import Outcome, train_locally
from support.unequal_clients import unequal_clients

FILE = Path(__file__).with_suffix(".json")
ALGORITHMS = ("fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg")
PARTIES = ("client", "server", "auxiliary")
SAME_IN_FP64 = 1e-8
"""the largest relative difference after three rounds: the order of sums, and nothing else"""
SAME_ANGLE = 1e-4
"""likewise of what alignments report: cosines and small differences"""


def tree(folder: Path, algorithm: str, device: str = "cuda", **changes: Any) -> dict[str, Any]:
    """Three rounds of three unequal clients. With SGD: Adam makes a step of any rounding error."""
    return {
        **unequal_clients(folder, algorithm),
        "precision": "fp64",
        "device": device,
        "optimizer": {party: {"name": "sgd", "lr": 0.05} for party in PARTIES},
        "comm": {"timeout_seconds": 60},
        **changes,
    }


def described(outcome: Outcome) -> dict[str, Any]:
    """The part of a training that is kept: losses, bytes, each tensor's norm and three projections."""
    keys = ("train_loss", "test_loss", "alignment", "drift", "wire_bytes")
    return {
        "lines": [{key: line[key] for key in keys} for line in outcome.lines],
        "tensors": {
            name: projections(tensor) for name, tensor in outcome.tensors.items() if tensor.numel() > 0
        },
    }


def projections(tensor: torch.Tensor) -> list[float]:
    """The norm, and the products with three fixed vectors of norm 1."""
    values = tensor.double().flatten()
    index = torch.arange(1, values.numel() + 1, dtype=torch.float64)
    waves = [torch.cos(frequency * index) for frequency in (1.0, 2.0, 3.0)]
    return [values.norm().item(), *((values @ wave / wave.norm()).item() for wave in waves)]


def assert_as_on_a_cpu(outcome: Outcome, algorithm: str, size: bool = True) -> None:
    """Every tensor, loss and figure of a training of `tree` is the reference's.

    Args:
        size: those on the wire too, which depend on the number of ranks.
    """
    expected = json.loads(FILE.read_text())[algorithm]
    found = described(outcome)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, values in expected["tensors"].items():
        tolerance = SAME_IN_FP64 * abs(values[0])
        assert found["tensors"][name] == pytest.approx(values, rel=0, abs=tolerance), name
    assert len(found["lines"]) == len(expected["lines"])
    for line, reference in zip(found["lines"], expected["lines"], strict=True):
        for key in ("train_loss", "test_loss"):
            assert line[key] == pytest.approx(reference[key], rel=SAME_IN_FP64), key
        for key in ("alignment", "drift"):
            assert line[key] == (reference[key] and pytest.approx(reference[key], rel=SAME_ANGLE)), key
        if size:
            assert line["wire_bytes"] == reference["wire_bytes"]


def rounded(value: Any) -> Any:
    """Floats to 13 digits, which say more than is compared."""
    match value:
        case float():
            return float(f"{value:.12e}")
        case dict():
            return {key: rounded(each) for key, each in value.items()}
        case list():
            return [rounded(each) for each in value]
    return value


def main() -> None:
    """Compute all of them on the CPU, and write them."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            algorithm: rounded(described(train_locally(tree(Path(folder), algorithm, "cpu"))))
            for algorithm in ALGORITHMS
        }
    FILE.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
