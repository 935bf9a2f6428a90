"""Stopping on request: SIGTERM or Ctrl-C ends a run after the round under way, with a checkpoint.

Standard library only: the launcher of the ranks shares it.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

STOPPED = 75
"""exit status of a run that can be gone on with (EX_TEMPFAIL): schedulers may queue it again"""
LAUNCHED = "FSLSAGE_LAUNCHED"
"""variable of ranks whose launcher would start them again; it looks for `DIVERGED` in the run folder"""
NOBODY_READS = 128 + 13
"""exit status when the reader of the output has gone, as of a program that SIGPIPE ends"""
INTERRUPTED = 128 + 2
"""exit status after Ctrl-C, while there is no run yet to stop"""
INSISTENCE_SECONDS = 5.0
"""a signal so much later than the first ends the process at once; until then it is the first one's echo, as
a launcher and a scheduler both send it"""
SPREAD_SECONDS = 1.0
"""other ranks may get a signal so much later: before, a second one would not end them all"""


class Stopped(Exception):
    """The run has stopped on request.

    Args:
        resumable: is there a checkpoint to go on from?
    """

    def __init__(self, resumable: bool):
        super().__init__("stopped on request")
        self.resumable = resumable


class StopRequest:
    """Takes note of SIGTERM and SIGINT while the context is open, of every signal from the first on.

    Python runs signal handlers only in its main thread, which may wait inside a collective for long. So the
    handler does nothing; a thread is woken by the byte that the interpreter writes as the signal arrives.

    Args:
        say: shows a line, where the stop takes its time.
    """

    def __init__(self, say: Callable[[str], None] | None = None):
        self._say = say
        self._first: float | None = None
        self._patience: threading.Timer | None = None

    def __call__(self) -> bool:
        """Has a stop been asked for?"""
        return self._first is not None

    def obeyed(self) -> None:
        """The run has stopped: that it takes its time need not be said any more."""
        if self._patience:
            self._patience.cancel()

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._outer_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._outer = {number: signal.signal(number, _nothing) for number in signals_that_stop()}
        for number in self._outer:
            signal.siginterrupt(number, False)  # system calls under way are none of its business
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outer_descriptor)
        self._writer.close()
        self.obeyed()

    def _listen(self) -> None:
        with self._reader:
            while byte := self._reader.recv(1):
                if byte[0] in self._outer:
                    self._take(byte[0])

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            if self._say:
                text = f"{signal.Signals(number).name}: stops after this round; once more ends it at once"
                self._patience = threading.Timer(INSISTENCE_SECONDS + SPREAD_SECONDS, self._say, [text])
                self._patience.daemon = True
                self._patience.start()
            self._first = now
        elif now - self._first > INSISTENCE_SECONDS:
            os._exit(128 + number)  # files appear whole or not at all


def signals_that_stop() -> list[signal.Signals]:
    """Those of this system that ask a program to stop, without those that it was started to ignore."""
    names = ("SIGTERM", "SIGINT", "SIGHUP")
    known = [signal.Signals[name] for name in names if name in signal.Signals.__members__]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def answering_signals(answer: Callable[[int], None]) -> Iterator[None]:
    """While the context is open, signals that ask this program to stop are given to `answer`."""
    before = {
        number: signal.signal(number, lambda number, frame: answer(number)) for number in signals_that_stop()
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def under_torchrun() -> bool:
    """Is this process a worker of torchrun? It takes any status but 0 for a failure, and starts anew."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until modules have been imported: torch takes an interrupted import of numpy for a missing
    one, and goes on with half of it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
