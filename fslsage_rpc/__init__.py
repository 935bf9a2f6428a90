"""Federated split learning on torch.distributed, with latency and bytes measured rather than modelled."""

from fslsage_rpc.config import Config
from fslsage_rpc.errors import InputError
from fslsage_rpc.notebook import train
from fslsage_rpc.version import __version__

__all__ = ["Config", "InputError", "__version__", "train"]
