"""Flat weights: one buffer under a model, weighted sums of buffers, and the federated average over ranks."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.models.flat import Weights, flatten, module_bytes, weighted_sum
from fslsage_rpc.parties.aggregation import federated_average


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


# Weighted sums


def numbers(*floats: float, counter: int = 0) -> Weights:
    return Weights(torch.tensor(floats, dtype=torch.float64), torch.tensor([counter]))


def plain(weights: Weights) -> tuple[list[float], list[int]]:
    return weights.floats.tolist(), weights.integers.tolist()


def test_a_weighted_sum_is_new_and_holds_the_weighted_mean_and_the_greatest_counter() -> None:
    members = [numbers(1.0, -8.0, counter=3), numbers(3.0, 0.0, counter=11), numbers(-4.0, 16.0, counter=5)]
    kept = [plain(member) for member in members]
    assert plain(weighted_sum(members, [0.5, 0.25, 0.25], members[0])) == ([0.25, 0.0], [11])
    assert [plain(member) for member in members] == kept


def test_a_weighted_sum_of_nothing_is_zeros() -> None:
    like = numbers(1.0, 2.0, counter=9)
    assert plain(weighted_sum([], [], like)) == ([0.0, 0.0], [0])
    assert plain(like) == ([1.0, 2.0], [9])


def test_a_weighted_sum_needs_as_many_shares_as_members() -> None:
    with pytest.raises(ValueError, match="zip"):
        weighted_sum([numbers(1.0)], [0.5, 0.5], numbers(1.0))


# Federated averages


def alone(_: Weights) -> None:
    """The all-reduce of the only rank."""


def test_the_federated_average_of_one_rank_is_a_new_weighted_mean_of_each_model() -> None:
    models = {
        0: (numbers(1.0, 2.0, counter=4), numbers(10.0, counter=1)),
        1: (numbers(5.0, -2.0, counter=6), numbers(-10.0, counter=0)),
    }
    averages = federated_average(models, {0: 0.75, 1: 0.25}, alone)
    assert [plain(average) for average in averages] == [([2.0, 1.0], [6]), ([5.0], [1])]
    (copied,) = federated_average({0: models[0][:1]}, {0: 1.0}, alone)
    copied.floats.zero_()
    copied.integers.zero_()
    assert plain(models[0][0]) == ([1.0, 2.0], [4])


def test_all_models_travel_in_one_all_reduce() -> None:
    models = {client: (flatten(small(client)), flatten(small(client + 9))) for client in range(3)}
    seen: list[Weights] = []
    federated_average(models, dict.fromkeys(range(3), 1 / 3), seen.append)
    (joint,) = seen
    assert (joint.floats.numel(), joint.integers.numel()) == (2 * models[0][0].floats.numel(), 2)


Models = dict[int, tuple[Weights, ...]]


def average_over_ranks(ranks: list[Models], shares: dict[int, float]) -> list[tuple[Weights, ...]]:
    """What each rank gets, with an all-reduce that adds up what all ranks bring."""
    brought: list[Weights] = []
    for models in ranks:
        federated_average(models, shares, lambda joint: brought.append(joint.clone()))

    def all_reduce(joint: Weights) -> None:
        joint.floats.copy_(torch.stack([other.floats for other in brought]).sum(0))
        joint.integers.copy_(torch.stack([other.integers for other in brought]).amax(0))

    return [federated_average(models, shares, all_reduce) for models in ranks]


@pytest.mark.parametrize("participants", [(0, 1, 2, 3, 4), (0, 2, 4), (0, 1), (3,)], ids=str)
def test_the_average_is_that_of_the_participants_over_two_ranks_as_over_one(
    participants: tuple[int, ...],
) -> None:
    samples = [3, 10, 1, 7, 29]
    total = sum(samples[client] for client in participants)
    shares = {client: samples[client] / total for client in participants}
    models: Models = {}
    for client in range(5):
        model = small(client)
        model[1].num_batches_tracked.fill_(10 * client)
        models[client] = (flatten(model), flatten(nn.Linear(4, 3).double()))
    whole = federated_average(models, shares, alone)
    first, second = average_over_ranks([{c: models[c] for c in cs} for cs in ((0, 1), (2, 3, 4))], shares)
    for i in (0, 1):
        exact = sum(samples[client] * models[client][i].floats for client in participants) / total
        for average in (whole[i], first[i], second[i]):
            assert (average.floats - exact).abs().max() <= 1e-14 * exact.abs().max()
        assert torch.equal(first[i].floats, second[i].floats)
    counters = [average[0].integers.tolist() for average in (whole, first, second)]
    assert counters == [[10 * max(participants)]] * 3
