"""The models: their layers and sizes, that the halves are the whole, and what follows from the seed."""

import copy
import itertools
from collections import OrderedDict
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.config.schema import Auxiliary, Model
from fslsage_rpc.models.flat import module_bytes
from fslsage_rpc.models.splitting import SplitModel, build, has_batch_norm
from fslsage_rpc.models.zoo import ZOO, ParameterFreeShortcut
from fslsage_rpc.randomness import keyed_seed
from support.user_input import mistake

CIFAR = (3, 32, 32)
CUTS = {
    "simple_conv": ["norm1", "pool2"],
    "resnet18": ["layer1", "layer2", "layer3"],
    "resnet56": ["layer1", "layer2"],
    "resnet110": ["layer1", "layer2"],
}
EVERY_CUT = [(name, cut) for name, cuts in CUTS.items() for cut in cuts]
every_model = pytest.mark.parametrize("name", list(ZOO))


def fresh(name: str, cut: str | None = None, seed: int = 0) -> SplitModel:
    return build(Model(name=name, cut=cut), 10, CIFAR, seed, torch.float32)


built = cache(fresh)


def make(name: str, cut: str | None = None) -> SplitModel:
    """The model of seed 0, built once and copied."""
    return copy.deepcopy(built(name, cut))


def parts(split: SplitModel) -> tuple[nn.Module, ...]:
    return split.client, split.server, split.auxiliary


def states(split: SplitModel) -> list[dict[str, Tensor]]:
    return [module.state_dict() for module in parts(split)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def images(shape: tuple[int, ...] = CIFAR, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# Layers and sizes


@pytest.mark.parametrize(
    ("name", "smashed", "parameters"),
    [
        ("resnet18", (128, 4, 4), [683_072, 10_498_570, 2_102_282]),
        ("resnet56", (16, 32, 32), [42_512, 810_506, 162_762]),
        ("simple_conv", (64, 8, 8), [107_328, 1_649_098, 40_970]),
    ],
)
def test_smashed_data_client_server_and_auxiliary_have_the_papers_sizes(
    name: str, smashed: tuple[int, ...], parameters: list[int]
) -> None:
    split = make(name)
    assert split.client(images()).shape[1:] == split.smashed_shape == smashed
    assert [sum(parameter.numel() for parameter in part.parameters()) for part in parts(split)] == parameters


def test_bytes_of_resnet18_give_the_papers_communication_load() -> None:
    split = make("resnet18")
    client, server, auxiliary = map(module_bytes, parts(split))
    smashed = 4 * torch.Size(split.smashed_shape).numel()
    clients, samples, uploaded = (
        10,
        5000,
        4 * 256,
    )  # batches 0, 5, 10 and 15 of 20, the last of which is short
    assert clients * 2 * (client + server) == 895_302_560
    assert clients * (2 * client + 2 * samples * smashed) == 874_000_960
    assert clients * (2 * client + uploaded * smashed + 2 * auxiliary) == 307_075_200
    assert clients * (2 * client + uploaded * smashed) + clients * auxiliary / 10 == 147_106_448


def test_simple_conv_has_the_documented_layers() -> None:
    layers = list(ZOO["simple_conv"].make(10, CIFAR).children())
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
    assert [layer.out_features for layer in layers if isinstance(layer, nn.Linear)] == [384, 192, 10]


def test_the_auxiliary_model_of_simple_conv_is_one_linear_layer() -> None:
    auxiliary = make("simple_conv").auxiliary
    assert list(auxiliary.state_dict()) == ["fc.weight", "fc.bias"]
    with torch.no_grad():
        z = images((64, 8, 8))
        expected = z.flatten(1) @ auxiliary.fc.weight.T + auxiliary.fc.bias
        assert torch.allclose(auxiliary(z), expected, atol=1e-4)


def test_the_auxiliary_model_of_resnet18_is_a_fresh_next_stage_with_a_head() -> None:
    split = make("resnet18", "layer2")
    assert list(dict(split.auxiliary.named_children())) == ["layer3", "fc"]
    own, servers = split.auxiliary.layer3, split.server.layer3
    assert [type(module) for module in own.modules()] == [type(module) for module in servers.modules()]
    assert not torch.equal(own[0].conv1.weight, servers[0].conv1.weight)
    assert not torch.equal(split.auxiliary.fc.weight, split.server.fc.weight[:, :256])


@pytest.mark.parametrize(
    ("name", "cuts", "shapes"),
    [
        ("simple_conv", ["norm1", "pool2"], [(1, 8, 8), (1, 28, 28), (1, 9, 11), (2, 5, 1), (4, 7, 16)]),
        ("resnet18", ["layer2"], [(1, 8, 8), (1, 28, 28), (4, 33, 40)]),
    ],
)
def test_images_may_have_any_size_and_channels(name: str, cuts: list[str], shapes: list[Any]) -> None:
    for cut, shape in itertools.product(cuts, shapes):
        split = build(Model(name=name, cut=cut), 7, shape, 0, torch.float32)
        z = split.client(images(shape))
        assert z.shape == (4, *split.smashed_shape)
        assert split.server(z).shape == split.auxiliary(z).shape == (4, 7)


@pytest.mark.parametrize(("depth", "blocks"), [(56, 9), (110, 18)])
def test_cifar_resnets_have_the_documented_layers(depth: int, blocks: int) -> None:
    model = ZOO[f"resnet{depth}"](10, CIFAR)
    layers = OrderedDict(model.named_children())
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == depth  # and the classifier
    assert all(convolution.kernel_size == (3, 3) for convolution in convolutions)  # none in a shortcut
    for stage, channels, size in (("layer1", 16, 32), ("layer2", 32, 16), ("layer3", 64, 8)):
        assert len(layers[stage]) == blocks
        before = list(layers)[: list(layers).index(stage) + 1]
        z = nn.Sequential(OrderedDict((name, layers[name]) for name in before)).eval()(images())
        assert z.shape == (4, channels, size, size)


def test_a_parameter_free_shortcut_keeps_every_second_pixel_and_adds_zeros() -> None:
    x = images((3, 5, 4))
    out = ParameterFreeShortcut(3)(x)
    assert out.shape == (4, 6, 3, 2)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert not out[:, [0, 4, 5]].any()


@pytest.mark.parametrize(
    ("width", "parameters"), [(4, [2_852, 51_434, 10_458]), (16, [42_512, 810_506, 162_762])]
)
def test_cifar_resnets_have_any_width(width: int, parameters: list[int]) -> None:
    split = build(Model(name="resnet56", arguments={"width": width}), 10, CIFAR, 0, torch.float32)
    assert [sum(parameter.numel() for parameter in part.parameters()) for part in parts(split)] == parameters
    assert split.smashed_shape == (width, 32, 32)


def test_a_width_is_refused_where_there_is_but_one() -> None:
    keys = Model(name="resnet18", arguments={"width": 8})
    message = mistake(build, keys, 10, CIFAR, 0, torch.float32)
    unknown = "model.arguments.width: unknown argument of resnet18"
    assert message == f"{unknown}; it takes none: set model.arguments={{}}"


def test_a_resnet_has_the_depth_of_its_name() -> None:
    keys = Model(name="resnet56", arguments={"depth": 20})
    message = mistake(build, keys, 10, CIFAR, 0, torch.float32)
    assert message.startswith("model.arguments.depth: unknown argument of resnet56; did you mean ")


# Auxiliary models


@pytest.mark.parametrize(
    ("keys", "children", "parameters"),
    [
        (Auxiliary(kind="linear"), ["fc"], 128 * 10 + 10),
        (Auxiliary(until="layer3.0"), ["layer3", "fc"], 921_610),
        (Auxiliary(until="layer3"), ["layer3", "fc"], 2_102_282),
        (Auxiliary(kind="copy"), ["layer3", "fc"], 2_102_282),
        (Auxiliary(until="layer4"), ["layer3", "layer4", "fc"], 10_498_570),
    ],
)
def test_the_auxiliary_model_of_resnet18_has_the_chosen_size(
    keys: Auxiliary, children: list[str], parameters: int
) -> None:
    split = build(Model(name="resnet18", auxiliary=keys), 10, CIFAR, 0, torch.float32)
    assert list(dict(split.auxiliary.named_children())) == children
    assert sum(parameter.numel() for parameter in split.auxiliary.parameters()) == parameters
    assert split.auxiliary(split.client(images())).shape == (4, 10)


def test_a_copy_of_a_model_without_pooling_has_a_linear_layer_on_all_of_its_output() -> None:
    keys = Model(cut="norm1", auxiliary=Auxiliary(until="pool2"))
    auxiliary = build(keys, 10, CIFAR, 0, torch.float32).auxiliary
    assert list(dict(auxiliary.named_children())) == ["conv2", "relu2", "norm2", "pool2", "fc"]
    assert auxiliary.fc.in_features == 64 * 8 * 8


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            Model(name="resnet18", auxiliary=Auxiliary(until="layer2")),
            "model.auxiliary.until: got 'layer2', expected a module behind the cut, layer2",
        ),
        (
            Model(name="resnet18", auxiliary=Auxiliary(until="layer3.2")),
            "model.auxiliary.until: got 'layer3.2', expected a module of the model, as "
            "layer3.0, layer3, layer2, layer4.0 (fslsage check CONFIG --cuts lists all)",
        ),
        (
            Model(name="resnet18", auxiliary=Auxiliary(until="fc")),
            "model.auxiliary.until: got 'fc', where no weights are behind it; "
            "nearest that work: layer4, avgpool (fslsage check CONFIG --cuts lists all)",
        ),
        (
            Model(auxiliary=Auxiliary(kind="copy")),
            "model.auxiliary.until: got null, expected a module behind the cut, as kind is copy",
        ),
        (
            Model(auxiliary=Auxiliary(kind="linear", until="fc1")),
            "model.auxiliary.until: got 'fc1', expected null, as model.auxiliary.kind is linear",
        ),
        (
            Model(auxiliary=Auxiliary(kind="mlp")),
            "model.auxiliary.width: got null, expected the width of the hidden layer, as kind is mlp",
        ),
        (
            Model(auxiliary=Auxiliary(width=4)),
            "model.auxiliary.width: got 4, expected null, as kind is linear",
        ),
        (
            Model(auxiliary=Auxiliary(width_multiplier=0.5)),
            "model.auxiliary.width_multiplier: got 0.5, expected null, as kind is linear",
        ),
    ],
)
def test_an_auxiliary_model_that_cannot_be_is_refused_with_those_that_can(keys: Model, message: str) -> None:
    assert mistake(build, keys, 10, CIFAR, 0, torch.float32) == message


# Cuts


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_the_two_halves_are_the_uncut_model_whatever_the_cut(name: str, cut: str) -> None:
    split = make(name, cut)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(0, "model"))
        whole = ZOO[name](10, CIFAR)
    assert same({**split.client.state_dict(), **split.server.state_dict()}, whole.state_dict())
    x = images(dtype=torch.float64)  # in fp32 halves may compute in another order
    with torch.no_grad():
        halves = split.server.double().eval()(split.client.double().eval()(x))
        torch.testing.assert_close(halves, whole.double().eval()(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", CUTS["resnet18"])
def test_the_halves_of_resnet18_load_strictly_into_torchvisions(cut: str) -> None:
    client, server = (part.eval() for part in parts(make("resnet18", cut))[:2])
    whole = torchvision.models.resnet18(num_classes=10).eval()
    assert not set(client.state_dict()) & set(server.state_dict())
    whole.load_state_dict({**client.state_dict(), **server.state_dict()}, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(server(client(images())), whole(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_every_cut_trains_with_its_server_half_and_its_auxiliary_model(name: str, cut: str) -> None:
    split = make(name, cut)
    for head in (split.server, split.auxiliary):
        split.client.zero_grad()
        z = split.client(images())
        assert z.shape == (4, *split.smashed_shape)
        logits = head(z)
        assert logits.shape == (4, 10)
        F.cross_entropy(logits, torch.tensor([0, 3, 9, 3])).backward()
        for parameter in (*split.client.parameters(), *head.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()


@pytest.mark.parametrize(
    ("name", "default"), [("simple_conv", "pool2"), ("resnet18", "layer2"), ("resnet56", "layer1")]
)
def test_no_cut_means_the_models_default(name: str, default: str) -> None:
    assert all(map(same, states(make(name)), states(make(name, default))))


@every_model
def test_an_unknown_cut_is_refused_with_cuts_like_it(name: str) -> None:
    message = mistake(fresh, name, CUTS[name][0].upper())
    assert f"model.cut: got {CUTS[name][0].upper()!r}, expected a module of the model, as " in message


# Weights


@every_model
def test_weights_follow_from_the_seed_and_never_touch_the_global_generator(name: str) -> None:
    first = states(built(name))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert all(map(same, first, states(fresh(name))))
    assert not any(map(same, first, states(fresh(name, seed=1))))
    assert torch.equal(torch.get_rng_state(), before)


@every_model
def test_double_precision_holds_the_same_weights_and_computes_in_it(name: str) -> None:
    single, double = make(name), build(Model(name=name), 10, CIFAR, 0, torch.float64)
    for one, other in zip(states(single), states(double), strict=True):
        assert all(t.dtype == torch.float64 for t in other.values() if t.is_floating_point())
        assert same({key: t.to(other[key].dtype) for key, t in one.items()}, other)
    z = double.client(images(dtype=torch.float64))
    assert z.dtype == double.server(z).dtype == double.auxiliary(z).dtype == torch.float64


def test_models_come_in_train_mode_with_untouched_running_statistics() -> None:
    for part in parts(make("resnet18")):
        assert all(module.training for module in part.modules())
        norms = [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
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
