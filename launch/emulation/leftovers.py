"""Who owns what an emulated network puts into the system, and how all of it is removed.

Everything has a name that begins with its owner's: network namespaces, CPU groups and a folder under /run.
So a next start can tell what a killed owner left from what a live one still uses.
"""

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path

from emulation import quota, system

NAMESPACES = Path("/run/netns")
FOLDERS = Path("/run")
OWNER = re.compile(r"(fslwan-(\d+)-(\d+))(-.*)?")
END_SECONDS = 5.0


def owner_name(pid: int) -> str | None:
    """`fslwan-PID-START` of a live process, its start in clock ticks, so that a reused pid is another owner;
    None where there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"fslwan-{pid}-{fields[18]}"


def remove_dead_owners() -> list[str]:
    """Remove what owners that are dead have left.

    Returns:
        Their names.
    """
    places = [*_entries(NAMESPACES), *_entries(FOLDERS), *_entries(quota.groups_folder())]
    found = {match[1]: int(match[2]) for match in map(OWNER.fullmatch, places) if match}
    dead = [owner for owner, pid in found.items() if owner_name(pid) != owner]
    for owner in dead:
        remove(owner)
    return dead


def remove(owner: str) -> None:
    """End every process in the owner's namespaces and CPU groups and remove these and its folder.

    What another cleaner removes at the same time is no error.
    """
    namespaces = [name for name in _entries(NAMESPACES) if name.startswith(f"{owner}-")]
    folder = quota.groups_folder()
    groups = [folder / name for name in _entries(folder) if name.startswith(f"{owner}-")] if folder else []
    _end_processes(namespaces, groups)
    for name in namespaces:
        with contextlib.suppress(system.CommandFailed):
            system.run("ip", "netns", "delete", name)
    for group in groups:
        with contextlib.suppress(FileNotFoundError):
            group.rmdir()
    shutil.rmtree(FOLDERS / owner, ignore_errors=True)


def _end_processes(namespaces: list[str], groups: list[Path]) -> None:
    """Kill until none is left: the end of a process takes a moment, and it may just have forked."""
    deadline = time.monotonic() + END_SECONDS
    while (pids := _processes(namespaces, groups)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes(namespaces: list[str], groups: list[Path]) -> set[int]:
    pids: set[int] = set()
    for name in namespaces:
        with contextlib.suppress(system.CommandFailed):
            pids |= set(map(int, system.run("ip", "netns", "pids", name).split()))
    for group in groups:
        with contextlib.suppress(FileNotFoundError):
            pids |= set(map(int, (group / "cgroup.procs").read_text(encoding="ascii").split()))
    return pids


def _entries(folder: Path | None) -> list[str]:
    try:
        return os.listdir(folder) if folder else []
    except FileNotFoundError:
        return []
