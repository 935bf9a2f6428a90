"""The environment that a result depends on besides its configuration, for `environment.json`."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.device.placement import device_name
from fslsage_rpc.errors import InputError
from fslsage_rpc.version import __version__


def rank_environment(device: torch.device) -> dict[str, Any]:
    """One rank as `environment.json` has it."""
    return {
        "host": platform.node(),
        "device": str(device),
        "device_name": device_name(device),
        "cores": os.cpu_count(),
        "usable_cores": len(usable_cores()),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """The versions that a result depends on."""
    return {
        "fslsage_rpc": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
    }


def emulated_links() -> dict[str, Any]:
    """The key `links` with what `launch/wan.py` asked of the links and measured; nothing without it.

    Raises:
        InputError: FSLSAGE_LINKS names no JSON file.
    """
    path = os.environ.get("FSLSAGE_LINKS")
    if path is None:
        return {}
    try:
        return {"links": json.loads(Path(path).read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        raise InputError(f"FSLSAGE_LINKS: got {path!r}, expected a JSON file") from None
