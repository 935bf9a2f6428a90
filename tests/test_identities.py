"""Algorithms that must coincide do: fp64, real digits, three rounds."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fslsage_rpc.algorithms.rehearsal import Rehearsal
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Model
from fslsage_rpc.data.batches import ImageBatches
from fslsage_rpc.data.datasets import SPECS
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.models.splitting import build
from fslsage_rpc.training.experiment import Experiment
from support.batch_norm_model import CUT
from support.equality import without_seconds
from support.rank_program import train, train_locally


def tree(algorithm: dict[str, Any], optimizer: str = "adam", **more: Any) -> dict[str, Any]:
    return {
        "rounds": 3,
        "precision": "fp64",
        "transport": "local",
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"train_limit": 150, "test_limit": 60, "partition": "iid"},
        "algorithm": {
            "average_auxiliary": "never",
            "start": "paper",
            "alignment": {"epochs": 2},
            **algorithm,
        },
        "optimizer": {party: {"name": optimizer, "lr": 3e-3} for party in ("client", "server", "auxiliary")},
        **more,
    }


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() <= 1e-10 * a.norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("model", ["simple_conv", "support.batch_norm_model:residual"])
def test_splitfed_v1_is_fedavg(model: str, optimizer: str) -> None:
    cut = CUT if model == "support.batch_norm_model:residual" else None
    keys = tree({}, optimizer, model={"name": model, "cut": cut}, rounds=2 if cut else 3)
    split, whole = (
        train_locally({**keys, "algorithm": {"name": name}}) for name in ("splitfed_v1", "fedavg")
    )
    names = [name for name in split.tensors if name.startswith("final ")]
    assert names == [name for name in whole.tensors if name.startswith("final ")]
    for name in names:
        assert_equal(split.tensors[name].double(), whole.tensors[name].double())
    for a, b in zip(split.lines, whole.lines, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-9)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-9)


def test_fsl_sage_with_the_server_model_as_auxiliary_is_splitfed_v2() -> None:
    still = {"server": {"lr": 0, "weight_decay": 0}, "client": {"lr": 3e-3}, "auxiliary": {"lr": 3e-3}}
    sage, splitfed = (
        Experiment.prepare(from_tree({**tree({"name": name, "upload_every": 1}), "optimizer": still}))
        for name in ("fsl_sage", "splitfed_v2")
    )
    sage.split.auxiliary = copy.deepcopy(sage.split.server)
    sage.rehearsal = Rehearsal(sage.algorithm, sage.task, sage.split)
    a, b = (train(experiment, open_world(experiment.config)) for experiment in (sage, splitfed))
    assert_equal(a.tensors["client 0/floats"], b.tensors["client 0/floats"])
    assert all(line["drift"]["nmse"] < 1e-20 for line in a.lines)


def test_fsl_sage_without_alignment_is_cse_fsl_with_still_auxiliaries() -> None:
    still = {"auxiliary": {"lr": 0}, "client": {"lr": 3e-3}, "server": {"lr": 3e-3}}
    sage = train_locally({**tree({"name": "fsl_sage", "align_every": None}), "optimizer": still})
    cse = train_locally({**tree({"name": "cse_fsl"}), "optimizer": still})
    assert_equal(sage.tensors["client 2/floats"], cse.tensors["client 2/floats"])
    assert_equal(sage.tensors["server of 2/floats"], cse.tensors["server of 2/floats"])


@pytest.mark.parametrize("name", ["fsl_sage", "splitfed_v2", "cse_fsl", "fedavg"])
def test_participation_of_everybody_is_full_participation(name: str) -> None:
    keys = tree({"name": name}, rounds=2)
    most = {**keys, "clients": {**keys["clients"], "participation": 0.99}}  # ceil(0.99 * 3) of 3
    assert without_seconds(train_locally(keys).lines) == without_seconds(train_locally(most).lines)


@pytest.mark.parametrize("name", ["splitfed_v1", "splitfed_v2", "fedavg"])
def test_one_client_is_plain_training_in_one_process(name: str) -> None:
    keys = tree({"name": name}, clients={"count": 1, "batch_size": 16})
    experiment = Experiment.prepare(from_tree(keys))
    assert experiment.prepared
    data = ImageBatches(
        experiment.prepared[0].subset(experiment.parts[0]),
        SPECS["digits"],
        16,
        torch.device("cpu"),
        torch.float64,
    )
    split = build(Model(name="simple_conv"), 10, (1, 8, 8), 0, torch.float64)
    whole = nn.Sequential(split.client, split.server)
    optimizer = torch.optim.Adam(whole.parameters(), lr=3e-3)
    for round in range(3):
        for x, y in data.shuffled(seed=0, t=round, client=0, epochs=1, augment=True):
            optimizer.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            optimizer.step()
    still = {party: {"lr": 3e-3, "weight_decay": 0} for party in ("client", "server")}
    outcome = train_locally({**keys, "optimizer": still})
    final = torch.cat([t.reshape(-1) for n, t in outcome.tensors.items() if n.startswith("final ")])
    assert_equal(final, torch.cat([p.detach().reshape(-1) for p in whole.parameters()]))


def test_splitfed_v2_draws_its_order_anew_each_round() -> None:
    experiment = Experiment.prepare(from_tree(tree({"name": "splitfed_v2"}, clients={"count": 5})))
    orders = [tuple(experiment.algorithm.ranking(round)) for round in range(10)]
    assert len(set(orders)) > 5
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)


def test_client_major_trains_one_client_after_the_other_on_one_server_model() -> None:
    keys = tree({"name": "splitfed_v2"}, rounds=1, server={"order": "client_major"})
    keys["optimizer"] = {
        party: {"name": "sgd", "lr": 0.05, "weight_decay": 0} for party in ("client", "server")
    }
    experiment = Experiment.prepare(from_tree(keys))
    assert experiment.prepared
    split = build(Model(name="simple_conv"), 10, (1, 8, 8), 0, torch.float64)
    for client, part in enumerate(experiment.parts):
        data = ImageBatches(
            experiment.prepared[0].subset(part), SPECS["digits"], 16, torch.device("cpu"), torch.float64
        )
        whole = nn.Sequential(copy.deepcopy(split.client), split.server)
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
        for x, y in data.shuffled(seed=0, t=0, client=client, epochs=1, augment=True):
            optimizer.zero_grad()
            F.cross_entropy(whole(x), y).backward()
            optimizer.step()
    outcome = train_locally(keys)
    assert_equal(
        outcome.tensors["server of 0/floats"],
        torch.cat([p.detach().reshape(-1) for p in split.server.parameters()]),
    )
