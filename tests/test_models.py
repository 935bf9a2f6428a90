"""Models and their cuts, their flat weights, and the federated average of these."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.comm.averaging import federated_average
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.flat import Weights, flatten, module_bytes, weighted_sum
from fslsage_rpc.models.splitting import SplitModel, build, check_cut, has_batch_norm
from fslsage_rpc.models.zoo import ZOO
from fslsage_rpc.randomness import keyed_seed

CIFAR = (3, 32, 32)
CUTS = [(name, cut) for name, entry in ZOO.items() for cut in entry.cuts]
ODD_SHAPES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (1, 9, 11), (2, 5, 1), (4, 7, 16)]


def fresh(name: str, cut: str | None = None, seed: int = 0) -> SplitModel:
    return build(name, cut, 10, CIFAR, seed, torch.float32)


built = cache(fresh)


def make(name: str, cut: str | None = None) -> SplitModel:
    """The model of seed 0, built once and copied."""
    return copy.deepcopy(built(name, cut))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def images(shape: tuple[int, ...] = CIFAR, samples: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def states(split: SplitModel) -> list[dict[str, Tensor]]:
    return [module.state_dict() for module in (split.client, split.server, split.auxiliary)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# Models and cuts


@pytest.mark.parametrize(
    ("name", "smashed", "client", "server", "auxiliary"),
    [
        ("resnet18", (128, 4, 4), 683_072, 10_498_570, 2_102_282),
        ("simple_conv", (64, 8, 8), 107_328, 1_649_098, 40_970),
    ],
)
def test_halves_have_the_papers_sizes(
    name: str, smashed: tuple[int, ...], client: int, server: int, auxiliary: int
) -> None:
    split = make(name)
    assert split.smashed_shape == smashed
    assert split.client(images()).shape == (4, *smashed)
    assert (parameters(split.client), parameters(split.server)) == (client, server)
    assert parameters(split.auxiliary) == auxiliary


def test_bytes_of_resnet18_give_the_papers_communication_load() -> None:
    split = make("resnet18")
    client, server, auxiliary = map(module_bytes, (split.client, split.server, split.auxiliary))
    smashed = 4 * torch.Size(split.smashed_shape).numel()
    clients, samples, uploaded = (
        10,
        5000,
        4 * 256,
    )  # batches 0, 5, 10 and 15 of 20, of which the last is short
    assert clients * 2 * (client + server) == 895_302_560
    assert clients * (2 * client + 2 * samples * smashed) == 874_000_960
    assert clients * (2 * client + uploaded * smashed + 2 * auxiliary) == 307_075_200
    assert clients * (2 * client + uploaded * smashed) + clients * auxiliary / 10 == 147_106_448


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_the_two_halves_are_the_uncut_model(name: str, cut: str) -> None:
    split = make(name, cut)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(0, "model"))
        whole = nn.Sequential(ZOO[name].blocks(10, CIFAR))
    assert same({**split.client.state_dict(), **split.server.state_dict()}, whole.state_dict())
    with torch.no_grad():
        halves = split.server.eval()(split.client.eval()(images()))
        assert torch.equal(halves, whole.eval()(images()))


@pytest.mark.parametrize("cut", ZOO["resnet18"].cuts)
def test_the_halves_of_resnet18_load_strictly_into_torchvisions(cut: str) -> None:
    split = make("resnet18", cut)
    whole = torchvision.models.resnet18(num_classes=10)
    client, server = split.client.state_dict(), split.server.state_dict()
    assert not set(client) & set(server)
    whole.load_state_dict({**client, **server}, strict=True)
    for module in (split.client, split.server, whole):
        module.eval()
    with torch.no_grad():
        assert torch.equal(split.server(split.client(images())), whole(images()))


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_every_cut_trains_with_its_auxiliary_model(name: str, cut: str) -> None:
    split = make(name, cut)
    y = torch.tensor([0, 3, 9, 3])
    for head in (split.server, split.auxiliary):
        split.client.zero_grad()
        z = split.client(images())
        assert z.shape == (4, *split.smashed_shape)
        logits = head(z)
        assert logits.shape == (4, 10)
        F.cross_entropy(logits, y).backward()
        for parameter in (*split.client.parameters(), *head.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("cut", ZOO["simple_conv"].cuts)
def test_simple_conv_takes_images_of_any_size(shape: tuple[int, int, int], cut: str) -> None:
    split = build("simple_conv", cut, 7, shape, 0, torch.float32)
    z = split.client(images(shape))
    assert z.shape == (4, *split.smashed_shape)
    assert split.server(z).shape == split.auxiliary(z).shape == (4, 7)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (4, 33, 40)])
def test_resnet18_takes_other_channel_counts_and_sizes(shape: tuple[int, int, int]) -> None:
    split = build("resnet18", None, 100, shape, 0, torch.float32)
    z = split.client(images(shape))
    assert z.shape == (4, *split.smashed_shape)
    assert split.server(z).shape == split.auxiliary(z).shape == (4, 100)


def test_simple_conv_has_the_documented_layers() -> None:
    layers = list(ZOO["simple_conv"].blocks(10, CIFAR).values())
    kinds = [nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.LocalResponseNorm, nn.Conv2d, nn.ReLU, nn.LocalResponseNorm]
    kinds += [nn.MaxPool2d, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in layers] == kinds
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            assert (layer.kernel_size, layer.padding, layer.stride) == ((5, 5), (2, 2), (1, 1))
        if isinstance(layer, nn.MaxPool2d):
            assert (layer.kernel_size, layer.stride, layer.padding) == (3, 2, 1)
        if isinstance(layer, nn.LocalResponseNorm):
            assert (layer.size, layer.alpha, layer.beta, layer.k) == (4, 0.001 / 9, 0.75, 1)
    widths = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
    assert widths == [384, 192, 10]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_an_unknown_cut_is_refused_with_the_cuts_there_are(name: str) -> None:
    for attempt in (lambda: fresh(name, "layer9"), lambda: check_cut(name, "layer9")):
        with pytest.raises(InputError) as caught:
            attempt()
        expected = f"model.cut: got 'layer9', expected one of {', '.join(ZOO[name].cuts)} for {name}"
        assert str(caught.value) == expected


@pytest.mark.parametrize(("name", "default"), [("simple_conv", "pool2"), ("resnet18", "layer2")])
def test_no_cut_means_the_models_default(name: str, default: str) -> None:
    assert check_cut(name, None) == default
    assert all(map(same, states(make(name)), states(make(name, default))))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_weights_follow_from_the_seed_alone(name: str) -> None:
    first = states(fresh(name))
    torch.manual_seed(99)
    torch.rand(7)
    assert all(map(same, first, states(fresh(name))))
    assert not any(map(same, first, states(fresh(name, seed=1))))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_building_leaves_the_global_generator_as_it_was(name: str) -> None:
    before = torch.get_rng_state()
    fresh(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_the_whole_model_does_not_depend_on_where_it_is_cut(name: str, cut: str) -> None:
    default, other = make(name), make(name, cut)
    one = {**default.client.state_dict(), **default.server.state_dict()}
    assert same(one, {**other.client.state_dict(), **other.server.state_dict()})


@pytest.mark.parametrize("name", sorted(ZOO))
def test_double_precision_holds_the_same_weights_and_computes_in_it(name: str) -> None:
    single, double = make(name), build(name, None, 10, CIFAR, 0, torch.float64)
    for one, other in zip(states(single), states(double), strict=True):
        assert all(t.dtype == torch.float64 for t in other.values() if t.is_floating_point())
        assert same({key: t.to(other[key].dtype) for key, t in one.items()}, other)
    z = double.client(images(dtype=torch.float64))
    assert z.dtype == double.server(z).dtype == double.auxiliary(z).dtype == torch.float64


def test_the_auxiliary_model_of_resnet18_is_a_fresh_next_stage_with_a_head() -> None:
    split = make("resnet18", "layer2")
    assert list(dict(split.auxiliary.named_children())) == ["layer3", "avgpool", "flatten", "fc"]
    assert [type(m) for m in split.auxiliary.layer3.modules()] == [
        type(m) for m in split.server.layer3.modules()
    ]
    assert not torch.equal(split.auxiliary.layer3[0].conv1.weight, split.server.layer3[0].conv1.weight)
    assert not torch.equal(split.auxiliary.fc.weight, split.server.fc.weight[:, :256])


def test_the_auxiliary_model_of_simple_conv_is_one_linear_layer() -> None:
    auxiliary = make("simple_conv").auxiliary
    assert list(auxiliary.state_dict()) == ["fc.weight", "fc.bias"]
    with torch.no_grad():
        z = images((64, 8, 8))
        expected = z.flatten(1) @ auxiliary.fc.weight.T + auxiliary.fc.bias
        assert torch.allclose(auxiliary(z), expected, atol=1e-4)


def test_models_come_in_train_mode_with_untouched_running_statistics() -> None:
    split = make("resnet18")
    for module in (split.client, split.server, split.auxiliary):
        assert all(part.training for part in module.modules())
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        assert norms
        for norm in norms:
            assert not norm.running_mean.any()
            assert (norm.running_var == 1).all()
            assert norm.num_batches_tracked == 0


def test_the_auxiliary_models_running_statistics_never_move() -> None:
    auxiliary = make("resnet18").auxiliary
    before = [buffer.clone() for buffer in auxiliary.buffers()]
    auxiliary(images((128, 4, 4)))
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, auxiliary.buffers(), strict=True))


def test_batch_norm_is_seen() -> None:
    assert has_batch_norm(make("resnet18").client)
    assert not has_batch_norm(make("simple_conv").client)


# Flat weights


def small(seed: int = 0) -> nn.Sequential:
    """A model with BatchNorm: parameters, floating-point buffers and an integer buffer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
        return nn.Sequential(*layers).double()


def inside(tensor: Tensor, buffer: Tensor) -> bool:
    first = tensor.data_ptr() - buffer.data_ptr()
    return (
        first >= 0
        and first + tensor.numel() * tensor.element_size() <= buffer.numel() * buffer.element_size()
    )


def test_flattening_makes_every_tensor_a_view_of_one_buffer() -> None:
    model = small()
    weights = flatten(model)
    tensors = [*model.parameters(), *model.buffers()]
    floats = [t for t in tensors if t.is_floating_point()]
    integers = [t for t in tensors if not t.is_floating_point()]
    assert (len(floats), len(integers)) == (8, 1)
    assert weights.floats.numel() == sum(t.numel() for t in floats)
    assert weights.integers.numel() == 1
    assert all(inside(t, weights.floats) for t in floats)
    assert inside(integers[0], weights.integers)
    weights.floats.copy_(torch.arange(weights.floats.numel()))
    weights.integers.fill_(7)
    assert torch.cat([t.detach().flatten() for t in floats]).tolist() == list(range(weights.floats.numel()))
    assert model[1].num_batches_tracked == 7
    with torch.no_grad():
        model[4].bias.fill_(-1.0)
    assert (weights.floats == -1).sum() == 5


def test_flattening_changes_no_state_dict() -> None:
    model = make("resnet18").client
    before = copy.deepcopy(model.state_dict())
    flatten(model)
    assert same(model.state_dict(), before)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_flattening_keeps_values_of_tensors_that_are_not_contiguous() -> None:
    model = small().to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    before = copy.deepcopy(model.state_dict())
    weights = flatten(model)
    assert same(model.state_dict(), before)
    assert inside(model[0].weight, weights.floats)


def test_flattened_tensors_of_equal_models_lie_in_the_same_order() -> None:
    one, other = flatten(small(1)), small(2)
    target = flatten(other)
    target.load(one)
    assert same(other.state_dict(), small(1).state_dict())


def test_a_loaded_state_dict_reaches_the_buffer() -> None:
    model = small(1)
    weights = flatten(model)
    model.load_state_dict(small(2).state_dict())
    assert torch.equal(weights.floats, flatten(small(2)).floats)


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
    for model in (plain, flat):
        steps = optimizer(model.parameters())
        for step in range(3):
            steps.zero_grad()
            x = images((2, 4, 4), dtype=torch.float64) + step
            F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
            steps.step()
    assert same(flat.state_dict(), plain.state_dict())
    assert torch.equal(weights.floats, flatten(plain).floats)
    assert weights.integers.tolist() == [3]
    assert not (weights.floats == before.floats).all()
    assert before.integers.tolist() == [0]


class WithBuffer(nn.Module):
    def __init__(self, buffer: Tensor):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("extra", buffer)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.float64),  # the parameters are float32
        torch.zeros(2, dtype=torch.float16),
    ],
    ids=lambda buffer: str(buffer.dtype),
)
def test_weights_of_other_types_are_refused_by_name(buffer: Tensor) -> None:
    model = WithBuffer(buffer)
    with pytest.raises(TypeError, match="extra"):
        flatten(model)
    assert model.linear.weight.dtype == torch.float32


def test_a_model_without_weights_gives_empty_buffers() -> None:
    weights = flatten(nn.ReLU())
    assert (weights.floats.numel(), weights.integers.numel(), weights.bytes) == (0, 0, 0)
    assert weights.integers.dtype == torch.int64


def test_bytes_are_those_of_all_parameters_and_buffers() -> None:
    model = small()
    expected = 8 * (54 + 3 + 3 + 3 + 60 + 5) + 8 * (3 + 3) + 8  # parameters, running statistics, counter
    assert module_bytes(model) == expected
    assert flatten(model).bytes == module_bytes(model) == expected
    assert module_bytes(nn.Linear(3, 2)) == 4 * 8


def test_a_clone_keeps_the_numbers_of_its_time() -> None:
    model = small()
    weights = flatten(model)
    kept = weights.clone()
    floats = kept.floats.clone()
    weights.floats.zero_()
    weights.integers.fill_(3)
    assert torch.equal(kept.floats, floats)
    assert kept.integers.tolist() == [0]
    weights.load(kept)
    assert torch.equal(weights.floats, floats)
    assert same(model.state_dict(), small().state_dict())


def test_weights_move_to_a_device_with_both_buffers() -> None:
    moved = flatten(small()).to(torch.device("meta"))
    assert moved.floats.device.type == moved.integers.device.type == "meta"


# Averages


def numbers(*floats: float, counter: int = 0) -> Weights:
    return Weights(torch.tensor(floats, dtype=torch.float64), torch.tensor([counter]))


def test_a_weighted_sum_is_the_weighted_mean_with_the_greatest_counter() -> None:
    members = [numbers(1.0, -8.0, counter=3), numbers(3.0, 0.0, counter=11), numbers(-4.0, 16.0, counter=5)]
    kept = [member.clone() for member in members]
    total = weighted_sum(members, [0.5, 0.25, 0.25], members[0])
    assert total.floats.tolist() == [0.25, 0.0]
    assert total.integers.tolist() == [11]
    for member, before in zip(members, kept, strict=True):
        assert torch.equal(member.floats, before.floats)
        assert torch.equal(member.integers, before.integers)


def test_a_weighted_sum_of_nothing_is_zeros_of_the_same_form() -> None:
    like = numbers(1.0, 2.0, 3.0, counter=9)
    total = weighted_sum([], [], like)
    assert total.floats.tolist() == [0.0, 0.0, 0.0]
    assert total.floats.dtype == torch.float64
    assert total.integers.tolist() == [0]
    assert like.floats.tolist() == [1.0, 2.0, 3.0]


def test_a_weighted_sum_needs_as_many_shares_as_members() -> None:
    with pytest.raises(ValueError, match="zip"):
        weighted_sum([numbers(1.0)], [0.5, 0.5], numbers(1.0))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(1, 1000), st.integers(0, 2**40)),
        min_size=1,
        max_size=6,
    )
)
def test_a_sum_by_sample_shares_is_the_exact_mean(
    rows: list[tuple[float, float, int, int]],
) -> None:
    samples = sum(row[2] for row in rows)
    members = [numbers(a, b, counter=counter) for a, b, _, counter in rows]
    total = weighted_sum(members, [row[2] / samples for row in rows], members[0])
    for i in (0, 1):
        exact = sum(row[i] * row[2] for row in rows) / samples
        assert total.floats[i].item() == pytest.approx(exact, rel=1e-12, abs=1e-8)
    assert total.integers.item() == max(row[3] for row in rows)


def alone(_: Weights) -> None:
    """The all-reduce of the only rank."""


def test_the_federated_average_of_one_rank_is_the_weighted_mean_of_each_model() -> None:
    models = {
        0: (numbers(1.0, 2.0, counter=4), numbers(10.0, counter=1)),
        1: (numbers(5.0, -2.0, counter=6), numbers(-10.0, counter=0)),
    }
    client, auxiliary = federated_average(models, {0: 0.75, 1: 0.25}, alone)
    assert (client.floats.tolist(), client.integers.tolist()) == ([2.0, 1.0], [6])
    assert (auxiliary.floats.tolist(), auxiliary.integers.tolist()) == ([5.0], [1])


def test_an_absent_client_does_not_count_in_the_average() -> None:
    models = {
        2: (numbers(1.0, counter=4),),
        5: (numbers(1e9, counter=99),),  # its last training was some rounds ago
        7: (numbers(4.0, counter=5),),
    }
    (client,) = federated_average(models, {2: 1 / 3, 7: 2 / 3}, alone)
    assert client.floats.tolist() == pytest.approx([3.0], rel=1e-15)
    assert client.integers.tolist() == [5]


def test_the_average_is_a_copy_and_leaves_the_models_alone() -> None:
    models = {0: (numbers(1.0, 2.0, counter=4),)}
    (average,) = federated_average(models, {0: 1.0}, alone)
    average.floats.zero_()
    average.integers.zero_()
    assert models[0][0].floats.tolist() == [1.0, 2.0]
    assert models[0][0].integers.tolist() == [4]


def test_all_models_travel_in_one_all_reduce() -> None:
    seen: list[tuple[int, int]] = []

    def record(joint: Weights) -> None:
        seen.append((joint.floats.numel(), joint.integers.numel()))

    models = {client: (flatten(small(client)), flatten(small(client + 9))) for client in range(3)}
    federated_average(models, dict.fromkeys(range(3), 1 / 3), record)
    floats = models[0][0].floats.numel()
    assert seen == [(2 * floats, 2)]


def average_over_ranks(
    ranks: list[dict[int, tuple[Weights, ...]]], shares: dict[int, float]
) -> list[tuple[Weights, ...]]:
    """What each rank gets, with an all-reduce that adds up what all ranks bring."""
    brought: list[Weights] = []
    for models in ranks:
        federated_average(models, shares, lambda joint: brought.append(joint.clone()))

    def all_reduce(joint: Weights) -> None:
        joint.floats.copy_(torch.stack([other.floats for other in brought]).sum(0))
        joint.integers.copy_(torch.stack([other.integers for other in brought]).amax(0))

    return [federated_average(models, shares, all_reduce) for models in ranks]


@pytest.mark.parametrize(
    "participants", [(0, 1, 2, 3, 4), (0, 2, 4), (0, 1), (3,)], ids=lambda clients: f"participants {clients}"
)
def test_the_average_over_two_ranks_is_the_average_over_one(participants: tuple[int, ...]) -> None:
    samples = [3, 10, 1, 7, 29]
    total = sum(samples[client] for client in participants)
    shares = {client: samples[client] / total for client in participants}
    models: dict[int, tuple[Weights, ...]] = {}
    for client in range(5):
        model = small(client)
        model[1].num_batches_tracked.fill_(10 * client)
        models[client] = (flatten(model), flatten(nn.Linear(4, 3).double()))
    whole = federated_average(models, shares, alone)
    first, second = average_over_ranks(
        [{c: models[c] for c in (0, 1)}, {c: models[c] for c in (2, 3, 4)}], shares
    )
    for i in range(2):
        exact = sum(samples[client] * models[client][i].floats for client in participants) / total
        for average in (whole[i], first[i], second[i]):
            assert (average.floats - exact).abs().max() <= 1e-14 * exact.abs().max()
        assert torch.equal(first[i].floats, second[i].floats)
    counters = [average.integers.tolist() for average in (whole[0], first[0], second[0])]
    assert counters == [[10 * max(participants)]] * 3


def test_the_average_of_equal_models_is_that_model() -> None:
    models = {client: (flatten(small()),) for client in range(4)}
    (average,) = federated_average(models, dict.fromkeys(range(4), 0.25), alone)
    assert torch.equal(average.floats, models[0][0].floats)


def test_an_average_loaded_into_a_model_is_the_mean_of_the_models_by_name() -> None:
    one, other, target = small(1), small(2), small(3)
    models = {0: (flatten(one),), 1: (flatten(other),)}
    (average,) = federated_average(models, {0: 0.25, 1: 0.75}, alone)
    flatten(target).load(average)
    means = OrderedDict(
        (name, 0.25 * a + 0.75 * b if a.is_floating_point() else torch.maximum(a, b))
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    )
    assert list(target.state_dict()) == list(means)
    for name, tensor in target.state_dict().items():
        assert torch.allclose(tensor, means[name], rtol=1e-14, atol=1e-16)
