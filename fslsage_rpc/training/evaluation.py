"""Loss and accuracy of a whole model on a test set."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.comm.world import open_device
from fslsage_rpc.configuration import load
from fslsage_rpc.data.batches import ImageBatches
from fslsage_rpc.data.datasets import SPECS, prepare
from fslsage_rpc.data.datasets import load as load_data
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.splitting import PRECISIONS, build


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy per sample and the share of samples classified right."""

    loss: float
    accuracy: float


def evaluate(model: nn.Module, data: ImageBatches) -> Score:
    """Evaluate in eval mode on all samples; the model is left in train mode."""
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=data.labels.device)
    right = torch.zeros((), dtype=torch.int64, device=data.labels.device)
    with torch.no_grad():
        for x, y in data.in_order():
            logits = model(x)  # [B, classes]
            loss_sum += F.cross_entropy(logits, y, reduction="sum").double()
            right += (logits.argmax(1) == y).sum()
    model.train()
    return Score(loss_sum.item() / len(data.labels), right.item() / len(data.labels))


def evaluate_run(folder: str | Path) -> Score:
    """Evaluate the final model of a finished run, from its folder, on the test set of its configuration.

    Raises:
        InputError: the folder is not that of a finished run.
    """
    folder = Path(folder)
    config = load(folder / "config.yaml")
    precision, spec = PRECISIONS[config.precision], SPECS[config.data.name]
    split = build(
        config.model, spec.classes, spec.image_shape, config.seed, precision.weights, precision.autocast
    )
    device = open_device(config, 0)
    model = split.whole()  # shares its weights with the halves
    try:
        model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # on what it did not write torch raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{folder / 'model.pt'}: cannot be read ({reason}), expected a finished run"
        ) from None
    prepare(config.data)
    data = ImageBatches(
        load_data(config.data, train=False), spec, config.evaluation.batch_size, device, precision.weights
    )
    if not ALGORITHMS[config.algorithm.name].client_holds_whole_model:
        model = nn.Sequential(split.client, split.server)  # rounded at the cut as in training
    return evaluate(model.to(device), data)
