"""Shared by the commands, those of other packages, too."""

import os

from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError


def needs_ranks(config: Config) -> bool:
    """Is this neither one rank of a job nor a run in one process?"""
    return config.transport == "rpc" and "RANK" not in os.environ


def count(option: str, text: str) -> int:
    """The whole number, from 1 on, that an option is given.

    Raises:
        InputError: it is something else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option}: got {text!r}, expected a whole number from 1 on")
    return int(text)
