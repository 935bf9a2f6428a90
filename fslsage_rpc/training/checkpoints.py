"""Checkpoints as the ranks make them together, beside the training, and as they go on from one."""

import copy
import platform
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fslsage_rpc.comm.world import World
from fslsage_rpc.config import Checkpoint
from fslsage_rpc.errors import HostError
from fslsage_rpc.training.checkpoint_files import (
    Damaged,
    Manifest,
    Part,
    RankState,
    complete_folders,
    remove_all_but,
    round_folder,
    said,
    write_part,
)
from fslsage_rpc.training.run_folder import RunFolder

CPU = torch.device("cpu")


class Checkpoints:
    """Writes checkpoints while the next round runs; every rank has one of these.

    After a round (`begin`) each rank copies the state of its parties, and a thread writes the copy. After the
    next round (`complete`) the ranks tell rank 0 what they have written, and it writes the manifest: until
    then the checkpoint before is the one to go on from. A part that cannot be written costs its checkpoint,
    not the training.

    Args:
        root: the folder of the checkpoints, the same on all hosts.
        folder: the run folder, on the server's rank.
    """

    def __init__(self, world: World, root: Path, keys: Checkpoint, folder: RunFolder | None):
        self._world = world
        self._root = root
        self._keys = keys
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[Part]] | None = None

    def begin(self, rounds: int, last: bool, state: Callable[[int], RankState]) -> None:
        """Begin to write a checkpoint, if one is due after so many rounds; called by all ranks alike."""
        if self._keys.every is None or not (last or rounds % self._keys.every == 0):
            return
        folder = round_folder(self._root, rounds)
        writing = self._thread.submit(write_part, folder, self._world.rank, snapshot(state(rounds)))
        self._writing = rounds, writing

    def complete(self) -> None:
        """Collective: wait until the checkpoint that was begun is written, and make it the newest one."""
        if self._writing is None:
            return
        (rounds, writing), self._writing = self._writing, None
        outcomes = self._world.gather(_outcome(writing))
        if self._folder and outcomes:
            self._make_newest(rounds, outcomes, self._folder)

    def _make_newest(self, rounds: int, outcomes: list[Part | str], run: RunFolder) -> None:
        """Write the manifest and remove what is too old; or say what the matter is."""
        parts = [outcome for outcome in outcomes if isinstance(outcome, Part)]
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if isinstance(text, str)]
        folder = round_folder(self._root, rounds)
        if not problems:
            try:
                Manifest(folder, rounds, parts, run.sync_metrics()).write()
            except OSError as error:
                problems = [said(error)]
            except Damaged as error:
                problems = [str(error)]
        found = complete_folders(self._root)
        if problems:
            more = f", and {len(problems) - 1} more" if problems[1:] else ""
            last = f"the last one is {found[0]}" if found else "there is none"
            run.warn(f"no checkpoint after round {rounds} ({problems[0]}{more}); {last}; the run goes on")
        remove_all_but(self._root, found[: self._keys.keep])


def snapshot(tree: Any) -> Any:
    """A copy of a state, on the CPU, that no later step changes."""
    if isinstance(tree, RankState):
        return replace(tree, **snapshot(vars(tree)))
    if isinstance(tree, torch.Tensor):
        return tree.detach().to(CPU, copy=True)
    if type(tree) is dict:
        return {key: snapshot(value) for key, value in tree.items()}
    if type(tree) is list:
        return [snapshot(value) for value in tree]
    return copy.deepcopy(tree)


def read_state(manifest: Manifest, clients: Collection[int], server: bool) -> RankState:
    """What a rank goes on from, of a checkpoint that rank 0 has found sound.

    Raises:
        HostError: this host does not see the files that rank 0 has seen.
    """
    try:
        return manifest.read(clients, server)
    except Damaged as error:
        raise HostError(
            f"output: {error} on host {platform.node()}, expected a file system that all hosts share"
        ) from None


def _outcome(writing: Future[Part]) -> Part | str:
    """This rank's part, or what the system said."""
    try:
        return writing.result()
    except OSError as error:
        return said(error)
