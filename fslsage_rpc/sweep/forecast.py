"""`fslsage sweep --dry-run`: the runs of a sweep, with their bytes and hours. Predicted, not measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fslsage_rpc.algorithms.bound import NO_LINK
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.calibration import Calibration, calibrate_here, unlike_work
from fslsage_rpc.plan.prediction import predict
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.sweep.sweep_screen import pace_of, spelled
from fslsage_rpc.sweep.watched_run import WatchedRun, most_rounds
from fslsage_rpc.units import GIB

HEADERS = ("run", "rounds", "paper GiB (modelled)", "wire GiB", "takes about")
TIMED = "*"
"""beside a time that follows from rounds of the variant that have been timed"""


class Forecast(NamedTuple):
    """A whole run: its rounds at most, bytes of the paper ledger and on the wire, and seconds of training."""

    rounds: int
    paper_bytes: float
    wire_bytes: float
    seconds: float


class Forecaster:
    """Predicts runs from costs that are measured here, once for all variants that do the same work.

    Args:
        jobs: runs side by side.
    """

    def __init__(self, jobs: int):
        self._cores = max(1, len(usable_cores()) // jobs)
        self._measured: list[tuple[Config, Calibration]] = []

    def __call__(self, config: Config) -> Forecast | str:
        """The forecast of a run, by the lower bound of its rounds on this machine; or why there is none."""
        alone = config.transport == "local"  # one thread of the program does all of it
        client_ranks = 1 if alone else config.ranks - 1
        threads = 1 if alone else max(1, self._cores // config.ranks)
        try:
            calibration = self._calibration(config, threads)
            costs = calibration.costs[config.algorithm.name]
            if isinstance(costs, str):
                return costs
            place = Scenario(config, NO_LINK, client_ranks, 1 if alone else self._cores / threads)
            found = predict(place, costs, calibration.server_workers)
        except InputError as error:
            return str(error)
        if isinstance(found, str):
            return found
        rounds = most_rounds(config, found.paper_bytes)
        each = (found.paper_bytes, found.wire_bytes, found.round_seconds)
        return Forecast(rounds, *(rounds * value for value in each))

    def _calibration(self, config: Config, threads: int) -> Calibration:
        """The costs of what this configuration computes."""
        name = config.algorithm.name
        for measured, calibration in self._measured:
            if measured.algorithm.name == name and not unlike_work(measured, config):
                return calibration
        with _computing_with(threads):
            calibration = calibrate_here(config, [name])
        self._measured.append((config, calibration))
        return calibration


@contextmanager
def _computing_with(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show_forecast(runs: Sequence[WatchedRun], jobs: int, console: Console) -> None:
    """Print the runs of a sweep, complete ones too, and what is left of it."""
    console.print("Measures what rounds cost on this machine ...", soft_wrap=True)
    forecaster, pace = Forecaster(jobs), pace_of(runs)
    found = {
        variant: forecaster(config) for variant, config in {r.run.variant: r.run.config for r in runs}.items()
    }
    table = Table(title="PREDICTED runs", box=box.SIMPLE_HEAD)
    for header in HEADERS:
        table.add_column(header, justify="left" if header == "run" else "right", no_wrap=header == "run")
    left = 0.0
    for run in runs:
        forecast, each = found[run.run.variant], pace.get(run.run.variant)
        rounds, sizes, mark = run.run.config.rounds, ["unknown"] * 2, ""
        if isinstance(forecast, Forecast):
            rounds = forecast.rounds
            sizes = [f"{size / GIB:,.3f}" for size in (forecast.paper_bytes, forecast.wire_bytes)]
        if each is not None:
            mark = TIMED
        elif isinstance(forecast, Forecast):
            each = forecast.seconds / rounds
        if run.summary:
            table.add_row(run.name, str(run.progress.rounds), *sizes, "complete")
            continue
        takes = "unknown" if each is None else f"{spelled(rounds * each)}{mark}"
        table.add_row(run.name, str(rounds), *sizes, takes)
        left += (each or 0.0) * max(0, rounds - run.progress.rounds)
    console.print(table)
    todo = sum(run.summary is None for run in runs)
    side = f", {jobs} side by side" if jobs > 1 else ""
    takes = f": about {spelled(left / min(jobs, todo))} on this machine, over loopback" if todo else ""
    notes = [
        f"{todo} of {len(runs)} runs are left{side}{takes}.",
        "Seconds are the lower bound of training, without evaluation and the start of each run;",
        f"{TIMED} by rounds of the variant that have been timed, evaluation included.",
        "Bytes are for clients of equal size.",
        *(f"{name}: unknown, as {why}" for name, why in found.items() if isinstance(why, str)),
    ]
    console.print("\n".join(notes), soft_wrap=True, markup=False)
