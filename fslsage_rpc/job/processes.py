"""Processes of this machine: which one an id means, and whether it has ended."""

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def machine() -> str | None:
    """Tell process ids apart: the same text where the same id means the same process; None if unknown."""
    with suppress(OSError):
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(PROC / 'self/ns/pid')}"
    return None


def has_ended(process: int) -> bool:
    """Is a process of this machine gone, or dead and not yet taken note of by its parent?"""
    try:
        status = (PROC / str(process) / "stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"
