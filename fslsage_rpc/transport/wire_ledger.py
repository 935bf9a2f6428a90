"""The wire ledger: the bytes of the payload tensors that the program really hands over, by kind and client.

`weights_allreduce` holds what a ring moves and, after a warm start, the averaged auxiliary model's way to the
server. Framing, small control messages (announcements, reports) and retransmissions are not in it.
"""

import threading
from collections import defaultdict

WIRE_KINDS = (
    "smashed_up",
    "labels_up",
    "gradient_down",
    "auxiliary_down",
    "weights_allreduce",
    "initial_broadcast",
    "evaluation",
)
OFF_THE_CLOCK = ("initial_broadcast", "evaluation")
"""kinds that travel outside the rounds"""
RANK = -1
"""stands for a client in entries that belong to a whole rank: averaging and evaluation"""


class WireLedger:
    """Bytes by kind and client; any thread may count."""

    def __init__(self) -> None:
        self._bytes: dict[int, dict[str, int]] = defaultdict(lambda: dict.fromkeys(WIRE_KINDS, 0))
        self._lock = threading.Lock()

    def count(self, kind: str, size: int, client: int = RANK) -> None:
        """Add bytes of a kind."""
        with self._lock:
            self._bytes[client][kind] += size

    def take(self) -> dict[int, dict[str, int]]:
        """The bytes so far, by client and kind; the ledger starts again from zero."""
        with self._lock:
            taken = dict(self._bytes)
            self._bytes.clear()
        return taken


def ring_share(size: int, ranks: int, rank: int) -> int:
    """What rank `rank` (from 0) of a ring all-reduce of `size` sends: 2 (n-1)/n of it, rounded to add up
    exactly.
    """
    total = 2 * (ranks - 1) * size
    return total * (rank + 1) // ranks - total * rank // ranks
