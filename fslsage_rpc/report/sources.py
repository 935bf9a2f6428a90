"""What a report is made of: run folders and bench results, read from disk and checked."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from fslsage_rpc.config.loading import load, to_tree
from fslsage_rpc.errors import InputError
from fslsage_rpc.measure.host_load import BUSY, mean_busy
from fslsage_rpc.measure.phases import PARTS
from fslsage_rpc.runs.round_numbers import from_one
from fslsage_rpc.transport.wire_ledger import OFF_THE_CLOCK

Tree = dict[str, Any]
Line = dict[str, Any]
"""one line of metrics.jsonl, and in it `wire_bytes_total`: bytes on the wire of all rounds so far"""

EXPECTED = "expected a run folder (config.yaml, metrics.jsonl) or the folder of a bench (bench.json)"

HASHES = ("samples", "sources")
"""of an environment: by them the program compares runs, and people do not"""


@dataclass(frozen=True)
class SavedRun:
    """A run folder; `summary` is None where the run is not finished."""

    folder: Path
    config: Tree
    environment: Tree
    lines: list[Line]
    summary: Tree | None
    name: str
    """that of its folder, with parents where another folder has the same"""
    label: str | None
    """the user's own name for it"""

    @property
    def busy(self) -> bool:
        """Others had a part of the host's cores that its seconds are not to be trusted with."""
        share = mean_busy(self.lines)
        return share is not None and share > BUSY

    @property
    def diverged(self) -> int | None:
        """The first round with a loss or a weight that is not finite."""
        return next((line["round"] for line in self.lines if line.get("diverged")), None)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` samples; None where not measured."""

    median: float | None
    q1: float | None
    q3: float | None
    n: float | None


@dataclass(frozen=True)
class TargetReached:
    """What it took to reach a test accuracy; None where not measured."""

    accuracy: float | None = None
    rounds: float | None = None
    seconds: float | None = None
    wire_bytes: float | None = None
    paper_bytes: float | None = None


@dataclass(frozen=True)
class Variant:
    """One variant of a bench: seconds per round and bytes sent in one, None where not measured."""

    name: str
    algorithm: str
    round_seconds: Spread
    ratio_to_reference: Spread
    parts: dict[str, float | None]
    wire_bytes: float | None
    paper_bytes: float | None
    bound_seconds: float | None
    efficiency: float | None
    busy_samples: float | None
    """those whose seconds others' work on the host has changed"""
    target: TargetReached | None
    diverged: float | None = None
    """the first round in which it did"""


@dataclass(frozen=True)
class SavedBench:
    """The `bench.json` of a folder."""

    folder: Path
    name: str
    """the user's own for it, or that of its folder, with parents where another folder has the same"""
    reference: str | None
    environment: Tree
    variants: list[Variant]


def read(paths: Sequence[str], labels: Sequence[str] = ()) -> tuple[list[SavedRun], list[SavedBench]]:
    """The runs and the benches in these folders; a folder that is named twice is read once.

    Args:
        labels: the user's own names for them: none, or one for each path.

    Raises:
        InputError: a folder is missing, is neither of a run nor of a bench, or what it holds is damaged;
            there are not as many labels as paths, one is empty, or a folder has several.
    """
    if labels and len(labels) != len(paths):
        raise InputError(
            f"--label: got {len(labels)} for {len(paths)} RUNs, expected one for each, in their order"
        )
    if not all(map(str.strip, labels)):
        raise InputError("--label: got an empty one, expected a name")
    folders: dict[Path, Path] = {}
    labelled: dict[Path, str] = {}
    for number, path in enumerate(paths):
        folder = Path(path)
        try:
            names = {file.name for file in folder.iterdir()}
            folders.setdefault(folder.resolve(), folder)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "a loop of links"
            raise InputError(f"RUN: got {path!r}, which cannot be read ({reason}); {EXPECTED}") from None
        if labels and labelled.setdefault(folder.resolve(), labels[number]) != labels[number]:
            raise InputError(f"--label: got more than one for {path}, expected the same wherever it is named")
        if not names & {"config.yaml", "bench.json"}:
            raise InputError(f"RUN: got {path!r}, which has neither config.yaml nor bench.json; {EXPECTED}")
    runs: list[SavedRun] = []
    benches: list[SavedBench] = []
    for name, (resolved, folder) in zip(distinct_names(list(folders)), folders.items(), strict=True):
        label = labelled.get(resolved)
        if (folder / "bench.json").exists():
            benches.append(_read_bench(folder, label or name))
        else:
            runs.append(_with_rounds(read_run(folder, name, label)))
    return runs, benches


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The names of resolved folders, each with as many of its parents as set it apart from the others."""

    def name(folder: Path, parts: int) -> str:
        return str(Path(*folder.parts[-parts:]))

    return [
        next(
            name(folder, parts)
            for parts in range(1, len(folder.parts) + 1)
            if [name(other, parts) for other in folders].count(name(folder, parts)) == 1
        )
        for folder in folders
    ]


def parts_of(phases: Mapping[str, float | None]) -> dict[str, float | None]:
    """Seconds by part of a client's round, `other` last, from seconds by phase.

    Phases that were not measured (None) are left out of the sums; a part of which none was is None.
    """
    named = {phase for group in PARTS.values() for phase in group}
    groups = {**PARTS, "other": tuple(phase for phase in phases if phase not in named)}
    return {part: known_sum([phases.get(phase) for phase in group]) for part, group in groups.items()}


def known_sum(values: Sequence[float | None]) -> float | None:
    """The sum without what is not known (None); None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def read_run(folder: Path, name: str, label: str | None) -> SavedRun:
    """The run in a folder, which may have no round yet.

    Raises:
        InputError: what it holds is damaged.
    """
    try:
        config = to_tree(load(folder / "config.yaml"))
    except InputError as error:
        raise InputError(
            f"RUN: got {str(folder)!r}, whose config.yaml is not of this version ({error})"
        ) from None
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    # Before the lines, which are whole where there is a summary: the run may be about to end.
    ended = _read_json(summary) if summary.exists() else None
    lines = _read_lines(metrics) if metrics.exists() else []
    return SavedRun(folder, config, _checked_environment(folder), lines, ended, name, label)


def _with_rounds(run: SavedRun) -> SavedRun:
    """The run, which must have some."""
    if not (run.folder / "metrics.jsonl").exists():
        raise InputError(
            f"RUN: got {str(run.folder)!r}, which has no metrics.jsonl; expected a run with rounds in it"
        )
    if not run.lines:
        raise InputError(f"RUN: got {str(run.folder)!r}, which has no finished round; expected one or more")
    return run


def _checked_environment(folder: Path) -> Tree:
    """A run's own, else that beside its folder, of several runs in one process; empty where there is none."""
    own = folder / "environment.json"
    path = own if own.exists() else folder.parent / "environment.json"
    environment = {k: v for k, v in (_read_json(path) if path.exists() else {}).items() if k not in HASHES}
    ranks = environment.get("ranks", [])
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        raise InputError(f"{path}: ranks is damaged, expected a list of mappings")
    return environment


def _read_lines(path: Path) -> list[Line]:
    texts = _read_text(path).splitlines(keepends=True)
    if texts and not texts[-1].endswith("\n"):
        texts.pop()  # a run that is under way, or was cut off, in the middle of a line
    lines: list[Line] = []
    wire_bytes = 0
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and "event" in line:  # a rank was lost, or has joined
            continue
        if not _is_round(line):
            raise InputError(f"{path}: line {number} is damaged, expected the figures of a round")
        wire_bytes += sum(line["wire_bytes"].values())
        lines.append({**line, "wire_bytes_total": wire_bytes})
    return from_one(lines)


def _is_round(line: Any) -> bool:
    """Is this a metrics line, as far as a report needs it?"""
    if not isinstance(line, dict) or not isinstance(line.get("phases"), dict):
        return False
    drift, accuracy = line.get("drift"), line.get("test_accuracy", "none")  # null in a round not evaluated
    return (
        all(is_number(line.get(key)) for key in ("round", "elapsed_seconds", "paper_bytes_total"))
        and _are_numbers(line.get("wire_bytes"))
        and _are_numbers(line["phases"].get("client"))
        and (accuracy is None or is_number(accuracy))
        and (line.get("train_loss") is None or is_number(line["train_loss"]))
        and (drift is None or isinstance(drift, dict))
        and all(value is None or is_number(value) for value in (drift or {}).values())
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Is it a number that a float can hold?"""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # an integer may be larger


def _are_numbers(tree: Any) -> bool:
    return isinstance(tree, dict) and all(is_number(value) for value in tree.values())


def _read_bench(folder: Path, name: str) -> SavedBench:
    path = folder / "bench.json"
    tree = _read_json(path)
    variants = tree.get("variants")
    if not isinstance(variants, dict) or not variants:
        raise InputError(f"{path}: got no variants, expected a mapping of one or more")
    try:
        read = [_read_variant(key, variant) for key, variant in variants.items()]
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    environment, reference = tree.get("environment"), tree.get("reference")
    return SavedBench(
        folder,
        name,
        reference if isinstance(reference, str) else None,
        environment if isinstance(environment, dict) else {},
        read,
    )


def _read_variant(name: str, tree: Any) -> Variant:
    def mapping(*keys: str) -> dict[str, float | None]:
        found = _find(tree, name, *keys)
        if not isinstance(found, dict | None):
            where = ".".join(("variants", name, *keys))
            raise ValueError(f"{where} is {type(found).__name__}, expected a mapping")
        return {key: _number(tree, name, *keys, key) for key in found or {}}

    def spread(key: str) -> Spread:
        return Spread(*(_number(tree, name, key, statistic) for statistic in ("median", "q1", "q3", "n")))

    algorithm = _find(tree, name, "algorithm")
    if not isinstance(algorithm, str):
        raise ValueError(f"variants.{name}.algorithm is {algorithm!r}, expected the name of an algorithm")
    target = None
    if _find(tree, name, "target") is not None:
        keys = ("accuracy", "rounds", "seconds", "wire_bytes", "paper_bytes")
        target = TargetReached(*(_number(tree, name, "target", key) for key in keys))
    return Variant(
        name,
        algorithm,
        spread("round_seconds"),
        spread("ratio_to_reference"),
        parts_of(mapping("phases", "client")),
        known_sum([bytes for kind, bytes in mapping("wire_bytes").items() if kind not in OFF_THE_CLOCK]),
        _number(tree, name, "paper_bytes"),
        _number(tree, name, "bound_seconds"),
        _number(tree, name, "efficiency"),
        _number(tree, name, "busy_samples"),
        target,
        _number(tree, name, "diverged"),
    )


def _find(tree: Any, name: str, *keys: str) -> Any:
    """The value under these keys of a variant; None where one of them is missing or null."""
    for depth, key in enumerate(keys):
        if tree is None:
            return None
        if not isinstance(tree, dict):
            where = ".".join(("variants", name, *keys[:depth]))
            raise ValueError(f"{where} is {type(tree).__name__}, expected a mapping")
        tree = tree.get(key)
    return tree


def _number(tree: Any, name: str, *keys: str) -> float | None:
    """The number under these keys of a variant; None where it was not measured or is not finite."""
    value = _find(tree, name, *keys)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if not is_number(value):
        raise ValueError(f"variants.{name}.{'.'.join(keys)} is {value!r}, expected a number or null")
    return value


def _read_json(path: Path) -> Tree:
    try:
        tree = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as JSON, expected what the program wrote") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: got {type(tree).__name__}, expected a mapping")
    return tree


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason}), expected what the program wrote") from None
