"""What `fslsage check` shows."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from fslsage_rpc.check.findings import Findings, Rank, Run, size
from fslsage_rpc.runs.screen import SteadyCursorConsole

GROUPS = {
    "models": ("models", "optimizers", "averaging"),
    "data": ("data",),
    "batches": ("activations", "requests", "libraries"),
    "alignment": ("alignment",),
    "checkpoint": ("checkpoint",),
}
"""the columns of the memory table, and the parts of `Memory` that each adds up"""


class CheckScreen:
    """Tables of the ranks, the links and the run; the warnings come last."""

    def __init__(self) -> None:
        self._console = SteadyCursorConsole(highlight=False)

    def show(self, findings: Findings) -> None:
        """All of it."""
        self._show_ranks(findings)
        self._show_links(findings)
        if findings.run:
            self._show_memory(findings)
            self._show_run(findings, findings.run)
        self._show_disk(findings)
        versions = findings.ranks[0].machine.versions
        self._say("Versions: " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
        warnings = findings.warnings()
        for warning in warnings:
            self._console.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
        if not warnings:
            self._say("No warnings.")

    def _show_ranks(self, findings: Findings) -> None:
        table = _table("ranks", "rank", "host", "device", "listens on", "cores", "threads", text=4)
        for number, rank in enumerate(findings.ranks):
            machine = rank.machine
            table.add_row(
                _role(findings, number),
                machine.host,
                f"{machine.device} ({machine.device_name})",
                _addresses(rank),
                str(len(machine.core_ids)),
                str(machine.threads),
            )
        self._console.print(table)
        busy = (f"{host} {'-' if share is None else f'{share:.0%}'}" for host, share in findings.busy.items())
        self._say("Share of the cores that others had, over half a second: " + ", ".join(busy) + ".")

    def _show_links(self, findings: Findings) -> None:
        world = findings.world
        if world["transport"] == "local":
            self._say("One process: no links, nothing to average over.")
            return
        table = _table(
            "server and client ranks, by RPC", "link", "round trip", "up", "down", "tensors", text=1
        )
        for client_rank, speed in sorted(findings.links.items()):
            rank = client_rank + 1
            table.add_row(
                f"rank {rank} - rank 0",
                f"{1000 * speed.round_trip_seconds:.2f} ms",
                _rate(speed.up_bytes_per_second),
                _rate(speed.down_bytes_per_second),
                world["request_tensors"][f"clients{rank}"],
            )
        self._console.print(table)
        transports, channels = (_named(world[f"rpc_{kind}"]) for kind in ("transports", "channels"))
        self._say(f"RPC transports: {transports}; channels: {channels}. Interface: {world['interface']}.")
        text = f"Averaging: {world['averaging'] or 'none'} ({findings.why_averaging()})"
        if findings.averaging:
            text += (
                f"; an all-reduce over {len(findings.ranks) - 1} client ranks takes "
                f"{1000 * findings.averaging.round_trip_seconds:.2f} ms at least, a large one "
                f"{_rate(findings.averaging.bytes_per_second)}"
            )
        self._say(text + ".")

    def _show_memory(self, findings: Findings) -> None:
        groups = {title: parts for title, parts in GROUPS.items() if _any(findings, parts)}
        table = _table("memory in MiB, estimated", "rank", "now", *groups, "at the peak", "host has left")
        for number, rank in enumerate(findings.ranks):
            table.add_row(
                str(number),
                _mib(rank.machine.resident_bytes),
                *(_mib(_sum(rank, parts)) for parts in groups.values()),
                _mib(rank.resident_then_bytes),
                _mib(rank.machine.memory_bytes),
            )
        self._console.print(table)
        if any(rank.machine.gpu_free_bytes is not None for rank in findings.ranks):
            self._say("Ranks with a GPU hold all but the checkpoint there; free: " + _gpus(findings) + ".")

    def _show_run(self, findings: Findings, run: Run) -> None:
        config = findings.config
        whole = run.bytes["client"] + run.bytes["server"]
        table = _table("models", "part", "parameters", "size", "of the whole", "trained", "their size")
        for name, bytes in run.bytes.items():
            table.add_row(
                name,
                f"{run.parameters[name]:,}",
                size(bytes),
                f"{bytes / whole:.1%}",
                f"{run.trained[name]:,}",
                size(run.trained_bytes[name]),
            )
        self._console.print(table)
        self._say(f"Smashed data: {run.smashed_bytes:,} bytes per sample.")
        first = "the first " if run.rounds_counted < config.rounds else ""
        table = _table(
            f"paper ledger (modelled), mean of {first}{run.rounds_counted} rounds",
            "algorithm",
            "per round",
            "all",
            text=1,
        )
        for name, mean in run.paper_bytes.items():
            chosen = " (configured)" if name == config.algorithm.name else ""
            known = ("unknown", "unknown") if mean is None else (size(mean), size(mean * config.rounds))
            table.add_row(name + chosen, *known)
        self._console.print(table)
        if run.interval > 1:
            self._say(f"Alignment interval: {run.interval} rounds.")

    def _show_disk(self, findings: Findings) -> None:
        disk = findings.ranks[0].disk
        if disk.free_bytes is None:
            return  # there is a warning
        text = f"Disk: {size(disk.free_bytes)} free in {Path(disk.folder).absolute()}"
        if findings.run:
            text += f"; the run would fill up to {size(findings.run.disk_bytes)}"
        self._say(text + ".")

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)


def _table(title: str, *headers: str, text: int = 1) -> Table:
    """The first `text` columns are flush left."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number < text else "right")
    return table


def _role(findings: Findings, rank: int) -> str:
    if len(findings.ranks) == 1:
        return "0"
    return "0 (server)" if rank == 0 else f"{rank} (clients)"


def _addresses(rank: Rank) -> str:
    machine = rank.machine
    text = ", ".join(machine.addresses) or "unknown"
    if machine.interfaces:
        text += f" ({', '.join(machine.interfaces)})"
    if machine.open_ports:
        text += f"; all interfaces: port {', '.join(map(str, machine.open_ports))}"
    return text


def _sum(rank: Rank, parts: Sequence[str]) -> int:
    return sum(getattr(rank.memory, part) for part in parts)


def _named(choice: str | Sequence[str]) -> str:
    return choice if isinstance(choice, str) else ", ".join(choice)


def _any(findings: Findings, parts: Sequence[str]) -> bool:
    return any(_sum(rank, parts) for rank in findings.ranks)


def _gpus(findings: Findings) -> str:
    shown = (
        f"rank {number} {size(rank.machine.gpu_free_bytes)}"
        for number, rank in enumerate(findings.ranks)
        if rank.machine.gpu_free_bytes is not None
    )
    return ", ".join(shown)


def _mib(bytes: int | None) -> str:
    return "-" if bytes is None else f"{bytes / 2**20:,.1f}"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s" if math.isfinite(bytes_per_second) else "-"
