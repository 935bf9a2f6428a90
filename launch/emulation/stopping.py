"""Signals that ask the launcher to stop, looked at where it is safe: cleaning up is never interrupted."""

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The launcher was asked to stop."""


class StopRequests:
    """Counts the signals that have come; install before anything needs cleaning up."""

    def __init__(self) -> None:
        self.count = 0
        self.signal = signal.SIGTERM
        for number in SIGNALS:
            signal.signal(number, self._note)

    def check(self) -> None:
        """Go on, or not.

        Raises:
            Stopped: a signal has come.
        """
        if self.count:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.signal = signal.Signals(number)
