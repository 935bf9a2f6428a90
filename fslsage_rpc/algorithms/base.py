"""What an algorithm has to say; everything else follows from it (`rehearsal.py`) or is the same for all."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from fslsage_rpc.config.schema import AlgorithmKeys
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import ClientStep

OF_ALIGNMENT = frozenset({"alignment", "average_auxiliary", "measure_drift"})


class Algorithm(ABC):
    """One federated (split) learning algorithm.

    A subclass is a page: its paper, a client's local step, and a few attributes. `client_step` is run twice:
    rehearsed, by another object and on tensors without numbers, and in earnest. So all that it asks of the
    server follows from the configuration, the client, the round and the step.
    """

    name: ClassVar[str]
    """what configurations call it; one of the user's own needs none"""
    uses: ClassVar[frozenset[str]] = frozenset()
    """the keys of the configuration's `algorithm` section that its methods read"""
    client_holds_whole_model: ClassVar[bool] = False
    """FedAvg: there is no cut, and the server only evaluates"""
    server_replicas: ClassVar[bool] = False
    """one server model (and lane) per client, averaged at the end of the round; else one for all"""
    auxiliary: ClassVar[Literal["none", "aligned", "trained"]] = "none"
    """the auxiliary model: none, aligned by the server, or trained by the client"""
    requests_depend_on_values: ClassVar[bool] = False
    """what it asks is known only once it has asked: it is not rehearsed, and `server.order` is `arrival`"""

    def __init__(self, keys: AlgorithmKeys, federation: Federation):
        self.keys = keys
        self.federation = federation

    @abstractmethod
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        """One local step of a participating client on x `[B, ...]` and labels y `[B, ...]`.

        Args:
            t: the round, from 0; `step`: in it, likewise.
        """

    def ranking(self, t: int) -> list[int]:
        """All participants, in the order that the server takes them in within a step."""
        return self.federation.participants(t)

    @property
    def average_auxiliary(self) -> Literal["never", "alignment", "round"]:
        """When the auxiliary models are averaged: every round, or at the end of one in which clients take
        fitted ones up. Where the server goes on from trained ones, these are averaged, too.
        """
        return self.keys.average_auxiliary if self.auxiliary == "aligned" else "round"

    @property
    def interval(self) -> int:
        """Rounds after which the kinds of rounds repeat: the alignment interval, where there is one."""
        return (self.auxiliary == "aligned" and self.keys.align_every) or 1

    @classmethod
    def reads(cls) -> frozenset[str]:
        """The keys that make a difference: those that it uses, and those by which the server aligns."""
        return cls.uses | (OF_ALIGNMENT if cls.auxiliary == "aligned" else frozenset())

    @classmethod
    def train_loss_of(cls) -> Literal["batches", "uploads"]:
        """What `train_loss` is the mean loss over: all batches trained on, or what the server trained on."""
        return "batches" if cls.auxiliary == "none" else "uploads"
