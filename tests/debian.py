"""Debian's packages for tests of what is no Python package."""

import os
import shutil
import subprocess

APT = ("apt-get", "--option=DPkg::Lock::Timeout=300")


def install(*packages: str) -> None:
    """Install packages on a machine of continuous integration; any other stays as it is.

    What is not to be had there is missed by the test that needs it, which says so.
    """
    if "CI" not in os.environ or os.geteuid() != 0 or shutil.which(APT[0]) is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        subprocess.run([*APT, *command], env=environment, capture_output=True, check=False)
