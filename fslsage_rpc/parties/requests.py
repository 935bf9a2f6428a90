"""What a client may ask of the server, and the envelope it travels in."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """Wait, before a local step that makes requests, until it may begin: see `Turns`."""

    step: int


@dataclass
class SmashedData:
    """Smashed data z `[B, ...]` with its labels y `[B, ...]`; z is cut off its autograd graph."""

    z: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        self.z = self.z.detach()

    def to(self, device: torch.device) -> Self:
        """The same request with its tensors on a device."""
        return type(self)(self.z.to(device), self.y.to(device))


@dataclass
class Push(SmashedData):
    """Train on (z, y) and return nothing. The client goes on at once."""

    kind: ClassVar[str] = "push"
    waits_as: ClassVar[str] = "upload_wait"
    blocks: ClassVar[bool] = False
    fits: ClassVar[bool] = False


@dataclass
class Exchange(SmashedData):
    """Train on (z, y) and return the cut-layer gradient g = dL/dz `[B, ...]`."""

    kind: ClassVar[str] = "exchange"
    waits_as: ClassVar[str] = "gradient_wait"
    blocks: ClassVar[bool] = True
    fits: ClassVar[bool] = False


@dataclass
class Align:
    """Fit the client's auxiliary model to the true cut-layer gradients and return its `Weights`."""

    kind: ClassVar[str] = "align"
    waits_as: ClassVar[str] = "alignment_wait"
    blocks: ClassVar[bool] = True
    fits: ClassVar[bool] = True

    def to(self, device: torch.device) -> Self:
        """There is nothing to move."""
        return self


Body = Push | Exchange | Align

KINDS: Mapping[str, type[Body]] = {body.kind: body for body in (Push, Exchange, Align)}
"""requests by the name of their kind; each takes its turn in its lane's order

A client waits for the answer to one that `blocks`. One that `fits` is executed beside its lane, from its turn
on.
"""


class Ask(NamedTuple):
    """A request that a client makes in its round."""

    step: int
    """the local step, from 0"""
    kind: str
    at_once: bool = False
    """the client computes nothing between the request before it, of the same step, and this one"""


@dataclass
class Request:
    """One request of one client; `number` counts the client's requests in the round from 0.

    The transport does not keep the order of asynchronous calls, so the mailbox puts them back by number.
    """

    client: int
    number: int
    body: Body


@dataclass
class Answer:
    """What a request comes to (a gradient, `Weights`, or None for a push), and how long it took the server.

    `queue_seconds`: from its arrival to its turn; `compute_seconds`: its execution; by the clock of the
    server's host, which on a GPU has then only queued it: what the GPU took is in the server's report.
    `cpu_seconds`: of the threads that executed it.
    """

    value: Any
    queue_seconds: float
    compute_seconds: float
    cpu_seconds: float = 0.0

    def to(self, device: torch.device) -> Self:
        """The same answer with its tensors on a device."""
        value = None if self.value is None else self.value.to(device)
        return replace(self, value=value)


ClientStep = Generator[Body, Any, None]
"""One local step: yields what it asks of the server and is resumed with the answer (None for a push)."""

ClientRound = Generator[Turn | Body, Any, None]
"""One client's round: its steps, with a turn before each that makes requests."""
