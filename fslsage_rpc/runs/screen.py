"""What a run shows: a live progress bar on a terminal, one plain line per round elsewhere, and a table at the
end.
"""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.errors import ConsoleError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import Diverged
from fslsage_rpc.measure.host_load import BUSY
from fslsage_rpc.units import GIB, MIB

LARGE_CHECKPOINT_BYTES = 100 * MIB
TABLE_WIDTH = 78
NARROW = 64
"""columns of a terminal, below which the numbers of a row stand under its label"""


class SteadyCursorConsole(Console):
    """A console that never hides the cursor: a killed rank could not bring it back. That nobody reads any
    more is an error like others, for the caller to end on.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def show_cursor(self, show: bool = True) -> bool:
        return False


class ProgressScreen:
    """A progress bar where there is a terminal; a context that closes it.

    Args:
        columns: of the bar, between its description and the time remaining.
        time_left: the last column.
    """

    def __init__(
        self,
        columns: Sequence[ProgressColumn],
        console: Console | None = None,
        time_left: ProgressColumn | None = None,
    ):
        self._console = console or SteadyCursorConsole(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            time_left or TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Screen(ProgressScreen):
    """Shows one run."""

    def __init__(self, config: Config, console: Console | None = None):
        super().__init__([TextColumn("accuracy {task.fields[accuracy]}  {task.fields[bytes]}")], console)
        self._name = config.name
        self._rounds = config.rounds
        self._shown = 0
        self._wire_bytes = 0
        self._accuracy: float | None = None
        self._events: list[dict[str, Any]] = []
        self._task = self._progress.add_task(
            self._name, total=self._rounds, accuracy="   - ", bytes=_mib(0), start=True
        )

    def warn(self, message: str) -> None:
        """One line above the progress."""
        self._progress.console.print(f"warning: {message}", style="yellow", soft_wrap=True, markup=False)

    def show_resumed(self, lines: Sequence[dict[str, Any]], checkpoint: Path) -> None:
        """Take in the metrics lines of the rounds that this run goes on from."""
        self._progress.console.print(
            f"goes on from round {len(lines)} ({checkpoint})", soft_wrap=True, markup=False
        )
        self._go_to(lines)

    def show_checkpoint_size(self, written: int) -> None:
        """Say what the first checkpoint takes in bytes, where that is worth a line."""
        if written >= LARGE_CHECKPOINT_BYTES:
            size = f"{written / GIB:.1f} GiB" if written >= GIB else _mib(written)
            self._progress.console.print(f"the first checkpoint takes {size}", soft_wrap=True)

    def show_changes(
        self, lines: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], rounds: int
    ) -> None:
        """Ranks were lost or have joined, and the run goes on from so many rounds."""
        for event in events:
            if event["round"] == rounds + 1 and event not in self._events:
                self._events.append(event)
                clients = ", ".join(str(client) for client in event["clients"])
                lost = f"is lost ({event.get('reason')}): clients {clients} leave"
                what = lost if event["event"] == "loss" else f"has joined: clients {clients} are back"
                self.warn(f"rank {event['rank']} {what}; goes on from round {rounds}")
        self._go_to(lines)

    def _go_to(self, lines: Sequence[dict[str, Any]]) -> None:
        self._shown = len(lines)
        self._wire_bytes = sum(sum(line["wire_bytes"].values()) for line in lines)
        scored = [line["test_accuracy"] for line in lines if line["test_accuracy"] is not None]
        self._accuracy = scored[-1] if scored else None
        self._progress.update(self._task, completed=len(lines), **self._fields())

    def show_round(self, line: dict[str, Any]) -> None:
        """Take in a metrics line."""
        self._shown += 1
        self._wire_bytes += sum(line["wire_bytes"].values())
        if line["test_accuracy"] is not None or line.get("diverged"):
            self._accuracy = line["test_accuracy"]
        fields = self._fields()
        self._progress.update(self._task, advance=1, **fields)
        if not self._console.is_terminal:
            loss = "not finite" if line.get("diverged") else "-"  # a server may have had no upload
            if line["train_loss"] is not None:
                loss = f"{line['train_loss']:.4f}"
            print(
                f"round {line['round']}/{self._rounds}  accuracy {fields['accuracy']}  "
                f"train loss {loss} ({line['train_loss_of']})  {line['round_seconds']:.3f} s  "
                f"{fields['bytes']} so far" + ("  diverged" if line.get("diverged") else ""),
                flush=True,
            )

    def show_finished(self, summary: dict[str, Any], folder: Path, has_checkpoint: bool) -> None:
        """The table of a run that was complete before it was asked for, and how to go on or start anew."""
        self.show_summary(summary, folder)
        done, on = "was complete already", "more rounds=..."
        if summary.get("diverged"):
            done, on = f"has diverged in round {summary['diverged']} already", "stop.diverged=false"
        going_on = f"To go on: {on}; to" if has_checkpoint else "To"
        self._console.print(
            f"This run {done}. {going_on} start anew: resume=never, or another name=...",
            soft_wrap=True,
        )

    def show_diverged(self, error: Diverged, checkpoint: Path | None) -> None:
        """The last line of a run that ends because it has diverged."""
        kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
        self._console.print(f"{error}; {kept}", soft_wrap=True, markup=False)

    def show_stopped(self, checkpoint: Path | None) -> None:
        """The last line of a run that was stopped on request."""
        self._progress.stop()
        how = f"the same command goes on from {checkpoint}" if checkpoint else "it has no checkpoint"
        self._console.print(
            f"stopped on request after round {self._shown} of {self._rounds}; {how}",
            soft_wrap=True,
            markup=False,
        )

    def show_summary(self, summary: dict[str, Any], folder: Path) -> None:
        """The table that a run ends in."""
        self._progress.stop()
        self._console.print(summary_table(self._name, summary, self._console.width))
        if busy := busy_line(summary.get("host_busy")):
            self.warn(busy)
        self._console.print(f"Run folder: {folder}", soft_wrap=True, markup=False)

    def _fields(self) -> dict[str, Any]:
        """What the bar says at its end."""
        accuracy = "   - " if self._accuracy is None else f"{self._accuracy:.3f}"
        return {"accuracy": accuracy, "bytes": _mib(self._wire_bytes)}


def busy_line(host_busy: float | None) -> str | None:
    """A line for seconds that others' work has changed; None where it was little, or is not known."""
    if host_busy is None or host_busy <= BUSY:
        return None
    return f"others took {host_busy:.0%} of the host's cores meanwhile: do not trust these seconds"


def summary_table(name: str, summary: dict[str, Any], width: int = TABLE_WIDTH) -> Table:
    """Accuracy, seconds by phase, bytes by kind, the paper ledger beside them, and peak memory.

    Numbers stand beside what they measure, or below it where fewer columns than `NARROW` leave no room.
    """
    rounds, seconds = summary["rounds"], summary["training_seconds"]
    accuracy, diverged = summary["test_accuracy"], summary.get("diverged")
    headers = ("measured", "total", "per round", "share")
    table = Table(title=f"{name}: {summary['algorithm']}, {rounds} rounds", width=min(width, TABLE_WIDTH))
    table.add_column(headers[0] if width >= NARROW else f"{headers[0]}: {', '.join(headers[1:])}")
    for header in headers[1:] if width >= NARROW else ():
        table.add_column(header, justify="right", no_wrap=True)

    def add(label: str, *numbers: str) -> None:
        if width >= NARROW:
            table.add_row(label, *numbers)
            return
        table.add_row(label)
        if numbers:
            table.add_row(f"    {'  '.join(numbers)}")

    if diverged:
        add(f"diverged in round {diverged}")
    if accuracy["last"] is None:
        add("test accuracy", "-")
    else:
        add(f"test accuracy{', finite rounds' if diverged else ''}", f"{accuracy['last']:.4f}")
        add(f"  best {accuracy['best']:.4f} in round {accuracy['best_round']}")
    table.add_section()

    def add_seconds(label: str, value: float) -> None:
        add(label, f"{value:.2f} s", f"{value / rounds:.4f} s", f"{value / seconds:.1%}")

    add_seconds("training clock", seconds)
    for party, title in (("client", "client ranks, mean"), ("server", "server lanes, mean")):
        table.add_section()
        add(title)
        for phase, value in summary["phases"][party].items():
            if value:
                add_seconds(f"  {phase}", value)

    wire = sum(summary["wire_bytes"].values())

    def add_bytes(label: str, value: int) -> None:
        add(label, _mib(value), _mib(value / rounds), f"{value / wire:.1%}")

    table.add_section()
    add_bytes("bytes on the wire", wire)
    for kind, value in summary["wire_bytes"].items():
        if value:
            add_bytes(f"  {kind}", value)
    paper = summary["paper_bytes_total"]
    table.add_section()
    add("paper ledger (modelled)", _mib(paper), _mib(paper / rounds))
    uncoded = summary.get("paper_bytes_uncoded_total", paper)
    if uncoded != paper:
        add("  without codecs", _mib(uncoded), _mib(uncoded / rounds))
    peaks = summary.get("peak_memory", {})  # older ones have none
    known = {
        f"  {kind}, {place}": figures[f"{place}_bytes"]
        for kind, figures in peaks.items()
        for place in ("host", "device")
        if figures[f"{place}_bytes"] is not None
    }
    if known:
        table.add_section()
        add("peak memory, largest rank")
    for label, value in known.items():
        add(label, _mib(value))
    return table


def can_be_shown(summary: Any) -> bool:
    """Has a summary that was read from a file all that is shown of it?"""
    try:
        Console(file=StringIO()).print(summary_table("", summary))
        busy_line(summary.get("host_busy"))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ConsoleError):
        return False
    return True


def _mib(size: float) -> str:
    return f"{size / MIB:.2f} MiB"
