"""Models cut by name: the halves are the whole, in both modes, and what cannot be cut is refused."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import list_models
from torchvision.ops import StochasticDepth

from fslsage_rpc.cli import main
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Auxiliary, Model
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.cuts import list_cuts
from fslsage_rpc.models.dropout import key_masks
from fslsage_rpc.models.splitting import SplitModel, build
from fslsage_rpc.models.tracing import probe_inputs
from fslsage_rpc.models.zoo import make
from fslsage_rpc.notebook import train
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient, untouched_statistics
from fslsage_rpc.training.experiment import Experiment
from support.user_input import mistake, write

IMAGES = (3, 64, 64)
LABELS = torch.tensor([0, 3])
CUTS = {
    "mobilenet_v3_small": ["features.0.0", "features.6", "classifier.2"],
    "swin_t": ["features.0.0", "features.5.1", "flatten"],
    "resnet18": ["conv1", "layer2.0", "avgpool"],
    "resnet50": ["conv1", "layer2", "layer4.1"],
    "efficientnet_b0": ["features.0.0", "features.4.1", "classifier.0"],
    "densenet121": ["features.conv0", "features.transition2.norm", "features"],
    "vgg11_bn": ["features.18"],  # half a GiB of weights in fp64
    "googlenet": ["conv1.conv", "inception3b", "dropout"],
    "convnext_tiny": ["features.0.0", "features.5.2", "classifier.1"],
    "vit_b_16": ["conv_proj", "encoder.layers.encoder_layer_5", "encoder"],
}
FAST = ("features.6", "classifier.2", "features.5.1")
EVERY_CUT = [
    pytest.param(name, cut, marks=() if cut in FAST else pytest.mark.nightly)
    for name, cuts in CUTS.items()
    for cut in cuts
]


def keys(name: str, cut: str | None, **auxiliary: object) -> Model:
    return Model(name=name, cut=cut, auxiliary=Auxiliary(**auxiliary))  # type: ignore[arg-type]


def split(name: str, cut: str, dtype: torch.dtype = torch.float64, **auxiliary: object) -> SplitModel:
    return build(keys(name, cut, **auxiliary), 10, IMAGES, 0, dtype)


def images(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *IMAGES, generator=torch.Generator().manual_seed(0), dtype=dtype)


def draws(layer: nn.Module) -> bool:
    """Does a layer of torch's take random numbers from its generator?"""
    return isinstance(layer, nn.Dropout | StochasticDepth) and layer.p > 0


@pytest.mark.parametrize(("name", "cut"), EVERY_CUT)
def test_the_halves_are_torchvisions_model_in_both_modes(name: str, cut: str) -> None:
    halves = split(f"torchvision/{name}", cut, kind="linear")
    state = {**halves.client.state_dict(), **halves.server.state_dict()}
    assert not set(halves.client.state_dict()) & set(halves.server.state_dict())
    whole = make(keys(f"torchvision/{name}", cut), 10, IMAGES).double()
    whole.load_state_dict(state, strict=True)
    with torch.no_grad():
        for batch in (1, 3):
            z = halves.client.eval()(images(batch))
            assert z.shape == (batch, *halves.smashed_shape)
            assert torch.equal(halves.server.eval()(z), whole.eval()(images(batch)))
    # One step in train mode, with the same masks of dropout and stochastic depth.
    assert not [m for half in (halves.client, halves.server) for m in half.modules() if draws(m)]
    key_masks(whole)
    for part in (halves.client, halves.server, whole):
        part.train()
    z = halves.client(images())
    sent = z.detach().requires_grad_()
    F.cross_entropy(halves.server(sent), LABELS).backward()
    z.backward(sent.grad)
    F.cross_entropy(whole(images()), LABELS).backward()
    ours = {**dict(halves.client.named_parameters()), **dict(halves.server.named_parameters())}
    for parameter_name, parameter in whole.named_parameters():
        assert torch.allclose(ours[parameter_name].grad, parameter.grad, rtol=1e-9, atol=1e-12)
    for buffer_name, buffer in whole.state_dict().items():  # running statistics, too
        assert torch.equal({**halves.client.state_dict(), **halves.server.state_dict()}[buffer_name], buffer)


# A model of the user's own


class Own(nn.Module):
    """Draws in train mode alone, holds weights and constants of its own, sizes what it makes by the batch."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.act = nn.ReLU(inplace=True)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("shift", torch.arange(8.0), persistent=False)
        self.mixer = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        batch = x.shape[0]
        x = self.act(self.stem(x)).flatten(2).transpose(1, 2) + self.shift
        if self.training:
            x = x * 2
        if scale is not None:
            x = x * scale
        token = self.token.expand(batch, -1, -1)
        x = torch.cat([token, x.reshape(batch, -1, 8)], 1)
        x = F.dropout(self.mixer(x), 0.5, self.training) + x
        return self.head(self.norm(x).mean(1))


def own(num_classes: int) -> nn.Module:
    return Own(num_classes)


def by_shape(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(torch.Size(image_shape).numel(), 5), nn.Linear(5, num_classes)
    )


def broken(num_classes: int) -> nn.Module:
    raise KeyError("no such thing")


def nothing(num_classes: int) -> None:
    return None


OWN = "test_splitting:own"


@pytest.mark.parametrize("cut", ["stem", "act", "norm"])
def test_a_model_of_the_users_own_keeps_both_modes(cut: str) -> None:
    halves = split(OWN, cut, kind="linear")
    whole = Own(10).double()
    whole.load_state_dict({**halves.client.state_dict(), **halves.server.state_dict()}, strict=True)
    for training in (True, False):
        for batch in (1, 2, 5):
            outputs = []
            for parts in ((halves.client, halves.server), (whole,), (halves.whole(),)):
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    torch.manual_seed(3)
                    outputs.append(nn.Sequential(*parts).train(training)(images(batch)))
            assert torch.equal(outputs[0], outputs[1])
            assert torch.equal(outputs[0], outputs[2])


def test_a_cut_before_an_operation_in_place_leaves_what_was_sent() -> None:
    halves = split(OWN, "stem", until="act")
    z = halves.client(images()).detach()
    before = z.clone()
    for part in (halves.server, halves.auxiliary):
        cut_layer_gradient(part, z, LABELS)
    assert torch.equal(z, before)


def test_copies_share_nothing_and_statistics_can_be_left_alone() -> None:
    halves = split("resnet18", "layer2.0", until="layer2")
    copied = copy.deepcopy(halves.server)
    ours, theirs = ({t.data_ptr() for t in part.state_dict().values()} for part in (copied, halves.server))
    assert not ours & theirs
    state = copy.deepcopy(copied.state_dict())
    z = halves.client(images()).detach()
    with untouched_statistics(copied):
        copied(z)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), copied.state_dict().values(), strict=True))
    with torch.no_grad():
        copied.fc.weight.add_(1)
    assert not torch.equal(copied(z), halves.server(z))


def test_a_function_may_ask_for_the_shape_of_the_images() -> None:
    halves = build(keys("test_splitting:by_shape", "1", kind="linear"), 7, (1, 8, 8), 0, torch.float32)
    assert halves.smashed_shape == (5,)
    assert halves.server(halves.client(torch.zeros(3, 1, 8, 8))).shape == (3, 7)


@pytest.mark.parametrize(
    ("name", "cut", "shape", "words"),
    [
        ("resnet1", "x", IMAGES, ["model.name: got 'resnet1'", "did you mean resnet18?"]),
        ("torchvision/resnt50", "x", IMAGES, ["model.name", "did you mean torchvision/resnet50"]),
        ("torchvision/resnet50", None, IMAGES, ["model.cut: got null", "--cuts"]),
        ("torchvision/resnet50", "layer1", (1, 8, 8), ["model.name", "resnet50", "1x8x8", "3 channels"]),
        ("torchvision/alexnet", "features.0", (3, 32, 32), ["model.name", "alexnet", "3x32x32", "too small"]),
        ("resnet18", "layer3.0.conv1", IMAGES, ["more than one tensor crosses", "layer2, layer3.0, layer3"]),
        ("resnet18", "layer3.0.relu", IMAGES, ["called 2 times", "layer3.0"]),
        ("resnet18", "layr2", IMAGES, ["model.cut: got 'layr2'", "layer2"]),
        ("no.such.module:f", "x", IMAGES, ["model.name", "cannot be imported (ModuleNotFoundError"]),
        ("test_splitting:f", "x", IMAGES, ["model.name", "cannot be imported (AttributeError"]),
        ("test_splitting:broken", "x", IMAGES, ["model.name", "no such thing"]),
        ("test_splitting:nothing", "x", IMAGES, ["model.name", "NoneType, not a torch.nn.Module"]),
        ("test_splitting:IMAGES", "x", IMAGES, ["model.name", "expected a function"]),
        (OWN, "mixer", IMAGES, ["model.cut: got 'mixer'", "more than one tensor crosses", "act"]),
    ],
)
def test_what_cannot_be_split_is_refused(
    name: str, cut: str | None, shape: tuple[int, int, int], words: list[str]
) -> None:
    message = mistake(build, keys(name, cut), 10, shape, 0, torch.float32)
    assert all(word in message for word in words), message


# Auxiliary models


@pytest.mark.parametrize(
    ("name", "cut", "auxiliary", "features"),
    [
        (OWN, "stem", {"kind": "linear"}, 8),  # [B, C, H, W]
        (OWN, "norm", {"kind": "linear"}, 8),  # [B, N, D]
        ("torchvision/swin_t", "features.0", {"kind": "linear"}, 96),  # [B, H, W, C]
        ("torchvision/swin_t", "features.0", {"until": "features.1.0"}, 96),
        ("torchvision/swin_t", "flatten", {"kind": "linear"}, 768),  # [B, D]
        ("simple_conv", "pool2", {"kind": "linear"}, 64 * 16 * 16),  # the one without pooling
    ],
)
def test_the_linear_classifier_takes_means_over_positions(
    name: str, cut: str, auxiliary: dict[str, str], features: int
) -> None:
    halves = split(name, cut, torch.float32, **auxiliary)
    assert halves.auxiliary.fc.in_features == features
    if auxiliary == {"kind": "linear"} and name != "simple_conv":
        z = halves.client(images(dtype=torch.float32)).detach()
        positions = {4: (1, 2) if "swin" in name else (2, 3), 3: (1,), 2: ()}[z.dim()]
        means = z.mean(positions) if positions else z
        assert torch.allclose(halves.auxiliary(z), halves.auxiliary.fc(means), atol=1e-5)


def test_an_mlp_has_one_hidden_layer() -> None:
    auxiliary = split("resnet18", "layer2", kind="mlp", width=7).auxiliary
    shapes = {name: tuple(t.shape) for name, t in auxiliary.state_dict().items()}
    assert shapes == {"hidden.weight": (7, 128), "hidden.bias": (7,), "fc.weight": (10, 7), "fc.bias": (10,)}
    z = torch.randn(2, 128, 8, 8, dtype=torch.float64)
    assert torch.allclose(auxiliary(z), auxiliary.fc(auxiliary.hidden(z.mean((2, 3))).relu()))


def test_a_narrower_copy_has_a_share_of_the_channels_of_every_layer() -> None:
    auxiliary = split("resnet18", "layer2", until="layer3", width_multiplier=0.5).auxiliary
    shapes = {name: tuple(t.shape) for name, t in auxiliary.named_parameters() if t.dim() == 4}
    assert shapes == {
        "layer3.0.conv1.weight": (128, 128, 3, 3),
        "layer3.0.conv2.weight": (128, 128, 3, 3),
        "layer3.0.downsample.0.weight": (128, 128, 1, 1),
        "layer3.1.conv1.weight": (128, 128, 3, 3),
        "layer3.1.conv2.weight": (128, 128, 3, 3),
    }
    assert auxiliary.fc.in_features == 128
    assert auxiliary(torch.randn(2, 128, 8, 8, dtype=torch.float64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "cut", "until"),
    [("resnet18", "layer2.0", "layer2"), ("torchvision/swin_t", "features.0", "features.1.0")],
)
def test_a_copy_that_cannot_be_narrower_is_refused(name: str, cut: str, until: str) -> None:
    message = mistake(build, keys(name, cut, until=until, width_multiplier=0.5), 10, IMAGES, 0, torch.float32)
    assert message.startswith("model.auxiliary.width_multiplier: got 0.5, expected null, as this copy cannot")


@pytest.mark.parametrize(
    ("name", "cut", "until"),
    [
        ("torchvision/vit_b_32", "conv_proj", "encoder.layers.encoder_layer_0"),
        ("torchvision/swin_t", "features.0", "features.1"),
        ("torchvision/mobilenet_v3_small", "features.6", "features.8"),
    ],
)
def test_alignment_can_differentiate_a_copy_twice(name: str, cut: str, until: str) -> None:
    halves = split(name, cut, until=until)
    z = halves.client(images()).detach()
    estimate = cut_layer_gradient(halves.auxiliary, z, LABELS, create_graph=True)
    estimate.square().sum().backward(inputs=list(halves.auxiliary.parameters()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in halves.auxiliary.parameters())


class HardSigmoid(nn.Module):
    """A layer whose gradient has none."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)


def once(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), HardSigmoid(), nn.Linear(9, num_classes))


def test_a_copy_that_cannot_be_aligned_is_refused() -> None:
    tree = {"model": {"name": "test_splitting:once", "cut": "1", "auxiliary": {"until": "2"}}}
    with pytest.raises(InputError, match=r"model.auxiliary.until: got '2', whose layers cannot be .* twice"):
        Experiment.prepare(from_tree(tree))


# The list of cuts


def test_the_cuts_of_resnet18_are_listed_with_sizes_and_multiply_adds() -> None:
    cuts = {cut.name: cut for cut in list_cuts(Model(name="resnet18"), 10, (3, 32, 32))}
    assert list(cuts) == [
        *("conv1", "bn1", "relu", "maxpool", "layer1.0", "layer1", "layer2.0", "layer2"),
        *("layer3.0", "layer3", "layer4.0", "layer4", "avgpool"),
    ]
    assert cuts["conv1"].client_multiply_adds == 64 * 3 * 7 * 7 * 16 * 16
    assert cuts["layer4"].server_multiply_adds == 512 * 10
    layer2 = cuts["layer2"]
    assert (layer2.client_parameters, layer2.server_parameters) == (683_072, 10_498_570)
    assert layer2.smashed_shape == (128, 4, 4)
    assert len({cut.client_multiply_adds + cut.server_multiply_adds for cut in cuts.values()}) == 1


def test_every_listed_cut_is_one() -> None:
    with torch.device("meta"):
        for cut in list_cuts(Model(name="torchvision/squeezenet1_1"), 10, IMAGES):
            halves = build(keys("torchvision/squeezenet1_1", cut.name), 10, IMAGES, 0, torch.float32)
            assert halves.smashed_shape == cut.smashed_shape
            assert sum(p.numel() for p in halves.client.parameters()) == cut.client_parameters
            assert sum(p.numel() for p in halves.server.parameters()) == cut.server_parameters


FAMILIES = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
    mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d
    shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t vgg11 vit_b_16 wide_resnet50_2
"""


def test_no_family_of_torchvisions_classifiers_is_left_out() -> None:
    def family(name: str) -> str:
        return re.sub(r"[\d_].*", "", name.replace("_v2", "V"))

    every = list_models(module=torchvision.models)
    assert {family(name) for name in FAMILIES.split()} == {family(name) for name in every}


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES.split())
def test_every_family_of_torchvisions_classifiers_can_be_cut(name: str) -> None:
    """At the first, the middle and the last listed cut, for images of its own size, on the meta device."""
    image = (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    with torch.device("meta"):
        whole = sum(p.numel() for p in make(keys(f"torchvision/{name}", None), 10, image).parameters())
        cuts = list_cuts(keys(f"torchvision/{name}", None), 10, image)
        assert len(cuts) >= 7
        for cut in (cuts[0], cuts[len(cuts) // 2], cuts[-1]):
            halves = build(keys(f"torchvision/{name}", cut.name, kind="linear"), 10, image, 0, torch.float32)
            sizes = [sum(p.numel() for p in half.parameters()) for half in (halves.client, halves.server)]
            assert sizes == [cut.client_parameters, cut.server_parameters]
            assert sum(sizes) == whole
            z = halves.client.eval()(probe_inputs(halves.client, image, 3))
            assert z.shape == (3, *cut.smashed_shape)
            assert halves.server.eval()(z).shape == (3, 10)


def test_check_prints_the_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path, "precision: bf16\n")
    assert main(["check", str(config), "--cuts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["cut", "smashed", "data"]
    assert ["pool2", "64x2x2", "512", "104,128"] in [line.split()[:4] for line in lines]
    (tmp_path / "pair.py").write_text(
        "import torch\n\n\nclass Pair(torch.nn.Module):\n    def __init__(self, num_classes):\n"
        "        super().__init__()\n        self.fc = torch.nn.Linear(64, num_classes)\n\n"
        "    def forward(self, x):\n        y = self.fc(x.flatten(1))\n        return y, y\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check", str(config), "model.name=pair:Pair", "--cuts"]) == 2
    assert "model.name: got 'pair:Pair', which can be cut nowhere" in capsys.readouterr().err
    assert main(["check", "--cuts"]) == 2
    assert "check --cuts" in capsys.readouterr().err


def test_a_model_by_name_trains(tmp_path: Path) -> None:
    run = train(
        {
            "output": str(tmp_path),
            "transport": "local",
            "rounds": 8,
            "clients": {"count": 2, "batch_size": 16},
            "data": {"name": "digits", "train_limit": 64, "test_limit": 32, "partition": "iid"},
            "model": {
                "name": "test_splitting:by_shape",
                "cut": "1",
                "auxiliary": {"kind": "mlp", "width": 4},
            },
            "algorithm": {"align_every": 1, "start": "paper", "alignment": {"epochs": 2}},
            "optimizer": {party: {"lr": 0.03} for party in ("client", "server", "auxiliary")},
        }
    )
    assert set(torch.load(tmp_path / "run" / "model.pt")) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert run.rounds[-1]["train_loss"] < 0.9 * run.rounds[0]["train_loss"]
