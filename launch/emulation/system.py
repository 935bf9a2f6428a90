"""The system's own tools: what is needed of them, and running them."""

import os
import shutil
import subprocess
import sys

from fslsage_rpc.errors import HostError

PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
"""the commands that are always needed, and the Debian packages that have them"""
COMMAND_SECONDS = 30.0


class CommandFailed(RuntimeError):
    """A system command refused; the message is the command and what it said, in one line."""


def require_root_and_tools() -> None:
    """Check what every emulated network needs.

    Raises:
        HostError: this is not Linux, not root, or a command is missing.
    """
    if sys.platform != "linux":
        raise HostError(f"needs Linux, for its network namespaces; this is {sys.platform}")
    if os.geteuid() != 0:
        raise HostError("needs root, to make network namespaces; start it with sudo")
    for command, package in PACKAGES.items():
        if shutil.which(command) is None:
            raise HostError(f"needs the command {command} (Debian: apt-get install {package})")


def run(*command: str) -> str:
    """Run a short system command.

    Returns:
        Its standard output.

    Raises:
        CommandFailed: its status is not 0, or it takes too long.
    """
    said = f"no answer in {COMMAND_SECONDS:g} s"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{' '.join(command)}: {said}") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        raise CommandFailed(f"{' '.join(command)}: {said}")
    return done.stdout
