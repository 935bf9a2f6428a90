"""Optimizers of torch.optim by the name that the configuration gives them."""

from collections.abc import Iterable

import torch
from torch import nn

from fslsage_rpc.config import OptimizerKeys

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def make_optimizer(keys: OptimizerKeys, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimizer over these parameters."""
    return OPTIMIZERS[keys.name](parameters, lr=keys.lr, weight_decay=keys.weight_decay)
