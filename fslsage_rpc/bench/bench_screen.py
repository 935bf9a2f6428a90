"""What a benchmark shows: a progress bar, a line per run, and its tables at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.progress import TextColumn
from rich.table import Table

from fslsage_rpc.bench import table as tables
from fslsage_rpc.bench.statistics import BenchRun, typical_seconds
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import combinations
from fslsage_rpc.runs.screen import ProgressScreen


class BenchScreen(ProgressScreen):
    """Shows one benchmark."""

    def __init__(self, config: Config):
        super().__init__([TextColumn("rounds")])
        self._warmup_rounds = config.bench.warmup_rounds
        total = (
            len(combinations(config.bench.variants, "bench.variants")) * config.bench.repeats * config.rounds
        )
        self._task = self._progress.add_task(config.name, total=total)

    def show_round(self, run: BenchRun) -> None:
        """One round more."""
        self._progress.update(self._task, advance=1, description=run.variant)

    def end_run(self, run: BenchRun) -> None:
        """One line for one run."""
        seconds = typical_seconds(run, self._warmup_rounds)
        self._progress.console.print(f"repeat {run.repeat + 1}  {run.variant}  {seconds:.3f} s per round")

    def show(self, name: str, result: Mapping[str, Any], folder: Path) -> None:
        """The tables."""
        self._progress.stop()
        self._show_variants(f"{name}: seconds per round", tables.rows(result))
        for line in tables.diverged_lines(result):
            self._console.print(line, soft_wrap=True, markup=False)
        self._show_rows("one request, mean", tables.REQUEST_HEADERS, tables.request_rows(result))
        targets = tables.target_rows(result)
        if targets:
            self._show_rows("to the target accuracy", tables.TARGET_HEADERS, targets)
        self._console.print(tables.links_line(result), soft_wrap=True)
        if busy := tables.busy_line(result):
            self._console.print(f"warning: {busy}", style="yellow", soft_wrap=True, markup=False)
        where = f"Ratios are to {result['reference']}. Results: {folder}/bench.md"
        self._console.print(where, soft_wrap=True, markup=False)

    def _show_variants(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """One column per variant, as many side by side as the terminal is wide."""
        widest = max(len(cell) for row in rows for cell in row) + 2
        beside = max(1, (self._console.width - 16) // widest)
        for first in range(0, len(rows), beside):
            columns = rows[first : first + beside]
            turned = [[header, *(row[i] for row in columns)] for i, header in enumerate(tables.HEADERS)]
            self._show_rows(title if first == 0 else "", turned[0], turned[1:])

    def _show_rows(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, box=box.SIMPLE_HEAD)
        for header in headers:
            label = header in ("variant", "request")
            table.add_column(header, justify="left" if label else "right", no_wrap=label)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
