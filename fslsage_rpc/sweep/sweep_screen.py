"""A sweep while it runs: one progress bar for all runs, one for each that is running, and the time left."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import TaskID, TextColumn

from fslsage_rpc.runs.screen import ProgressScreen
from fslsage_rpc.sweep.watched_run import WatchedRun


class SweepScreen(ProgressScreen):
    """Shows one sweep.

    Args:
        runs: all that are to be trained, those that are complete too.
        jobs: so many are trained side by side.
    """

    def __init__(self, name: str, runs: Sequence[WatchedRun], jobs: int, console: Console | None = None):
        super().__init__(
            [TextColumn("{task.fields[said]}")], console, TextColumn("{task.fields[left]}", justify="right")
        )
        self._runs, self._jobs = runs, jobs
        self._ended = sum(run.summary is not None for run in runs)
        self._all = self._progress.add_task(name, total=None, said="rounds", left="")
        self._tasks: dict[str, TaskID] = {}
        if self._ended:
            self._print(f"{self._ended} of {len(runs)} runs are complete already")
        self.show([])

    def show(self, running: Sequence[WatchedRun]) -> None:
        """Take in how far the runs are."""
        done = sum(run.progress.rounds for run in self._runs)
        total = done + sum(run.rounds_left for run in self._runs)
        self._progress.update(self._all, completed=done, total=total, left=self._left())
        for name in {*self._tasks} - {run.name for run in running}:
            self._progress.remove_task(self._tasks.pop(name))
        for run in running:
            name = run.name
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(
                    name, total=run.run.config.rounds, said="", left=""
                )
            self._progress.update(self._tasks[name], completed=run.progress.rounds, said=_accuracy(run))

    def end_run(self, run: WatchedRun) -> None:
        """One line for a run that has ended."""
        if run.stopped:
            self._print(f"{run.name}  stopped after round {run.progress.rounds}, with a checkpoint")
            return
        self._ended += 1
        line = f"{self._ended}/{len(self._runs)}  {run.name}  "
        if run.failure:
            self._print(f"{line}failed: {run.failure}")
            return
        diverged = f"  diverged in round {run.diverged}" if run.diverged else ""
        left = self._left()
        self._print(
            f"{line}{_accuracy(run)}  {run.progress.rounds} rounds in {run.progress.seconds:.0f} s{diverged}"
            + (f"  {left}" if left else "")
        )

    def _left(self) -> str:
        seconds = seconds_left(self._runs, self._jobs)
        return "" if seconds is None else f"about {spelled(seconds)} left"

    def _print(self, line: str) -> None:
        self._progress.console.print(line, soft_wrap=True, markup=False)


def seconds_left(runs: Sequence[WatchedRun], jobs: int) -> float | None:
    """Seconds that the rounds to come should take, by those of the same variant so far, or else of all.

    Returns:
        None where nothing is left, or nothing is known.
    """
    left, pace = [run for run in runs if run.rounds_left and not run.failure], pace_of(runs)
    if not left or not pace:
        return None
    mean = sum(run.progress.seconds for run in runs) / sum(run.progress.rounds for run in runs)
    return sum(run.rounds_left * pace.get(run.run.variant, mean) for run in left) / min(jobs, len(left))


def pace_of(runs: Sequence[WatchedRun]) -> dict[str, float]:
    """Seconds of a round, evaluation included, by variant; without those of which no round was timed."""
    rounds: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for run in runs:
        rounds[run.run.variant] = rounds.get(run.run.variant, 0) + run.progress.rounds
        seconds[run.run.variant] = seconds.get(run.run.variant, 0.0) + run.progress.seconds
    return {name: seconds[name] / rounds[name] for name in rounds if rounds[name]}


def spelled(seconds: float) -> str:
    """A duration, to about a twentieth."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds > 20 * 3600 else f"{seconds / 3600:.1f} h"


def _accuracy(run: WatchedRun) -> str:
    return "" if run.progress.accuracy is None else f"accuracy {run.progress.accuracy:.3f}"
