"""The processes of a job that a test starts, found by a word of their command line; none may outlive it."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path


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


def end_job(process: subprocess.Popen[str], word: str) -> None:
    """Kill the launcher and what is left of its ranks."""
    if process.poll() is None:
        process.kill()
    for left in survivors(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    process.communicate()
