"""Cores that several simulated ranks share."""

from collections.abc import Callable
from dataclasses import dataclass

RESOLUTION_SECONDS = 1e-12


@dataclass
class Task:
    """Work under way."""

    left: float
    """seconds on a core of its own"""
    done: Callable[[], None]


class Cores:
    """n tasks on c cores each go on at min(1, c / n) of full speed.

    Args:
        count: c; infinite where every rank has a machine of its own.
        now: reads the simulated time, in seconds.
        after: has something happen in so many seconds.
    """

    def __init__(
        self, count: float, now: Callable[[], float], after: Callable[[float, Callable[[], None]], None]
    ):
        self._count, self._now, self._after = count, now, after
        self._tasks: list[Task] = []
        self._since = 0.0
        self._expected = 0  # number of the latest expectation of an end; earlier ones have become wrong

    def run(self, seconds: float, done: Callable[[], None]) -> None:
        """Begin a task of so many seconds on a core of its own; `done` is called at its end."""
        self._advance()
        self._tasks.append(Task(seconds, done))
        self._expect()

    def _speed(self) -> float:
        return min(1.0, self._count / len(self._tasks))

    def _advance(self) -> None:
        """Account for the time since the last change."""
        if self._tasks:
            done = (self._now() - self._since) * self._speed()
            for task in self._tasks:
                task.left -= done
        self._since = self._now()

    def _expect(self) -> None:
        """The next end, if no other task begins before it."""
        self._expected += 1
        if self._tasks:
            number, left = self._expected, max(0.0, min(task.left for task in self._tasks))
            self._after(left / self._speed(), lambda: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._expected:
            return
        self._advance()
        # The first to end has ended, though a late clock may be too coarse to say so.
        over = max(RESOLUTION_SECONDS, min(task.left for task in self._tasks))
        ended = [task for task in self._tasks if task.left <= over]
        self._tasks = [task for task in self._tasks if task.left > over]
        self._expect()
        for task in ended:
            task.done()
