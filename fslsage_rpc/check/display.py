"""The screen of `fslsage check`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fslsage_rpc.algorithms import find
from fslsage_rpc.check.findings import COPIES, Findings, Outlook, Rank, sized
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.parties.requests import ALIGNING, BeginAlignment
from fslsage_rpc.runs.screen import SteadyCursorConsole
from fslsage_rpc.units import MIB


class CheckScreen:
    """Tables of the ranks, the links and the run; the warnings come last."""

    def __init__(self) -> None:
        self._console = SteadyCursorConsole(highlight=False)

    def show(self, findings: Findings) -> None:
        """All of it."""
        self._show_ranks(findings)
        self._show_links(findings)
        if findings.outlook:
            self._show_outlook(findings.outlook)
            if findings.outlook.line:
                self._show_memory(findings)
                self._show_seconds(findings.outlook, findings.outlook.line, findings.world["transport"])
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
            device, cores = f"{machine.device} ({machine.device_name})", str(len(machine.core_ids))
            places = (_role(findings, number), machine.host, device, _addresses(rank))
            table.add_row(*places, cores, str(machine.threads))
        self._console.print(table)
        busy = (f"{host} {'-' if share is None else f'{share:.0%}'}" for host, share in findings.busy.items())
        self._say("Share of the cores that others had, over half a second: " + ", ".join(busy) + ".")

    def _show_links(self, findings: Findings) -> None:
        world = findings.world
        if world["transport"] == "local":
            self._say("One process: no links, nothing to average over.")
            return
        table = _table("server and client ranks, by RPC", "link", "round trip", "up", "down", "tensors")
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

    def _show_outlook(self, outlook: Outlook) -> None:
        rounds = outlook.config.rounds
        table = _table("models", "part", "parameters", "size", "of the whole", "trained", "their size")
        for name, part in outlook.models.items():
            of_all = (
                f"{part.parameters:,}",
                sized(part.bytes),
                f"{part.bytes / outlook.whole_bytes:.1%}",
            )
            table.add_row(name, *of_all, f"{part.trained:,}", sized(part.trained_bytes))
        self._console.print(table)
        self._say(f"Smashed data: {outlook.smashed_bytes:,} bytes per sample.")
        first = "the first " if outlook.rounds_counted < rounds else ""
        title = f"paper ledger (modelled), mean of {first}{outlook.rounds_counted} rounds"
        table = _table(title, "algorithm", "per round", "all")
        for name, mean in outlook.paper_bytes.items():
            chosen = " (configured)" if name == outlook.config.algorithm.name else ""
            known = ("unknown", "unknown") if mean is None else (sized(mean), sized(mean * rounds))
            table.add_row(name + chosen, *known)
        self._console.print(table)
        if outlook.interval > 1:
            self._say(f"Alignment interval: {outlook.interval} rounds.")

    def _show_memory(self, findings: Findings) -> None:
        headers = ["rank", "before", "peak", "part of a checkpoint", "host had left", "host has"]
        if any(rank.machine.gpu_bytes for rank in findings.ranks):
            headers += ["GPU's peak", "GPU had free", "GPU has"]
        table = _table("memory of one round, in MiB", *headers)
        for number, rank in enumerate(findings.ranks):
            machine, use = rank.machine, rank.use
            assert use is not None
            of_host = (
                machine.resident_bytes,
                use.peak,
                use.checkpoint,
                machine.memory_bytes,
                machine.host_bytes,
            )
            of_gpu = (use.gpu_peak, *(machine.gpu_bytes or (None, None)))
            table.add_row(str(number), *map(_mib, (*of_host, *of_gpu)[: len(headers) - 1]))
        self._console.print(table)
        if findings.config.checkpoint.every is not None:
            self._say(
                f"Writing a checkpoint, beside the next round, takes up to {COPIES} times its part more."
            )

    def _show_seconds(self, outlook: Outlook, line: Mapping[str, Any], transport: str) -> None:
        rounds, alignment = outlook.config.rounds, line["phases"]["server"][Phase.ALIGNMENT]
        counts = ", ".join(f"{times['count']} {kind}" for kind, times in line["requests"].items())
        aligns = not ALIGNING.isdisjoint(line["requests"])
        behind = BeginAlignment.kind in line["requests"] and transport != "local"  # which fits at once
        text = f"Round {line['round']}, with{'' if aligns else 'out'} alignment"
        text += " behind the training" if behind else ""
        text += f": {line['round_seconds']:.2f} s"
        if aligns and not behind:
            text += f", of which nothing but alignment {alignment:.2f} s"
        self._say(f"{text}; evaluation {line['evaluation_seconds']:.2f} s. Requests: {counts or 'none'}.")
        text = f"Estimate for {rounds} rounds: {_duration(outlook.run_seconds(rounds))}"
        if behind:
            text += " if all are like this one, and fits end before they are collected"
        elif aligns and outlook.interval > 1:
            aligned = math.ceil(rounds / outlook.interval)
            text += (
                f" if all are like this one, {_duration(outlook.run_seconds(aligned))} if {aligned} are and "
                "the others have no alignment"
            )
        algorithm = find(outlook.config.algorithm.name)
        unknown = algorithm.requests_depend_on_values and not algorithm.client_holds_whole_model
        self._say(text + (", though others may ask for more." if unknown else "."))

    def _show_disk(self, findings: Findings) -> None:
        disk = findings.ranks[0].disk
        if disk.free_bytes is None:
            return  # there is a warning
        text = f"Disk: {sized(disk.free_bytes)} free in {Path(disk.folder).absolute()}"
        if (filled := findings.disk_bytes) is not None:
            text += f"; the run would fill about {sized(filled)}"
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


def _named(choice: str | Sequence[str]) -> str:
    return choice if isinstance(choice, str) else ", ".join(choice)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _mib(amount: int | None) -> str:
    return "-" if amount is None else f"{amount / MIB:,.1f}"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s" if math.isfinite(bytes_per_second) else "-"
