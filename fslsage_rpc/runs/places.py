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


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all, also where others write it, too."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
