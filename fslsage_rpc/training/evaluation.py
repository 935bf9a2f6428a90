"""The score of a whole model on a test set."""

from pathlib import Path

import torch
from torch import nn

from fslsage_rpc.algorithms import find
from fslsage_rpc.comm.world import open_device
from fslsage_rpc.configuration import load
from fslsage_rpc.errors import InputError
from fslsage_rpc.tasks import Batches, Score, Task, open_task


def evaluate(model: nn.Module, task: Task, data: Batches) -> Score:
    """Evaluate in eval mode on all samples; the model is left in train mode."""
    model.eval()
    with torch.no_grad():
        tallies = [task.tally(model(x), y) for x, y in data.in_order()]
    model.train()
    return task.score(torch.stack(tallies).sum(0))


def evaluate_run(folder: str | Path) -> Score:
    """Evaluate the final model of a finished run, from its folder, on the test set of its configuration.

    Raises:
        InputError: the folder is not that of a finished run.
    """
    folder = Path(folder)
    config = load(folder / "config.yaml")
    task = open_task(config)
    split = task.build()
    device = open_device(config, 0)
    model = split.whole()  # shares its weights with the halves
    try:
        model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # on what it did not write torch raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{folder / 'model.pt'}: cannot be read ({reason}), expected a finished run"
        ) from None
    task.prepare()
    data = task.batches(task.load(train=False), config.evaluation.batch_size, device)
    if not find(config.algorithm.name).client_holds_whole_model:
        model = nn.Sequential(split.client, split.server)  # rounded at the cut as in training
    return evaluate(model.to(device), task, data)
