"""Compares what went through the interfaces with what the run's wire ledger says.

Each byte of payload is counted once in the ledger, whoever sends it: uploads from client to server, answers
from server to client, and averaged weights from client to client. Each is received once: so the ledger's sum
stands beside the sum of what *all* ranks' interfaces received, the server's included. (What is received is
behind the shapers; what is sent also has the packets that a full queue then drops.)

Framing is the rest: Ethernet, IP and TCP headers, taken as 66 bytes for each packet, acknowledgements
included; and what the ledger leaves out by definition: pickles, RPC and collective headers, announcements,
reports and barriers, the store with its signs of life, and, in a benchmark, the measurement of its links.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emulation.network import Counters

HEADER_BYTES = 14 + 20 + 32
"""Ethernet, IPv4, and TCP with time stamps"""
SLIP_PERCENT = -5.0
MIB = 2**20


class Ledger:
    """The wire ledger of a run folder, as far as one job writes it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._before = self._lines()

    def bytes(self) -> int | None:
        """All kinds, clients and rounds; None where the job has written no round."""
        lines: list[str] = []
        for path, now in self._lines().items():
            kept = os.path.commonprefix([self._before.get(path, []), now])  # the rounds that it went on from
            lines += now[len(kept) :]
        rounds = [json.loads(line) for line in lines]
        return sum(sum(line.get("wire_bytes", {}).values()) for line in rounds) if lines else None

    def _lines(self) -> dict[Path, list[str]]:
        """The files with a line per round, of a training or a benchmark."""
        paths = [self._folder / "metrics.jsonl", *self._folder.glob("rounds/*.jsonl")]
        return {path: path.read_text(encoding="utf-8").splitlines() for path in paths if path.exists()}


def compare(counters: Sequence[Counters], ledger_bytes: int | None) -> dict[str, Any]:
    """The traffic of a job: bytes by rank, their sum without headers, and how far that is from the ledger.

    Args:
        counters: by rank, of the job alone.
        ledger_bytes: None where there is no ledger to compare with.
    """
    received = sum(rank.received_bytes for rank in counters)
    headers = HEADER_BYTES * sum(rank.received_packets for rank in counters)
    difference = None if not ledger_bytes else 100 * (received - headers - ledger_bytes) / ledger_bytes
    return {
        "ranks": {str(rank): vars(count) for rank, count in enumerate(counters)},
        "received_bytes": received,
        "header_bytes": headers,
        "ledger_bytes": ledger_bytes,
        "difference_percent": difference,
    }


def summary(traffic: dict[str, Any]) -> str:
    """The comparison in one line."""
    carried = (
        f"{traffic['received_bytes'] / MIB:.2f} MiB, {traffic['header_bytes'] / MIB:.2f} of them headers"
    )
    if traffic["ledger_bytes"] is None:
        return f"links carried {carried}; this job wrote no wire ledger to compare with"
    difference = traffic["difference_percent"]
    line = (
        f"links carried {carried}; wire ledger {traffic['ledger_bytes'] / MIB:.2f} MiB: {difference:+.1f} %"
    )
    return line + (": TENSORS WENT AROUND THE LINKS" if difference < SLIP_PERCENT else "")
