"""What the user brings along: functions and classes of their own, named `package.module:function`."""

import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from fslsage_rpc.errors import InputError


def is_own(name: str | None) -> TypeGuard[str]:
    """Does a configuration's name, if there is one, stand for something of the user's own?"""
    return name is not None and ":" in name


def import_own(key: str, name: str, expected: str) -> Callable[..., Any]:
    """The function or class of that name, from the working directory or from what is installed.

    Args:
        key: of the configuration, and `expected`: what it is to be; for the message.

    Raises:
        InputError: it cannot be imported, or cannot be called.
    """
    path, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, also for the console script
    try:
        if path not in sys.modules:
            importlib.invalidate_caches()  # a notebook may have written the file just now
        found: object = getattr(importlib.import_module(path), function)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise InputError(f"{key}: got {name!r}, which cannot be imported ({first_line(error)})") from None
    if not callable(found):
        raise InputError(f"{key}: got {name!r}, expected {expected}")
    return found


def source_hash(name: str) -> str | None:
    """The SHA-256 of the source of what was imported by that name: of its module's file, and of the file that
    it comes from where that is another.

    Returns:
        None where no file holds it, as for what a notebook defines.
    """
    path, _, function = name.partition(":")
    module = sys.modules.get(path)
    origin = sys.modules.get(getattr(getattr(module, function, None), "__module__", None) or path)
    files = dict.fromkeys(getattr(each, "__file__", None) or "" for each in (module, origin))
    try:
        return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    except OSError:
        return None


def first_line(error: BaseException) -> str:
    """What an error is and says, in one line."""
    return (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0][:200]
