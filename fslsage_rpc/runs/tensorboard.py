"""Metrics as TensorBoard events, where the `tensorboard` package is installed."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes each round's figures to a folder; does nothing without the package.

    Args:
        first_round: events of this round and later ones that the folder has already count no more.
    """

    def __init__(self, folder: Path, first_round: int):
        self._folder = folder
        self._first_round = first_round
        self._writer: SummaryWriter | None = None

    def open(self) -> None:
        """Begin an event file."""
        if find_spec("tensorboard") is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensorboard's own imports
            from torch.utils.tensorboard import SummaryWriter
        purged = self._first_round if self._first_round > 1 else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purged)

    def add_round(self, line: dict[str, Any]) -> None:
        """Write one metrics line: scalars under their keys, nested ones under `section/key`.

        `train_loss/batches` and `train_loss/uploads` have charts of their own.
        """
        if self._writer is None:
            return
        for name, value in _scalars(line):
            if name == "train_loss" and "train_loss_of" in line:
                name = f"train_loss/{line['train_loss_of']}"
            self._writer.add_scalar(name, value, line["round"])
        if line.get("diverged"):
            self._writer.add_text("diverged", f"diverged in round {line['round']}", line["round"])
        self._writer.flush()

    def give_up(self) -> None:
        """Write nothing more."""
        self._writer = None

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def _scalars(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("round", "diverged"):
            found.append((prefix + key, value))
    return found
