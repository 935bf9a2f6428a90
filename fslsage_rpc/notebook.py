"""The Python entry point: a whole run in this process, for notebooks and scripts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fslsage_rpc.config.loading import from_tree, load, to_tree
from fslsage_rpc.config.schema import Config


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the lines of its rounds in `metrics.jsonl`, and its `summary.json`."""

    folder: Path
    rounds: list[dict[str, Any]]
    summary: dict[str, Any]


def train(config: Config | Mapping[str, Any] | str | Path, *overrides: str) -> Run:
    """Train in this process (`transport: local`), showing progress.

    Args:
        config: a `Config`, nested keys as in YAML, or the path of a YAML file.
        overrides: `key.sub=value`.

    Raises:
        InputError: a key, value or file is wrong.
    """
    from fslsage_rpc.runs.metrics_file import decoded, rounds_of
    from fslsage_rpc.runs.round_numbers import summary_from_one
    from fslsage_rpc.runs.screen import Screen
    from fslsage_rpc.training.run import run

    if isinstance(config, str | Path):
        checked = load(config, overrides)
    else:
        checked = from_tree(to_tree(config) if isinstance(config, Config) else dict(config), overrides)
    checked = replace(checked, transport="local")
    folder = run(checked, Screen(checked))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = decoded((folder / "metrics.jsonl").read_bytes())
    rounds = rounds_of(lines)
    return Run(folder, rounds, summary_from_one(summary, rounds))
