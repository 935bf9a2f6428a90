"""Where results are written, and that they can be."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fslsage_rpc.errors import InputError


@contextmanager
def writing(output: str, folder: Path) -> Iterator[None]:
    """Say in one line that the folder cannot be written to.

    Raises:
        InputError: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output: got {output!r}, where {folder} cannot be written ({error.strerror})"
        ) from None


def check_place(folder: Path) -> None:
    """Hold what is written into a run folder to a place below `output`.

    Raises:
        InputError: it is a link, or the file system does not take its name.
    """
    try:
        is_link = stat.S_ISLNK(folder.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG or not folder.parent.exists():
            raise
        raise InputError(
            f"name: got {folder.name!r}, expected one that the file system of {folder.parent} takes "
            f"({error.strerror})"
        ) from None
    if is_link:
        raise InputError(
            f"name: got {folder.name!r}, where {folder} is a link, expected a folder or the name of a "
            "new one; output itself may be a link"
        )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it appears whole or not at all, also where several processes write it at once.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        # A path may be no UTF-8.
        temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
