"""Learning-rate schedules: whose steps or rounds they count, and which arguments are refused."""

from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import OptimizerKeys, SchedulerKeys
from fslsage_rpc.parties.optimizers import ScheduledOptimizer, check_scheduler
from support.rank_program import train_locally
from support.user_input import mistake


def halving(per: str) -> dict[str, Any]:
    return {"name": "StepLR", "arguments": {"step_size": 1, "gamma": 0.5}, "per": per}


def rate(optimizer: ScheduledOptimizer) -> float:
    return optimizer.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("per", "after_steps", "after_round"), [("step", 0.25, 0.25), ("round", 1.0, 0.5)])
def test_a_schedule_counts_steps_or_rounds(per: str, after_steps: float, after_round: float) -> None:
    parameter = nn.Parameter(torch.ones(1))
    keys = OptimizerKeys(name="sgd", lr=1.0, scheduler=SchedulerKeys(**halving(per)))
    optimizer = ScheduledOptimizer(keys, [parameter])
    for _ in range(2):
        parameter.grad = torch.ones(1)
        optimizer.step()
        assert parameter.grad is None
    assert rate(optimizer) == after_steps
    optimizer.end_round()
    assert rate(optimizer) == after_round


def test_without_a_schedule_the_rate_stays() -> None:
    optimizer = ScheduledOptimizer(OptimizerKeys(lr=0.1), [nn.Parameter(torch.ones(1))])
    optimizer.end_round()
    assert rate(optimizer) == 0.1


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (9, 10)])
def test_a_linear_warm_up_and_decay_is_that_of_transformers(warmup: int, total: int) -> None:
    transformers = pytest.importorskip("transformers")
    schedule = {"name": "LinearWarmupDecay", "arguments": {"warmup": warmup, "total": total}, "per": "step"}
    keys = OptimizerKeys(name="sgd", lr=0.2, scheduler=SchedulerKeys(**schedule))
    ours = ScheduledOptimizer(keys, [nn.Parameter(torch.ones(1))])
    theirs = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.2)
    scheduler = transformers.get_linear_schedule_with_warmup(theirs, warmup, total)
    for _ in range(total + 3):  # at 0 behind the end
        assert rate(ours) == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-15)
        theirs.step()
        scheduler.step()
        ours.step()
    assert rate(ours) == 0


@pytest.mark.parametrize(
    "arguments", [{}, {"warmup": 5}, {"warmup": 5, "total": 5}, {"warmup": -1, "total": 5}]
)
def test_a_warm_up_needs_a_decay_behind_it(arguments: dict[str, Any]) -> None:
    keys = OptimizerKeys(scheduler=SchedulerKeys(name="LinearWarmupDecay", arguments=arguments))
    said = mistake(check_scheduler, keys, "client")
    assert said.startswith(f"optimizer.client.scheduler.arguments: got {arguments}, expected ")


def tree(per: str) -> dict[str, Any]:
    keys = {"name": "sgd", "lr": 0.05, "weight_decay": 0.0}
    return {
        "rounds": 2,
        "precision": "fp64",
        "device": "cpu",
        "clients": {"count": 2, "batch_size": 16, "participation": 0.5},
        "data": {"train_limit": 64, "test_limit": 20, "partition": "iid"},
        "algorithm": {"align_every": 1, "start": "paper", "alignment": {"epochs": 1}},
        "optimizer": {
            party: {**keys, "scheduler": halving(per)} for party in ("client", "server", "auxiliary")
        },
    }


@pytest.mark.parametrize("name", ["fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg"])
def test_a_rate_that_falls_to_zero_after_a_round_stops_every_party(name: str) -> None:
    """Absent clients' rates fall too: the client that first trains in round 1 does not move either."""
    keys = tree("round")
    keys["algorithm"]["name"] = name
    for party in keys["optimizer"].values():
        party["scheduler"]["arguments"]["gamma"] = 0.0
    one, two = (train_locally({**keys, "rounds": rounds}) for rounds in (1, 2))
    for tensor in (key for key in one.tensors if key.endswith("floats") or key.startswith("final")):
        assert torch.allclose(one.tensors[tensor], two.tensors[tensor], rtol=1e-12, atol=1e-14), tensor


def test_steps_are_counted_by_each_model_for_itself() -> None:
    """With a rate that is zero after one step, the server takes one step, and each client one of its own."""
    keys = tree("step")
    keys["clients"]["participation"] = 1.0
    keys["algorithm"] = {"name": "splitfed_v2"}
    for party in keys["optimizer"].values():
        party["scheduler"]["arguments"]["gamma"] = 0.0
    one, two = (train_locally({**keys, "rounds": rounds}) for rounds in (1, 2))
    still = train_locally({**keys, "rounds": 1, "optimizer": {p: {"lr": 0} for p in keys["optimizer"]}})
    for name in ("client 0/floats", "client 1/floats", "server of 0/floats"):
        assert torch.equal(one.tensors[name], two.tensors[name])
        assert not torch.equal(one.tensors[name], still.tensors[name])


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("CosineAnnealingLR", {}, "T_max"),
        ("CosineAnnealingLR", {"T_max": 0}, "zero"),
        ("StepLR", {"step_size": "long"}, ""),
        ("LinearLR", {"total": 3}, "total"),
        ("MultiStepLR", {"milestones": 3}, ""),
        (None, {"T_max": 3}, "scheduler.name is null"),
    ],
)
def test_arguments_that_torch_does_not_take_are_refused(name: Any, arguments: Any, reason: str) -> None:
    keys = OptimizerKeys(scheduler=SchedulerKeys(name=name, arguments=arguments))
    message = mistake(check_scheduler, keys, "server")
    assert message.startswith(f"optimizer.server.scheduler.arguments: got {arguments}, expected ")
    assert reason in message


def test_an_unknown_schedule_is_refused_with_those_there_are() -> None:
    message = mistake(from_tree, {"optimizer": {"client": {"scheduler": {"name": "Cosine"}}}})
    assert message.startswith("optimizer.client.scheduler.name: got 'Cosine', expected one of StepLR, ")
    assert message.endswith("LinearWarmupDecay or null")
