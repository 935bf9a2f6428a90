"""`metrics.jsonl`: one line per round, without gap or double line, also across a resume and a full disk; and
between them one for each event.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fslsage_rpc.runs.checkpoint_files import Damaged, Extent, compare, extent_of, said, write_durably
from fslsage_rpc.runs.round_numbers import from_one, from_zero


class MetricsFile:
    """Grows by whole lines. A line that the disk does not take is kept and written with the next one."""

    def __init__(self, path: Path):
        self.path = path
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._unwritten = b""

    def begin(self, lines: bytes) -> None:
        """Start with these lines (of earlier rounds); whatever else the file held is gone."""
        write_durably(self.path, lines)
        self._bytes, self._digest = len(lines), hashlib.sha256(lines)
        self._unwritten = b""

    def append(self, line: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: it, or one before it, is not on disk yet.
        """
        self._unwritten += encoded([line])
        self._write()

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far, read back: they are not kept in memory, as a long run has many.

        Raises:
            Damaged: the file is not what was written.
        """
        written = read_beginning(self.path, Extent(self._bytes, self._digest.hexdigest()))
        return decoded(written + self._unwritten)

    def extent(self) -> Extent:
        """What the lines so far come to.

        Raises:
            OSError: some are not written yet.
        """
        if self._unwritten:
            self._write()
        return Extent(self._bytes, self._digest.hexdigest())

    def sync(self) -> None:
        """Make what has been written durable; also beside `append`, from another thread.

        Raises:
            OSError: it is not.
        """
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _write(self) -> None:
        with self.path.open("r+b") as file:
            file.truncate(self._bytes)  # half a line, where the disk was full
            file.seek(self._bytes)
            file.write(self._unwritten)
        self._bytes += len(self._unwritten)
        self._digest.update(self._unwritten)
        self._unwritten = b""


def encoded(lines: Iterable[dict[str, Any]]) -> bytes:
    """Lines as they stand in the file; those read from it come out the same."""
    return b"".join((json.dumps(line) + "\n").encode() for line in lines)


def decoded(lines: bytes) -> list[dict[str, Any]]:
    """What `encoded` has made of lines, in this version or an older one."""
    return from_one([json.loads(line) for line in lines.splitlines()])


def rounds_of(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of rounds, without those of events: a rank that was lost, or has joined."""
    return [line for line in lines if "event" not in line]


def read_beginning(path: Path, extent: Extent) -> bytes:
    """The beginning of the file that a checkpoint goes with.

    Going on with an older run rewrites its lines; its checkpoints have the SHA-256 of what they were.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        whole = path.read_bytes()
    except OSError as error:
        raise Damaged(said(error, path)) from None
    lines = whole[: extent.bytes]
    if extent_of(lines) != extent and extent_of(older := _as_older(whole)[: extent.bytes]) == extent:
        return older
    compare(path, extent_of(lines), extent)
    return lines


def _as_older(lines: bytes) -> bytes:
    """Lines as an older version has written them; nothing where they are none."""
    try:
        return encoded(from_zero(decoded(lines)))
    except (ValueError, LookupError, TypeError, RecursionError):
        return b""
