"""`fslsage plan`: what rounds would take over other links and with more clients. Predicted, not measured."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich import box
from rich.table import Table

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.data.partitions import divided
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.calibration import Calibration, calibrate_here, read_calibration
from fslsage_rpc.plan.prediction import Prediction, predict
from fslsage_rpc.plan.scenario import Scenario, with_algorithm
from fslsage_rpc.runs.screen import SteadyCursorConsole
from fslsage_rpc.tasks import open_task
from fslsage_rpc.units import MIB

BYTES_PER_SECOND = {"kbit": 125.0, "mbit": 125e3, "gbit": 125e6}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
HEADERS = ("algorithm", "clients", "seconds", "wire MiB", "paper-ledger MiB")


def plan(
    config: Config,
    clients: Sequence[int],
    bandwidth: str | None,
    rtt: str | None,
    client_ranks: int | None,
    shared_cores: int | None,
    calibration: str | None,
) -> None:
    """Print the predicted seconds and bytes of a round, for each algorithm and number of clients.

    Args:
        bandwidth: of each client rank's link, both ways, as tc writes it: 100mbit.
        rtt: its round trip, as 20ms.
        client_ranks: ranks that host the clients; None for one rank per client.
        shared_cores: of the one machine that all ranks are on; None where each has a machine of its own.
        calibration: folder of a benchmark; None measures costs on this machine, in one process.

    Raises:
        InputError: a value is not one of these, or there is nothing to know the links from.
    """
    if calibration is None and (bandwidth is None or rtt is None):
        got = "none" if bandwidth is rtt else "one"
        raise InputError(f"--bandwidth, --rtt: got {got}, expected both, or --calibrate with a benchmark")
    samples = divided(config.data, open_task(config).train_samples)
    if max(clients) > samples:
        raise InputError(f"--clients: got {max(clients)}, expected at most {samples}, the training samples")
    if calibration is None:
        measured = calibrate_here(config, dict.fromkeys([*ALGORITHMS, config.algorithm.name]))
    else:
        measured = read_calibration(Path(calibration), config)
    link = link_speed(measured.link, bandwidth, rtt)
    by_count = {}
    for count in clients:
        ranks, cores = min(client_ranks or count, count), shared_cores or math.inf
        place = partial(Scenario, link=link, client_ranks=ranks, shared_cores=cores)
        counted = from_tree(to_tree(config), [f"clients.count={count}"])
        by_count[count] = predictions(counted, measured, place)
    table = Table(title="PREDICTED rounds (nothing here was measured)", box=box.SIMPLE_HEAD)
    for header in HEADERS:
        table.add_column(header, justify="left" if header == "algorithm" else "right", overflow="fold")
    unknown: dict[str, str] = {}
    for name in sorted(measured.costs, key=[*ALGORITHMS, *measured.costs].index):
        for count in clients:
            found = by_count[count][name]
            if isinstance(found, str):
                unknown[name] = found
                table.add_row(name, str(count), *["unknown"] * 3)
                continue
            sizes = [f"{size / MIB:,.2f}" for size in (found.wire_bytes, found.paper_bytes)]
            table.add_row(name, str(count), f"{found.round_seconds:.3f}", *sizes)
    console = SteadyCursorConsole(highlight=False)
    console.print(table)
    rates = [rate * 8 / 1e6 for rate in (link.up_bytes_per_second, link.down_bytes_per_second)]
    up, down = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates)
    over = f" over the efficiency of {calibration}" if calibration else ""
    notes = [
        f"Predicted for links of {up} mbit up, {down} mbit down and {1000 * link.round_trip_seconds:g} ms "
        f"round trip, from costs measured on {calibration or 'this machine, in one process'}; for clients of "
        "equal size and server.order: round_robin.",
        f"Seconds are the lower bound of a round{over}; no such round was measured.",
        *([f"warning: {calibration} was measured on a busy host"] if measured.busy else []),
        *(f"{name}: unknown, as {why}" for name, why in unknown.items()),
    ]
    console.print("\n".join(notes), soft_wrap=True, markup=False)


def predictions(
    config: Config, measured: Calibration, place: Callable[[Config], Scenario]
) -> Mapping[str, Prediction | str]:
    """A round of each algorithm in a place where the configuration is run, or why it is unknown."""
    return {
        name: costs
        if isinstance(costs, str)
        else predict(place(with_algorithm(config, name)), costs, measured.server_workers)
        for name, costs in measured.costs.items()
    }


def link_speed(measured: LinkSpeed, bandwidth: str | None, rtt: str | None) -> LinkSpeed:
    """The measured link, with what is asked for in its place.

    Raises:
        InputError: not a rate or a time.
    """
    if bandwidth is not None:
        rate = _quantity("--bandwidth", bandwidth, BYTES_PER_SECOND, "100mbit")
        measured = replace(measured, up_bytes_per_second=rate, down_bytes_per_second=rate)
    if rtt is not None:
        measured = replace(measured, round_trip_seconds=_quantity("--rtt", rtt, SECONDS, "20ms"))
    return measured


def _quantity(option: str, text: str, units: Mapping[str, float], example: str) -> float:
    parts = re.fullmatch(r"([0-9]+[.]?[0-9]*|[.][0-9]+)([a-z]+)", text)
    value = float(parts[1]) * units.get(parts[2], 0.0) if parts else 0.0
    if value <= 0:
        raise InputError(f"{option}: got {text!r}, expected a number with {', '.join(units)}, as {example}")
    return value
