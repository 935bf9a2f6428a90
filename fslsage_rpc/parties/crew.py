"""Who does the server's work: pieces of it on threads, and each request from its arrival to its answer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fslsage_rpc.device.clock import clock, cpu_clock
from fslsage_rpc.device.cores import server_workers
from fslsage_rpc.device.streams import WorkQueue, current_place
from fslsage_rpc.measure.activity import Activity
from fslsage_rpc.measure.request_times import DeviceLog
from fslsage_rpc.measure.trace import Arrow
from fslsage_rpc.parties.requests import Answer, Request
from fslsage_rpc.randomness import LocalStep

Reply = Callable[[Answer], None]
Start = Callable[[str, int, Callable[[], None]], None]
"""runs a piece of work, given its kind and the number of the lane or fit that it is of: see `World.start`"""


class Crew:
    """Runs the server's pieces of work. One that fails ends the round.

    Attributes:
        changed: guards mailboxes and lanes; told when none is under way, and of a failure.
        failure: the first one of the round.
        activity: of lanes and fits; it ends with a failure.
        on_device: what requests took of a GPU.
    """

    def __init__(self, start: Start, device: torch.device):
        self.device = device
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.activity = Activity(server_workers(device))
        self.on_device = DeviceLog()
        self._start = start
        self._under_way = 0

    @property
    def idle(self) -> bool:
        """Has every piece ended that is awaited?"""
        return not self._under_way

    def run(self, kind: str, number: int, work: Callable[[], None], awaited: bool = True) -> None:
        """Start a piece of work.

        Args:
            awaited: the round does not end before it has.
        """

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.fail(error)
                raise
            finally:
                self._count(-awaited)

        self._count(awaited)
        self._start(kind, number, guarded)

    def fail(self, error: BaseException) -> None:
        """No more requests are executed in this round."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()
        self.activity.end()

    def _count(self, by: int) -> None:
        with self.changed:
            self._under_way += by
            if self.idle:
                self.changed.notify_all()


class Execution:
    """One request from its arrival to its answer: who waits for that, and the seconds that it has taken.

    Attributes:
        at: the local step that it belongs to.
        place: in a stream, behind which its next part comes.
    """

    def __init__(self, request: Request, at: LocalStep, reply: Reply, crew: Crew):
        self.request, self.at = request, at
        self.arrow = Arrow("execution", request.client, request.number)
        self.place = current_place(crew.device)
        self._reply, self._crew = reply, crew
        self._waiting = clock()
        self._answer = Answer(None, 0.0, 0.0)

    @contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """It is executed inside, by a lane or by a fit. On a GPU the work is queued, not done, on return."""
        crew, so_far = self._crew, self._answer
        started, cpu_started, began = clock(), cpu_clock(), current_place(crew.device)
        with crew.activity.of(kind):
            yield
        ended = current_place(crew.device)
        crew.on_device.add(self.request.client, self.request.body.kind, self.place, began, ended)
        self._answer = Answer(
            None,
            so_far.queue_seconds + started - self._waiting,
            so_far.compute_seconds + clock() - started,
            so_far.cpu_seconds + cpu_clock() - cpu_started,
        )
        self.place, self._waiting = ended, clock()

    def answer(self, value: object) -> None:
        """Answer at once, within the stream that computes the value."""
        self._reply(replace(self._answer, value=value))

    def answer_once_done(self, value: object, queue: WorkQueue, kind: str, number: int) -> None:
        """Answer when the device, too, has come to the end of the queue: nothing waits for it before.

        Args:
            kind: of work, and `number`: of the lane or fit whose queue it is.
        """
        end, answer = queue.end(), replace(self._answer, value=value)
        if end is None:
            self._reply(answer)
            return
        queued = clock()

        def work() -> None:
            end.synchronize()
            self._reply(replace(answer, compute_seconds=answer.compute_seconds + clock() - queued))

        self._crew.run(f"answers of a {kind}", number, work)
