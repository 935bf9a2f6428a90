"""From what the ranks report of a round to the pieces that its lower bound is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fslsage_rpc.algorithms.bound import ClientPieces, LinkSpeed, RoundPieces
from fslsage_rpc.data.participation import Federation, home_of
from fslsage_rpc.device.cores import server_workers
from fslsage_rpc.measure.phases import COMPUTE, Phase
from fslsage_rpc.parties.requests import KINDS, Ask
from fslsage_rpc.runs.records import RankReport


def round_pieces(
    line: Mapping[str, Any],
    reports: Sequence[RankReport],
    federation: Federation,
    asks: Mapping[int, Sequence[Ask]],
    links: Mapping[int, LinkSpeed],
    replicas: bool,
    device: torch.device,
) -> RoundPieces:
    """The pieces of one round, on the server's rank.

    A rank's compute is measured as a whole and divided among its participants by their steps.

    Args:
        line: the round's metrics line.
        reports: those of all ranks, of the same round.
        asks: by client, what it asked in this round.
        links: by client rank.
        replicas: does the server have a lane per client?
        device: of the server.
    """
    hosts = [report for report in reports if report.phases is not None]
    clients: dict[int, ClientPieces] = {}
    for rank, report in enumerate(hosts):
        mine = [client for client in line["participants"] if home_of(client, len(hosts)) == rank]
        steps = sum(federation.steps(client) for client in mine)
        seconds = {**(report.phases or {}), **report.device_seconds}  # a GPU's in place of its host's
        compute = sum(seconds.get(phase, 0.0) for phase in COMPUTE)
        for client in mine:
            share = federation.steps(client) / steps
            times = report.requests.get(client, {})
            clients[client] = ClientPieces(
                rank=rank,
                steps=federation.steps(client),
                compute_seconds=share * compute,
                asks=asks[client],
                of_kind={kind: each for kind, each in times.items() if kind in KINDS},
            )
    phases = line["phases"]
    server = {**phases["server"], **line.get("device_seconds", {}).get("server", {})}
    return RoundPieces(
        clients=clients,
        links=links,
        replicas=replicas,
        server_workers=server_workers(device),
        averaging_seconds=phases["client"][Phase.AVERAGING],
        server_averaging_seconds=phases["server"][Phase.AVERAGING],
        # Of all lanes, whose mean is measured.
        targets_seconds=server[Phase.TARGETS] * (len(federation.samples) if replicas else 1),
    )


def fit_seconds(line: Mapping[str, Any]) -> float:
    """The fits of auxiliary models in a round: their seconds of a GPU or of CPU threads, over all of them.

    The time in which one gave way is not in it.

    Args:
        line: the round's metrics line.
    """
    server = line.get("device_seconds", {}).get("server") or line["cpu_seconds"]["server"]
    seconds: float = server.get(Phase.ALIGNMENT, 0.0)
    return seconds
