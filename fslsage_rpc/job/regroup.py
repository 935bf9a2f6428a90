"""The policy of `clients.on_loss: drop`: which processes make up the job, after each loss and with newcomers.

Rank 0 writes the list of them anew whenever one is lost, or joins; all of them read it in the job's store.
Every process has a number, its RANK as it was started. It also has an identity of its own, so that a
replacement is not taken for the process that it replaces.
"""

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fslsage_rpc.job.connections import open_sockets
from fslsage_rpc.job.signs_of_life import Policy, SignsOfLife

FRESH_SECONDS = 3.0
"""a newcomer that gave its last sign of life longer ago is not let in"""
SETTLING_SECONDS = 0.5
"""how long a loss waits for others: what ends one process often ends several"""
NEWS_SECONDS = 3.0
"""how long an error that does not look like a loss waits for news of one"""
LEFT_BEHIND = "the others took this rank for lost and went on without it"


@dataclass(frozen=True)
class Generation:
    """The processes that train together, until one is lost or joins.

    `members`: identity by number. `too_few`: why there is no next one; known to rank 0 alone.
    """

    number: int
    members: Mapping[int, str]
    too_few: str | None = None


NONE_YET = Generation(-1, {})


class Regroup(Policy):
    """A new generation begins where a client rank is lost.

    Rank 0 watches all others, and they watch rank 0, whose end is everybody's. On rank 0 the thread that
    gives signs of life learns of losses, by `lose` or by silence, and writes the next generation. On the
    others it reads it. Either way it then ends the present one: it cuts this process's connections, again and
    again until the main thread has left (`enter`). Wherever that waits, it gets an error. A process that is
    not in the new generation ends.

    Attributes:
        identity: of this process.
        began: when rank 0 knew of what the newest generation is for, by the clock of `signs`.

    Args:
        size: processes that the job was started with.
        cut: cuts the connections of the present generation.
        too_few: says why so many members, by number, cannot go on, if they cannot.
    """

    period_seconds = 0.25

    def __init__(self, size: int, cut: Callable[[], None], too_few: Callable[[list[int]], str | None]):
        self.identity = uuid.uuid4().hex
        self._size = size
        self._cut = cut
        self._too_few = too_few
        self._changed = threading.Condition()  # guards what follows
        self._newest = self._entered = NONE_YET
        self._losses: dict[int, str] = {}
        self._lost_since = float("inf")
        self._newcomers: dict[int, tuple[str, bytes, float]] = {}  # identity, last beat, when it came
        self._former: set[str] = set()  # a process that was stopped and goes on is no newcomer
        self._changes: list[tuple[int, str | None]] = []
        self._closing = False

    def bind(self, signs: SignsOfLife) -> None:
        super().bind(signs)
        self._store, self._clock, self._number = signs.store, signs.clock, signs.here.rank
        self.speaker = f"rank {self._number}:"
        self.began = self._clock.now()
        if self._number != 0:
            signs.watch([0])
            self._store.set(f"left/{self._number}", "")
        self._store.set(f"here/{self._number}", self.identity)

    def lost(self, rank: int, why: str) -> None:
        if self._number == 0:
            self.lose(rank, self._newest.number, why)
        else:
            self.signs.end(f"{self.speaker} rank {rank}: {why}")

    def lost_store(self, error: RuntimeError | None) -> str:
        if error:
            return f"{self.speaker} rank 0 is gone, and the job's store with it ({type(error).__name__})"
        seconds = self.signs.timeout_seconds
        return f"{self.speaker} rank 0, with the job's store, has not answered for {seconds:g} s"

    def speaks_without_store(self) -> bool:
        # One on each host, and the first.
        first = min((number for number in self._newest.members if number), default=self._number)
        return self._number == first or os.environ.get("LOCAL_RANK") == "0"

    def farewell(self, message: str) -> str | None:
        # This process may have been stopped for long, wake to late alarms, and not be wanted.
        told = self._told()
        if told is NONE_YET or told.members.get(self._number) == self.identity:
            return None
        return message if self._newest is NONE_YET else f"{self.speaker} {LEFT_BEHIND}"

    def explain_loss(self, seen: str) -> str:
        members = self._entered.members
        self.await_next(self._entered.number, NEWS_SECONDS)
        if self._number != 0:
            self._clock.wait(NEWS_SECONDS)  # rank 0 knows why; when it says so, its claim ends this process
        reasons = dict(self.take_changes())
        lost = [number for number, identity in members.items() if not self.has(number, identity)]
        if lost:
            who = ", ".join(f"rank {n} was lost" + (f" ({reasons[n]})" if n in reasons else "") for n in lost)
            return f"{who} in {self.signs.doing()}: the run ends"
        where = f"{self.signs.here} lost a connection in {self.signs.doing()}"
        return f"{where}, and no rank that was lost: {seen}"

    def first(self) -> None:
        """On rank 0, when all have come: the first generation."""
        members = {number: self._store.get(f"here/{number}").decode() for number in range(self._size)}
        with self._changed:
            self._begin(Generation(0, members))

    def await_next(self, after: int, seconds: float = float("inf")) -> Generation | None:
        """Wait for a generation later than that number.

        Returns:
            The newest one; None where none came in time, or the run is over.
        """
        deadline = self._clock.now() + seconds
        with self._changed:
            while self._newest.number <= after:
                if self.run_over() or self._clock.now() >= deadline:
                    return None
                self._clock.wait(self.period_seconds, self._changed)
            return self._newest

    def enter(self, generation: Generation) -> None:
        """The main thread has left all earlier generations: connections from now on belong to this one."""
        with self._changed:
            self._entered = generation

    def is_over(self, generation: int) -> bool:
        """Is there a later one?"""
        return self._newest.number > generation

    def has(self, number: int, identity: str) -> bool:
        """Is this process in the newest generation?"""
        return self._newest.members.get(number) == identity

    def lose(self, number: int, generation: int, reason: str) -> None:
        """On rank 0, from any thread: a member of that generation is lost."""
        with self._changed:
            if not self._closing and not self.is_over(generation):
                self._losses.setdefault(number, reason)
        self.signs.wake.set()

    @contextmanager
    def impatience(self, seconds: float) -> Iterator[None]:
        """Until the end of the context, rank 0 takes members for lost after this silence at the latest."""
        if self._number == 0:
            self.signs.silence_seconds = min(seconds, self.signs.timeout_seconds)
        try:
            yield
        finally:
            self.signs.silence_seconds = self.signs.timeout_seconds

    def admit(self, before: Callable[[], None]) -> None:
        """On rank 0: begin a generation with those who wait to join, if there are any.

        Args:
            before: what has to be done first, if so.
        """
        if not self._fresh():
            return
        before()
        with self._changed:
            fresh = self._fresh()
            if fresh and not self._losses:
                self._changes += [(number, None) for number in fresh]
                self._newcomers = {}
                members = {**self._newest.members, **fresh}
                self._begin(Generation(self._newest.number + 1, dict(sorted(members.items()))))

    def _fresh(self) -> dict[int, str]:
        """The identities of newcomers that are alive, by number."""
        now = self._clock.now()
        return {
            number: identity
            for number, (identity, _, came) in list(self._newcomers.items())
            if now - came < FRESH_SECONDS
        }

    def take_changes(self) -> list[tuple[int, str | None]]:
        """On rank 0: who was lost, with the reason, or has joined, since this was last asked for."""
        with self._changed:
            taken, self._changes = self._changes, []
        return taken

    def end_run(self) -> None:
        """On rank 0: the run is over; nobody is lost any more by leaving."""
        with self._changed:
            self._closing = True
        self._store.set("finished", "")

    def run_over(self) -> bool:
        """Has rank 0 ended the run?"""
        try:
            return self._store.check(["finished"])
        except RuntimeError:
            return False  # it is gone: the thread ends this process

    def look(self) -> None:
        with self._changed:
            if self._number == 0:
                self._look_for_changes()
            else:
                self._read_newest()
            if self._entered.number < self._newest.number:
                self._cut()  # whatever the main thread has opened in the meantime

    def _look_for_changes(self) -> None:
        newest = self._newest
        if newest is NONE_YET or self._closing:
            return
        for number in range(1, self._size):
            identity = self._store.get(f"here/{number}").decode()
            if identity == newest.members.get(number):
                continue
            if number in newest.members:
                self._losses.setdefault(number, "another process has taken its place")
            if identity not in self._former:
                self._watch_newcomer(number, identity)
        lost = {number: why for number, why in self._losses.items() if number in newest.members}
        if lost and self._lost_since == float("inf"):
            self._lost_since = self._clock.now()
        if lost and self._clock.now() - self._lost_since < SETTLING_SECONDS:
            return
        since = self._lost_since
        self._losses, self._lost_since = {}, float("inf")
        if lost:
            lost = {number: self._store.get(f"left/{number}").decode() or why for number, why in lost.items()}
            self._changes += lost.items()
            self._former |= {newest.members[number] for number in lost}
            left = {number: it for number, it in newest.members.items() if number not in lost}
            too_few = self._too_few(list(left))
            if too_few:
                reasons = ", ".join(f"rank {number} is lost: {why}" for number, why in lost.items())
                too_few = f"{too_few} ({reasons})"
            self._begin(Generation(newest.number + 1, left, too_few))
            self.began = since

    def _watch_newcomer(self, number: int, identity: str) -> None:
        beat = self.signs.beat_of(number)
        known = self._newcomers.get(number)
        if known is None or known[0] != identity:
            self._newcomers[number] = identity, beat, float("-inf")  # of its predecessor, maybe
        elif known[1] != beat:
            self._newcomers[number] = identity, beat, self._clock.now()

    def _read_newest(self) -> None:
        generation = self._told()
        if generation.number <= self._newest.number:
            return
        if generation.members.get(self._number) == self.identity:
            self._begin(generation)
        elif self._newest is not NONE_YET:  # a newcomer has yet to be let in
            self.signs.end(f"{self.speaker} {LEFT_BEHIND}")

    def _told(self) -> Generation:
        """The newest generation, as it stands in the store."""
        if not self._store.check(["generation"]):
            return NONE_YET
        number, members = json.loads(self._store.get("generation"))
        return Generation(number, dict(members))

    def _begin(self, generation: Generation) -> None:
        """A new generation, which ends the one before."""
        self._newest = generation
        self.began = self._clock.now()
        if self._number == 0:
            if not generation.too_few:
                members = list(generation.members.items())
                self._store.set("generation", json.dumps([generation.number, members]))
            # No number passes from one process to another without a generation between that lacks it.
            self.signs.watch(number for number in generation.members if number)
        self._cut()
        self._changed.notify_all()


def cut(spared: Collection[int], port: int) -> None:
    """Shut down all TCP connections of this process; whoever reads or writes there gets an error.

    Gloo's collectives have no other way out: aborting a group does not wake those who wait in it.

    Args:
        spared: of `open_sockets`, those to leave alone.
        port: connections accepted at this port of ours are left alone: those of the store's host.
    """
    for identity, descriptor in open_sockets().items():
        if identity not in spared:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                if internet and connection.getsockname()[1] != port:
                    connection.getpeername()  # fails for a listening socket: Gloo aborts if that is shut down
                    connection.shutdown(socket.SHUT_RDWR)
