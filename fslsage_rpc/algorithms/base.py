"""What an algorithm has to say; everything else (ranks, transports, order, timing) is the same for all of
them.
"""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from types import GeneratorType
from typing import ClassVar, Literal

from torch import Tensor

from fslsage_rpc.config import AlgorithmKeys
from fslsage_rpc.errors import InputError
from fslsage_rpc.federation import Federation
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Body, ClientRound, ClientStep, Turn


@dataclass(frozen=True)
class Sizes:
    """Bytes of the client, server and auxiliary model (all parameters and buffers) and of one sample's
    smashed data.
    """

    client: int
    server: int
    auxiliary: int
    smashed: int


class Algorithm(ABC):
    """One federated (split) learning algorithm.

    A subclass is a page: its paper, a client's local step, the steps that make requests, and its line of the
    paper ledger.
    """

    name: ClassVar[str]
    """what configurations call it; one of the user's own needs none"""
    uses: ClassVar[frozenset[str]] = frozenset()
    """the keys of the configuration's `algorithm` section that it reads, besides the name"""
    client_holds_whole_model: ClassVar[bool] = False
    """FedAvg: there is no cut, and the server only evaluates"""
    server_replicas: ClassVar[bool] = False
    """one server model (and lane) per client, averaged at the end of the round; else one for all"""
    auxiliary: ClassVar[Literal["none", "aligned", "trained"]] = "none"
    """the auxiliary model: none, aligned by the server, or trained by the client"""

    def __init__(self, keys: AlgorithmKeys, federation: Federation):
        self.keys = keys
        self.federation = federation

    @classmethod
    def train_loss_of(cls) -> Literal["batches", "uploads"]:
        """What `train_loss` is the mean loss over: all batches trained on, or what the server trained on."""
        return "batches" if cls.client_holds_whole_model else "uploads"

    @abstractmethod
    def client_step(self, client: Client, round: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        """One local step of a participating client on x `[B, ...]` and labels y `[B, ...]`."""

    @abstractmethod
    def request_steps(self, client: int, round: int) -> list[int]:
        """The local steps, ascending, at which `client_step` yields: one entry per request."""

    @abstractmethod
    def paper_bytes(self, sizes: Sizes, round: int) -> int:
        """The paper ledger's bytes of one round, all participants together."""

    def client_round(self, client: Client, round: int) -> ClientRound:
        """The round of one participating client, starting from the averaged client model.

        Between two steps it holds neither a batch nor activations.

        Raises:
            InputError: a step of an algorithm of the user's own makes other requests than it announced, for
                which the server would wait in vain.
        """
        batches = client.batches(round)
        announced = Counter(self.request_steps(client.id, round))
        for step in range(self.federation.steps(client.id)):
            if announced[step]:
                yield Turn(step)
            requests = self.client_step(client, round, step, *next(batches))
            yield from self._as_announced(requests, step, announced[step])

    def _as_announced(self, requests: ClientStep, step: int, announced: int) -> ClientStep:
        """The requests of a local step, counted."""
        wrong = f"algorithm.name: got {self.keys.name!r}, whose client_step"
        if not isinstance(requests, GeneratorType):
            raise InputError(f"{wrong} returns {type(requests).__name__}, expected it to yield its requests")
        made, answer = 0, None
        while True:
            try:
                body = requests.send(answer)
            except StopIteration:
                break
            if not isinstance(body, Body):
                raise InputError(f"{wrong} yields {type(body).__name__}, expected Push, Exchange or Align")
            made += 1
            if made > announced:
                break
            answer = yield body
        if made != announced:
            got = "more" if made > announced else made
            raise InputError(
                f"{wrong} makes {got} requests at local step {step}, expected {announced}, as request_steps "
                "says"
            )

    def ranking(self, round: int) -> list[int]:
        """The participants in the order that the server takes them in within a step."""
        return self.federation.participants(round)

    def aligns(self, client: int, round: int) -> bool:
        """Does this participant align in this round?"""
        return False

    def averages_auxiliary(self, round: int) -> bool:
        """Are the auxiliary models averaged at the end of this round?"""
        return False

    def warms_up(self, round: int) -> bool:
        """Do the clients train the auxiliary models in this round, after which the server takes them over?"""
        return False

    @property
    def interval(self) -> int:
        """Rounds after which the kinds of rounds repeat: the alignment interval, where there is one."""
        return 1
