"""The model of a finished run, from its folder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fslsage_rpc.config.loading import load
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.splitting import SplitModel
from fslsage_rpc.tasks import Task, open_task


@dataclass(frozen=True)
class FinishedRun:
    """A finished run's configuration and task, and its model with the trained weights, on the CPU."""

    config: Config
    task: Task
    split: SplitModel


def load_finished(folder: str | Path) -> FinishedRun:
    """The finished run of a folder.

    Raises:
        InputError: the folder is not that of a finished run.
    """
    folder = Path(folder)
    config = load(folder / "config.yaml")
    task = open_task(config)
    split = task.build()
    try:
        weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        split.whole().load_state_dict(weights)  # which shares its weights with the halves
    except Exception as error:  # on what it did not write torch raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{folder / 'model.pt'}: cannot be read ({reason}), expected a finished run"
        ) from None
    return FinishedRun(config, task, split)
