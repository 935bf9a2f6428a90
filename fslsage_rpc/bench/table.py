"""The tables of a benchmark, as `bench.md` holds them and the screen shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from fslsage_rpc.measure.phases import PARTS
from fslsage_rpc.transport.wire_ledger import OFF_THE_CLOCK
from fslsage_rpc.units import MIB

SHOWN_PARTS = ("compute", "wait", "alignment", "averaging")
HEADERS = (
    *("variant", "s / round", "quartiles", "ratio"),
    *SHOWN_PARTS,
    *("wire MiB", "bound", "efficiency"),
)
REQUEST_HEADERS = ("variant", "request", "a round", "trip ms", "queue ms", "compute ms", "wire ms", "MiB/s")
TARGET_HEADERS = ("variant", "target accuracy", "rounds", "training clock", "wire MiB, all", "modelled MiB")
BUSY_MARK = "*"
"""behind what others' work on the host has changed"""
QUARTER = 1 / 4
"""of a variant's samples"""
REQUEST_PARTS = ("round_trip", "queue", "compute", "wire")


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per variant, under `HEADERS`: seconds per round, ratios, MiB per round."""
    return [_row(name, record) for name, record in result["variants"].items()]


def _row(name: str, record: Mapping[str, Any]) -> list[str]:
    seconds, ratio, client = record["round_seconds"], record["ratio_to_reference"], record["phases"]["client"]
    return [
        name,
        f"{seconds['median']:.3f}",
        "-" if seconds["q1"] is None else f"{seconds['q1']:.3f} to {seconds['q3']:.3f}",
        f"{ratio['median']:.2f}",
        *(f"{sum(client[phase] for phase in PARTS[part]):.3f}" for part in SHOWN_PARTS),
        f"{round_bytes(record) / MIB:.2f}",
        f"{record['bound_seconds']:.3f}",
        f"{record['efficiency']:.0%}{BUSY_MARK if record['busy_samples'] else ''}",
    ]


def busy_line(result: Mapping[str, Any]) -> str | None:
    """A line for samples that others' work on the host has changed; None where there are none."""
    samples = [sample for record in result["variants"].values() for sample in record["samples"]]
    busy = [sample["host_busy"] for sample in samples if sample["busy"]]
    if not busy:
        return None
    return (
        f"{BUSY_MARK} others took up to {max(busy):.0%} of the host's cores in {len(busy)} of {len(samples)} "
        "samples" + (": these ratios and efficiencies cannot be trusted" if untrusted(result) else "")
    )


def untrusted(result: Mapping[str, Any]) -> bool:
    """Has others' work on the host changed so many samples of a variant that it reaches the quartiles?"""
    return any(
        record["busy_samples"] > QUARTER * len(record["samples"]) for record in result["variants"].values()
    )


def round_bytes(record: Mapping[str, Any]) -> float:
    """What a variant's rounds sent, each on average: without the first broadcast and evaluation."""
    sent: float = sum(bytes for kind, bytes in record["wire_bytes"].items() if kind not in OFF_THE_CLOCK)
    return sent


def request_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per variant and kind of request, under `REQUEST_HEADERS`: milliseconds of one request."""
    return [
        [
            name,
            kind,
            f"{times['per_round']:g}",
            *(f"{1000 * times[f'{part}_seconds']:.2f}" for part in REQUEST_PARTS),
            "-" if times["bytes_per_second"] is None else f"{times['bytes_per_second'] / MIB:.1f}",
        ]
        for name, record in result["variants"].items()
        for kind, times in record["requests"].items()
    ]


def target_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per variant with what it took to reach the target accuracy; none where none was set."""
    table = []
    for name, record in result["variants"].items():
        target = record["target"]
        if target is not None:
            table.append(
                [
                    name,
                    f"{target['accuracy']:g}",
                    f"{target['rounds']:g}",
                    f"{target['seconds']:.2f} s",
                    f"{target['wire_bytes'] / MIB:.1f}",
                    f"{target['paper_bytes'] / MIB:.1f}",
                ]
            )
    return table


def links_line(result: Mapping[str, Any]) -> str:
    """The speed of the client ranks' links as it was measured: the slowest of all ranks and repeats."""
    speeds = [speed for each in result["environment"]["link_speeds"] for speed in each.values()]
    if not speeds:
        return "no links: one process"
    up, down = (min(speed[f"{way}_bytes_per_second"] for speed in speeds) / MIB for way in ("up", "down"))
    round_trip = max(speed["round_trip_seconds"] for speed in speeds)
    return f"links, slowest: {up:.1f} MiB/s up, {down:.1f} MiB/s down, round trip {1000 * round_trip:.2f} ms"


def diverged_lines(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each variant that has diverged."""
    return [
        f"{name}: diverged in round {record['diverged']}; later rounds compute with what is not finite."
        for name, record in result["variants"].items()
        if record["diverged"]
    ]


def markdown(name: str, result: Mapping[str, Any]) -> str:
    """`bench.md`."""
    environment = result["environment"]
    ranks = environment["ranks"]
    hosts = ", ".join(sorted({f"{rank['host']} ({rank['device_name']})" for rank in ranks}))
    rounds = " or ".join(map(str, sorted({record["rounds"] for record in result["variants"].values()})))
    parts = [
        f"# {name}",
        f"{result['repeats']} repeats of {rounds} rounds, the first {result['warmup_rounds']} left "
        f"out (to whole alignment intervals); ratios to `{result['reference']}`, paired within each repeat.",
        f"torch {environment['versions']['torch']}, {len(ranks)} ranks on {hosts}, transport "
        f"{environment['transport']}; {links_line(result)}.",
        table(HEADERS, rows(result)),
        *diverged_lines(result),
        "Seconds per round; compute, wait, alignment and averaging are means over client ranks; wire MiB are "
        "what a round sends, without evaluation. `bound` is the longest chain of the same measured pieces "
        "under perfect overlap; efficiency = bound / measured.",
        table(REQUEST_HEADERS, request_rows(result)),
        "One request, on average: round trip = queue + compute (both at the server) + wire; MiB/s are its "
        "bytes over its wire time.",
    ]
    if busy := busy_line(result):
        parts.append(f"\\{busy}.")
    if target_rows(result):
        parts.append(table(TARGET_HEADERS, target_rows(result)))
        parts.append("Modelled MiB are those of the paper ledger.")
    return "\n\n".join(parts) + "\n"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
