"""What the server's timelines of single lanes cannot know: when nothing but fits was at work."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fslsage_rpc.device.clock import clock


class Activity:
    """For how long auxiliary models were fitted while no lane executed a request: the lanes' timelines do not
    know that.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = {"lane": 0, "fit": 0}
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

    def take_fitting_alone(self) -> float:
        """The seconds so far; they start again from zero."""
        taken, self._fitting_alone = self._fitting_alone, 0.0
        return taken

    def _change(self, kind: str, by: int) -> None:
        with self._lock:
            now = clock()
            if self._active["fit"] and not self._active["lane"]:
                self._fitting_alone += now - self._since
            self._since = now
            self._active[kind] += by
