"""A segment can compute on images in another order of memory; but for rounding, the same."""

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Model
from fslsage_rpc.models.cuts import list_cuts
from fslsage_rpc.models.image_order import failure_by_order
from fslsage_rpc.models.segment import Segment, differentiated_twice
from fslsage_rpc.models.splitting import SplitModel, build
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient
from fslsage_rpc.training.experiment import Experiment
from support.equality import assert_same
from support.rank_program import train_locally
from support.trees import tree
from support.user_input import mistake

IMAGES = (3, 32, 32)
LAST = torch.channels_last
RESHAPING = [
    "convnext_tiny",
    "densenet121",
    "inception_v3",
    "maxvit_t",
    "shufflenet_v2_x0_5",
    "swin_t",
    "vit_b_16",
]
"""torchvision's, that view, permute or concatenate what they compute"""


def split(name: str = "resnet56", dtype: torch.dtype = torch.float32, **keys: object) -> SplitModel:
    return build(Model(name=name, **keys), 10, IMAGES, 0, dtype)  # type: ignore[arg-type]


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *IMAGES, generator=torch.Generator().manual_seed(seed))


class Orders(list[bool]):
    """Of what a segment's first convolution is given: does each pixel have its channels together?"""

    def __init__(self, segment: nn.Module):
        first = next(module for module in segment.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_pre_hook(
            lambda module, inputs: self.append(inputs[0].is_contiguous(memory_format=LAST))
        )


def outcome(part: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and all weights' gradients."""
    part.zero_grad()
    z = part(x)
    z.backward(torch.ones_like(z))
    gradients = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
    assert all(tensor.is_contiguous() for tensor in (z, *gradients))
    return [z.detach(), torch.cat([gradient.flatten() for gradient in gradients])]


def test_images_are_reordered_inside_alone() -> None:
    parts = split("resnet18")
    assert isinstance(parts.client, Segment)
    usual = copy.deepcopy(parts.client)
    parts.client.reorder_images(once=True, twice=False)
    orders = Orders(parts.client), Orders(usual)
    errors = []
    for seed in range(5):
        results = [outcome(part, images(16, seed)) for part in (parts.client, usual)]
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)])
    assert orders == ([True] * 5, [False] * 5)
    for of_outputs_or_gradients in zip(*errors, strict=True):
        # Now and then rounding moves a number across a ReLU's zero.
        assert statistics.median(of_outputs_or_gradients) < 1e-5


def test_a_gradient_on_its_way_out_is_in_the_usual_order() -> None:
    parts = split(memory_format="channels_last")
    z, y = torch.randn(16, *parts.smashed_shape), torch.arange(16) % 10
    orders = Orders(parts.server)
    assert cut_layer_gradient(parts.server, z, y).is_contiguous()
    leaf = z.requires_grad_()
    F.cross_entropy(parts.server(leaf), y).backward()
    assert leaf.grad is not None
    assert leaf.grad.is_contiguous()
    assert orders == [True, True]


@pytest.mark.parametrize("twice", [False, True])
def test_fits_may_have_another_order(twice: bool) -> None:
    """A fit differentiates its auxiliary model twice, a client does so once."""
    parts = split("resnet18")
    assert isinstance(parts.auxiliary, Segment)
    parts.auxiliary.reorder_images(once=not twice, twice=twice)
    orders = Orders(parts.auxiliary)
    z, y = torch.randn(64, *parts.smashed_shape), torch.arange(64) % 10
    cut_layer_gradient(parts.auxiliary, z, y)
    cut_layer_gradient(parts.auxiliary, z, y, create_graph=True)
    assert orders == [not twice, twice]
    with differentiated_twice(), differentiated_twice(False):
        parts.auxiliary(z)
    assert orders[-1] is not twice


@pytest.mark.nightly
@pytest.mark.parametrize("name", RESHAPING)
def test_torchvisions_models_take_images_in_any_order(name: str) -> None:
    size = 299 if name == "inception_v3" else 224
    image = (3, size, size)
    cut = list_cuts(Model(name=f"torchvision/{name}"), 10, image)[0].name
    whole = build(Model(name=f"torchvision/{name}", cut=cut), 10, image, 0, torch.float32).uncut.eval()
    assert isinstance(whole, Segment)
    x = torch.randn(2, *image, generator=torch.Generator().manual_seed(0))
    expected, found = whole(x), whole(x.contiguous(memory_format=LAST))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))
    found.sum().backward()


class Viewing(nn.Module):
    """Works on torch's usual order alone."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 32 * 32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        return self.fc(x.view(x.shape[0], -1))


def viewing_auxiliary(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(smashed_shape[0], 2, 3, padding=1)
            self.fc = nn.Linear(2 * smashed_shape[1] * smashed_shape[2], num_classes)

        def forward(self, z: Tensor) -> Tensor:
            z = self.conv(z)
            return self.fc(z.view(z.shape[0], -1))

    return Auxiliary()


# Asked for


def asked(memory_format: str, name: str = "resnet18", **keys: Any) -> SplitModel:
    return split(name, torch.float64, memory_format=memory_format, **keys)


def alignment_step(parts: SplitModel, batch: int) -> list[Tensor]:
    """Smashed data, its true gradient, and the auxiliary model's own in a step of a fit."""
    x, y = images(batch).double(), torch.arange(batch) % 10
    z = parts.client(x)
    true = cut_layer_gradient(parts.server, z, y)
    estimate = cut_layer_gradient(parts.auxiliary, z, y, create_graph=True)
    (estimate - true).square().sum().backward()
    assert all(tensor.is_contiguous() for tensor in (z, true, estimate))
    weights = [parameter.grad for parameter in parts.auxiliary.parameters() if parameter.grad is not None]
    return [z.detach(), true, *weights]


@pytest.mark.parametrize(("memory_format", "expected"), [("channels_last", True), ("contiguous", False)])
def test_an_order_that_is_asked_for_is_taken_in_every_pass(memory_format: str, expected: bool) -> None:
    for batch in (4, 16):
        parts = asked(memory_format)
        usual = asked("contiguous")
        orders = [Orders(part) for part in (parts.client, parts.server, parts.auxiliary)]
        found = alignment_step(parts, batch)
        assert orders == [[expected]] * 3
        for mine, other in zip(found, alignment_step(usual, batch), strict=True):
            assert (mine - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize(
    ("memory_format", "reordered"), [("channels_last", True), ("contiguous", False), ("auto", False)]
)
def test_another_device_than_a_cpu_reorders_where_that_is_asked_for(
    memory_format: str, reordered: bool
) -> None:
    parts = split("resnet18", memory_format=memory_format)
    assert isinstance(parts.server, Segment)
    large = torch.empty(500, *parts.smashed_shape)
    assert parts.server.reorders(large.to("meta")) == reordered


def test_smashed_data_in_bf16_is_reordered_too() -> None:
    keys = Model(name="resnet18", memory_format="channels_last")
    parts = build(keys, 10, IMAGES, 0, torch.float32, autocast=torch.bfloat16)
    orders = Orders(parts.client), Orders(parts.server)
    z = parts.client(images(2))
    assert (z.dtype, z.is_contiguous()) == (torch.bfloat16, True)
    assert parts.server(z).dtype == torch.float32
    assert orders == ([True], [True])


def test_a_run_is_the_same_in_either_order(tmp_path: Path) -> None:
    keys = {"data": {"name": "synthetic", "train_limit": 24, "test_limit": 8, "partition": "iid"}}
    keys |= {"clients": {"count": 2, "batch_size": 6}, "algorithm": {"alignment": {"batch_size": 6}}}
    keys["optimizer"] = {party: {"name": "sgd", "lr": 0.01} for party in ("client", "server", "auxiliary")}
    usual, reordered = (
        train_locally(tree(tmp_path, keys, rounds=1, model={"name": "resnet18", "memory_format": each}))
        for each in ("contiguous", "channels_last")
    )
    assert usual.lines[0]["alignment"] is not None
    assert_same(usual, reordered)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "test_segment:Viewing", "cut": "stem"},
        {"name": "test_segment:Viewing", "cut": "conv"},  # the uncut model alone fails
        {"name": "resnet18", "auxiliary": {"kind": "test_segment:viewing_auxiliary"}},
    ],
)
def test_a_model_that_needs_the_usual_order_is_bad_input(model: dict[str, Any], tmp_path: Path) -> None:
    keys = {"data": {"name": "synthetic", "train_limit": 96}, "model": model}
    config = from_tree(tree(tmp_path, keys, model={"memory_format": "channels_last"}))
    said = mistake(Experiment.prepare, config)
    expected = "model.memory_format: got 'channels_last', expected auto or contiguous: "
    assert said.startswith(f"{expected}{model['name']} fails on images in that order (RuntimeError: view")
    Experiment.prepare(from_tree(tree(tmp_path, keys)))


def test_a_model_that_fails_anyway_does_so_by_no_order() -> None:
    parts = asked("channels_last")
    assert failure_by_order(parts, IMAGES, auxiliary=True) is None
    assert all(part.training for part in (parts.client, parts.server, parts.uncut))

    def fail(module: nn.Module, inputs: Any) -> None:
        raise ValueError

    parts.server.register_forward_pre_hook(fail)
    assert failure_by_order(parts, IMAGES, auxiliary=True) is None
