"""`fslsage plan`: what rounds would take over other links and with more clients. Predicted, not measured."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.table import Table

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.config.schema import Config
from fslsage_rpc.data.partitions import divided
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.calibration import Calibration, read_calibration
from fslsage_rpc.plan.here import adapted, calibrate_here, fits_apart
from fslsage_rpc.plan.prediction import Prediction, predict
from fslsage_rpc.plan.scenario import Scenario, with_algorithm
from fslsage_rpc.runs.screen import SteadyCursorConsole
from fslsage_rpc.tasks import open_task

MIB = 2**20
NOT_MEASURED = "it makes requests of a kind that was not measured"
BIT_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
OFF = 0.85, 1.35
"""the least and the most that measured seconds came to, of predicted ones, in docs/results/plan.md"""
OFF_OVER_OTHER_LINKS = 0.85, 1.55
"""likewise over other links than the calibration's"""
SECOND_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


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
        bandwidth: of each client rank's link, both ways, as tc writes it (100mbit).
        rtt: its round trip (20ms).
        client_ranks: ranks that host the clients; None for one rank per client.
        shared_cores: of the one machine that all ranks are on; None where each has a machine of its own.
        calibration: folder of a benchmark; None measures costs on this machine, in one process.

    Raises:
        InputError: a value is not one of these, or there is nothing to know the links from.
    """
    if calibration is None:
        if bandwidth is None or rtt is None:
            got = "none" if bandwidth is rtt else "one"
            raise InputError(f"--bandwidth, --rtt: got {got}, expected both, or --calibrate with a benchmark")
        names = dict.fromkeys([*ALGORITHMS, config.algorithm.name])
        measured = fits_apart(calibrate_here(config, names), config)
    else:
        measured = adapted(read_calibration(Path(calibration), config), config)
    samples = divided(config.data, open_task(config).train_samples)
    if max(clients) > samples:
        raise InputError(f"--clients: got {max(clients)}, expected at most {samples}, the training samples")
    link = link_speed(measured.link, bandwidth, rtt)
    cores = shared_cores or math.inf
    by_count = {
        count: predictions(config, measured, link, count, min(client_ranks or count, count), cores)
        for count in clients
    }
    rows = [
        (name, count, by_count[count].get(name))
        for name in dict.fromkeys([*ALGORITHMS, *measured.costs, *measured.left_out])
        if name in measured.costs or name in measured.left_out
        for count in clients
    ]
    off = OFF if link == measured.link else OFF_OVER_OTHER_LINKS
    _show(rows, off, link, calibration or "this machine, in one process")
    if measured.busy:
        print(f"warning: {calibration} was measured on a busy host")
    for name in dict.fromkeys(name for name, _, predicted in rows if predicted is None):
        print(f"{name}: unknown, as {measured.left_out.get(name, NOT_MEASURED)}")


def predictions(
    config: Config,
    measured: Calibration,
    link: LinkSpeed,
    clients: int,
    client_ranks: int,
    shared_cores: float = math.inf,
) -> dict[str, Prediction | None]:
    """What rounds of each algorithm that has costs would take; None where they do not tell."""
    found = {}
    for name, costs in measured.costs.items():
        planned = with_algorithm(config, name, [f"clients.count={clients}"])
        scenario = Scenario(planned, link, client_ranks, shared_cores)
        found[name] = predict(scenario, costs, measured.server_workers)
    return found


def link_speed(measured: LinkSpeed, bandwidth: str | None, rtt: str | None) -> LinkSpeed:
    """The measured link, with what is asked for in its place.

    Raises:
        InputError: not a rate or a time.
    """
    if bandwidth is not None:
        rate = _quantity("--bandwidth", bandwidth, BIT_UNITS, "100mbit") / 8
        measured = replace(measured, up_bytes_per_second=rate, down_bytes_per_second=rate)
    if rtt is not None:
        measured = replace(measured, round_trip_seconds=_quantity("--rtt", rtt, SECOND_UNITS, "20ms"))
    return measured


def _quantity(option: str, text: str, units: dict[str, float], example: str) -> float:
    parts = re.fullmatch(r"([0-9.]+)([a-z]+)", text)
    try:
        value = float(parts[1]) * units[parts[2]] if parts else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if value <= 0:
        raise InputError(f"{option}: got {text!r}, expected a number with {', '.join(units)}, as {example}")
    return value


def _show(
    rows: Sequence[tuple[str, int, Prediction | None]],
    off: tuple[float, float],
    link: LinkSpeed,
    calibration: str,
) -> None:
    table = Table(title="PREDICTED rounds (nothing here was measured)", box=box.SIMPLE_HEAD)
    for header in ("algorithm", "clients", "seconds", "from", "to", "wire MiB", "paper-ledger MiB"):
        table.add_column(header, justify="left" if header == "algorithm" else "right", overflow="fold")
    for name, count, predicted in rows:
        if predicted is None:
            table.add_row(name, str(count), "unknown", "", "", "unknown", "unknown")
            continue
        table.add_row(
            name,
            str(count),
            *(f"{predicted.round_seconds * factor:.3f}" for factor in (1, *off)),
            f"{predicted.wire_bytes / MIB:,.2f}",
            f"{predicted.paper_bytes / MIB:,.2f}",
        )
    console = SteadyCursorConsole(highlight=False)
    console.print(table)
    rates = [rate * 8 / 1e6 for rate in (link.up_bytes_per_second, link.down_bytes_per_second)]
    up, down = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates)
    console.print(
        f"Predicted for links of {up} mbit up, {down} mbit down and "
        f"{1000 * link.round_trip_seconds:g} ms round trip, from costs measured on {calibration}; "
        "for clients of equal size and server.order: round_robin. From, to: as far as measured seconds were "
        "off such predictions so far, on one machine.",
        soft_wrap=True,
        markup=False,
    )
