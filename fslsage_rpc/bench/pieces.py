"""From what the ranks report of a round to the pieces that its lower bound is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fslsage_rpc.bench.table import COMPUTE
from fslsage_rpc.comm.world import server_workers
from fslsage_rpc.critical_path import ClientPieces, LinkSpeed, RoundPieces
from fslsage_rpc.federation import Federation
from fslsage_rpc.measure.requests import RequestTimes
from fslsage_rpc.training.records import RankReport


def round_pieces(
    line: Mapping[str, Any],
    reports: Sequence[RankReport],
    federation: Federation,
    links: Mapping[int, LinkSpeed],
    device: torch.device,
) -> RoundPieces:
    """The pieces of one round, on the server's rank.

    A rank's compute is measured as a whole and divided among its participants by their steps.

    Args:
        line: the round's metrics line.
        reports: those of all ranks, of the same round.
        links: by client rank.
        device: of the server.
    """
    hosts = [report for report in reports if report.phases is not None]
    clients: dict[int, ClientPieces] = {}
    for rank, report in enumerate(hosts):
        mine = [client for client in line["participants"] if client % len(hosts) == rank]
        steps = sum(federation.steps(client) for client in mine)
        seconds = {**(report.phases or {}), **report.device_seconds}  # a GPU's in place of its host's
        compute = sum(seconds.get(phase, 0.0) for phase in COMPUTE)
        for client in mine:
            share = federation.steps(client) / steps
            times = report.requests.get(client, {})
            clients[client] = _client_pieces(rank, federation.steps(client), share * compute, times)
    phases = line["phases"]
    server = {**phases["server"], **line.get("device_seconds", {}).get("server", {})}
    return RoundPieces(
        clients=clients,
        links=links,
        server_workers=server_workers(device),
        averaging_seconds=phases["client"]["averaging"],
        server_averaging_seconds=phases["server"]["averaging"],
        targets_seconds=server["targets"],
    )


def _client_pieces(rank: int, steps: int, compute: float, times: Mapping[str, RequestTimes]) -> ClientPieces:
    uploads = [times[kind] for kind in ("push", "exchange") if kind in times]
    align = times.get("align", RequestTimes())
    return ClientPieces(
        rank=rank,
        steps=steps,
        compute_seconds=compute,
        requests=sum(upload.count for upload in uploads),
        server_seconds=sum(upload.compute_seconds for upload in uploads),
        alignment_seconds=align.compute_seconds,
        up_bytes=sum(upload.up_bytes for upload in uploads),
        down_bytes=sum(upload.down_bytes for upload in uploads),
        auxiliary_bytes=align.down_bytes,
    )
