"""One run of a sweep as it is seen from outside: its process, and what its folder says so far."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fslsage_rpc.config.variants import SweepRun
from fslsage_rpc.job.stopping import STOPPED
from fslsage_rpc.runs.former_run import FormerRun

LOG = "log.txt"
"""in a run folder: all that its process has printed"""
PATIENCE_SECONDS = 10.0
"""for a process that is asked to end, where the sweep itself has failed"""


class WatchedRun:
    """A run of a sweep.

    Attributes:
        run: the run.
        lines: its rounds so far, as `metrics.jsonl` has them.
        summary: once it is complete.
        failure: the last line that it has printed, where its process has failed.
        stopped: has it ended on request, after a checkpoint?

    Raises:
        InputError: its folder holds a run of another configuration.
    """

    def __init__(self, run: SweepRun):
        self.run = run
        self.failure: str | None = None
        self.stopped = False
        self._there = FormerRun(replace(run.config, resume="auto"))
        self._process: subprocess.Popen[bytes] | None = None
        self._printed_before = 0
        replaces = run.config.resume == "never"
        self._seen = self._extent() if replaces else None  # what is there is none of its own
        self.lines: list[dict[str, Any]] = []
        self.summary = FormerRun(run.config).finished_summary()
        self.look()

    @property
    def diverged(self) -> int | None:
        """The round in which it has ended by that."""
        return (self.summary or {}).get("diverged")

    @property
    def rounds_left(self) -> int:
        """Rounds that it has yet to train, where nothing ends it before."""
        return 0 if self.summary is not None else max(0, self.run.config.rounds - len(self.lines))

    @property
    def seconds(self) -> float:
        """Seconds that the rounds so far have taken, with their evaluation."""
        return float(sum(line["round_seconds"] + line["evaluation_seconds"] for line in self.lines))

    @property
    def accuracy(self) -> float | None:
        """The newest test accuracy."""
        scores = [line["test_accuracy"] for line in self.lines if line["test_accuracy"] is not None]
        return scores[-1] if scores else None

    def look(self) -> None:
        """Read the rounds again, if there are more."""
        if (seen := self._extent()) != self._seen:
            self._seen = seen
            self.lines = self._there.rounds() or self.lines  # none where a line is being written

    def _extent(self) -> tuple[int, int] | None:
        """By which `metrics.jsonl` is seen to change; None where there is none."""
        try:
            file = (self.run.folder / "metrics.jsonl").stat()
        except OSError:
            return None
        return file.st_mtime_ns, file.st_size

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start its process, in a session of its own: a terminal's Ctrl-C reaches it through the sweep.

        Raises:
            OSError: the folder cannot be written to, or there is no such program.
        """
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with (self.run.folder / LOG).open("ab") as log:
            self._printed_before = log.tell()
            self._process = subprocess.Popen(
                command,
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
        self.stopped = status == STOPPED
        if self.summary is None and not self.stopped:
            self.failure = self._last_words() or f"its process has ended with status {status}"
        return True

    def ask_to_stop(self) -> None:
        """After the round under way, with a checkpoint; asked again, at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # nothing where it has ended

    def end(self) -> None:
        """Have its process ended, however long that takes it: soon, where it obeys."""
        if self._process is None:
            return
        for _ in range(2):
            self.ask_to_stop()
            try:
                self._process.wait(PATIENCE_SECONDS)
                return
            except subprocess.TimeoutExpired:
                continue
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str | None:
        """The last line that its process has printed."""
        try:
            printed = (self.run.folder / LOG).read_bytes()[self._printed_before :]
        except OSError:
            return None
        lines = [line.strip() for line in printed.decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), None)
