"""How algorithms are named, coloured and marked, in all tables and figures alike.

An algorithm has the same colour in all figures, wherever colours of algorithms tell curves apart.
"""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

ALGORITHMS = {
    "fsl_sage": ("FSL-SAGE", "#0072B2"),
    "cse_fsl": ("CSE-FSL", "#009E73"),
    "splitfed_v1": ("SplitFedV1", "#D55E00"),
    "splitfed_v2": ("SplitFedV2", "#E69F00"),
    "fedavg": ("FedAvg", "#CC79A7"),
}
"""names, and colours that colour-blind readers can tell apart (Okabe and Ito)"""
OWN_COLORS = ("#666666", "#56B4E9", "#000000")
"""for algorithms that are not among these, the user's own: by name, so that two may share one"""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
"""of curves that algorithms do not tell apart: those of Okabe and Ito but for yellow, faint on white"""
STYLES = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


@dataclass(frozen=True)
class Look:
    """How a curve is drawn."""

    color: str
    style: Any = "-"
    marker: str | None = None


def display_name(algorithm: str) -> str:
    """The algorithm as its paper writes it, or the user's own as the configuration names it."""
    return ALGORITHMS.get(algorithm, (algorithm, ""))[0]


def color_of(algorithm: str) -> str:
    """Its colour; one of the user's own always has the same, too."""
    own = OWN_COLORS[_number(algorithm) % len(OWN_COLORS)]
    return ALGORITHMS.get(algorithm, ("", own))[1]


def rank_of(algorithm: str) -> tuple[int, str]:
    """Its place among all algorithms, those of the user's own last, by name."""
    return _place(algorithm), algorithm


def _place(algorithm: str) -> int:
    names = list(ALGORITHMS)
    return names.index(algorithm) if algorithm in names else len(names)


def _number(name: str) -> int:
    """A number that follows from a name, the same in every process."""
    return zlib.crc32(name.encode())


def look_of(algorithm: str) -> Look:
    """The colour of an algorithm, and its marker."""
    own = 0 if algorithm in ALGORITHMS else _number(algorithm) // len(OWN_COLORS)
    return Look(color_of(algorithm), marker=MARKERS[(_place(algorithm) + own) % len(MARKERS)])


def looks_of(algorithms: Sequence[str]) -> list[Look]:
    """Looks for one curve of each of these: those of the algorithms, where no two share a colour.

    Else each curve has a look of its own: another colour, and with the colours used up another line style.
    """
    if len({color_of(algorithm) for algorithm in algorithms}) == len(algorithms):
        return [look_of(algorithm) for algorithm in algorithms]
    return [
        Look(
            COLORS[number % len(COLORS)],
            STYLES[number // len(COLORS) % len(STYLES)],
            MARKERS[number % len(MARKERS)],
        )
        for number in range(len(algorithms))
    ]


def looks_side_by_side(algorithms: Sequence[str]) -> list[Look]:
    """Looks for figures that stand side by side, and for print without colour.

    The first curve of an algorithm has its colour in each figure. Others have the colours that are left, and
    neighbours have different line styles.
    """
    looks: dict[int, Look] = {}
    for number, algorithm in enumerate(algorithms):
        if color_of(algorithm) not in {look.color for look in looks.values()}:
            looks[number] = look_of(algorithm)
    used = {look.color for look in looks.values()} | {look.marker for look in looks.values()}
    colors = itertools.cycle([color for color in COLORS if color not in used] or COLORS)
    markers = itertools.cycle([marker for marker in MARKERS if marker not in used] or MARKERS)
    for number in range(len(algorithms)):
        if number not in looks:
            looks[number] = Look(next(colors), marker=next(markers))
    return [replace(looks[number], style=STYLES[number % len(STYLES)]) for number in range(len(algorithms))]
