"""The score of a whole model on a test set."""

import math
from pathlib import Path

import torch
from torch import nn

from fslsage_rpc.algorithms import find
from fslsage_rpc.device.placement import open_device
from fslsage_rpc.runs.finished import load_finished
from fslsage_rpc.tasks import Batches, Score, Task


def evaluate(model: nn.Module, task: Task, data: Batches) -> Score:
    """Evaluate in eval mode on all samples; the model is left in train mode.

    Where the loss is not finite, neither is the accuracy: it would be that of some class.
    """
    model.eval()
    with torch.no_grad():
        tallies = [task.tally(model(x), y) for x, y in data.in_order()]
    model.train()
    score = task.score(torch.stack(tallies).sum(0))
    if math.isfinite(score.loss):
        return score
    return Score(score.loss, math.nan, dict.fromkeys(score.metrics, math.nan))


def evaluate_run(folder: str | Path) -> Score:
    """Evaluate the final model of a finished run, from its folder, on the test set of its configuration.

    Raises:
        InputError: the folder is not that of a finished run.
    """
    run = load_finished(folder)
    device = open_device(run.config, 0)
    run.task.prepare()
    data = run.task.batches(run.task.load(train=False), run.config.evaluation.batch_size, device)
    model = run.split.whole()
    if not find(run.config.algorithm.name).client_holds_whole_model:
        model = nn.Sequential(run.split.client, run.split.server)  # rounded at the cut as in training
    return evaluate(model.to(device), run.task, data)
