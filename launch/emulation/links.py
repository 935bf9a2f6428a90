"""What is asked of the clients' links: units as tc writes them, the command line, the per-client file."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fslsage_rpc.config.yaml_files import read_yaml
from fslsage_rpc.errors import InputError

MAX_CLIENTS = 250
"""each has a subnet of its own, 10.77.RANK.0/24"""


@dataclass(frozen=True)
class Units:
    """The units of one kind of quantity, and what it may be."""

    factors: Mapping[str, float]
    smallest: float
    largest: float
    expected: str


RATE = Units(
    factors={"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9},
    smallest=1e5,
    largest=1e11,
    expected="a rate from 100kbit to 100gbit, such as 20mbit",
)
TIME = Units(
    factors={"us": 1e-6, "ms": 1e-3, "s": 1.0},
    smallest=1e-4,
    largest=10.0,
    expected="a time from 100us to 10s, such as 40ms",
)


@dataclass(frozen=True)
class Link:
    """The link between one client rank and the router; None where it is left as it is."""

    up_bits_per_second: float | None = None
    down_bits_per_second: float | None = None
    round_trip_seconds: float | None = None
    """between the client and the server, half of it in each direction"""


FIELDS = {
    "up": ("up_bits_per_second", RATE),
    "down": ("down_bits_per_second", RATE),
    "rtt": ("round_trip_seconds", TIME),
}
"""what users call the fields of a link"""


def quantity(where: str, given: Any, units: Units) -> float:
    """The number behind `20mbit` or `40ms`, in bit/s or seconds.

    Raises:
        InputError: it is none, and `where` names the option.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", given.lower()) if isinstance(given, str) else None
    value = float(parts[1]) * units.factors.get(parts[2], 0.0) if parts else 0.0
    if not units.smallest <= value <= units.largest:
        raise InputError(f"{where}: got {given!r}, expected {units.expected}")
    return value


def count_clients(given: str) -> int:
    """The number of client ranks.

    Raises:
        InputError: it is none.
    """
    if not re.fullmatch(r"\d{1,3}", given) or not 1 <= int(given) <= MAX_CLIENTS:
        raise InputError(f"--clients: got {given!r}, expected a number of client ranks, 1 to {MAX_CLIENTS}")
    return int(given)


def common_link(up: str | None, down: str | None, rtt: str | None) -> Link:
    """The link that the command line gives to all clients.

    Raises:
        InputError: a value is not allowed.
    """
    given = {"up": up, "down": down, "rtt": rtt}
    values = {
        FIELDS[name][0]: quantity(f"--{name}", text, FIELDS[name][1])
        for name, text in given.items()
        if text is not None
    }
    return Link(**values)


def read_links(common: Link, clients: int, file: str | None) -> dict[int, Link]:
    """The link of every client rank: the common one, with the file's values over it.

    Raises:
        InputError: the file cannot be read, or names a rank, key or value that is not allowed.
    """
    links = dict.fromkeys(range(1, clients + 1), common)
    if file is None:
        return links
    try:
        tree = read_yaml(Path(file))
    except InputError as error:
        raise InputError(f"--per-client: {error}") from None
    for rank, values in tree.items():
        if not isinstance(rank, int) or rank not in links:
            raise InputError(f"--per-client: {file}: got {rank!r}, expected a client rank, 1 to {clients}")
        links[rank] = _with_values(links[rank], values, f"--per-client: {file}: {rank}")
    return links


def _with_values(link: Link, values: Any, where: str) -> Link:
    if not isinstance(values, dict):
        raise InputError(f"{where}: got {values!r}, expected a mapping such as {{up: 5mbit, rtt: 100ms}}")
    for name, given in values.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1)
            known = f"did you mean {near[0]}?" if near else f"expected {', '.join(FIELDS)}"
            raise InputError(f"{where}.{name}: unknown key; {known}")
        field, units = FIELDS[name]
        value = None if given is None else quantity(f"{where}.{name}", given, units)
        link = replace(link, **{field: value})
    return link


def read_stragglers(given: list[str], clients: int) -> dict[int, float]:
    """The speed of each slowed client rank, as a share of its full speed, from texts such as `2:0.25`.

    Raises:
        InputError: a text is none of these, or a rank is named twice.
    """
    speeds: dict[int, float] = {}
    for text in given:
        parts = re.fullmatch(r"(\d{1,3}):(\d*\.?\d+)", text)
        rank, speed = (int(parts[1]), float(parts[2])) if parts else (0, 0.0)
        if not 1 <= rank <= clients or not 0.01 <= speed <= 1.0:
            raise InputError(
                f"--straggler: got {text!r}, expected a client rank (1 to {clients}) and its share of full "
                "speed (0.01 to 1), such as 1:0.25"
            )
        if rank in speeds:
            raise InputError(f"--straggler: got {text!r}, where rank {rank} has {speeds[rank]:g} already")
        speeds[rank] = speed
    return speeds
