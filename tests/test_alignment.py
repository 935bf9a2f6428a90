"""Closed forms of the alignment: what the estimate, the buffer and the fit must be."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import AlignmentKeys, Auxiliary, Model, OptimizerKeys
from fslsage_rpc.models.splitting import build
from fslsage_rpc.parties.agreement import Agreement
from fslsage_rpc.parties.alignment_buffer import AlignmentBuffer
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit, cut_layer_gradient
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.randomness import START
from fslsage_rpc.training.experiment import Experiment
from support.batch_norm_model import CUT
from support.user_input import mistake


def smashed(shape: tuple[int, ...], samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return z, torch.randint(10, (samples,), generator=generator)


@pytest.mark.parametrize("model", ["simple_conv", "resnet18"])
def test_estimate_of_a_copy_of_the_server_model_is_the_true_gradient(model: str) -> None:
    split = build(Model(name=model), 10, (3, 32, 32), 0, torch.float64)
    z, y = smashed(split.smashed_shape, 8)
    true = z.clone().requires_grad_()
    F.cross_entropy(split.server(true), y).backward()
    estimate = cut_layer_gradient(copy.deepcopy(split.server), z, y)
    assert true.grad is not None
    assert (estimate - true.grad).norm() <= 1e-12 * true.grad.norm()


def make_fit(auxiliary: nn.Module, epochs: int = 20, batch_size: int = 8, **keys: Any) -> AuxiliaryFit:
    optimizer = ScheduledOptimizer(OptimizerKeys(), auxiliary.parameters())
    of_alignment = AlignmentKeys(epochs=epochs, batch_size=batch_size, buffer_size=24, **keys)
    return AuxiliaryFit(auxiliary, optimizer, of_alignment, Context())


@pytest.mark.parametrize(
    "model",
    [Model(), Model(name="support.batch_norm_model:residual", cut=CUT)],
    ids=["simple_conv", "batch norm"],
)
def test_alignment_lowers_its_objective_and_leaves_the_server_as_it_was(model: Model) -> None:
    split = build(model, 10, (3, 32, 32), 0, torch.float64)
    server = split.server.train()
    server(smashed(split.smashed_shape, 8, seed=1)[0])  # running statistics that are not the initial ones
    before = {name: tensor.clone() for name, tensor in server.state_dict().items()}
    fit = make_fit(split.auxiliary)
    fit.buffer.add(*smashed(split.smashed_shape, 20))
    record = fit.fit(fit.targets(server)).read()
    weights = fit.hand_out(START, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in server.state_dict().items())
    assert all(parameter.grad is None for parameter in server.parameters())
    assert server.training
    assert record["nmse_after"] < record["nmse_before"]
    assert record["cosine_after"] > record["cosine_before"]
    assert torch.equal(weights.floats, fit.weights.floats)
    assert (
        weights.floats.data_ptr() != fit.weights.floats.data_ptr()
    )  # what is sent must not change under way


def test_running_statistics_still_move_in_training_after_an_alignment() -> None:
    split = build(Model(name="resnet18"), 10, (3, 32, 32), 0, torch.float64)
    fit = make_fit(split.auxiliary, epochs=1)
    fit.buffer.add(*smashed(split.smashed_shape, 8))
    fit.fit(fit.targets(split.server))
    counters = [b.clone() for b in split.server.buffers()]
    split.server(smashed(split.smashed_shape, 8)[0])
    assert not any(torch.equal(a, b) for a, b in zip(counters, split.server.buffers(), strict=True))


def test_a_second_alignment_goes_on_with_the_optimizer_of_the_first() -> None:
    split = build(Model(name="simple_conv"), 10, (1, 8, 8), 0, torch.float64)
    data = smashed(split.smashed_shape, 16)
    once, twice = (make_fit(copy.deepcopy(split.auxiliary), epochs=n) for n in (6, 3))
    for fit in (once, twice):
        fit.buffer.add(*data)
        fit.fit(fit.targets(split.server))
    twice.fit(twice.targets(split.server))
    assert torch.equal(once.weights.floats, twice.weights.floats)


def linear_fit(**keys: Any) -> tuple[AuxiliaryFit, nn.Module]:
    split = build(
        Model(name="simple_conv", auxiliary=Auxiliary(kind="linear")), 10, (1, 8, 8), 0, torch.float64
    )
    fit = make_fit(split.auxiliary, epochs=40, **keys)
    fit.buffer.add(*smashed(split.smashed_shape, 24))
    return fit, split.server


def test_a_tolerance_stops_the_passes_when_they_gain_too_little() -> None:
    passes = []
    for tolerance in (None, 1e-9, 0.2):
        fit, server = linear_fit(tolerance=tolerance)
        record = fit.fit(fit.targets(server)).read()
        assert record["nmse_after"] < record["nmse_before"]
        passes.append(record["passes"])
    assert passes[:2] == [40, 40]
    assert 1 < passes[2] < 40


def test_lbfgs_fits_a_linear_auxiliary_model_better_in_as_many_passes() -> None:
    left = {}
    for solver in ("optimizer", "lbfgs"):
        fit, server = linear_fit(solver=solver)
        record = fit.fit(fit.targets(server)).read()
        assert record["passes"] <= 40 + 25 * (solver == "lbfgs")  # a line search is brought to its end
        left[solver] = record["nmse_after"]
        assert all(parameter.grad is None for parameter in fit.model.parameters())
    assert left["lbfgs"] < left["optimizer"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 7))
def test_the_buffer_keeps_the_newest_samples_in_order(uploads: list[int], size: int, batch: int) -> None:
    buffer = AlignmentBuffer(size)
    sent = 0
    for samples in uploads:
        numbers = torch.arange(sent, sent + samples)
        buffer.add(numbers.double().view(-1, 1), numbers)
        sent += samples
    kept = list(range(max(0, sent - size), sent))
    batches = buffer.batches(batch)
    assert len(buffer) == len(kept)
    assert torch.cat([y for _, y in batches]).tolist() == kept
    assert torch.cat([z for z, _ in batches]).flatten().tolist() == kept
    assert [len(y) for _, y in batches] == [min(batch, len(kept) - i) for i in range(0, len(kept), batch)]


def test_agreement_is_the_closed_form_over_all_batches() -> None:
    agreement = Agreement()
    assert agreement.read() is None
    agreement.add(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    agreement.add(torch.tensor([[0.0]]), torch.tensor([[2.0]]))
    record = agreement.read()
    assert record == pytest.approx({"nmse": (4 + 4) / (1 + 4), "cosine": 3 / (9 * 5) ** 0.5})


def test_agreement_with_gradients_that_are_all_zero_has_no_scale() -> None:
    agreement = Agreement()
    agreement.add(torch.ones(2, 3), torch.zeros(2, 3))
    assert agreement.read() is None
    agreement.add(torch.zeros(2, 3), torch.ones(2, 3))
    assert agreement.read() == {"nmse": 2.0, "cosine": 0.0}


def test_only_the_rounds_in_which_a_client_aligns_must_leave_no_batch_of_one() -> None:
    def check(batch_size: int) -> None:
        alignment = {"batch_size": batch_size, "buffer_size": 1000}
        Experiment.prepare(
            from_tree(
                {
                    "rounds": 30,
                    "model": {"name": "resnet18"},
                    "clients": {"count": 2, "batch_size": 33},
                    "data": {"name": "synthetic", "partition": "iid", "train_limit": 396},
                    "algorithm": {
                        "upload_every": 5,
                        "align_every": 10,
                        "start": "paper",
                        "alignment": alignment,
                    },
                }
            )
        )

    check(10)  # it aligns on 33, 693 and 1000 samples; on 231 it would in round 3
    assert "client 0 aligns on 33" in mistake(check, 32)
