"""A star of network namespaces: one per rank, joined by a router, with no way out of this machine.

Rank R has the interface eth0 with the address 10.77.R.1. Up, a client's link is shaped where the client
sends; down, where the router sends to it. The server's own link is not shaped.
"""

import json
import shutil
from dataclasses import dataclass

from emulation.links import Link
from emulation.system import CommandFailed, run
from fslsage_rpc.errors import HostError, InputError

INTERFACE = "eth0"
BURST_SECONDS = 0.01
SMALLEST_BURST_BYTES = 3 * 1514
QUEUE_SECONDS = 0.2
FRAME_BYTES = 1514
UNLIMITED_QUEUE_FRAMES = 100_000
SETTINGS = {
    "net/ipv4/tcp_congestion_control": "reno",  # the default may be one that takes long to fill a short queue
    "net/ipv4/tcp_no_metrics_save": "1",  # the job's connections must not start from what the probe's learnt
    "net/ipv6/conf/all/disable_ipv6": "1",  # its neighbour discovery would be in the counters
}


@dataclass(frozen=True)
class Counters:
    """What has gone through one rank's interface."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    def since(self, before: "Counters") -> "Counters":
        """The difference to an earlier reading."""
        return Counters(**{name: value - getattr(before, name) for name, value in vars(self).items()})


def address(rank: int) -> str:
    """The address of a rank."""
    return f"10.77.{rank}.1"


def queueing(
    rate: float | None, delay_seconds: float | None, burst_seconds: float = BURST_SECONDS
) -> list[str]:
    """The queueing discipline for one direction, as arguments of `tc qdisc`; empty where nothing is asked.

    A rate alone is tbf's; a delay is netem's, and then the rate too.

    Args:
        rate: bit/s.
        delay_seconds: one way.
        burst_seconds: so much of the rate passes at once after a rest; more would let whole messages slip
            through, less would lose rate to late timers.
    """
    if delay_seconds is not None:
        waiting = (delay_seconds + QUEUE_SECONDS) * (rate or 0.0) / 8 / FRAME_BYTES
        limit = max(1000, round(waiting)) if rate else UNLIMITED_QUEUE_FRAMES
        shape = ["netem", "limit", str(limit), "delay", f"{round(1e6 * delay_seconds)}us"]
        return [*shape, "rate", f"{round(rate)}bit"] if rate else shape
    if rate is None:
        return []
    burst = max(round(burst_seconds * rate / 8), SMALLEST_BURST_BYTES)
    queue = f"{round(1000 * QUEUE_SECONDS)}ms"
    return ["tbf", "rate", f"{round(rate)}bit", "burst", f"{burst}b", "latency", queue]


class Network:
    """The namespaces of one owner, named OWNER-router and OWNER-rankR.

    Whatever it makes is removed by `leftovers.remove(owner)`.
    """

    def __init__(self, owner: str, clients: int):
        self.owner = owner
        self.router = f"{owner}-router"
        self.namespaces = [f"{owner}-rank{rank}" for rank in range(clients + 1)]

    def build(self) -> None:
        """Make the namespaces and join them.

        Raises:
            HostError: this system lets nobody make namespaces.
        """
        try:
            run("ip", "netns", "add", self.router)
        except CommandFailed as error:
            raise HostError(f"needs network namespaces, which this system refuses ({error})") from None
        _configure(self.router, {**SETTINGS, "net/ipv4/ip_forward": "1"})
        run("ip", "-n", self.router, "link", "set", "lo", "up")
        for rank in range(len(self.namespaces)):
            self._join(rank)

    def _join(self, rank: int) -> None:
        name, side, gateway = self.namespaces[rank], f"rank{rank}", f"10.77.{rank}.254"
        run("ip", "netns", "add", name)
        _configure(name, SETTINGS)
        peer = ("peer", "name", INTERFACE, "netns", name)
        run("ip", "-n", self.router, "link", "add", side, "type", "veth", *peer)
        run("ip", "-n", self.router, "address", "add", f"{gateway}/24", "dev", side)
        run("ip", "-n", self.router, "link", "set", side, "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", name, "address", "add", f"{address(rank)}/24", "dev", INTERFACE)
        run("ip", "-n", name, "link", "set", INTERFACE, "up")
        run("ip", "-n", name, "route", "add", "10.77.0.0/16", "via", gateway)

    def has_netem(self) -> bool:
        """Can this kernel delay packets by itself?"""
        try:
            run("tc", "-n", self.router, "qdisc", "add", "dev", "lo", "root", *queueing(None, 0.001))
        except CommandFailed:
            return False
        run("tc", "-n", self.router, "qdisc", "delete", "dev", "lo", "root")
        return True

    def shape(self, rank: int, link: Link, delay_by_netem: bool) -> None:
        """Give one client's link its rates and, where netem is to do it, its delay."""
        one_way = link.round_trip_seconds / 2 if link.round_trip_seconds and delay_by_netem else None
        for namespace, device, rate in (
            (self.namespaces[rank], INTERFACE, link.up_bits_per_second),
            (self.router, f"rank{rank}", link.down_bits_per_second),
        ):
            shape = queueing(rate, one_way)
            if shape:
                run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape)

    def hold_packets(self, rank: int) -> None:
        """Have every packet from and to a client wait in NFQUEUE number RANK for `delay.py`.

        The two directions are in two tables, so that a packet between clients waits once for each of them.
        Without the program that lets them go they are dropped: a delay is never silently left out.

        Raises:
            InputError: there is no iptables, or the kernel has no NFQUEUE.
        """
        what = "--rtt: needs netem or NFQUEUE in the kernel, and this one has no netem"
        if shutil.which("iptables") is None:
            raise InputError(f"{what}; for NFQUEUE the command iptables (Debian: apt-get install iptables)")
        queue = ("-j", "NFQUEUE", "--queue-num", str(rank))
        inside = ("ip", "netns", "exec", self.router, "iptables", "-w")
        try:
            run(*inside, "-t", "mangle", "-A", "FORWARD", "-i", f"rank{rank}", *queue)
            run(*inside, "-t", "filter", "-A", "FORWARD", "-o", f"rank{rank}", *queue)
        except CommandFailed as error:
            raise InputError(f"{what}; NFQUEUE is refused ({error})") from None

    def counters(self) -> list[Counters]:
        """The counters of every rank's interface, by rank."""
        return [_read_counters(namespace) for namespace in self.namespaces]


def _configure(namespace: str, settings: dict[str, str]) -> None:
    """Write kernel settings of a namespace; those that this kernel does not have are skipped."""
    writes = [
        f"[ ! -e /proc/sys/{key} ] || echo {value} > /proc/sys/{key}" for key, value in settings.items()
    ]
    run("ip", "netns", "exec", namespace, "sh", "-ec", "\n".join(writes))


def _read_counters(namespace: str) -> Counters:
    (link,) = json.loads(run("ip", "-n", namespace, "-s", "-j", "link", "show", "dev", INTERFACE))
    sent, received = link["stats64"]["tx"], link["stats64"]["rx"]
    return Counters(sent["bytes"], sent["packets"], received["bytes"], received["packets"])
