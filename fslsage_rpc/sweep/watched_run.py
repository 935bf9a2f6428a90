"""One run of a sweep as it is seen from outside: its process, and what its folder says so far."""

import json
import math
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fslsage_rpc.config.loading import to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import SweepRun
from fslsage_rpc.config.yaml_files import to_yaml
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.stopping import STOPPED
from fslsage_rpc.runs.folder_lock import FolderLock
from fslsage_rpc.runs.former_run import ANOTHER, FormerRun
from fslsage_rpc.runs.places import write_whole
from fslsage_rpc.units import GIB

LOG = "log.txt"
"""in a run folder: all that its process has printed"""
TRAIN = "train.yaml"
"""likewise: what its process is told to train, which a sweep that comes later does not change"""
PATIENCE_SECONDS = 10.0
"""for a process that is asked to end, where the sweep itself has failed"""
ENDED_BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""statuses of processes that were not ready to obey yet"""


@dataclass
class RoundsSoFar:
    """Rounds so far: their number, seconds with evaluation, paper-ledger bytes, and the newest accuracy."""

    rounds: int = 0
    seconds: float = 0.0
    paper_bytes: float = 0.0
    accuracy: float | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Take in a line of `metrics.jsonl`; one of an event, or a damaged one, changes nothing."""
        with suppress(LookupError, TypeError):
            seconds = float(line["round_seconds"] + line["evaluation_seconds"])
            rounds, paper_bytes = int(line["round"]), float(line["paper_bytes_total"])
            self.accuracy = self.accuracy if line["test_accuracy"] is None else float(line["test_accuracy"])
            self.rounds, self.paper_bytes = rounds, paper_bytes
            self.seconds += seconds


class WatchedRun:
    """A run of a sweep.

    Attributes:
        run: the run.
        progress: how far it is.
        summary: once it is complete.
        failure: the last line that it has printed, where its process has failed.
        stopped: has it ended on request, to be gone on with?

    Raises:
        InputError: its folder holds a run of another configuration, or one of more rounds.
    """

    def __init__(self, run: SweepRun):
        self.run = run
        self.failure: str | None = None
        self.stopped = False
        self._there = FormerRun(run.config)
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False
        self._printed_before = 0
        self.progress, self._read = RoundsSoFar(), 0
        self.summary = self._there.finished_summary(as_measured=True)
        self.look()
        if run.config.resume == "auto" and self.progress.rounds > run.config.rounds:
            raise InputError(
                f"rounds: got {run.config.rounds}, expected {self.progress.rounds} or more, as the run in "
                f"{run.folder} has; {ANOTHER}"
            )

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.run.config.name

    @property
    def diverged(self) -> int | None:
        """The round in which it has ended by that."""
        return (self.summary or {}).get("diverged")

    @property
    def rounds_left(self) -> int:
        """Rounds that it has yet to train, where no accuracy ends it before."""
        if self.summary is not None:
            return 0
        done = self.progress
        each = done.paper_bytes / done.rounds if done.rounds else 0.0
        return max(0, most_rounds(self.run.config, each) - done.rounds)

    def look(self) -> None:
        """Read what `metrics.jsonl` has grown by."""
        try:
            with (self.run.folder / "metrics.jsonl").open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._read:  # it goes on from an earlier round
                    self.progress, self._read = RoundsSoFar(), 0
                file.seek(self._read)
                lines = file.read().rpartition(b"\n")[0]
        except OSError:
            return
        for line in lines.splitlines():
            with suppress(ValueError, RecursionError):
                self.progress.add(json.loads(line))
        self._read += len(lines) + 1 if lines else 0

    def start(self, launch: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start its process, in a session of its own: a terminal's Ctrl-C reaches it through the sweep.

        Args:
            launch: the program, and its first arguments; `train CONFIG` follows.

        Raises:
            OSError: the folder cannot be written to, or there is no such program.
        """
        folder = self.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / TRAIN, to_yaml(to_tree(self.run.config)))
        with (folder / LOG).open("ab") as log:
            self._printed_before = log.tell()
            self._process = subprocess.Popen(
                [*launch, "train", str(folder / TRAIN)],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Has its process ended? If so, how is known from now on."""
        assert self._process is not None
        status = self._process.poll()
        if status is None:
            return False
        self.look()
        summary = self._there.summary() or {}
        if status == 0 or (status == 1 and summary.get("diverged")):
            self.summary = summary or None
        self.stopped = status == STOPPED or (self._asked and status in ENDED_BY_SIGTERM)
        if self.summary is None and not self.stopped:
            self.failure = self._last_words() or f"its process has ended with status {status}"
        return True

    def ask_to_stop(self) -> None:
        """After the round under way, with a checkpoint; asked again, at once."""
        self._asked = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # nothing where it has ended

    def end(self) -> None:
        """Have its process ended, and be it by force."""
        if self._process is None:
            return
        for _ in range(2):
            self.ask_to_stop()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE_SECONDS)
                return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str | None:
        """The last line that its process has printed."""
        try:
            printed = (self.run.folder / LOG).read_bytes()[self._printed_before :]
        except OSError:
            return None
        lines = [line.strip() for line in printed.decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), None)


def most_rounds(config: Config, paper_bytes: float) -> int:
    """The rounds after which a run ends at the latest, with so many bytes of the paper ledger in each."""
    limit = config.stop.paper_gib
    if limit is None or not paper_bytes:
        return config.rounds
    return min(config.rounds, math.ceil(limit * GIB / paper_bytes))


def forget(run: SweepRun) -> None:
    """Have what a run folder holds be no run any more: it is to be trained anew.

    Raises:
        InputError: another process writes there.
        OSError: the folder cannot be written to.
    """
    if not run.folder.is_dir():
        return
    with FolderLock(run.folder):
        for name in ("summary.json", "config.yaml", "metrics.jsonl"):
            (run.folder / name).unlink(missing_ok=True)
