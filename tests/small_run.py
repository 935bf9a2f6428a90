"""A small run at fp64, and when two of them are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_equality import SECONDS

ROUNDS = 12
TREE: dict[str, Any] = {
    "rounds": ROUNDS,
    "ranks": 3,
    "device": "cpu",
    "precision": "fp64",
    "clients": {"count": 3, "batch_size": 16},
    "data": {"train_limit": 120, "test_limit": 50, "partition": "iid"},
    "algorithm": {"upload_every": 2, "align_every": 2, "alignment": {"epochs": 8}},
    "comm": {"transports": ["uv"], "timeout_seconds": 60},
}


def write(folder: Path) -> str:
    """Its configuration file; the run is made in the same folder."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**TREE, "output": str(folder)}))
    return str(config)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Those of `metrics.jsonl` so far."""
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def assert_equal_runs(a: Path, b: Path) -> None:
    """On the same number of ranks: to the last bit, but for seconds; one line for each round."""
    mine, its = lines(a), lines(b)
    assert [line["round"] for line in its] == list(range(ROUNDS))
    for one, other in zip(mine, its, strict=True):
        assert {k: v for k, v in one.items() if k not in SECONDS} == {
            k: v for k, v in other.items() if k not in SECONDS
        }
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (a, b)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def assert_close_runs(a: Path, b: Path) -> None:
    """On different numbers of ranks: to the rounding of a sum."""
    mine, its = lines(a), lines(b)
    assert [line["round"] for line in its] == list(range(ROUNDS))
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert [line[key] for line in its] == pytest.approx([line[key] for line in mine], rel=1e-10)
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (a, b)]
    for name, weights in models[0].items():
        torch.testing.assert_close(models[1][name], weights, rtol=1e-10, atol=1e-12)
