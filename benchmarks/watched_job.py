"""A run under launch/local.sh, watched from outside: its ranks, and what is left when it has ended. Linux."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
RANKS = 3
MARK = "FSLSAGE_SOAK"
"""the variable in whose value the processes of a job are told from all others"""
POLL_SECONDS = 0.1
SOCKETS_SECONDS = 1.0
"""between two looks at which sockets the processes have open"""


@dataclass
class Left:
    """What is there when a job has ended, by kind."""

    things: dict[str, list[str]] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        """Is that so?"""
        return not any(self.things.values())


class Job:
    """A run under the launcher, its processes told from others by a variable of their environment."""

    def __init__(self, output: Path, name: str, overrides: Sequence[str], restarts: int = 0):
        self.folder = output / name
        self.log = output / f"{name}.log"
        self._temporary = output / f"{name}.tmp"
        self._temporary.mkdir(parents=True)
        self._shared_memory = _names(Path("/dev/shm"))
        self._sockets: set[str] = set()
        self._counted = (0, 0), 0
        self._mark = uuid.uuid4().hex
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHON": sys.executable,
            "MAX_RESTARTS": str(restarts),
            "TMPDIR": str(self._temporary),
            MARK: self._mark,
        }
        launcher = str(ROOT / "launch" / "local.sh")
        command = [launcher, "train", str(CONFIG), *overrides, f"ranks={RANKS}"]
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(
                [*command, f"name={name}", f"output={output}"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def watch(self, look: Callable[[int], None]) -> float:
        """Look, again and again, until the job ends; gives how many rounds are done.

        Returns:
            Seconds from now until the end.

        Raises:
            RuntimeError: it ended with another status than 0.
        """
        started = time.monotonic()
        due = 0.0
        try:
            while self.launcher.poll() is None:
                if time.monotonic() >= due:
                    self._sockets |= {inode for process in self._processes() for inode in _sockets(process)}
                    due = time.monotonic() + SOCKETS_SECONDS
                look(self.rounds)
                time.sleep(POLL_SECONDS)
        finally:
            for process in self._processes() if self.launcher.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        if self.launcher.returncode:
            raise RuntimeError(f"status {self.launcher.returncode}: {self.log.read_text()[-3000:]}")
        return time.monotonic() - started

    @property
    def rounds(self) -> int:
        """How many rounds `metrics.jsonl` has."""
        path = self.folder / "metrics.jsonl"
        with suppress(FileNotFoundError):
            status = path.stat()
            version = status.st_size, status.st_mtime_ns
            if self._counted[0] != version:
                self._counted = version, path.read_bytes().count(b"\n")
            return self._counted[1]
        return 0

    def ranks(self) -> dict[int, int]:
        """The process ids of the ranks, by rank."""
        found = {}
        for process in self._processes():
            ranks = [int(text[5:]) for text in _environment(process) if text.startswith("RANK=")]
            found |= dict.fromkeys(ranks, process)
        return found

    def left(self) -> Left:
        """What is still there of an ended job."""
        open_sockets = {inode for inode, line in _system_sockets() if inode in self._sockets}
        return Left(
            {
                "processes": [str(process) for process in self._processes()],
                "sockets": sorted(open_sockets),
                "shared-memory files": sorted(_names(Path("/dev/shm")) - self._shared_memory),
                "temporary files": [
                    *sorted(_names(self._temporary)),
                    *(str(path) for path in self.folder.rglob("*.tmp")),
                ],
            }
        )

    def _processes(self) -> list[int]:
        """Those that the launcher has started, directly or not, and itself."""
        return processes_with(f"{MARK}={self._mark}")


def processes_with(word: str) -> list[int]:
    """The ids of the processes that have this word, NAME=VALUE, in their environment."""
    numbers = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [number for number in numbers if word in _environment(number)]


def _environment(process: int) -> list[str]:
    """Of a process; nothing where it has ended, or is not ours to look at."""
    with suppress(OSError):
        return Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")
    return []


def _sockets(process: int) -> Iterator[str]:
    """The inodes of the sockets that a process has open."""
    with suppress(OSError):
        for descriptor in os.scandir(f"/proc/{process}/fd"):
            with suppress(OSError):
                kind, _, inode = os.readlink(descriptor.path).partition(":")
                if kind == "socket":
                    yield inode.strip("[]")


def _system_sockets() -> Iterator[tuple[str, str]]:
    """The inode, and the line of /proc, of each socket of this host."""
    for name, column in (("tcp", 9), ("tcp6", 9), ("udp", 9), ("udp6", 9), ("unix", 6)):
        with suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                yield line.split()[column], line


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.exists() else set()
