"""What the transformers library loads from a folder or from the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fslsage_rpc.config.own import first_line
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
    from huggingface_hub.utils import get_session  # which knows the user's proxies and certificates

    try:
        get_session().head(address, timeout=REACH_SECONDS)  # any answer will do
    except Exception as error:  # of whichever library the client is built on
        raise OSError(f"{address} cannot be reached ({first_line(error)})") from None
