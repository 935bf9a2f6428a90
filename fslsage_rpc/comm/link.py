"""A client rank's way to the server, whatever the transport: its tensors are counted here."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fslsage_rpc.comm.ledger import WireLedger
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.requests import Request, SmashedData


class ServerLink(ABC):
    """Calls to the server. Subclasses carry them; this class counts their tensors."""

    def __init__(self, ledger: WireLedger):
        self.ledger = ledger

    @abstractmethod
    def announce(self, plans: Mapping[int, Sequence[int]], ranking: Sequence[int]) -> None:
        """Tell the server at which steps each of this rank's participants will make requests."""

    @abstractmethod
    def _initial_weights(self) -> tuple[Weights, Weights | None]: ...

    @abstractmethod
    def _submit(self, request: Request, on_answer: Callable[[Any], None]) -> None: ...

    @abstractmethod
    def _deposit_average(self, weights: Weights) -> None: ...

    @abstractmethod
    def _deposit_auxiliary(self, weights: Weights) -> None: ...

    def initial_weights(self, client: int) -> tuple[Weights, Weights | None]:
        """The client and auxiliary weights that this client starts from."""
        weights, auxiliary = self._initial_weights()
        bytes = weights.bytes + (auxiliary.bytes if auxiliary else 0)
        self.ledger.count("initial_broadcast", bytes, client)
        return weights, auxiliary

    def send(self, request: Request, on_answer: Callable[[Any], None]) -> None:
        """Hand a request over; `on_answer` is called later, from any thread, with the answer or the
        exception.
        """
        client, body = request.client, request.body
        if isinstance(body, SmashedData):
            self.ledger.count("smashed_up", _bytes(body.z), client)
            self.ledger.count("labels_up", _bytes(body.y), client)

        def counted(answer: Any) -> None:
            if isinstance(answer, Tensor):
                self.ledger.count("gradient_down", _bytes(answer), client)
            elif isinstance(answer, Weights):
                self.ledger.count("auxiliary_down", answer.bytes, client)
            on_answer(answer)

        self._submit(request, counted)

    def deposit_average(self, weights: Weights) -> None:
        """Give the server the averaged client model, to evaluate it and keep it."""
        self.ledger.count("evaluation", weights.bytes)
        self._deposit_average(weights)

    def deposit_auxiliary(self, weights: Weights) -> None:
        """Give the server the averaged auxiliary model, which it fits from here on: after a warm start."""
        self.ledger.count("weights_allreduce", weights.bytes)
        self._deposit_auxiliary(weights)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
