"""Flat weights: one buffer under a model."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.models.flat import flatten, module_bytes, parameter_count


def small(seed: int = 0) -> nn.Sequential:
    """A model with BatchNorm: parameters, floating-point buffers and an integer buffer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
        return nn.Sequential(*layers).double()


def inside(tensor: Tensor, buffer: Tensor) -> bool:
    """Does the tensor lie in the memory of the buffer?"""
    first = tensor.data_ptr() - buffer.data_ptr()
    return 0 <= first <= buffer.nbytes - tensor.nbytes


def same(one: nn.Module, other: dict[str, Tensor]) -> bool:
    """Has the model just these names and numbers?"""
    state = one.state_dict()
    return list(state) == list(other) and all(torch.equal(state[name], other[name]) for name in state)


# One model


def test_flattening_makes_every_tensor_a_view_of_one_buffer() -> None:
    model = small()
    weights = flatten(model)
    tensors = [*model.parameters(), *model.buffers()]
    floats = [t for t in tensors if t.is_floating_point()]
    (counter,) = [t for t in tensors if not t.is_floating_point()]
    assert weights.floats.numel() == sum(t.numel() for t in floats)
    assert all(inside(t, weights.floats) for t in floats)
    assert weights.integers.numel() == 1
    assert inside(counter, weights.integers)
    weights.floats.copy_(torch.arange(weights.floats.numel()))
    weights.integers.fill_(7)
    assert torch.cat([t.detach().flatten() for t in floats]).tolist() == list(range(weights.floats.numel()))
    assert model[1].num_batches_tracked == 7
    with torch.no_grad():
        model[4].bias.fill_(-1.0)
    assert (weights.floats == -1).sum() == 5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flattening_changes_no_value_whatever_the_memory_format(memory_format: torch.memory_format) -> None:
    model = small().to(memory_format=memory_format)
    assert model[0].weight.is_contiguous(memory_format=memory_format)
    before = copy.deepcopy(model.state_dict())
    weights = flatten(model)
    assert same(model, before)
    assert inside(model[0].weight, weights.floats)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_weights_and_state_dicts_load_alike() -> None:
    by_weights, by_state = small(1), small(2)
    one, other = flatten(by_weights), flatten(by_state)
    one.load(flatten(small(3)))
    by_state.load_state_dict(small(3).state_dict())
    assert same(by_weights, small(3).state_dict())
    assert torch.equal(one.floats, other.floats)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.1)],
    ids=["sgd", "adam"],
)
def test_training_a_flattened_model_is_training_the_model(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    plain, flat = small(), small()
    weights = flatten(flat)
    before = weights.clone()
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for model in (plain, flat):
        steps = optimizer(model.parameters())
        for step in range(3):
            steps.zero_grad()
            F.cross_entropy(model(x + step), torch.tensor([0, 1, 2, 3])).backward()
            steps.step()
    assert same(flat, plain.state_dict())
    assert torch.equal(weights.floats, flatten(plain).floats)
    assert (weights.integers.tolist(), before.integers.tolist()) == ([3], [0])
    assert not (weights.floats == before.floats).all()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.uint8, torch.complex64, torch.float64, torch.float16]
)
def test_a_buffer_that_is_neither_of_the_parameters_type_nor_int64_is_refused_by_name(
    dtype: torch.dtype,
) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("extra", torch.zeros(2, dtype=dtype))
    with pytest.raises(TypeError, match="extra"):
        flatten(model)
    assert model.weight.dtype == torch.float32


def test_a_model_without_weights_gives_empty_buffers() -> None:
    weights = flatten(nn.ReLU())
    assert (weights.floats.numel(), weights.integers.numel(), weights.nbytes) == (0, 0, 0)
    assert weights.integers.dtype == torch.int64


def test_bytes_are_those_of_all_parameters_and_buffers() -> None:
    expected = 8 * (54 + 3 + 3 + 3 + 60 + 5) + 8 * (3 + 3) + 8  # parameters, running statistics, counter
    assert module_bytes(small()) == flatten(small()).nbytes == expected
    assert module_bytes(nn.Linear(3, 2)) == 4 * 8


def test_a_clone_keeps_the_numbers_of_its_time() -> None:
    model = small()
    weights = flatten(model)
    kept = weights.clone()
    weights.floats.zero_()
    weights.integers.fill_(3)
    assert torch.equal(kept.floats, flatten(small()).floats)
    assert kept.integers.tolist() == [0]
    weights.load(kept)
    assert same(model, small().state_dict())


def test_weights_move_to_a_device_with_both_buffers() -> None:
    moved = flatten(small()).to(torch.device("meta"))
    assert moved.floats.device.type == moved.integers.device.type == "meta"


def test_parameters_come_before_buffers() -> None:
    model = small()
    model[4].bias.requires_grad_(False)  # frozen, so in neither
    weights = flatten(model)
    trained = [p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]
    assert torch.equal(weights.floats[: parameter_count(model)], torch.cat(trained))
    buffers = torch.cat([model[1].running_mean, model[1].running_var])
    assert torch.equal(weights.floats[parameter_count(model) :], buffers)
