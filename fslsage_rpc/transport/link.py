"""A client rank's way to the server, whatever the transport: its tensors are counted here."""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.algorithms.bound import NO_LINK, LinkSpeed
from fslsage_rpc.device.clock import Reading, clock, device_clock
from fslsage_rpc.measure.request_times import RequestLog, RequestTimes
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.predictor import FinishedServer
from fslsage_rpc.parties.requests import TAKING_UP, Announced, Answer, Request, SmashedData
from fslsage_rpc.parties.server import Server
from fslsage_rpc.transport.base import Take, Transport
from fslsage_rpc.transport.endpoint import ServerEndpoint
from fslsage_rpc.transport.wire_ledger import WireLedger

PROBE_SECONDS = 0.1
PROBE_BYTES = 2**24


def connect(
    transport: Transport, server: Server | FinishedServer | None, ledger: WireLedger, log: RequestLog
) -> "ServerLink | None":
    """Collective: offer the server (rank 0) and get a link to it (client ranks)."""
    transport.serve(ServerEndpoint(server, transport.device) if server else None)
    return None if transport.client_rank is None else ServerLink(transport, ledger, log)


def measure_links(transport: Transport, link: "ServerLink | None") -> dict[int, LinkSpeed]:
    """Collective: the speed of each client rank's link to the server, one after the other.

    Args:
        link: this rank's, if it hosts clients.

    Returns:
        By client rank, on the server's rank; elsewhere nothing.
    """
    mine = None
    for turn in range(transport.client_ranks):
        transport.barrier()
        if link and transport.client_rank == turn:
            mine = link.measure_speed()
    speeds = transport.gather((transport.client_rank, mine)) or []
    return {rank: speed for rank, speed in speeds if speed is not None}


class ServerLink:
    """Calls to the server: the transport carries them, this counts their tensors and takes their times."""

    def __init__(self, transport: Transport, ledger: WireLedger, log: RequestLog):
        self._transport = transport
        self.ledger = ledger
        self.log = log

    def announce(
        self,
        t: int,
        plans: Mapping[int, Announced],
        ranking: Sequence[int],
        collecting: Collection[int] = (),
    ) -> None:
        """Tell the server at which steps each of this rank's participants will make requests, if it knows,
        and who will collect.
        """
        self._transport.call("announce", t, plans, ranking, collecting)

    def server_clock(self) -> float:
        """A reading of the server's clock, in seconds, to draw traces by."""
        seconds: float = self._transport.call("clock")
        return seconds

    def initial_weights(self, client: int) -> tuple[Weights, Weights | None]:
        """The client and auxiliary weights that this client starts from."""
        weights, auxiliary = self._transport.call("initial")
        size = weights.nbytes + (auxiliary.nbytes if auxiliary else 0)
        self.ledger.count("initial_broadcast", size, client)
        return weights, auxiliary

    def measure_speed(self) -> LinkSpeed:
        """Round trip and rates of this rank's link, which nothing else uses meanwhile.

        The round trip is the median of 21 empty calls. A rate is bytes over seconds, less a round trip. It is
        that of the fastest of 3 transfers of 256 KiB, or of more until one takes 0.1 s.
        """
        if self._transport.size == 1:
            return NO_LINK
        carrier = self._transport.carrier
        empty = torch.zeros(1, dtype=torch.uint8, device=carrier)
        round_trip = statistics.median(self._timed_echo(empty, 1) for _ in range(21))

        def rate(up: bool) -> float:
            size = 2**18
            while True:
                payload = torch.zeros(size if up else 1, dtype=torch.uint8, device=carrier)
                seconds = min(self._timed_echo(payload, 1 if up else size) for _ in range(3)) - round_trip
                if seconds >= PROBE_SECONDS or size >= PROBE_BYTES:
                    return size / seconds if seconds > 0 else math.inf
                size *= 4

        return LinkSpeed(round_trip, rate(up=True), rate(up=False))

    def _timed_echo(self, payload: Tensor, down_bytes: int) -> float:
        started = clock()
        self._transport.echo(payload, down_bytes)
        return clock() - started

    def send(self, request: Request, on_answer: Callable[[Callable[[], Any]], None]) -> None:
        """Hand a request over.

        `on_answer` is called later, from any thread, with a function for the calling thread to take the
        answer by. That returns the answer's value, or raises what the request came to. Until then nothing is
        queued on a GPU for that thread, which may be capturing.
        """
        client, body = request.client, request.body
        up = {}
        if isinstance(body, SmashedData):
            up = {"smashed_up": body.z.nbytes, "labels_up": body.y.nbytes}
        for kind, bytes in up.items():
            self.ledger.count(kind, bytes, client)

        def arrived(take: Take, there: Reading) -> None:
            seconds = clock() - started
            on_answer(lambda: counted(take(), seconds, there))

        def counted(answer: Answer, seconds: float, there: Reading) -> Any:
            times = RequestTimes(
                count=1,
                round_trip_seconds=seconds if sent is None or there is None else 0.0,
                queue_seconds=answer.queue_seconds,
                compute_seconds=answer.compute_seconds,
                cpu_seconds=answer.cpu_seconds,
                up_bytes=sum(up.values()),
            )
            if answer.value is not None:
                times.down_bytes = answer.value.nbytes
                down = "auxiliary_down" if body.kind in TAKING_UP else "gradient_down"
                self.ledger.count(down, times.down_bytes, client)
            self.log.add(client, body.kind, times)
            self.log.add_round_trip(client, body.kind, sent, there)
            return answer.value

        started, sent = clock(), device_clock(self._transport.carrier)
        self._transport.submit(request, arrived)
        self.log.add(client, body.kind, RequestTimes(send_seconds=clock() - started))

    def deposit_average(self, weights: Weights) -> None:
        """Give the server the averaged client model, to evaluate it and keep it."""
        self.ledger.count("evaluation", weights.nbytes)
        self._transport.call("deposit_average", weights)

    def deposit_auxiliary(self, weights: Weights) -> None:
        """Give the server the averaged auxiliary model, which it fits from here on: after a warm start."""
        self.ledger.count("weights_allreduce", weights.nbytes)
        self._transport.call("deposit_auxiliary", weights)

    def predict(self, z: Tensor) -> Tensor:
        """Ask a finished model's server for its outputs for smashed data z."""
        outputs: Tensor = self._transport.call("predict", z)
        self.ledger.count("evaluation", z.nbytes + outputs.nbytes)
        return outputs
