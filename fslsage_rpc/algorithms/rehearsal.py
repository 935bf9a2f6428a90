"""A round read off `client_step` before it is trained: what each client asks of the server, and when.

The generator is run on a stand-in for the client and on tensors of the meta device, which have shapes and no
numbers. From what it yields follow the announced requests, the paper ledger, and how full alignment buffers
are. So do the lower bound of a round, and the predictions of `plan`.
"""

import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.algorithms.client_round import refusal, watched
from fslsage_rpc.config.own import first_line, is_own
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.flat import Weights, sorted_weights
from fslsage_rpc.models.splitting import SplitModel
from fslsage_rpc.parties.client import Client, NoAuxiliary
from fslsage_rpc.parties.coding import Coded, Codings
from fslsage_rpc.parties.requests import (
    ALIGNING,
    KINDS,
    TAKING_UP,
    Ask,
    BeginAlignment,
    Collect,
    Exchange,
    Push,
    SmashedData,
)
from fslsage_rpc.tasks import Task

META = torch.device("meta")
WITH_CUT: frozenset[object] = frozenset({"forward", "backward", "estimate", "train_auxiliary"})
WITH_WHOLE_MODEL: frozenset[object] = frozenset({"train_whole_model"})
"""methods of clients that hold a part of the model, and of those that hold all of it"""


class StandIn:
    """Stands for a `Client`: what algorithms use of one, without numbers.

    Args:
        smashed: smashed data of so many samples.

    Attributes:
        events: the methods called in a local step, by name, and what it asks, in order.
    """

    def __init__(
        self,
        client_id: int,
        smashed: Callable[[int], Tensor],
        weights: Weights,
        auxiliary_weights: Weights | None,
        codings: Codings,
    ):
        self.id = client_id
        self.codings = codings
        self.weights = weights
        self.events: list[str | Ask] = []
        self._smashed = smashed
        self._auxiliary_weights = auxiliary_weights

    def note(self, ask: Ask) -> None:
        """A request is made."""
        at_once = bool(self.events) and isinstance(self.events[-1], Ask)
        self.events.append(ask._replace(at_once=True) if at_once else ask)

    @property
    def auxiliary_weights(self) -> Weights:
        """The weights of its auxiliary model, where there is one; like all of this, without numbers."""
        if self._auxiliary_weights is None:
            raise NoAuxiliary
        return self._auxiliary_weights

    def forward(self, x: Tensor) -> Tensor:
        """Smashed data z `[B, ...]`."""
        self.events.append("forward")
        return self._smashed(x.shape[0])

    def estimate(self, z: Tensor, y: Tensor) -> Tensor:
        """A gradient like z `[B, ...]`."""
        assert self.auxiliary_weights
        self.events.append("estimate")
        return z

    def train_auxiliary(self, z: Tensor, y: Tensor) -> Tensor:
        """A gradient like z `[B, ...]`, from which on the client trains its auxiliary model."""
        assert self.auxiliary_weights
        self.events.append("train_auxiliary")
        return z

    def train_whole_model(self, x: Tensor, y: Tensor) -> None:
        """No more than that it was called."""
        self.events.append("train_whole_model")

    def backward(self, z: Tensor, gradient: Tensor) -> None:
        """No more than that it was called, with a gradient like z."""
        if not (isinstance(gradient, Tensor) and gradient.shape == z.shape):
            got = list(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise TypeError(f"backward got {got} for a gradient, of smashed data {list(z.shape)}")
        self.events.append("backward")


@dataclass(frozen=True)
class ClientRehearsal:
    """One client's round: for each local step the client's methods that it calls, and what it asks, in
    order.
    """

    steps: Sequence[Sequence[str | Ask]]

    @cached_property
    def asks(self) -> list[Ask]:
        """All requests, in order."""
        return [event for events in self.steps for event in events if isinstance(event, Ask)]

    @property
    def trains_auxiliary(self) -> bool:
        """Does the client train its auxiliary model?"""
        return any("train_auxiliary" in events for events in self.steps)

    @property
    def uploaded(self) -> int:
        """The samples that go into the client's alignment buffer."""
        return sum(ask.samples for ask in self.asks if ask.kind == Push.kind)

    @property
    def alignments(self) -> list[str]:
        """The kinds of the requests by which the client is aligned, in order."""
        return [ask.kind for ask in self.asks if ask.kind in ALIGNING | TAKING_UP]

    def aligned(self, buffered: int, size: int) -> list[int]:
        """The samples in the client's alignment buffer at each of its alignments.

        Args:
            buffered: those at the beginning of the round, and `size` the most that it holds.
        """
        found = []
        for ask in self.asks:
            if ask.kind == Push.kind:
                buffered = min(buffered + ask.samples, size)
            elif ask.kind in ALIGNING:
                found.append(buffered)
        return found


@dataclass(frozen=True)
class Course:
    """The course of a round: what each participant asks of the server, and whether one trains its auxiliary
    model. Rehearsed; or, where requests depend on values, as it was.
    """

    asks: dict[int, list[Ask]]
    trains_auxiliary: bool

    @property
    def sized(self) -> bool:
        """Are the bytes of all requests and answers known?"""
        asked = [ask for asks in self.asks.values() for ask in asks]
        return not any(None in (ask.smashed_bytes, ask.answer_bytes) for ask in asked)

    @classmethod
    def joined(cls, parts: Sequence["Course"]) -> "Course":
        """All participants' course, from those of some each."""
        asks = {client: mine for part in parts for client, mine in part.asks.items()}
        return cls(asks, any(part.trains_auxiliary for part in parts))

    def steps(self, client: int) -> list[int]:
        """The local steps at which a client makes requests that are in order: one entry for each."""
        return [ask.step for ask in self.asks[client] if KINDS[ask.kind].in_order]

    def collects(self, client: int) -> bool:
        """Does a client collect an auxiliary model that was fitted behind the training?"""
        return any(ask.kind == Collect.kind for ask in self.asks[client])

    @property
    def takes_up(self) -> bool:
        """Does a client take up an auxiliary model that the server has fitted?"""
        return any(ask.kind in TAKING_UP for asks in self.asks.values() for ask in asks)


class Rehearsal:
    """Rehearses the rounds of an algorithm.

    Args:
        algorithm: an object of its own, so that what it remembers is not the training's.

    Raises:
        InputError: the first round of an algorithm of the user's own cannot be.
    """

    def __init__(self, algorithm: Algorithm, task: Task, split: SplitModel):
        self._algorithm = algorithm
        self._federation = algorithm.federation
        self._buffer_size = algorithm.keys.alignment.buffer_size
        self._codings = Codings(task.config.comm.codec, task.config.seed)
        self._formats = (
            (task.sample_shape, task.precision.weights),
            (task.label_shape, task.label_dtype),
            (split.smashed_shape, task.precision.smashed),
        )
        self._weights = _without_numbers(
            split.whole() if algorithm.client_holds_whole_model else split.client
        )
        self._auxiliary = None if algorithm.auxiliary == "none" else _without_numbers(split.auxiliary)
        self._batches: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # x, y and z, by their samples
        self._alignments: dict[tuple[int, int], list[str]] = {}  # by client and round
        self._last: tuple[tuple[int, list[int]], dict[int, ClientRehearsal]] | None = None
        first = self.course(0)
        if is_own(algorithm.keys.name):
            self._last = None
            if self.course(0) != first:
                raise refusal(algorithm, "asks otherwise when it is rehearsed again: by what it remembers")

    def course(self, t: int) -> Course | None:
        """The course of a round; None where requests depend on values.

        Raises:
            InputError: `client_step` of an algorithm of the user's own fails, or asks what cannot be.
        """
        if self._algorithm.requests_depend_on_values:
            if self._algorithm.client_holds_whole_model:  # there is no server model to ask
                return Course({client: [] for client in self._federation.participants(t)}, False)
            return None
        clients = self.clients(t)
        return Course(
            {client: rehearsed.asks for client, rehearsed in clients.items()},
            any(rehearsed.trains_auxiliary for rehearsed in clients.values()),
        )

    def asks_for(self, kinds: Collection[str], rounds: Iterable[int]) -> bool:
        """Is there a request of these kinds in these rounds? Yes, where that depends on values."""
        return any(
            course is None or any(ask.kind in kinds for asks in course.asks.values() for ask in asks)
            for course in map(self.course, rounds)
        )

    def clients(self, t: int) -> dict[int, ClientRehearsal]:
        """The round of each participant."""
        participants = self._federation.participants(t)
        if self._last is None or self._last[0] != (t, participants):
            rehearsed = {client: self.client(client, t) for client in participants}
            for client, its in rehearsed.items():
                if 0 in its.aligned(0, self._buffer_size) and not self.buffered(client, t):
                    kind = KINDS[its.alignments[0]].__name__
                    wrong = f"yields {kind} in round {t + 1} for client {client}, which has pushed nothing"
                    raise refusal(self._algorithm, wrong)
                if is_own(self._algorithm.keys.name):
                    self._check_alignments(client, t, its)
            self._last = (t, participants), rehearsed
        return self._last[1]

    def client(self, client: int, t: int) -> ClientRehearsal:
        """The round of a client, if it takes part."""
        sizes = self._federation.batch_sizes[client]
        stand_in = StandIn(
            client, lambda size: self._batch(size)[2], self._weights, self._auxiliary, self._codings
        )
        return ClientRehearsal([self._step(stand_in, t, k, size) for k, size in enumerate(sizes)])

    def buffered(self, client: int, t: int) -> int:
        """The samples in a client's alignment buffer at the beginning of a round."""
        samples = 0
        for past in reversed(range(t)):
            if samples >= self._buffer_size:
                break
            if client in self._federation.participants(past):
                samples += self.client(client, past).uploaded
        return min(samples, self._buffer_size)

    def aligned(self, client: int, t: int) -> list[int]:
        """The samples in the client's alignment buffer at each of its alignments in a round."""
        return self.client(client, t).aligned(self.buffered(client, t), self._buffer_size)

    def begun(self, client: int, t: int) -> int:
        """The samples of the alignment that a client has begun before a round and has yet to collect; 0 where
        there is none.
        """
        for past in reversed(range(t)):
            there = client in self._federation.participants(past)
            if there and (alignments := self._alignments_of(client, past)):
                return self.aligned(client, past)[-1] if alignments[-1] == BeginAlignment.kind else 0
        return 0

    def _alignments_of(self, client: int, t: int) -> list[str]:
        """`ClientRehearsal.alignments`; each round is looked back at from many others."""
        if (client, t) not in self._alignments:
            self._alignments[client, t] = self.client(client, t).alignments
        return self._alignments[client, t]

    def _check_alignments(self, client: int, t: int, rehearsed: ClientRehearsal) -> None:
        """An alignment that is begun is collected, once, in a later round, before the next. In its own round
        the server may not have come to it yet.

        Raises:
            InputError: it is not.
        """
        alignments = rehearsed.alignments
        earlier, now = bool(alignments) and bool(self.begun(client, t)), False
        for kind in alignments:
            yields = f"yields {KINDS[kind].__name__} in round {t + 1} for client {client}"
            if kind == Collect.kind and not earlier:
                raise refusal(self._algorithm, f"{yields}, which has begun none before that round")
            if kind != Collect.kind and (earlier or now):
                raise refusal(self._algorithm, f"{yields}, which has one to collect")
            earlier, now = False, kind == BeginAlignment.kind

    def _step(self, client: StandIn, t: int, step: int, samples: int) -> list[str | Ask]:
        """The events of a local step, in order."""
        algorithm, (x, y, _) = self._algorithm, self._batch(samples)
        client.events = []
        as_client = cast(Client, client)
        try:
            requests = watched(
                algorithm,
                as_client,
                algorithm.client_step(as_client, t, step, x, y),
                step,
                client.note,
            )
            answer: Tensor | Coded | Weights | None = None
            while True:
                body = requests.send(answer)
                answer = client.auxiliary_weights if body.kind in TAKING_UP else None
                if isinstance(body, SmashedData):
                    self._check_formats(body)
                    answer = body.z if isinstance(body, Exchange) else None
        except StopIteration:
            pass
        except InputError:
            raise
        except Exception as error:  # the user's class may raise anything
            reads = "; it may read no numbers, unless it says requests_depend_on_values = True"
            hint = reads if "meta" in str(error).lower() else ""
            raise refusal(
                algorithm, f"fails in its rehearsal, {_place(algorithm, error)} ({first_line(error)}){hint}"
            ) from None
        lacking = WITH_CUT if algorithm.client_holds_whole_model else WITH_WHOLE_MODEL
        if not lacking.isdisjoint(client.events):
            called = next(event for event in client.events if event in lacking)
            holds = f"where client_holds_whole_model is {algorithm.client_holds_whole_model}"
            raise refusal(algorithm, f"calls {called}, {holds}")
        return client.events

    def _check_formats(self, body: SmashedData) -> None:
        """Hold z and y to what the models and the loss take.

        Raises:
            InputError: they are not.
        """
        _, labels, smashed = self._formats
        for name, tensor, (shape, dtype) in (("z", body.z, smashed), ("y", body.y, labels)):
            if (tensor.shape[1:], tensor.dtype) != (tuple(shape), dtype):
                raise refusal(
                    self._algorithm,
                    f"yields {name} {_shown(tensor.shape)} of {tensor.dtype}, expected "
                    f"{_shown((tensor.shape[0], *shape))} of {dtype}",
                )

    def _batch(self, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and z of so many samples."""
        if samples not in self._batches:
            x, y, z = (
                torch.empty(samples, *shape, dtype=dtype, device=META) for shape, dtype in self._formats
            )
            self._batches[samples] = x, y, z
        return self._batches[samples]


def _shown(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _place(algorithm: Algorithm, error: Exception) -> str:
    """Where in the file of the user's class an error comes from."""
    file = getattr(sys.modules.get(type(algorithm).__module__), "__file__", None)
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == file]
    return f"at {Path(file).name}, line {lines[-1]}" if file and lines else "on tensors without numbers"


def _without_numbers(model: nn.Module) -> Weights:
    """A model's `Weights` on the meta device."""
    floats, integers = sorted_weights(model)
    return Weights(
        torch.empty(sum(map(torch.numel, floats)), dtype=floats[0].dtype if floats else None, device=META),
        torch.empty(sum(map(torch.numel, integers)), dtype=torch.int64, device=META),
    )
