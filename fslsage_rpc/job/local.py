"""Everything in one process, without torch.distributed: the oracle for tests, and the way to run in a
notebook.

The server works inside the call that hands it a request, so nothing here happens at the same time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fslsage_rpc.algorithms.bound import NO_LINK, LinkSpeed
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.clock import clock, device_clock
from fslsage_rpc.job.world import World, open_device
from fslsage_rpc.measure.requests import RequestLog
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.predictor import FinishedServer
from fslsage_rpc.parties.requests import Announced, Request
from fslsage_rpc.parties.server import Server
from fslsage_rpc.transport.base import OnAnswer, ServerLink
from fslsage_rpc.transport.wire_ledger import WireLedger


class LocalWorld(World):
    """One process that is server and client rank at once."""

    works_beside = False

    def __init__(self, config: Config):
        self.rank, self.size = 0, 1
        self.client_ranks, self.client_rank = 1, 0
        self.homes, self.home = 1, 0
        self.device = open_device(config, 0)

    def connect(
        self, server: Server | FinishedServer | None, ledger: WireLedger, log: RequestLog
    ) -> ServerLink:
        assert server is not None
        return LocalLink(server, ledger, log, self.device)

    def start(self, kind: str, number: int, work: Callable[[], None]) -> None:
        work()

    def barrier(self) -> None:
        pass

    def client_barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def gather_beside(self, name: str, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def all_reduce(self, weights: Weights, ledger: WireLedger) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {
            "transport": "local",
            "averaging": None,
            "rpc_transports": None,
            "rpc_channels": None,
            "request_tensors": None,
            "interface": None,
        }

    def fail(self, error: BaseException) -> NoReturn:
        raise error

    def close(self) -> None:
        pass


class LocalLink(ServerLink):
    """Calls the server object."""

    def __init__(self, server: Any, ledger: WireLedger, log: RequestLog, device: torch.device):
        super().__init__(ledger, log, carrier=device)
        self._server = server

    def announce(self, round: int, plans: Mapping[int, Announced], ranking: Sequence[int]) -> None:
        self._server.announce(round, plans, ranking)

    def server_clock(self) -> float:
        return clock()

    def measure_speed(self) -> LinkSpeed:
        return NO_LINK

    def _echo(self, payload: Tensor, down_bytes: int) -> None:
        pass

    def _initial_weights(self) -> tuple[Weights, Weights | None]:
        initial: tuple[Weights, Weights | None] = self._server.initial
        return initial

    def _submit(self, request: Request, on_answer: OnAnswer) -> None:
        self._server.submit(request, lambda answer: on_answer(lambda: answer, device_clock(self.carrier)))

    def _deposit_average(self, weights: Weights) -> None:
        self._server.averaged_weights.load(weights)

    def _deposit_auxiliary(self, weights: Weights) -> None:
        self._server.take_auxiliary(weights)

    def _predict(self, z: Tensor) -> Tensor:
        logits: Tensor = self._server.predict(z)
        return logits
