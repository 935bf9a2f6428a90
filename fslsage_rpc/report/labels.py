"""Labels of runs that fit a legend: cut where they are too long, and never two alike."""

from collections.abc import Sequence

LETTERS = 40
"""of a label, at most"""
FEWEST_LETTERS = 10
"""of a name, however long its ending is"""


def fitted(names: Sequence[str], endings: Sequence[str]) -> list[str]:
    """The names, so short that each has at most 40 letters with its ending.

    Long ones lose their middle, or else another part, so that those that differ still do.
    Where no one place does for all, they are numbered.
    """
    names = [_in_one_line(name) for name in names]
    rooms = [max(FEWEST_LETTERS, LETTERS - len(ending)) for ending in endings]
    whole = set(zip(names, endings, strict=True))
    for shift in sorted(range(-LETTERS // 2, LETTERS // 2), key=abs):
        cut = [_cut(name, room, room // 2 + shift) for name, room in zip(names, rooms, strict=True)]
        if len(set(zip(cut, endings, strict=True))) == len(whole):
            return cut
    return [
        _cut(f"{number}: {name}", room, room)
        for number, (name, room) in enumerate(zip(names, rooms, strict=True), start=1)
    ]


def _cut(name: str, room: int, head: int) -> str:
    """A name of at most `room` letters: its first `head` ones, an ellipsis, and its last ones."""
    if len(name) <= room:
        return name
    head = min(max(head, 0), room - 1)
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"


def _in_one_line(name: str) -> str:
    """The name with its blanks as spaces, and with a question mark for what is not UTF-8."""
    return " ".join(name.encode(errors="replace").decode().split())
