"""One writer of a folder at a time: a lock of the operating system's, or signs of life where it has none.

The file `.lock` in the folder names its holder: host, process and start. The system's lock on it (`flock`)
ends with the process that holds it, however that ends. The holder also touches the file every so often. By
that a holder is known on file systems without locks, or whose locks do not reach other hosts.
"""

import errno
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from fslsage_rpc.errors import InputError
from fslsage_rpc.job import processes

NAME = ".lock"
BEAT_SECONDS = 2.0
"""between two signs of life of the holder"""
STALE_SECONDS = 20.0
"""a holder that gave none for so long is taken for dead, where no lock of the system's tells"""
PATIENCE_SECONDS = 5.0
"""how long a holder that lives may take to let go: it may be ending"""
RESTART_SECONDS = 120.0
"""how long an earlier attempt of the same job may take, or a silent holder whose lock is still there"""
SETTLING_SECONDS = 1.0
"""after which two that have taken a file without locks at the same time see whose name is in it"""
TELLING_SECONDS = 2.0
"""after which a line says what is waited for"""
POLL_SECONDS = 0.2
ATTEMPTS = {"SLURM_JOB_ID": "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT"}
"""variables that name a job, and those that count its attempts"""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_held: set[int] = set()  # descriptors of this process's locks


@dataclass(frozen=True)
class Holder:
    """A process that holds a folder; `attempts`: the jobs that it is part of, and which attempt of each."""

    host: str
    process: int
    since: str
    machine: str | None
    attempts: Mapping[str, str]

    @classmethod
    def here(cls) -> "Holder":
        """This process, from now on."""
        jobs = [(name, count) for name, count in ATTEMPTS.items() if name in os.environ]
        return cls(
            host=platform.node(),
            process=os.getpid(),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            machine=processes.machine(),
            attempts={f"{name}={os.environ[name]}": os.environ.get(count, "0") for name, count in jobs},
        )

    @classmethod
    def read(cls, text: bytes) -> "Holder | None":
        """The holder that a file names; None where it names none."""
        try:
            tree = json.loads(text)
            return cls(**{**tree, "attempts": dict(tree["attempts"])})
        except (ValueError, TypeError, LookupError, RecursionError):
            return None

    def written(self) -> bytes:
        """The text that `read` reads."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def on_host_of(self, other: "Holder") -> bool:
        """Does one system's lock serve both?"""
        return self.host == other.host or (self.machine is not None and self.machine == other.machine)

    def has_ended(self, seen_by: "Holder") -> bool:
        """Is the process gone, as far as another one can see?"""
        on_machine = self.machine is not None and self.machine == seen_by.machine
        return on_machine and processes.has_ended(self.process)

    def precedes(self, other: "Holder") -> bool:
        """Is the other one a later attempt of the same job?"""
        return any(other.attempts.get(job, count) != count for job, count in self.attempts.items())

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host}, since {self.since}"


class FolderLock:
    """The right to write to a folder, from its construction until it is released or the process ends.

    A context, which releases it. A holder that lives is waited for as long as one that ends may take. An
    earlier attempt of the same job is waited for longer, and so is a silent holder.

    Raises:
        InputError: another process holds it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda said: None):
        self._folder = folder
        self._warn = warn
        self._path = folder / NAME
        self._mine = Holder.here()
        self._released = threading.Event()
        self._take()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def check(self) -> None:
        """Look whether the file still names this process.

        Raises:
            InputError: another one has taken the folder, as this one was silent for long.
        """
        with suppress(OSError):
            holder = Holder.read(self._path.read_bytes())
            if holder not in (self._mine, None):
                raise self._refusal(holder)

    def release(self) -> None:
        """Let go; the file goes with it."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        with suppress(OSError):
            if Holder.read(self._path.read_bytes()) == self._mine:
                self._path.unlink()
        _held.discard(self._descriptor)
        os.close(self._descriptor)

    def _take(self) -> None:
        last: tuple[bytes, int] | None = None
        began = came = time.monotonic()
        lives = told = False
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                locked = _lock(descriptor)
                text, now = os.pread(descriptor, 4096, 0), time.monotonic()
                holder, state = Holder.read(text), (text, os.fstat(descriptor).st_mtime_ns)
                if state != last:
                    lives, came, last = last is not None, now, state
                if locked is not False and self._is_free(locked, holder, silent=now - came):
                    if self._claim(descriptor, locked):
                        self._descriptor, descriptor = descriptor, -1
                        return
                elif now - began > self._patience(holder, lives):
                    raise self._refusal(holder)
                elif not told and now - began > TELLING_SECONDS:
                    self._warn(f"waits for {holder or 'another run'}, which holds {self._folder}")
                    told = True
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            time.sleep(POLL_SECONDS)

    def _is_free(self, locked: bool | None, holder: Holder | None, silent: float) -> bool:
        """Is the one that the file names no holder any more?"""
        if holder is None or silent > STALE_SECONDS or holder.has_ended(self._mine):
            return True
        return locked is True and holder.on_host_of(self._mine)

    def _patience(self, holder: Holder | None, lives: bool) -> float:
        """Seconds that a holder is waited for; `lives`: it was seen to."""
        may_end = not lives or (holder is not None and holder.precedes(self._mine))
        return RESTART_SECONDS if may_end else PATIENCE_SECONDS

    def _claim(self, descriptor: int, locked: bool | None) -> bool:
        """Put this process's name into the file; False where another has been faster."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self._mine.written(), 0)
        os.fsync(descriptor)
        if locked is None:
            time.sleep(SETTLING_SECONDS)
        with suppress(OSError):  # its name may be gone: a holder that has let go removes it
            there = os.stat(self._path)
            same = os.path.samestat(there, os.fstat(descriptor))
            if same and Holder.read(self._path.read_bytes()) == self._mine:
                _held.add(descriptor)
                return True
        return False

    def _refusal(self, holder: Holder | None) -> InputError:
        who = f" ({holder})" if holder else ""
        return InputError(
            f"name: got {self._folder.name!r}, where another run is writing to {self._folder}{who}, expected "
            "another name, or that run's end first"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._descriptor)


def _lock(descriptor: int) -> bool | None:
    """Ask for the system's lock on an open file.

    Returns:
        Is it had? None where the file system has none.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _let_go_in_child() -> None:
    """Keep a process that is forked from holding the lock after its parent's end."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
