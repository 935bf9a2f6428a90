"""Runs that differ only in seed and name are one series; a label sets it apart from the others."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.config.loading import changed_keys
from fslsage_rpc.config.schema import AlgorithmKeys
from fslsage_rpc.errors import InputError
from fslsage_rpc.report.labels import LETTERS, fitted
from fslsage_rpc.report.looks import display_name, rank_of
from fslsage_rpc.report.sources import SavedRun, Tree

LEFT_OUT = (
    "name",
    "seed",
    "output",
    "resume",
    "checkpoint",
    "trace",
    "bench",
    "sweep",
    "data.root",
    "data.download",
    "comm.timeout_seconds",
)
"""what may differ between the runs of one series"""


@dataclass(frozen=True)
class Series:
    """The runs of one configuration: all finished, or all not."""

    algorithm: str
    settings: tuple[str, ...]
    """`key=value` of the keys that set it apart from other series, besides the algorithm"""
    config: Tree
    runs: list[SavedRun]
    name: str = ""
    """what the user calls it, else algorithm and settings, else the folder of its first run"""

    @property
    def label(self) -> str:
        """Its name in tables and figures, with the state of its runs."""
        return self.name + self.state

    @property
    def state(self) -> str:
        """The end of its label."""
        return "" if self.finished else ", unfinished"

    @property
    def finished(self) -> bool:
        """Did its runs reach their end?"""
        return self.runs[0].summary is not None


def group(runs: Sequence[SavedRun]) -> list[Series]:
    """The series of these runs, in order of algorithms and settings where these name them, else as given.

    Runs that the user labels differently are never one series.

    Raises:
        InputError: runs of unlike configurations have the same label.
    """
    groups: dict[tuple[str | None, bool, str], list[SavedRun]] = {}
    for run in runs:
        configuration = json.dumps(comparable(run), sort_keys=True)
        groups.setdefault((run.label, run.summary is not None, configuration), []).append(run)
    trees = [comparable(members[0]) for members in groups.values()]
    keys = differing_keys(trees)
    series = [
        Series(
            _algorithm(tree), tuple(assignment(tree, key) for key in keys if reads(tree, key)), tree, members
        )
        for tree, members in zip(trees, groups.values(), strict=True)
    ]
    if runs and runs[0].label is not None:
        return _by_hand(series)
    return _by_settings(series, keys) or _by_folder(series)


def _by_hand(series: Sequence[Series]) -> list[Series]:
    """The series under the labels of their runs, as given."""
    labels = [one.runs[0].label or "" for one in series]
    for number, (label, one) in enumerate(zip(labels, series, strict=True)):
        for other in series[:number]:
            if (other.runs[0].label, other.finished) == (label, one.finished):
                raise InputError(
                    f"--label: got {label!r} for both {other.runs[0].folder} and {one.runs[0].folder}, "
                    "expected different ones for runs that are not seeds of one configuration"
                )
    names = fitted(labels, [one.state for one in series])
    return [replace(one, name=name) for one, name in zip(series, names, strict=True)]


def _by_settings(series: Sequence[Series], keys: Sequence[str]) -> list[Series]:
    """The series under algorithm and settings, in their order; none where that is too long for one of them.

    Keys are whole, or else their last words, where these differ.
    """
    for shown in ({key: key for key in keys}, {key: key.rpartition(".")[2] for key in keys}):
        named = [replace(one, name=_title(one, shown)) for one in series]
        if len(set(shown.values())) == len(keys) and all(len(one.label) <= LETTERS for one in named):
            return sorted(named, key=lambda one: _rank(one, keys))
    return []


def _by_folder(series: Sequence[Series]) -> list[Series]:
    """The series under the names of their first runs' folders, as given."""
    others = [f" and {len(one.runs) - 1} more" if len(one.runs) > 1 else "" for one in series]
    endings = [more + one.state for more, one in zip(others, series, strict=True)]
    names = fitted([one.runs[0].name for one in series], endings)
    return [replace(one, name=name + more) for one, name, more in zip(series, names, others, strict=True)]


def _title(series: Series, shown: Mapping[str, str]) -> str:
    """The algorithm and the settings, whose keys are shown so."""
    settings = [setting.partition("=") for setting in series.settings]
    return ", ".join(
        [display_name(series.algorithm), *(f"{shown[key]}={value}" for key, _, value in settings)]
    )


def comparable(run: SavedRun) -> Tree:
    """The configuration of a run without what does not matter to its results.

    Ranks and device are those that there were; keys that the algorithm does not read have their defaults.
    """
    tree = copy.deepcopy(run.config)
    for key in LEFT_OUT:
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section[name]
        del section[last]
    if ranks := run.environment.get("ranks"):
        tree["ranks"] = len(ranks)
        tree["device"] = ", ".join(sorted({str(rank.get("device")).partition(":")[0] for rank in ranks}))
    defaults = asdict(AlgorithmKeys())
    for key in tree["algorithm"]:
        if not reads(tree, f"algorithm.{key}"):
            tree["algorithm"][key] = defaults[key]
    return tree


def differing_keys(trees: Sequence[Tree]) -> list[str]:
    """The dotted keys in which the configurations differ, each compared where the algorithm reads it."""
    changed = sorted({key for tree in trees[1:] for key in changed_keys(trees[0], tree)})
    return [
        key
        for key in changed
        if key != "algorithm.name"
        and len({repr(value_of(tree, key)) for tree in trees if reads(tree, key)}) > 1
    ]


def value_of(tree: Tree, key: str) -> Any:
    """The value of a dotted key; None where it is missing."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def assignment(tree: Tree, key: str) -> str:
    """`key=value`, as on the command line."""
    value = value_of(tree, key)
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def reads(tree: Tree, key: str) -> bool:
    """Does the algorithm of this configuration read this key? (All read what is outside `algorithm`.)

    One of the user's own counts as reading all: a report imports no code that a run folder names.
    """
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    known = ALGORITHMS.get(_algorithm(tree))
    return section != "algorithm" or name == "name" or known is None or name in known.reads()


def _rank(series: Series, keys: Sequence[str]) -> tuple[tuple[int, str], list[tuple[bool, float, str]], bool]:
    """Sorts by algorithm, then by settings (numbers by size, before texts), then unfinished runs last."""
    values = [value_of(series.config, key) for key in keys]
    numbers = [value if isinstance(value, int | float) else None for value in values]
    settings = [
        (number is None, number or 0, str(value)) for number, value in zip(numbers, values, strict=True)
    ]
    return rank_of(series.algorithm), settings, not series.finished


def _algorithm(tree: Tree) -> str:
    name: str = tree["algorithm"]["name"]
    return name
