"""Lanes and fits at work on the server: which timelines of single ones cannot know, and who goes first."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fslsage_rpc.device.clock import clock


class Abandoned(Exception):
    """A fit is not needed any more: the training has ended."""


class Activity:
    """For how long auxiliary models were fitted while no lane executed a request: the lanes' timelines do not
    know that. And when those that nobody waits for may go on.

    Args:
        workers: lanes and fits that have a core each.
    """

    def __init__(self, workers: int) -> None:
        self._changed = threading.Condition()
        self._active = {"lane": 0, "fit": 0}
        self._workers = workers
        self._rests = self._ended = False
        self._since = clock()
        self._fitting_alone = 0.0

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """A lane, or a fit, is at work inside."""
        self._change(kind, 1)
        try:
            yield
        finally:
            self._change(kind, -1)

    def give_way(self) -> None:
        """Called in a fit behind the training, where it can stop: wait until there is a core for it that no
        lane needs.

        Raises:
            Abandoned: the training has ended.
        """
        with self._changed:
            self._change("fit", -1)
            self._changed.wait_for(lambda: self._ended or not (self._rests or self._full()))
            self._change("fit", 1)
            if self._ended:
                raise Abandoned

    def rest(self) -> None:
        """Have no fit compute until `go_on`: on return they have come to where they can stop."""
        with self._changed:
            self._rests = True
            self._changed.wait_for(lambda: self._ended or not self._active["fit"])

    def go_on(self) -> None:
        """Fits may compute."""
        with self._changed:
            self._rests = False
            self._changed.notify_all()

    def end(self) -> None:
        """Abandon the fits that are behind the training."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take_fitting_alone(self) -> float:
        """The seconds so far; they start again from zero."""
        with self._changed:
            self._change("fit", 0)
            taken, self._fitting_alone = self._fitting_alone, 0.0
        return taken

    def _full(self) -> bool:
        return sum(self._active.values()) >= self._workers

    def _change(self, kind: str, by: int) -> None:
        with self._changed:
            now = clock()
            if self._active["fit"] and not self._active["lane"]:
                self._fitting_alone += now - self._since
            self._since = now
            self._active[kind] += by
            self._changed.notify_all()
