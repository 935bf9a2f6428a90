"""A client rank's way to the server, whatever the transport: its tensors are counted here."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.device.clock import Reading, clock, device_clock
from fslsage_rpc.measure.requests import RequestLog, RequestTimes
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.requests import Announced, Answer, Request, SmashedData
from fslsage_rpc.transport.wire_ledger import WireLedger

CPU = torch.device("cpu")
Take = Callable[[], Answer]
"""takes an answer in, on the thread that sent the request, or raises what the request came to; what that
thread queues from then on comes after the answer's tensors"""
OnAnswer = Callable[[Take, Reading], None]
"""gets, on any thread, an answer to be taken, and the reading of the carrier's clock at which its tensors are
there; None where the carrier is no GPU"""
PROBE_SECONDS = 0.1
PROBE_BYTES = 2**24


class ServerLink(ABC):
    """Calls to the server. Subclasses carry them; this class counts their tensors and takes their times.

    Args:
        carrier: the device that requests' tensors are on when they are handed over, and answers' when they
            come.
    """

    staged: bool = False
    """tensors pass through host memory on their way from a GPU"""

    def __init__(self, ledger: WireLedger, log: RequestLog, carrier: torch.device = CPU):
        self.ledger = ledger
        self.log = log
        self.carrier = carrier

    @abstractmethod
    def announce(self, round: int, plans: Mapping[int, Announced], ranking: Sequence[int]) -> None:
        """Tell the server at which steps each of this rank's participants will make requests, if it knows."""

    @abstractmethod
    def server_clock(self) -> float:
        """A reading of the server's clock, in seconds, to draw traces by."""

    @abstractmethod
    def _echo(self, payload: Tensor, down_bytes: int) -> None:
        """Send a tensor to the server and get one of so many bytes back."""

    @abstractmethod
    def _initial_weights(self) -> tuple[Weights, Weights | None]: ...

    @abstractmethod
    def _submit(self, request: Request, on_answer: OnAnswer) -> None:
        """Carry a request to the server and its answer back."""

    @abstractmethod
    def _deposit_average(self, weights: Weights) -> None: ...

    @abstractmethod
    def _deposit_auxiliary(self, weights: Weights) -> None: ...

    @abstractmethod
    def _predict(self, z: Tensor) -> Tensor: ...

    def initial_weights(self, client: int) -> tuple[Weights, Weights | None]:
        """The client and auxiliary weights that this client starts from."""
        weights, auxiliary = self._initial_weights()
        bytes = weights.bytes + (auxiliary.bytes if auxiliary else 0)
        self.ledger.count("initial_broadcast", bytes, client)
        return weights, auxiliary

    def measure_speed(self) -> LinkSpeed:
        """Round trip and rates of this rank's link, which nothing else uses meanwhile.

        The round trip is the median of 21 empty calls. A rate is bytes over seconds, less a round trip, of
        the fastest of 3 transfers: of 256 KiB, or of more until one takes 0.1 s.
        """
        empty = torch.zeros(1, dtype=torch.uint8, device=self.carrier)
        round_trip = statistics.median(self._timed_echo(empty, 1) for _ in range(21))

        def rate(up: bool) -> float:
            size = 2**18
            while True:
                payload = torch.zeros(size if up else 1, dtype=torch.uint8, device=self.carrier)
                seconds = min(self._timed_echo(payload, 1 if up else size) for _ in range(3)) - round_trip
                if seconds >= PROBE_SECONDS or size >= PROBE_BYTES:
                    return size / seconds if seconds > 0 else math.inf
                size *= 4

        return LinkSpeed(round_trip, rate(up=True), rate(up=False))

    def _timed_echo(self, payload: Tensor, down_bytes: int) -> float:
        started = clock()
        self._echo(payload, down_bytes)
        return clock() - started

    def send(self, request: Request, on_answer: Callable[[Callable[[], Any]], None]) -> None:
        """Hand a request over.

        `on_answer` is called later, from any thread, with a function that the calling thread takes the
        answer by: it returns the answer's value, or raises what the request came to. Until then nothing is
        queued on a GPU for that thread, which may be capturing.
        """
        client, body = request.client, request.body
        up = (
            {"smashed_up": _bytes(body.z), "labels_up": _bytes(body.y)}
            if isinstance(body, SmashedData)
            else {}
        )
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
            if isinstance(answer.value, Tensor):
                times.down_bytes = _bytes(answer.value)
                self.ledger.count("gradient_down", times.down_bytes, client)
            elif isinstance(answer.value, Weights):
                times.down_bytes = answer.value.bytes
                self.ledger.count("auxiliary_down", times.down_bytes, client)
            self.log.add(client, body.kind, times)
            self.log.add_round_trip(client, body.kind, sent, there)
            return answer.value

        started, sent = clock(), device_clock(self.carrier)
        self._submit(request, arrived)
        self.log.add(client, body.kind, RequestTimes(send_seconds=clock() - started))

    def deposit_average(self, weights: Weights) -> None:
        """Give the server the averaged client model, to evaluate it and keep it."""
        self.ledger.count("evaluation", weights.bytes)
        self._deposit_average(weights)

    def deposit_auxiliary(self, weights: Weights) -> None:
        """Give the server the averaged auxiliary model, which it fits from here on: after a warm start."""
        self.ledger.count("weights_allreduce", weights.bytes)
        self._deposit_auxiliary(weights)

    def predict(self, z: Tensor) -> Tensor:
        """Of a finished model's server: what it gives for smashed data z."""
        logits = self._predict(z)
        self.ledger.count("evaluation", _bytes(z) + _bytes(logits))
        return logits


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
