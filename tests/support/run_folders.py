"""Run folders as tests look at them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fslsage_rpc.notebook import Run
from fslsage_rpc.runs.checkpoint_files import complete_folders, read_manifest


def lines(folder: Path) -> list[dict[str, Any]]:
    """Those of `metrics.jsonl` so far."""
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def finished(folder: Path) -> Run:
    """A run that has ended, from its folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(folder, lines, json.loads((folder / "summary.json").read_text()))


def copied(run: Run, output: Path) -> Path:
    """The run's folder, elsewhere."""
    return shutil.copytree(run.folder, output / run.folder.name)


def everything(run: Run) -> dict[str, Any]:
    """The leaves of all parties' state in the newest checkpoint, by name."""
    manifest = read_manifest(complete_folders(run.folder / "checkpoints")[0])
    clients = [client for part in manifest.parts for client in part.clients]
    return dict(leaves("", vars(manifest.read(clients, server=True))))


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in items:
            yield from leaves(f"{name}/{key}", below)
    else:
        yield name, value
