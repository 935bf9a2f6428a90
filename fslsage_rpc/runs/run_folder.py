"""The run folder `output/name`: what a run leaves behind, written by the server's rank alone."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from fslsage_rpc.config.loading import to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.yaml_files import to_yaml
from fslsage_rpc.errors import InputError
from fslsage_rpc.runs.checkpoint_files import (
    Damaged,
    Manifest,
    complete_folders,
    read_manifest,
    remove_all_but,
    said,
    serialised,
    write_durably,
)
from fslsage_rpc.runs.folder_lock import FolderLock
from fslsage_rpc.runs.former_run import ANOTHER, FormerRun, asks_for_more
from fslsage_rpc.runs.metrics_file import MetricsFile, decoded, encoded, read_beginning, rounds_of
from fslsage_rpc.runs.places import check_place, writing
from fslsage_rpc.runs.records import is_scored
from fslsage_rpc.runs.tensorboard import TensorBoard

STOPPED = "STOPPED"
DIVERGED = "DIVERGED"
ENDINGS = (STOPPED, DIVERGED, "summary.json", "model.pt", "trace.json", "links.json")
"""what a run leaves at its end"""
EVENTS = "tensorboard"
SWEEP = "sweep.yaml"
"""in the folder of a sweep, whose runs have folders of their own in it: its configuration"""


class RunFolder:
    """The folder of one run. Files appear whole or not at all; `metrics.jsonl` grows by whole lines.

    A context: until it ends no other process may write there, unless the run was complete before.

    Args:
        warn: shows one line.

    Attributes:
        finished_summary: of the run that is there, where it is complete and nothing more is asked of it.
        manifest: of the checkpoint to go on from; None where this run has yet to begin.

    Raises:
        InputError: the folder cannot be made, or holds a benchmark, a run of another configuration, or a
            complete run that cannot be gone on with; or another process writes there.
    """

    def __init__(self, config: Config, warn: Callable[[str], None]):
        self.path = Path(config.output) / config.name
        self.warn = warn
        self._former = FormerRun(config)
        self.finished_summary: dict[str, Any] | None = None
        self.manifest: Manifest | None = None
        self._before: list[dict[str, Any]] | None = []  # until it is started, the lines to go on from
        self._older = False  # do rounds count from 0 in what is there?
        self._config = to_tree(config)
        self._checkpoints = checkpoints_folder(config)
        self._metrics = MetricsFile(self.path / "metrics.jsonl")
        with self._writing():
            check_place(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        for file, what in (("bench.json", "a benchmark"), (SWEEP, "a sweep")):
            if (self.path / file).exists():
                raise InputError(f"name: got {config.name!r}, where {self.path} holds {what}; choose another")
        self._lock: FolderLock | None = None
        self.finished_summary = self._former.finished_summary()
        if not self.finished_summary:
            with self._writing():
                self._lock = FolderLock(self.path, warn)
            try:
                self.finished_summary = self._former.finished_summary()  # it may have ended since
                if not self.finished_summary:
                    self._look_at_run()
            except BaseException:
                self.release()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others write there."""
        if self._lock:
            self._lock.release()

    @property
    def has_checkpoint(self) -> bool:
        """Is there one that a run could go on from?"""
        return bool(complete_folders(self._checkpoints))

    def check_partition(self, partition: list[dict[str, Any]]) -> None:
        """Refuse to go on with other samples.

        Raises:
            InputError: the clients' samples are not those of the run that is gone on with.
        """
        path = self.path / "partition.json"
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == partition
        except (OSError, ValueError, RecursionError):
            return  # it is written again
        if self.manifest and not same:
            raise InputError(
                f"{path}: got other samples for the clients, expected those of the run that goes on from "
                f"round {self.manifest.rounds}; {ANOTHER}"
            )

    def start(self, environment: Mapping[str, Any], partition: list[dict[str, Any]]) -> None:
        """Write what is known before the first round, and remove what an earlier run left, or left after the
        checkpoint to go on from.

        Raises:
            InputError: the folder cannot be written to.
        """
        with self._writing():
            # Whenever this is cut short, what is there can still be gone on with: no file of it is missing.
            self._metrics.begin(encoded(self.lines))
            self._before = None
            complete, going_on = complete_folders(self._checkpoints), self.manifest
            kept = [folder for folder in complete if folder <= going_on.folder] if going_on else []
            remove_all_but(self._checkpoints, kept)
            for name in ENDINGS:
                (self.path / name).unlink(missing_ok=True)
            self._write("config.yaml", to_yaml(self._config))
            self._write("environment.json", _json(environment))
            self._write("partition.json", _json(partition))
            if self._older or not going_on:
                shutil.rmtree(self.path / EVENTS, ignore_errors=True)
        self._open_events(going_on.rounds + 1 if going_on else 1)
        if self._older:
            for line in self.rounds:
                self._try(partial(self._tensorboard.add_round, line))

    def add_before(self, events: list[dict[str, Any]]) -> None:
        """Add lines of events before the first round; written as the folder is started."""
        self._before = self.lines + events

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All metrics lines so far; before the first round, those up to the checkpoint to go on from.

        Raises:
            InputError: the file is not what was written.
        """
        if self._before is not None:
            return self._before
        try:
            return self._metrics.lines()
        except Damaged as error:
            raise InputError(f"output: {error}") from None

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds."""
        return rounds_of(self.lines)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of ranks that were lost or have joined."""
        return [line for line in self.lines if "event" in line]

    def add_round(self, line: dict[str, Any]) -> None:
        """Append a round's line to `metrics.jsonl`; where that fails the training goes on.

        Raises:
            InputError: another process has taken the folder, as this one was silent for long.
        """
        self._add(line)
        self._try(lambda: self._tensorboard.add_round(line))

    def add_event(self, line: dict[str, Any]) -> None:
        """Append an event's line."""
        self._add(line)

    def go_back(self, rounds: int) -> None:
        """Forget the lines of later rounds than so many: they are done again.

        Raises:
            InputError: the folder cannot be written to.
        """
        lines = self.lines
        kept = [line for line in lines if "event" in line or line["round"] <= rounds]
        if len(kept) < len(lines):
            with self._writing():
                self._metrics.begin(encoded(kept))
            self._try(self._tensorboard.close)
            self._open_events(rounds + 1)

    def _open_events(self, first_round: int) -> None:
        self._tensorboard = TensorBoard(self.path / EVENTS, first_round)
        self._try(self._tensorboard.open)

    def _try(self, write: Callable[[], None]) -> None:
        """TensorBoard's events are worth a warning, no more: its writer ends with the first error."""
        try:
            write()
        except OSError as error:
            self.warn(f"{said(error, self.path / EVENTS)}: no more events are written there")
            self._tensorboard.give_up()

    def _add(self, line: dict[str, Any]) -> None:
        if self._lock:
            self._lock.check()
        try:
            self._metrics.append(line)
        except OSError as error:
            self.warn(f"{said(error, self._metrics.path)}: this line is written later")

    @property
    def metrics(self) -> MetricsFile:
        """`metrics.jsonl`."""
        return self._metrics

    def add_trace(self, text: str) -> None:
        """Write `trace.json`."""
        with self._writing():
            self._write("trace.json", text)

    def mark_stopped(self, checkpoint: Path) -> None:
        """Write `STOPPED`, by which a launcher knows that the run can be gone on with, from this checkpoint.

        Raises:
            InputError: the folder cannot be written to.
        """
        with self._writing():
            self._write(STOPPED, f"goes on from {checkpoint}\n")

    def mark_diverged(self, said: str) -> None:
        """Write `DIVERGED`, by which a launcher knows that the run has ended so.

        Raises:
            InputError: the folder cannot be written to.
        """
        with self._writing():
            self._write(DIVERGED, f"{said}\n")

    def finish(self, summary: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> None:
        """Write the final model and, last, the summary that marks the run as complete.

        Raises:
            InputError: the folder cannot be written to.
        """
        self._try(self._tensorboard.close)
        with self._writing():
            self._metrics.extent()
            self._metrics.sync()
            write_durably(self.path / "model.pt", serialised(dict(model)))
            self._write("summary.json", _json(summary))

    def _look_at_run(self) -> None:
        """Find what is left to do of the run that is there, if any."""
        old = self._former.config()
        if old is None:
            return
        self._find_checkpoint()
        if self._former.summary() and not self.manifest:
            key, (was, is_now) = next(iter(asks_for_more(old, self._config).items()))
            raise InputError(
                f"{key}: got {is_now!r}, expected {was!r} as in the complete run in "
                f"{self.path}, which has no checkpoint to go on from; {ANOTHER}"
            )
        if not self.manifest:
            self.warn(f"the unfinished run in {self.path} is replaced: it has no checkpoint to go on from")

    def _find_checkpoint(self) -> None:
        """Take the newest sound checkpoint; damaged ones are named and left out.

        Raises:
            InputError: it is further than this configuration asks for.
        """
        for folder in complete_folders(self._checkpoints):
            try:
                manifest = read_manifest(folder)
                manifest.check()
                kept = read_beginning(self._metrics.path, manifest.metrics)
            except Damaged as error:
                self.warn(f"{error}: this checkpoint is left out")
                continue
            self.manifest = manifest
            self._before = decoded(kept)
            self._older = encoded(self._before) != kept
            least = manifest.rounds if is_scored(self.rounds[-1]) else manifest.rounds + 1
            if self._config["rounds"] < least:
                raise InputError(
                    f"rounds: got {self._config['rounds']}, expected {least} or more, as the run in "
                    f"{self.path} goes on from round {manifest.rounds}; {ANOTHER}"
                )
            return

    def _write(self, name: str, text: str) -> None:
        write_durably(self.path / name, text.encode())

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self._config["output"], self.path)


def checkpoints_folder(config: Config) -> Path:
    """Where all ranks write their parts."""
    return Path(config.output) / config.name / "checkpoints"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
