"""What the transformers library loads from a folder or from the Hugging Face hub."""

import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from fslsage_rpc.errors import InputError

REACH_SECONDS = 10.0


def load(loader: Callable[..., Any], name: str, download: bool = True, **keys: Any) -> Any:
    """What a loader of transformers makes of a folder, or of a name on the hub: from what is stored on this
    machine or, only where that is not enough, from the network.

    Args:
        download: may the network be asked? (The environment variable HF_HUB_OFFLINE forbids it too.)

    Raises:
        Exception: whatever the loader raises.
        OSError: the hub cannot be reached.
    """
    try:
        return loader(name, local_files_only=True, **keys)
    except InputError:  # transformers is not installed
        raise
    except Exception:
        from huggingface_hub import constants

        if not download or constants.is_offline_mode() or Path(name).is_dir():
            raise
    _reach(constants.ENDPOINT)
    return loader(name, **keys)


def _reach(address: str) -> None:
    """Fail at once where the hub cannot be reached: its client tries each of many files for half a minute."""
    try:
        urllib.request.urlopen(address, timeout=REACH_SECONDS).close()
    except HTTPError:
        pass  # an answer, whatever it says
    except URLError as error:
        raise OSError(f"{address} cannot be reached: {error.reason}") from None
