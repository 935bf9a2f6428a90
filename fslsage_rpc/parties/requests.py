"""What a client may ask of the server, and the envelope it travels in."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.parties.coding import Coded


@dataclass(frozen=True)
class BeginStep:
    """Wait, before a local step that makes requests, until it may begin: see `Turns`."""

    step: int


@dataclass
class SmashedData:
    """Smashed data z `[B, ...]` with its labels y `[B, ...]`; z is cut off its autograd graph.

    It travels coded where a codec is configured.
    """

    z: Tensor | Coded
    y: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.z, Tensor):
            self.z = self.z.detach()

    def to(self, device: torch.device) -> Self:
        """The same request with its tensors on a device."""
        return type(self)(self.z.to(device), self.y.to(device))


class WithoutTensors:
    """A request that is no more than its kind."""

    def to(self, device: torch.device) -> Self:
        """There is nothing to move."""
        return self


@dataclass
class Push(SmashedData):
    """Train on (z, y) and return nothing. The client goes on at once."""

    kind: ClassVar[str] = "push"
    waits_as: ClassVar[str] = Phase.UPLOAD_WAIT
    blocks: ClassVar[bool] = False
    fits: ClassVar[bool] = False
    in_order: ClassVar[bool] = True


@dataclass
class Exchange(SmashedData):
    """Train on (z, y) and return the cut-layer gradient g = dL/dz `[B, ...]`."""

    kind: ClassVar[str] = "exchange"
    waits_as: ClassVar[str] = Phase.GRADIENT_WAIT
    blocks: ClassVar[bool] = True
    fits: ClassVar[bool] = False
    in_order: ClassVar[bool] = True


@dataclass
class Align(WithoutTensors):
    """Fit the client's auxiliary model to the true cut-layer gradients and return its `Weights`."""

    kind: ClassVar[str] = "align"
    waits_as: ClassVar[str] = Phase.ALIGNMENT_WAIT
    blocks: ClassVar[bool] = True
    fits: ClassVar[bool] = True
    in_order: ClassVar[bool] = True


@dataclass
class BeginAlignment(WithoutTensors):
    """Take the true cut-layer gradients of the client's alignment buffer, in turn, and fit its auxiliary
    model to them behind the training: the client goes on at once.
    """

    kind: ClassVar[str] = "begin_alignment"
    waits_as: ClassVar[str] = Phase.ALIGNMENT_WAIT
    blocks: ClassVar[bool] = False
    fits: ClassVar[bool] = False
    in_order: ClassVar[bool] = True


@dataclass
class Collect(WithoutTensors):
    """Return the `Weights` of the alignment that the client has begun, once they are fitted. It has no turn
    in its lane's order.
    """

    kind: ClassVar[str] = "collect"
    waits_as: ClassVar[str] = Phase.COLLECT_WAIT
    blocks: ClassVar[bool] = True
    fits: ClassVar[bool] = True
    in_order: ClassVar[bool] = False


@dataclass
class End(WithoutTensors):
    """There is no more to come in this round: of a client that could not announce its requests."""

    kind: ClassVar[str] = "end"
    waits_as: ClassVar[str] = Phase.DRAIN_WAIT
    blocks: ClassVar[bool] = False
    in_order: ClassVar[bool] = True


Asked = Push | Exchange | Align | BeginAlignment | Collect
Body = Asked | End
KINDS: Mapping[str, type[Asked]] = {
    body.kind: body for body in (Push, Exchange, Align, BeginAlignment, Collect)
}
"""what an algorithm may ask, by the name of its kind

A client waits for the answer to one that `blocks`. One that is `in_order` takes its turn in its lane's order.
One that `fits` is executed beside its lane, from its turn on, where it has one.
"""
TAKING_UP = frozenset({Align.kind, Collect.kind})
"""those whose answer is the client's auxiliary model from there on"""
ALIGNING = frozenset({Align.kind, BeginAlignment.kind})
"""those at whose turn true gradients are taken, and fitted to"""


class Ask(NamedTuple):
    """A request without its tensors: what a client asks of the server, and the bytes that this moves."""

    step: int
    """the client's local step that it is made at, from 0"""
    kind: str
    samples: int = 0
    smashed_bytes: int | None = 0
    """as they travel; None while they depend on values that are not there yet"""
    label_bytes: int = 0
    answer_bytes: int | None = 0
    """of a gradient, or an auxiliary model; likewise"""
    uncoded_bytes: int = 0
    """of both without codecs"""
    at_once: bool = False
    """of a rehearsed one: the client computes nothing between the request before, of its step, and this"""

    @property
    def up_bytes(self) -> int:
        """Of all its tensors, where that is known."""
        assert self.smashed_bytes is not None
        return self.smashed_bytes + self.label_bytes

    @property
    def down_bytes(self) -> int:
        """Of its answer, where that is known."""
        assert self.answer_bytes is not None
        return self.answer_bytes

    def __str__(self) -> str:
        amount = f" of {self.samples} samples" if self.samples else ""
        size = f", {self.smashed_bytes:,} bytes" if self.smashed_bytes else ""
        return f"{self.kind}{amount}{size}"


@dataclass
class Request:
    """One request of one client; `number` counts the client's requests in the round from 0.

    The transport does not keep the order of asynchronous calls, so the mailbox puts them back by number. One
    that is not `in_order` is not counted: it has the number of the next one that is.
    """

    client: int
    number: int
    step: int
    """the client's local step that it is made at, from 0"""
    body: Body


Announced = Sequence[int] | None
"""the local steps, ascending, at which a client will make requests; None: it will say when there are no more
(`End`)"""


@dataclass
class Answer:
    """What a request comes to (a gradient, `Weights`, or None for a push), and how long it took the server.

    A gradient and weights are coded where a codec is configured.

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

ClientRound = Generator[BeginStep | Body, Any, None]
"""One client's round: its steps, with a turn before each that makes requests."""
