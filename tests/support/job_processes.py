"""The processes of a job that a test starts, found by a word of their command line; none may outlive it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def outer_environment() -> dict[str, str]:
    """Without the variables of a rank, as at a user's prompt."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def survivors(word: str) -> list[int]:
    """Processes with this word in their command line, this one left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if word in (folder / "cmdline").read_text() and state != "Z":
                    found.append(int(folder.name))
    return found


def members(word: str) -> dict[int, int]:
    """The ranks among them: process ids by rank."""
    found = {}
    for process in survivors(word):
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{process}/environ").read_text().split("\0")
            ranks = [int(text[5:]) for text in variables if text.startswith("RANK=")]
            found |= dict.fromkeys(ranks, process)
    return found


@contextmanager
def started_job(arguments: Sequence[str], word: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """The program with these arguments, as a shell starts it; none of it outlives the context.

    Args:
        word: in the command line of all its processes, and of no others.
        streams: see `subprocess.Popen`.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "fslsage_rpc", *arguments],
        text=True,
        env=outer_environment(),
        start_new_session=True,
        **streams,
    )
    try:
        yield process
    finally:
        end_job(process, word)


def end_job(process: subprocess.Popen[str], word: str) -> None:
    """Kill the launcher and what is left of its ranks."""
    if process.poll() is None:
        process.kill()
    for left in survivors(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    process.communicate()
