"""A small run at fp64, of so many rounds that it can be disturbed in the middle."""

from pathlib import Path
from typing import Any

import yaml

from support.trees import ALGORITHM, MODEL

ROUNDS = 12
TREE: dict[str, Any] = {
    "rounds": ROUNDS,
    "ranks": 3,
    "device": "cpu",
    "precision": "fp64",
    "clients": {"count": 3, "batch_size": 16},
    "data": {"train_limit": 120, "test_limit": 50, "partition": "iid"},
    "model": MODEL,
    "algorithm": {**ALGORITHM, "alignment": {"epochs": 8}},
    "comm": {"transports": ["uv"], "timeout_seconds": 60},
}


def write(folder: Path) -> str:
    """Its configuration file; the run is made in the same folder."""
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**TREE, "output": str(folder)}))
    return str(config)
