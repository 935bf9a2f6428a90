"""The Python entry points for notebooks and scripts: a whole run in this process, and what runs have left."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.loading import load as load_config
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError

if TYPE_CHECKING:
    import pandas

    from fslsage_rpc.report.sources import SavedRun


@dataclass(frozen=True)
class Run:
    """A run: its folder, the lines of its rounds in `metrics.jsonl`, its `summary.json`, and what made it."""

    folder: Path
    rounds: list[dict[str, Any]]
    summary: Any
    """nested keys, as in the file; None where the run is unfinished"""
    config: dict[str, Any] = field(default_factory=dict)
    """nested keys, as in YAML"""
    variant: str | None = None
    """its name in a sweep"""

    @property
    def seed(self) -> int:
        """The seed in its configuration."""
        seed: int = self.config["seed"]
        return seed


class Runs(Sequence[Run]):
    """Runs in their order, and tables of all of them."""

    def __init__(self, runs: Iterable[Run]):
        self._runs = list(runs)

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, place: int) -> Run: ...

    @overload
    def __getitem__(self, place: slice) -> "Runs": ...

    def __getitem__(self, place: int | slice) -> "Run | Runs":
        return Runs(self._runs[place]) if isinstance(place, slice) else self._runs[place]

    def __repr__(self) -> str:
        return f"Runs({[str(run.folder) for run in self._runs]})"

    def rounds_table(self) -> "pandas.DataFrame":
        """A row for each round of each run: variant, seed, and the keys of its line, as `drift.cosine`.

        Raises:
            ImportError: pandas is not installed.
        """
        return _table((run, line) for run in self for line in run.rounds)

    def summary_table(self) -> "pandas.DataFrame":
        """A row for each finished run: variant, seed, and the keys of its summary, as `test_accuracy.best`.

        Raises:
            ImportError: pandas is not installed.
        """
        return _table((run, run.summary) for run in self if run.summary is not None)


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
        checked = load_config(config, overrides)
    else:
        checked = from_tree(to_tree(config) if isinstance(config, Config) else dict(config), overrides)
    checked = replace(checked, transport="local")
    folder = run(checked, Screen(checked))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = decoded((folder / "metrics.jsonl").read_bytes())
    rounds = rounds_of(lines)
    return Run(folder, rounds, summary_from_one(summary, rounds), to_tree(checked))


def load(folder: str | Path) -> Runs:
    """The runs in a run folder, or in that of a sweep: all that have begun, seed by seed.

    Raises:
        InputError: the folder is neither, or is damaged.
    """
    from fslsage_rpc.report.sources import read
    from fslsage_rpc.report.sweeps import is_sweep, read_sweep

    if is_sweep(folder):
        members = read_sweep(folder).members
        return Runs(_plain(member.run, member.planned.variant) for member in members if member.run)
    runs, benches = read([str(folder)])
    if benches:
        raise InputError(f"load: got {str(folder)!r}, which holds a bench, expected a run or a sweep")
    return Runs(_plain(run, None) for run in runs)


def _plain(run: "SavedRun", variant: str | None) -> Run:
    from fslsage_rpc.runs.round_numbers import summary_from_one

    # The sum of all bytes so far is not in the file.
    rounds = [{key: value for key, value in line.items() if key != "wire_bytes_total"} for line in run.lines]
    try:
        summary = None if run.summary is None else summary_from_one(run.summary, rounds)
    except (LookupError, TypeError, ValueError):
        raise InputError(
            f"{run.folder / 'summary.json'}: is damaged, expected what the program wrote"
        ) from None
    return Run(run.folder, rounds, summary, run.config, variant)


def _table(rows: Iterable[tuple[Run, Mapping[str, Any]]]) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError:
        raise ImportError("tables of runs need pandas: pip install pandas") from None

    flat = [{"variant": run.variant, "seed": run.seed, **_flat(tree)} for run, tree in rows]
    keys = dict.fromkeys(key for row in flat for key in row)
    # What is a mapping in one round may be null in another: its keys are null there.
    mappings = {key[:place] for key in keys for place, letter in enumerate(key) if letter == "."}
    return pandas.DataFrame(flat, columns=[key for key in keys if key not in mappings])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
