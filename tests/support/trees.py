"""Configurations in tests, as nested dictionaries."""

import copy
from pathlib import Path
from typing import Any

Tree = dict[str, Any]


def merged(below: Tree, above: Tree) -> Tree:
    """A tree with another one's values on top."""
    result = copy.deepcopy(below)
    for key, value in above.items():
        inside = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inside else copy.deepcopy(value)
    return result


CLIENTS = 3
MODEL: Tree = {"memory_format": "contiguous"}
"""not by timing: numbers must not depend on it"""

ALGORITHM: Tree = {"upload_every": 2, "align_every": 2, "start": "paper"}
"""every second round aligns, from the first one on"""


def tree(output: Path, *changes: Tree, **keys: Any) -> Tree:
    """A small run at fp64, of clients of unequal size."""
    result: Tree = {
        "rounds": 6,
        "transport": "local",
        "precision": "fp64",
        "device": "cpu",
        "output": str(output),
        "clients": {"count": CLIENTS, "batch_size": 16},
        "data": {"train_limit": 100, "test_limit": 60, "alpha": 3.0},
        "model": MODEL,
        "algorithm": {
            **ALGORITHM,
            "alignment": {"epochs": 2, "batch_size": 25, "buffer_size": 60},
        },
        "evaluation": {"every": 3},
        "comm": {"transports": ["uv"], "timeout_seconds": 60},
    }
    for change in (*changes, keys):
        result = merged(result, change)
    return result


BENCH: Tree = {
    "name": "small",
    "rounds": 4,
    "ranks": 2,
    "device": "cpu",
    "clients": {"count": 2, "batch_size": 16},
    "data": {"train_limit": 96, "test_limit": 20, "partition": "iid"},
    "model": MODEL,
    "algorithm": {**ALGORITHM, "alignment": {"epochs": 2}},
    "comm": {"transports": ["uv"], "timeout_seconds": 60},
    "bench": {
        "variants": {
            "fsl_sage": [],
            "splitfed_v1": ["algorithm.name=splitfed_v1"],
            "fedavg": ["algorithm.name=fedavg"],
        },
        "target_accuracy": 0.01,
    },
}
"""a benchmark of three variants in a few seconds"""
