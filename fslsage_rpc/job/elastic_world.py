"""The real transport where a lost client rank need not end the job: the ranks that are left meet anew.

A generation of ranks has process groups and RPC agents of its own. When one ends, its connections are cut,
the main thread gets an error wherever it is, and comes to `accept_loss` and `regroup`.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import rpc
from torch.futures import Future

from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import ConnectionLost, InputError, RankRefused, RunOver, TooFewClients
from fslsage_rpc.job.connections import open_sockets
from fslsage_rpc.job.regroup import NEWS_SECONDS, Generation, Regroup, cut
from fslsage_rpc.job.roll_call import Presence, await_all
from fslsage_rpc.job.rpc_world import POLL_SECONDS, RpcWorld, said_by
from fslsage_rpc.job.signs_of_life import GRACE_SECONDS, leave
from fslsage_rpc.job.world import Change
from fslsage_rpc.transport.rpc import offer, offered

MEETING_SECONDS = 30.0
"""how long a member may give no sign of life while ranks form a generation: nothing else tells of its end"""
LEAVING_SECONDS = 10.0
"""how long rank 0, which hosts the store, waits for the others to leave at the end"""

_staying: list[Future[None]] = []  # answers that nobody waits for


class ElasticWorld(RpcWorld):
    """The ranks of a job whose processes do not end together: plain srun, `launch/local.sh --elastic`.

    A client rank that dies (rank 0 has a call open at each that never returns: its failure is the news) or
    is silent for longer than the time-out is left behind, and the round under way is done again. A process
    started anew with its number is let in between two rounds. Rank 0's death ends the job.
    """

    _meets_anew = True

    def _start(self, config: Config) -> None:
        timeout = timedelta(seconds=config.comm.timeout_seconds)
        self._store = self._job = store = self._find_store(timeout)
        self._side_store = store.clone()
        self._config = config
        self._timeout_seconds = config.comm.timeout_seconds
        self.generation = -1
        self._generations = Regroup(self._started, self._cut, self._too_few)
        self._signs = self._signs_of_life(config, self._generations)
        self._spared = open_sockets().keys()
        self._signs.start()
        if self.number == 0:
            await_all(store, [f"here/{number}" for number in range(self._started)], timeout)
            self._generations.first()
        self._enter_next()

    def admit(self, before: Callable[[], None]) -> None:
        if self.rank == 0:
            self._generations.admit(before)
            if self._generations.is_over(self.generation):
                raise ConnectionLost("another rank joins")

    def accept_loss(self, error: BaseException) -> None:
        lost = isinstance(error, ConnectionLost)
        patience = self._timeout_seconds + LEAVING_SECONDS if lost else NEWS_SECONDS
        if isinstance(error, InputError) or self._generations.await_next(self.generation, patience) is None:
            if lost and self._generations.run_over():
                raise RunOver from error
            raise error

    def regroup(self) -> None:
        with suppress(RuntimeError):  # rank 0 is gone, and the store with it
            self._beside.set(f"left/{self.rank}", "")  # what it has not given by now never comes
        self._leave()
        self._enter_next()

    def take_changes(self) -> list[Change]:
        seconds = self._formed - self._generations.began
        return [Change(rank, reason, seconds) for rank, reason in self._generations.take_changes()]

    def _never(self) -> Callable[[int], bool]:
        members, numbers, own = self._members, self._numbers, self._beside
        return lambda rank: (
            not self._generations.has(numbers[rank], members[numbers[rank]]) or own.check([f"left/{rank}"])
        )

    def fail(self, error: BaseException) -> NoReturn:
        if isinstance(error, RunOver):
            late = f"fslsage_rpc: rank {self.number} came too late: the run has ended"
            print(late, file=sys.stderr, flush=True)
            leave(0, hosts_store=False)
        ours = InputError | KeyboardInterrupt | ConnectionLost
        own = isinstance(error, RankRefused) or not isinstance(error, ours)
        if self.number != 0 and own and self._signs:
            with suppress(RuntimeError):
                if self._job.check(["generation"]):  # the others may go on
                    before, message, status = self._last_words(error)
                    reason = f"{type(error).__name__}: {said_by(error)}"
                    self._job.set(f"left/{self.number}", reason)
                    print(f"{before}fslsage_rpc: {message}", file=sys.stderr, flush=True)
                    leave(status, hosts_store=False)
        super().fail(error)

    def _last_words(self, error: BaseException) -> tuple[str, str, int]:
        if isinstance(error, TooFewClients):
            return "", str(error), 1
        return super()._last_words(error)

    def close(self) -> None:
        if self.number == 0:
            self._generations.end_run()
            members = [f"done/{number}" for number in self._numbers if number]
            deadline = time.monotonic() + LEAVING_SECONDS
            while time.monotonic() < deadline and not self._job.check(members):
                time.sleep(POLL_SECONDS)
        self._generations.signs.stop()
        if self.number != 0:
            with suppress(RuntimeError):
                self._job.set(f"done/{self.number}", "")
        self._leave()

    def _too_few(self, numbers: list[int]) -> str | None:
        count, minimum = self._config.clients.count, self._config.clients.minimum
        left = sum(len(range(number - 1, count, self.homes)) for number in numbers if number)
        why = f"{left} clients are left, fewer than clients.minimum ({minimum}): the run ends"
        return why if left < minimum else None

    def _cut(self) -> None:
        """End the generation: on the thread of the signs of life, or rank 0's main one."""
        cut(self._spared, int(os.environ["MASTER_PORT"]))
        if server := offered():
            server.fail(ConnectionLost("a rank was lost or joins"))

    def _leave(self) -> None:
        """Leave the generation, without a word to the others."""
        offer(None)
        self._workers.dissolve()  # first: what they still run answers calls, and without RPC torch crashes
        self.transport.abandon()

    def _enter_next(self) -> None:
        """Form the newest generation that this process is in; or the one after, where one is lost meanwhile.

        Raises:
            TooFewClients: there is none.
            RunOver: there will be none.
        """
        while True:
            generation = self._generations.await_next(self.generation)
            if generation is None:
                raise RunOver
            if generation.too_few:
                raise TooFewClients(generation.too_few)
            self.generation = generation.number
            self._generations.enter(generation)
            with self._generations.impatience(MEETING_SECONDS):
                try:
                    self._form(generation)
                except RuntimeError as error:
                    if self._generations.run_over():
                        raise RunOver from error
                    patience = self._timeout_seconds + LEAVING_SECONDS  # silence would tell who was lost
                    followed = self._generations.await_next(self.generation, patience)
                    if not followed or self.generation == 0:  # nothing is trained that would be lost
                        raise ConnectionLost(said_by(error)) from error
                else:
                    self._formed = time.monotonic()
                    return

    def _form(self, generation: Generation) -> None:
        _staying.clear()
        numbers = sorted(generation.members)
        rank = numbers.index(self.number)
        # A connection of its own, to be cut with the others: forming groups waits on it for a rank that dies.
        store = dist.PrefixStore(f"generation/{generation.number}", self._job.clone())
        store.set(f"here/{rank}", self._here.written())
        keys = [f"here/{each}" for each in range(len(numbers))]
        while not store.check(keys):
            if self._generations.is_over(generation.number) or self._generations.run_over():
                raise ConnectionLost("a rank was lost while the ranks met")
            time.sleep(POLL_SECONDS)
        ranks = [Presence.read(store.get(key)) for key in keys]
        patience = self._timeout_seconds + GRACE_SECONDS  # a rank that is silent is lost before
        with self._generations.signs.expects_connections(patience):
            comm = replace(self._config.comm, transports=["uv"], averaging="gloo")  # which can be cut
            self._open_transport(store, comm, ranks)
        self._members, self._numbers = generation.members, numbers
        self._beside = dist.PrefixStore(f"beside/{generation.number}", self._side_store)
        if rank == 0:
            for worker, number in zip(self.transport.workers[1:], numbers[1:], strict=True):
                self._watch_process(worker, number, generation.number)

    def _watch_process(self, worker: str, number: int, generation: int) -> None:
        def lost(call: Future[None]) -> None:
            self._generations.lose(number, generation, "its process has died, or its connection to rank 0")

        try:
            rpc.rpc_async(worker, _stay, timeout=0).add_done_callback(lost)
        except RuntimeError:
            self.transport.abandon()
            raise


@rpc.functions.async_execution
def _stay() -> Future[None]:
    """On a client rank: a call that returns only by failing, when this process or its connection is gone."""
    answer: Future[None] = Future()
    _staying.append(answer)
    return answer
