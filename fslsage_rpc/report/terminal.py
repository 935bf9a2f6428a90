"""A sweep in a terminal: how far it is, and its tables, in as many blocks as they need."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from fslsage_rpc.report.page import Table
from fslsage_rpc.report.sweep_tables import READING_DIFFERENCES, differences_table, reading, results_table
from fslsage_rpc.report.sweeps import SavedSweep, read_sweep
from fslsage_rpc.runs.screen import SteadyCursorConsole

GET_MATPLOTLIB = "pip install 'fslsage_rpc[plots]'"
BESIDE = 3
"""letters between two columns"""
HEADER = 12
"""letters in a line of a header, at least, where the words are as short"""


def report_sweep(folder: str | Path, out: str | None = None, formats: Sequence[str] = ()) -> None:
    """Print the tables of the sweep in a folder, and write its page and figures where there is matplotlib.

    Args:
        out, formats: see `write_sweep_report`.

    Raises:
        InputError: the folder is damaged, or `out` cannot be written to.
    """
    show_sweep(read_sweep(folder), SteadyCursorConsole(highlight=False))
    if not has_matplotlib():
        print(f"The page and its figures need matplotlib: {GET_MATPLOTLIB}")
        return
    from fslsage_rpc.report.sweep_page import write_sweep_report  # which imports matplotlib

    print(f"Report: {write_sweep_report(folder, out, formats)}", flush=True)


def has_matplotlib() -> bool:
    """Can it be imported?"""
    try:
        import matplotlib  # noqa: F401  # only to see whether the extra is there
    except ImportError:
        return False
    return True


def show_sweep(sweep: SavedSweep, console: Console) -> None:
    """Print its tables, how to read them, and which of its runs are complete."""
    _show(f"{sweep.config.name}: over seeds", results_table(sweep), console)
    _say(reading(sweep), console)
    if differences := differences_table(sweep):
        _show("differences to the reference, paired by seed", differences, console)
        _say(READING_DIFFERENCES, console)
    _say(sweep.progress, console)


def _say(text: str, console: Console) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _show(title: str, table: Table, console: Console) -> None:
    """A table whose columns go on below, beside the names of its rows, where the terminal is too narrow."""
    columns = [
        _column(header, [row[number] for row in table.rows]) for number, header in enumerate(table.headers)
    ]
    for number, block in enumerate(_blocks(columns, console.width)):
        shown = RichTable(title="" if number else title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in block:
            label = column is columns[0]
            shown.add_column(column[0], justify="left" if label else "right", no_wrap=True, overflow="fold")
        for cells in zip(*(column[1:] for column in block), strict=True):
            shown.add_row(*cells)
        console.print(shown)


def _column(header: str, cells: Sequence[str]) -> list[str]:
    """The header, in lines about as wide as the cells or its longest word, and the cells."""
    width = max(HEADER, *map(len, header.split()), *map(len, cells))
    return [textwrap.fill(header, width), *cells]


def _blocks(columns: Sequence[list[str]], room: int) -> Iterator[list[list[str]]]:
    """The first column beside as many of the others as there is room for, until all have had their place."""
    widths = [max(len(line) for cell in column for line in cell.split("\n")) + BESIDE for column in columns]
    rest = list(range(1, len(columns)))
    while rest:
        block, used = [0], widths[0] + 1
        while rest and (len(block) == 1 or used + widths[rest[0]] <= room):
            used += widths[rest[0]]
            block.append(rest.pop(0))
        yield [columns[number] for number in block]
