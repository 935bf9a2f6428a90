"""A small run with everything in it that may go wrong: unequal clients, short last batches, alignments."""

import json
from pathlib import Path
from typing import Any

from support.trees import ALGORITHM


def unequal_clients(folder: Path, algorithm: str) -> dict[str, Any]:
    """Three rounds of three unequal clients, whose last batches are short; FSL-SAGE aligns in two of them."""
    parts = folder / "partition.json"
    parts.write_text(json.dumps([list(range(70)), list(range(70, 115)), list(range(115, 149))]))
    return {
        "rounds": 3,
        "clients": {"count": 3, "batch_size": 16},
        "data": {"partition": "file", "partition_file": str(parts), "test_limit": 60},
        "algorithm": {
            "name": algorithm,
            **ALGORITHM,
            "alignment": {"epochs": 4, "batch_size": 25, "buffer_size": 40},
        },
    }
