"""Which processes make up the job: a list that rank 0 writes anew whenever one is lost, or joins.

Every process has a number, its RANK as it was started, and an identity of its own, so that a replacement is
not taken for the process that it replaces. All of them read the list in the job's store.
"""

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from torch.distributed import Store

from fslsage_rpc.comm.connections import Patience
from fslsage_rpc.comm.roll_call import FAILURE
from fslsage_rpc.comm.watchdog import GRACE_SECONDS, claim_failure, connecting

PERIOD_SECONDS = 0.25
FRESH_SECONDS = 3.0
"""a newcomer that gave its last sign of life longer ago is not let in"""
SETTLING_SECONDS = 0.5
"""how long a loss waits for others: what ends one process often ends several"""


@dataclass(frozen=True)
class Generation:
    """The processes that train together, until one is lost or joins.

    `members`: identity by number. `too_few`: why there is no next one; known to rank 0 alone.
    """

    number: int
    members: Mapping[int, str]
    too_few: str | None = None

    def encoded(self) -> str:
        """As it stands in the store."""
        return json.dumps([self.number, list(self.members.items())])

    @classmethod
    def decoded(cls, text: bytes) -> "Generation":
        """From the store."""
        number, members = json.loads(text)
        return cls(number, dict(members))


class Generations:
    """What `Watchdog` is where a lost client rank does not end the job, but begins a new generation.

    A thread gives signs of life through the job's store, on a connection of its own. Rank 0 watches all
    others, and they watch rank 0, whose end is everybody's.

    On rank 0 its thread learns of losses (`lose`, a silence longer than the time-out) and writes the next
    generation; on the others it reads it. Either way it then ends the present one: it cuts this process's
    connections, again and again until the main thread has left (`enter`), so that wherever that thread waits,
    it gets an error. A process that is not in the new generation ends.

    Attributes:
        identity: of this process.
        began: when rank 0 knew of what the newest generation is for, by `time.monotonic`.

    Args:
        size: processes that the job was started with.
        cut: cuts the connections of the present generation.
        too_few: says why so many members, by number, cannot go on, if they cannot.
    """

    def __init__(
        self,
        store: Store,
        number: int,
        size: int,
        timeout_seconds: float,
        cut: Callable[[], None],
        too_few: Callable[[list[int]], str | None],
    ):
        self.identity = uuid.uuid4().hex
        self.began = time.monotonic()
        self._store = store
        self._number = number
        self._size = size
        self._cut = cut
        self._timeout_seconds = self._silence_seconds = timeout_seconds
        self._too_few = too_few
        self._patience = Patience(timeout_seconds + GRACE_SECONDS)
        # Per rank watched: the last sign of life, and when it came.
        self._beats = {0: (b"", time.monotonic())} if number else {}
        self._reported = False
        self._thread = threading.Thread(target=self._run, name="generations", daemon=True)
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._newest: Generation | None = None
        self._entered = -1
        self._losses: dict[int, str] = {}
        self._lost_since = float("inf")
        self._newcomers: dict[int, tuple[str, bytes, float]] = {}  # identity, last beat, when it came
        self._former: set[str] = set()  # a process that was stopped and goes on is no newcomer
        self._changes: list[tuple[int, str | None]] = []
        self._closing = False
        if number != 0:
            self._store.set(f"left/{number}", "")
        self._store.set(f"here/{number}", self.identity)

    def start(self) -> None:
        """Begin to give and watch signs of life."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, before the store goes away."""
        self._stopped.set()
        self._wake.set()
        self._thread.join()

    def claim(self) -> bool:
        """Is this process the first to report a failure that ends the job, so that it should print it?"""
        self._reported = True
        try:
            return claim_failure(self._store, self._number)
        except RuntimeError:  # rank 0 is gone, and the store with it: one speaks on each host, and the first
            members = self._newest.members if self._newest else {}
            first = self._number == min((number for number in members if number), default=self._number)
            return first or os.environ.get("LOCAL_RANK") == "0"

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
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._newest is None or self._newest.number <= after:
                if self.run_over() or time.monotonic() >= deadline:
                    return None
                self._changed.wait(PERIOD_SECONDS)
            return self._newest

    def enter(self, generation: Generation) -> None:
        """The main thread has left all earlier generations: connections from now on belong to this one."""
        with self._changed:
            self._entered = generation.number

    def expects_connections(self) -> AbstractContextManager[None]:
        """End the job if the members of a generation do not reach each other, though none is silent."""
        return connecting(self._timeout_seconds + GRACE_SECONDS, self._end)

    def is_over(self, generation: int) -> bool:
        """Is there a later one?"""
        return self._newest is not None and self._newest.number > generation

    def has(self, number: int, identity: str) -> bool:
        """Is this process in the newest generation?"""
        return self._newest is not None and self._newest.members.get(number) == identity

    def lose(self, number: int, generation: int, reason: str) -> None:
        """On rank 0, from any thread: a member of that generation is lost."""
        with self._changed:
            if not self._closing and not self.is_over(generation):
                self._losses.setdefault(number, reason)
        self._wake.set()

    @contextmanager
    def impatience(self, seconds: float) -> Iterator[None]:
        """Until the end of the context, rank 0 takes members for lost after this silence at the latest."""
        self._silence_seconds = min(seconds, self._timeout_seconds)
        try:
            yield
        finally:
            self._silence_seconds = self._timeout_seconds

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
            if fresh and self._newest and not self._losses:
                self._changes += [(number, None) for number in fresh]
                self._newcomers = {}
                members = {**self._newest.members, **fresh}
                self._begin(Generation(self._newest.number + 1, dict(sorted(members.items()))))

    def _fresh(self) -> dict[int, str]:
        """The identities of newcomers that are alive, by number."""
        now = time.monotonic()
        return {
            number: identity
            for number, (identity, _, came) in list(self._newcomers.items())
            if now - came < FRESH_SECONDS
        }

    def take_changes(self) -> list[tuple[int, str | None]]:
        """On rank 0: the numbers of those lost, each with the reason, and of those that have joined, since
        this was last asked for.
        """
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

    def _run(self) -> None:
        """Give signs of life and look for all that may have happened; until stopped."""
        count = 0
        while not self._stopped.is_set():
            self._wake.wait(PERIOD_SECONDS)
            self._wake.clear()
            count += 1
            self._patience.ask()
            # Where the store's host is silent, so is the store: then this thread never returns from it.
            why = f"rank 0, with the job's store, has not answered for {self._timeout_seconds:g} s"
            alarm = threading.Timer(self._timeout_seconds, self._end, [why])
            alarm.daemon = True
            alarm.start()
            try:
                self._store.set(f"beat/{self._number}", str(count))
                if self._store.check([FAILURE]) and not self._reported:
                    sys.stdout.flush()
                    os._exit(1)
                self._look()
                self._look_for_silence()
            except RuntimeError as error:
                if not self._stopped.is_set():
                    self._end(f"rank 0 is gone, and the job's store with it ({type(error).__name__})")
                return
            finally:
                alarm.cancel()

    def _look_for_silence(self) -> None:
        beats = self._beats
        limit = self._timeout_seconds if self._number else self._silence_seconds
        for number, (last, came) in beats.items():
            key = f"beat/{number}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            if beat != last:
                beats[number] = beat, time.monotonic()
            elif time.monotonic() - came > limit:
                why = f"no sign of life for {limit:g} s"
                if self._number != 0:
                    self._end(f"rank 0: {why}")
                elif self._newest:
                    self.lose(number, self._newest.number, why)

    def _look(self) -> None:
        """What each period brings; on the thread."""
        with self._changed:
            if self._number == 0:
                self._look_for_changes()
            else:
                self._read_newest()
            if self._newest and self._entered < self._newest.number:
                self._cut()  # whatever the main thread has opened in the meantime

    def _look_for_changes(self) -> None:
        newest = self._newest
        if newest is None or self._closing:
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
            self._lost_since = time.monotonic()
        if lost and time.monotonic() - self._lost_since < SETTLING_SECONDS:
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
        key = f"beat/{number}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        known = self._newcomers.get(number)
        if known is None or known[0] != identity:
            self._newcomers[number] = identity, beat, float("-inf")  # of its predecessor, maybe
        elif known[1] != beat:
            self._newcomers[number] = identity, beat, time.monotonic()

    def _read_newest(self) -> None:
        if not self._store.check(["generation"]):
            return
        generation = Generation.decoded(self._store.get("generation"))
        if self._newest and generation.number <= self._newest.number:
            return
        if generation.members.get(self._number) == self.identity:
            self._begin(generation)
        elif self._newest:
            self._leave_lost()

    def _leave_lost(self) -> None:
        if self._reported:
            os._exit(1)  # the main thread has said why it ends
        self._print_and_exit("the others took this rank for lost and went on without it")

    def _end(self, message: str) -> None:
        """Rank 0 is gone, or a rank out of reach; or this process was stopped for long, wakes to late alarms,
        and is not wanted.
        """
        if self._reported:
            return  # the main thread is about to end the process
        last_resort = threading.Timer(GRACE_SECONDS, self._print_and_exit, [message])
        last_resort.daemon = True
        last_resort.start()  # a silent store answers nothing
        if self._newest:
            with suppress(RuntimeError):
                members = Generation.decoded(self._store.get("generation")).members
                if members.get(self._number) != self.identity:
                    self._leave_lost()
        if self.claim():
            self._print_and_exit(message)
        os._exit(1)

    def _print_and_exit(self, message: str) -> None:
        print(f"fslsage_rpc: rank {self._number}: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    def _begin(self, generation: Generation) -> None:
        """A new generation, which ends the one before."""
        before = self._newest.members if self._newest else {}
        self._newest = generation
        self.began = time.monotonic()
        if self._number == 0:
            if not generation.too_few:
                self._store.set("generation", generation.encoded())
            self._beats = {
                number: self._beats[number] if before.get(number) == identity else (b"", self.began)
                for number, identity in generation.members.items()
                if number
            }
        self._cut()
        self._changed.notify_all()
