"""Debian's packages for tests of what is no Python package."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "iproute2", "iptables")
SECONDS = 100
"""for each of two commands; a test has 240"""


@cache
def install() -> None:
    """Install them all on a machine of continuous integration; any other stays as it is.

    What is not to be had there is missed by the test that needs it, which says so.
    """
    if "CI" not in os.environ or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with Path(tempfile.gettempdir(), "fslsage-debian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests may run beside these
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["apt-get", *command], env=environment, capture_output=True, check=False, timeout=SECONDS
                )
