"""Checkpoints on disk: `checkpoints/round-000003/`, after 3 rounds, with a part of each rank and a manifest.

Every file is written under a temporary name, synced and renamed, the manifest last: a folder without one is
no checkpoint. The manifest holds size and SHA-256 of each part and of the beginning of `metrics.jsonl` that
belongs to it, and a SHA-256 of its own.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
MANIFEST = "manifest.json"
FOLDER = re.compile(r"round-(\d{6,})")
State = dict[str, Any]


class Damaged(Exception):
    """A file of a checkpoint is not what was written; the message names it and says what is wrong with it."""


@dataclass(frozen=True)
class Extent:
    """What a file, or the beginning of one, holds."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """One rank's file, and the clients whose state it holds."""

    extent: Extent
    clients: list[int]


@dataclass
class RankState:
    """Everything of the parties that one rank hosts, between two rounds, as tensors and plain values.

    `server` and `client_bytes` (the wire ledger of all rounds so far, by client) are the server's rank's.
    `aggregation` is what the rule keeps of the client models: on all client ranks the same.
    """

    rounds: int
    """how many are done"""
    clients: dict[int, State]
    server: State | None
    client_bytes: dict[int, dict[str, int]]
    aggregation: State = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint: after how many rounds, and the part of each rank, the server's first."""

    folder: Path
    rounds: int
    parts: list[Part]
    metrics: Extent
    """the lines of these rounds"""
    image_orders: dict[str, dict[str, str]] = field(default_factory=dict)
    """of passes, by processor and by name, which the run keeps: `training/order_choice.py`"""

    def write(self) -> None:
        """Make the checkpoint complete.

        Raises:
            OSError: it cannot be written.
            Damaged: a part cannot be seen from here.
        """
        for rank, part in enumerate(self.parts):
            path = part_path(self.folder, rank)
            if not path.exists() or path.stat().st_size != part.extent.bytes:
                raise Damaged(
                    f"{path}: not seen from rank 0; all hosts must share the file system of `output`"
                )
        content = {
            "format": FORMAT,
            "rounds": self.rounds,
            "parts": [asdict(part) for part in self.parts],
            "metrics": asdict(self.metrics),
            "image_order": self.image_orders,
        }
        text = json.dumps({"manifest": content, "sha256": _digest(content)}, indent=2) + "\n"
        write_durably(self.folder / MANIFEST, text.encode())
        _sync_folder(self.folder.parent)

    def check(self) -> None:
        """Read all parts once.

        Raises:
            Damaged: one is not what was written.
        """
        for rank, part in enumerate(self.parts):
            path = part_path(self.folder, rank)
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    found = Extent(size, hashlib.file_digest(file, "sha256").hexdigest())
            except OSError as error:
                raise Damaged(said(error, path)) from None
            compare(path, found, part.extent)

    def read(self, clients: Collection[int], server: bool) -> RankState:
        """The state of these clients and, if asked for, the server, from the parts that hold them.

        Raises:
            Damaged: a part is missing here, or not what was written.
        """
        state = RankState(self.rounds, {}, None, {})
        for rank, part in enumerate(self.parts):
            mine = [client for client in part.clients if client in clients]
            the_servers = server and rank == 0
            if mine or the_servers:
                saved = self._read_part(rank)
                state.clients |= {client: saved.clients[client] for client in mine}
                state.aggregation = saved.aggregation or state.aggregation  # rank 0 has none of clients away
                if the_servers:
                    state.server, state.client_bytes = saved.server, saved.client_bytes
        return state

    def _read_part(self, rank: int) -> RankState:
        path = part_path(self.folder, rank)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Damaged(said(error, path)) from None
        compare(path, extent_of(data), self.parts[rank].extent)
        try:
            return RankState(**torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        except Exception as error:  # on what it did not write torch raises anything
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise Damaged(f"{path}: cannot be read by this version ({reason})") from None


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder.

    Raises:
        Damaged: it is not what was written.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
        content = tree["manifest"]
        sound = tree["sha256"] == _digest(content)
    except OSError as error:
        raise Damaged(said(error, path)) from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise Damaged(f"{path}: truncated or altered (not what the program writes)") from None
    if not sound:
        raise Damaged(f"{path}: altered (its SHA-256 differs)")
    if content["format"] != FORMAT:
        raise Damaged(f"{path}: of another version (format {content['format']}, expected {FORMAT})")
    if round_folder(folder.parent, content["rounds"]) != folder:
        raise Damaged(f"{path}: of another checkpoint (after {content['rounds']} rounds)")
    parts = [Part(Extent(**part["extent"]), part["clients"]) for part in content["parts"]]
    orders = content.get("image_order", {})  # older versions choose none
    return Manifest(folder, content["rounds"], parts, Extent(**content["metrics"]), orders)


def write_part(folder: Path, rank: int, state: RankState) -> Part:
    """Write a rank's part, durably.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # An aggregation that keeps nothing is left out, as older versions know of none.
    data = serialised({key: kept for key, kept in vars(state).items() if key != "aggregation" or kept})
    write_durably(part_path(folder, rank), data)
    return Part(extent_of(data), sorted(state.clients))


def serialised(state: State) -> memoryview:
    """As torch saves it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is there whole or not at all, also when the power fails.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def complete_folders(root: Path) -> list[Path]:
    """The folders of the checkpoints that were completed, newest first."""
    folders = reversed(list(_folders(root).values()))
    return [folder for folder in folders if (folder / MANIFEST).exists()]


def remove_all_but(root: Path, kept: Sequence[Path], until: int | None = None) -> None:
    """Remove every other checkpoint, complete or not, as far as the file system lets us.

    Args:
        until: those after more rounds than this stay.
    """
    for rounds, folder in _folders(root).items():
        if folder not in kept and (until is None or rounds <= until):
            with suppress(OSError):
                (folder / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint is none
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        root.rmdir()  # where it is empty


def round_folder(root: Path, rounds: int) -> Path:
    """The folder of the checkpoint after so many rounds."""
    return root / f"round-{rounds:06d}"


def part_path(folder: Path, rank: int) -> Path:
    """The file of a rank."""
    return folder / f"rank-{rank}.pt"


def extent_of(data: bytes | memoryview) -> Extent:
    """That of these bytes."""
    return Extent(len(data), hashlib.sha256(data).hexdigest())


def compare(path: Path, found: Extent, expected: Extent) -> None:
    """Hold what was found in a file to what was written.

    Raises:
        Damaged: they differ.
    """
    if found.bytes < expected.bytes:
        raise Damaged(f"{path}: truncated ({found.bytes} of {expected.bytes} bytes)")
    if found != expected:
        raise Damaged(f"{path}: altered (its SHA-256 is not the manifest's)")


def said(error: OSError, path: Path | None = None) -> str:
    """What the system says of a file, in one line."""
    return f"{path or error.filename}: {error.strerror or error}"


def _folders(root: Path) -> dict[int, Path]:
    """All checkpoint folders by round, ascending."""
    try:
        names = os.listdir(root)
    except OSError:
        return {}
    found = {int(match[1]): root / name for name in names if (match := FOLDER.fullmatch(name))}
    return dict(sorted(found.items()))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
