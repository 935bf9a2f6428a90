"""Runs that differ only in seed and name are one series; a label says what sets it apart from the others."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.config import AlgorithmKeys
from fslsage_rpc.configuration import changed_keys
from fslsage_rpc.report.figures import display_name, rank_of
from fslsage_rpc.report.sources import Run, Tree

FREE_KEYS = (
    "name",
    "seed",
    "output",
    "resume",
    "checkpoint",
    "trace",
    "bench",
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
    runs: list[Run]

    @property
    def label(self) -> str:
        """Its name in tables and figures."""
        state = () if self.finished else ("unfinished",)
        return ", ".join([display_name(self.algorithm), *self.settings, *state])

    @property
    def finished(self) -> bool:
        """Did its runs reach their end?"""
        return self.runs[0].summary is not None


def group(runs: Sequence[Run]) -> list[Series]:
    """The series of these runs, in order of algorithms and settings."""
    groups: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        configuration = json.dumps(comparable(run), sort_keys=True)
        groups.setdefault((configuration, run.summary is not None), []).append(run)
    trees = [comparable(members[0]) for members in groups.values()]
    keys = differing_keys(trees)
    series = [
        Series(
            _algorithm(tree), tuple(assignment(tree, key) for key in keys if _reads(tree, key)), tree, members
        )
        for tree, members in zip(trees, groups.values(), strict=True)
    ]
    return sorted(series, key=lambda one: _rank(one, keys))


def comparable(run: Run) -> Tree:
    """The configuration of a run without what does not matter to its results.

    Ranks and device are those that there were; keys that the algorithm does not read have their defaults.
    """
    tree = copy.deepcopy(run.config)
    for key in FREE_KEYS:
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
        if not _reads(tree, f"algorithm.{key}"):
            tree["algorithm"][key] = defaults[key]
    return tree


def differing_keys(trees: Sequence[Tree]) -> list[str]:
    """The dotted keys in which the configurations differ, each compared where the algorithm reads it."""
    changed = sorted({key for tree in trees[1:] for key in changed_keys(trees[0], tree)})
    return [
        key
        for key in changed
        if key != "algorithm.name"
        and len({repr(value_of(tree, key)) for tree in trees if _reads(tree, key)}) > 1
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


def _reads(tree: Tree, key: str) -> bool:
    """Does the algorithm of this configuration read this key? (All read what is outside `algorithm`.)

    One of the user's own counts as reading all: a report imports no code that a run folder names.
    """
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    known = ALGORITHMS.get(_algorithm(tree))
    return section != "algorithm" or name == "name" or known is None or name in known.uses
