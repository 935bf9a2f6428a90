"""Federated split learning on torch.distributed, with latency and bytes measured rather than modelled."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fslsage_rpc.version import __version__

if TYPE_CHECKING:
    from fslsage_rpc.config.schema import Config
    from fslsage_rpc.errors import InputError
    from fslsage_rpc.notebook import load, train

__all__ = ["Config", "InputError", "__version__", "load", "train"]

_MODULES = {
    "Config": "fslsage_rpc.config.schema",
    "InputError": "fslsage_rpc.errors",
    "load": "fslsage_rpc.notebook",
    "train": "fslsage_rpc.notebook",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line must be there first, to answer Ctrl-C.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
