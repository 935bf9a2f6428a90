"""`fslsage sweep`: every variant of a configuration with every seed, each a run of its own, resumable."""

import os
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from fslsage_rpc.config.loading import to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import SweepRun, sweep_runs
from fslsage_rpc.config.yaml_files import to_yaml
from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.device.placement import gpu_count
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.stopping import STOPPED, answering_signals
from fslsage_rpc.report.sweeps import read_sweep
from fslsage_rpc.report.terminal import report_sweep
from fslsage_rpc.runs.places import check_place, write_whole, writing
from fslsage_rpc.runs.run_folder import SWEEP
from fslsage_rpc.runs.screen import SteadyCursorConsole
from fslsage_rpc.sweep.forecast import show_forecast
from fslsage_rpc.sweep.sweep_screen import SweepScreen
from fslsage_rpc.sweep.watched_run import LOG, WatchedRun, forget
from fslsage_rpc.training.experiment import check

POLL_SECONDS = 0.2


def forecast(config: Config, only: str | None, jobs: int) -> None:
    """Print the runs with what they should take.

    Raises:
        InputError: a run cannot be here.
    """
    Slots(config, jobs)
    show_forecast(
        [WatchedRun(run) for run in selected(config, only)], jobs, SteadyCursorConsole(highlight=False)
    )


def sweep(config: Config, only: str | None, jobs: int, launch: str | None) -> int:
    """Train all runs that are not complete, then compare all that are.

    Returns:
        The exit status: see `RunQueue.train`.

    Raises:
        InputError: a run cannot be here; found before any begins.
    """
    asked_for = selected(config, only, launch)
    anew, config = config.resume == "never", replace(config, resume="auto")
    replaced = {run.folder for run in asked_for} if anew else set()
    for run in sweep_runs(config):
        if run.folder not in replaced:
            WatchedRun(run)  # refuses a run of other settings
    queue = RunQueue(config, jobs, launch)
    folder = open_sweep(config)
    mine = [run._replace(config=replace(run.config, resume="auto")) for run in share(asked_for)]
    if anew:
        for run in mine:
            with writing(config.output, run.folder):
                forget(run)
    runs = [WatchedRun(run) for run in mine]
    status = queue.train(runs, SweepScreen(config.name, runs, jobs))
    for watched in runs:
        if watched.failure:
            log = watched.run.folder / LOG
            print(f"{watched.name} failed: {watched.failure} (all that it said: {log})", flush=True)
    if status == STOPPED:
        how = "The same command with resume=auto goes on." if anew else "The same command goes on."
        print(f"{read_sweep(folder).progress} {how}", flush=True)
    else:
        report_sweep(folder)
    return status


def selected(config: Config, only: str | None, launch: str | None = None) -> list[SweepRun]:
    """The runs that are asked for, held to what can run here.

    Args:
        only: a pattern as a shell's, for names of variants or of runs.

    Raises:
        InputError: a variant cannot run here, or no run is left.
    """
    runs = sweep_runs(config)
    if only is not None:
        runs = [run for run in runs if any(fnmatchcase(n, only) for n in (run.variant, run.config.name))]
        if not runs:
            known = ", ".join({run.variant: None for run in sweep_runs(config)})
            raise InputError(f"--only: got {only!r}, expected a pattern for some of {known}")
    seen: set[str] = set()
    for run in runs:
        if run.variant in seen:
            continue
        seen.add(run.variant)
        try:
            check(_checkable(run.config, launch), 1 if run.config.transport == "local" else run.config.ranks)
        except InputError as error:
            raise type(error)(f"sweep.variants.{run.variant}: {error}") from None
    return runs


def _checkable(config: Config, launch: str | None) -> Config:
    """The configuration without what depends on how ranks are started, if a launcher starts them."""
    return replace(config, clients=replace(config.clients, on_loss="fail")) if launch else config


def share(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Those runs that this job of a SLURM array is to train; all where it is none.

    Raises:
        InputError: the jobs' numbers do not follow each other.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return list(runs)
    number, first, count = (int(os.environ[f"SLURM_ARRAY_TASK_{key}"]) for key in ("ID", "MIN", "COUNT"))
    if not 0 <= number - first < count:
        raise InputError(f"--array: got a job {number} of {count} from {first} on, expected an array as 0-3")
    return list(runs[number - first :: count])


def open_sweep(config: Config) -> Path:
    """The folder of a sweep, with its configuration in it.

    Raises:
        InputError: it cannot be made, or holds something else.
    """
    folder = Path(config.output) / config.name
    with writing(config.output, folder):
        check_place(folder)
        for file, what in (("metrics.jsonl", "a training run"), ("bench.json", "a benchmark")):
            if (folder / file).exists():
                raise InputError(f"name: got {config.name!r}, where {folder} holds {what}; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / SWEEP, to_yaml(to_tree(config)))
    return folder


class Slots:
    """Places for processes side by side, each with its part of the GPUs, or else of the cores.

    Args:
        jobs: their number.

    Raises:
        InputError: there are not as many GPUs, or cores.
    """

    def __init__(self, config: Config, jobs: int):
        cores, gpus = len(usable_cores()), gpu_count(config.device)
        if jobs > (gpus or cores):
            what = "GPUs" if gpus else "cores"
            raise InputError(f"--jobs: got {jobs}, expected at most {gpus or cores}, the {what} here")
        self._jobs, self._cores, self._gpus = jobs, cores, gpus
        self.free = deque(range(jobs))

    def environment(self, slot: int, config: Config) -> dict[str, str]:
        """Variables of a run's process."""
        if self._jobs == 1:
            return {}
        ranks = 1 if config.transport == "local" else config.ranks
        found = {"OMP_NUM_THREADS": str(max(1, self._cores // (self._jobs * ranks)))}
        if "OMP_NUM_THREADS" in os.environ:
            found = {}
        if self._gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self._gpus)))
            found["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[slot :: self._jobs])
        return found


def _program(launch: str) -> list[str]:
    """The words of a program that is there.

    Raises:
        InputError: there is none.
    """
    try:
        words = shlex.split(launch)
    except ValueError:  # a quotation without end
        words = []
    if not words or shutil.which(words[0]) is None:
        raise InputError(f"--launch: got {launch!r}, expected a program that is there, as launch/local.sh")
    return words


class RunQueue:
    """Trains runs, some side by side.

    Args:
        config: of the sweep.
        launch: a program that starts a run, as `launch/local.sh`; None for this one.

    Raises:
        InputError: there are too many jobs, or there is no such program.
    """

    def __init__(self, config: Config, jobs: int, launch: str | None):
        self._slots = Slots(config, jobs)
        self._launch = _program(launch) if launch is not None else [sys.executable, "-m", "fslsage_rpc"]
        self._running: dict[int, WatchedRun] = {}
        self._asked = False

    def train(self, runs: Sequence[WatchedRun], screen: SweepScreen) -> int:
        """Train what is not complete, in this order.

        Returns:
            The exit status: 0; 75 if stopped on request; else 1 where a run has failed or diverged.
        """
        waiting = deque(run for run in runs if run.summary is None)
        with answering_signals(self._ask_to_stop), screen:
            try:
                while self._running or (waiting and not self._asked):
                    while waiting and self._slots.free and not self._asked:
                        self._start(waiting.popleft(), screen)
                    time.sleep(POLL_SECONDS)
                    for slot, run in list(self._running.items()):
                        run.look()
                        if run.ended():
                            del self._running[slot]
                            self._slots.free.append(slot)
                            screen.end_run(run)
                    screen.show([*self._running.values()])
            finally:
                for run in self._running.values():
                    run.end()
        if waiting or any(run.stopped for run in runs):
            return STOPPED
        return 1 if any(run.failure or run.diverged for run in runs) else 0

    def _start(self, run: WatchedRun, screen: SweepScreen) -> None:
        slot = self._slots.free.popleft()
        try:
            run.start(self._launch, self._slots.environment(slot, run.run.config))
        except OSError as error:
            run.failure = f"cannot be started ({error.strerror}: {error.filename})"
            self._slots.free.append(slot)
            screen.end_run(run)
            return
        self._running[slot] = run
        if self._asked:  # while it was started
            run.ask_to_stop()

    def _ask_to_stop(self, number: int) -> None:
        """Ask the runs, as this process is asked; no further one begins."""
        self._asked = True
        for run in self._running.values():
            run.ask_to_stop()
