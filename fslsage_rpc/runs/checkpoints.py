"""Checkpoints as the ranks make them together, beside the training, and as they go on from one."""

import copy
import platform
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from fslsage_rpc.config.schema import Checkpoint
from fslsage_rpc.device.placement import CPU
from fslsage_rpc.errors import HostError
from fslsage_rpc.job.world import World
from fslsage_rpc.runs.checkpoint_files import (
    Damaged,
    Extent,
    Manifest,
    Part,
    RankState,
    complete_folders,
    remove_all_but,
    round_folder,
    said,
    write_part,
)
from fslsage_rpc.runs.run_folder import RunFolder

WEIGHTS = {"floats", "integers"}
"""the keys of `Weights.state`"""
SAMPLED_BYTES = 64
"""by which weights are looked up among those kept"""
LAST_MOMENT_SECONDS = 5.0
"""how long an error waits for the checkpoint of the round before"""


class Checkpoints:
    """Writes checkpoints while the next round runs; every rank has one of these.

    After a round (`begin`) each rank copies the state of its parties. A thread writes the copy and tells rank
    0; when all have, a thread there writes the manifest: until then the checkpoint before is the one to go on
    from. A part that cannot be written costs its checkpoint, not the training.

    A context: however the training ends, what is being written gets a moment to be.

    Args:
        root: the folder of the checkpoints, the same on all hosts.
        folder: the run folder, on the server's rank.
        image_orders: as manifests have them; more come in with ranks that join.
        in_memory: keep the copies of the last two rounds' ends, for when a rank is lost.

    Attributes:
        memory: by rounds done, such a copy; None for the start of a run. Two, as ranks may be a round apart.
    """

    def __init__(
        self,
        world: World,
        root: Path,
        keys: Checkpoint,
        folder: RunFolder | None,
        image_orders: dict[str, dict[str, str]],
        in_memory: bool = False,
    ):
        self._world = world
        self._root = root
        self._keys = keys
        self._folder = folder
        self._image_orders = image_orders
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._in_memory = in_memory
        self.memory: dict[int, RankState | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writing:
            wait([self._writing], LAST_MOMENT_SECONDS)  # longer only if a rank is lost, and its part with it

    def begin(self, rounds: int, last: bool, state: Callable[[int], RankState]) -> None:
        """Begin to write a checkpoint, if one is due after so many rounds; called by all ranks alike, when
        the round's line is in `metrics.jsonl` and the checkpoint before is complete.
        """
        due = self._keys.every is not None and (last or rounds % self._keys.every == 0)
        if not (due or self._in_memory):
            return
        copied = snapshot(state(rounds))
        if self._in_memory:
            self.memory = {done: kept for done, kept in self.memory.items() if done == rounds - 1}
            self.memory[rounds] = copied
        if due:
            lines = self._lines_so_far() if self._folder else None
            self._writing = self._thread.submit(self._write, copied, lines)

    def complete(self) -> None:
        """Wait until this rank has done its part of the checkpoint that was begun: on rank 0, until it is the
        newest one, or has been given up. A slow disk holds the training up here, off its clock.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def newest(self) -> Path | None:
        """The folder of the newest complete checkpoint, as rank 0 sees it."""
        return next(iter(complete_folders(self._root)), None)

    def _lines_so_far(self) -> Extent | str:
        """What `metrics.jsonl` holds now, before lines of later rounds; or what the system says."""
        assert self._folder is not None
        try:
            return self._folder.metrics.extent()
        except OSError as error:
            return said(error, self._folder.metrics.path)

    def _write(self, state: RankState, lines: Extent | str | None) -> None:
        """On the thread."""
        outcome: Part | str
        try:
            outcome = write_part(round_folder(self._root, state.rounds), self._world.rank, state)
        except OSError as error:
            outcome = said(error)
        outcomes = self._world.gather_beside(f"checkpoint/{state.rounds}", outcome)
        if self._folder and outcomes and lines:
            self._make_newest(state.rounds, outcomes, lines, self._folder)

    def _make_newest(
        self, rounds: int, outcomes: list[Part | str], lines: Extent | str, run: RunFolder
    ) -> None:
        """Write the manifest and remove what is too old; or say what the matter is."""
        parts = [outcome for outcome in outcomes if isinstance(outcome, Part)]
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if isinstance(text, str)]
        if isinstance(lines, str):
            problems.append(lines)
        elif not problems:
            try:
                run.metrics.sync()
                folder, orders = round_folder(self._root, rounds), self._image_orders
                Manifest(folder, rounds, parts, lines, orders).write()
            except OSError as error:
                problems = [said(error)]
            except Damaged as error:
                problems = [str(error)]
        found = complete_folders(self._root)
        if problems:
            more = f", and {len(problems) - 1} more" if problems[1:] else ""
            last = f"the last one is {found[0]}" if found else "there is none"
            run.warn(f"no checkpoint after round {rounds} ({problems[0]}{more}); {last}; the run goes on")
        remove_all_but(self._root, found[: self._keys.keep], until=rounds)  # others may write the next one


def snapshot(tree: Any, kept: "_KeptWeights | None" = None) -> Any:
    """A copy of a state, on the CPU, that no later step changes.

    Weights that are equal bit for bit become one tensor, which torch saves once: most clients' are, after
    averaging and before their first step. No other tensors do: parties copy only weights as they load them.
    """
    kept = kept or _KeptWeights()
    if isinstance(tree, RankState):
        return replace(tree, **snapshot(vars(tree), kept))
    if isinstance(tree, torch.Tensor):
        return tree.detach().to(CPU, copy=True)
    if type(tree) is dict and tree.keys() == WEIGHTS:
        return {key: kept.copy_of(tensor) for key, tensor in tree.items()}
    if type(tree) is dict:
        return {key: snapshot(value, kept) for key, value in tree.items()}
    if type(tree) is list:
        return [snapshot(value, kept) for value in tree]
    return copy.deepcopy(tree)


class _KeptWeights:
    """Copies of flat weights, of equal ones the same."""

    def __init__(self) -> None:
        self._copies: dict[
            Any, tuple[torch.Tensor, torch.Tensor]
        ] = {}  # by some bytes: the bytes, and a copy

    def copy_of(self, weights: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor `[n]`, on the CPU."""
        bits = weights.detach().view(torch.uint8)  # of which -0 is not 0, and NaN is itself
        some = bits[:: max(1, bits.numel() // SAMPLED_BYTES)].cpu().numpy().tobytes()
        key = weights.dtype, weights.shape, some
        known = self._copies.get(key)
        if known is None or not torch.equal(known[0], bits):
            known = self._copies[key] = bits, weights.detach().to(CPU, copy=True)
        return known[1]


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
