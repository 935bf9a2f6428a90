"""How algorithms are named, coloured and marked, in all tables and figures alike.

An algorithm has the same colour in all figures, wherever colours of algorithms tell curves apart.
"""

import zlib
from collections.abc import Container, Sequence
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

    The first curve of an algorithm has its colour and marker in each figure. Others have those that are left
    first, and neighbours have different line styles.
    """
    looks: dict[int, Look] = {}
    for number, algorithm in enumerate(algorithms):
        if color_of(algorithm) not in {look.color for look in looks.values()}:
            looks[number] = _styled(look_of(algorithm), number)
    colors = _unused_first(COLORS, {look.color for look in looks.values()})
    markers = _unused_first(MARKERS, {look.marker for look in looks.values()})
    others = [number for number in range(len(algorithms)) if number not in looks]
    for place, number in enumerate(others):
        look = _styled(Look(_turn(colors, place)[0], marker=_turn(markers, place)[0]), number)
        # A colour comes back in another line style, as long as there is one.
        taken = {(other.color, other.style) for other in looks.values()}
        free = [color for color in _turn(colors, place) if (color, look.style) not in taken]
        looks[number] = replace(look, color=free[0]) if free else look
    return [looks[number] for number in range(len(algorithms))]


def _styled(look: Look, number: int) -> Look:
    return replace(look, style=STYLES[number % len(STYLES)])


def _unused_first(choice: Sequence[str], used: Container[str | None]) -> list[str]:
    return sorted(choice, key=lambda one: one in used)


def _turn(choice: list[str], place: int) -> list[str]:
    """All of a choice, beginning at a place."""
    start = place % len(choice)
    return choice[start:] + choice[:start]
