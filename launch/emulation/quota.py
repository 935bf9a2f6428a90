"""Slow ranks: a CPU quota by a control group, version 1 or 2, whichever has the cpu controller."""

import os
from pathlib import Path

from fslsage_rpc.errors import HostError

PERIOD_MICROSECONDS = 100_000
SMALLEST_QUOTA_MICROSECONDS = 1_000
"""the kernel's"""


def _mounts() -> list[tuple[str, Path, list[str]]]:
    """Type, place and options of everything mounted."""
    lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    parts = [line.split() for line in lines]
    return [(kind, Path(place), options.split(",")) for _, place, kind, options, *_ in parts]


def groups_folder() -> Path | None:
    """Where groups with a CPU quota are made; None where this system has no such place."""
    for kind, place, options in _mounts():
        if kind == "cgroup" and "cpu" in options:
            return place
        controllers = place / "cgroup.controllers"
        if kind == "cgroup2" and controllers.exists() and "cpu" in controllers.read_text().split():
            return place
    return None


def make_group(name: str, cores: float) -> Path:
    """Make a group whose processes get so many cores together.

    Returns:
        The file that a process joins by writing 0 into it.

    Raises:
        HostError: this system has no CPU quota, or does not let it be set.
    """
    folder = groups_folder()
    if folder is None:
        raise HostError("--straggler: needs the cpu controller of cgroup v1 or v2, which is not mounted here")
    group = folder / name
    quota = max(round(cores * PERIOD_MICROSECONDS), SMALLEST_QUOTA_MICROSECONDS)
    try:
        if (folder / "cgroup.subtree_control").exists():
            (folder / "cgroup.subtree_control").write_text("+cpu")
            group.mkdir()
            (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
        else:
            group.mkdir()
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
    except OSError as error:
        raise HostError(
            f"--straggler: needs a CPU quota, which {folder} refuses ({error.strerror})"
        ) from None
    return group / "cgroup.procs"


def join(procs: Path) -> None:
    """Put the calling process into a group."""
    descriptor = os.open(procs, os.O_WRONLY)
    os.write(descriptor, b"0")
    os.close(descriptor)
