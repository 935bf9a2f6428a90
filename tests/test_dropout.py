"""Dropout and stochastic depth are keyed: by whom, where and when a mask is drawn changes nothing."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from fslsage_rpc.algorithms.rehearsal import Rehearsal
from fslsage_rpc.cli import main
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Model
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.models.draws import unkeyed_draws
from fslsage_rpc.models.dropout import KeyedMask, Masks, key_masks
from fslsage_rpc.models.splitting import build
from fslsage_rpc.notebook import train
from fslsage_rpc.parties.client import Client
from fslsage_rpc.randomness import LocalStep
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support.equality import without_seconds
from support.rank_program import train_locally
from support.recorded_graphs import Recorder, recorder
from support.user_input import mistake, write

__all__ = ["recorder"]  # a fixture

STEP = LocalStep(round=3, client=1, step=4)


def tree(name: str, cut: str, algorithm: str, **more: Any) -> dict[str, Any]:
    until = "5" if name == "copied" else None
    return {
        "rounds": 2,
        "precision": "fp64",
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"train_limit": 96, "test_limit": 30, "partition": "iid"},
        "model": {"name": f"support.random_models:{name}", "cut": cut, "auxiliary": {"until": until}},
        "algorithm": {
            "name": algorithm,
            "upload_every": 1,
            "align_every": 1,
            "start": "paper",
            "alignment": {"epochs": 2, "batch_size": 25, "buffer_size": 40},
        },
        **more,
    }


WET = ("wet", "between")
COPIED = ("copied", "1")


def keyed(layer: nn.Module) -> nn.Module:
    """The layer as a model of one layer, keyed."""
    model = nn.Sequential(layer)
    key_masks(model)
    Masks(model, seed=0).begin(STEP)
    return model


# One layer


def test_dropout_zeroes_a_share_and_scales_the_rest() -> None:
    model = keyed(nn.Dropout(0.3))
    output = model(torch.ones(400, 100))
    assert output.eq(0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(output[output != 0], torch.tensor(1 / 0.7))
    assert output.mean(0).std() > 0  # no two samples alike
    x = torch.ones(5)
    assert model.eval()(x) is x
    assert not keyed(nn.Dropout(1.0))(x).any()


@pytest.mark.parametrize(
    ("layer", "varies"),
    [
        (StochasticDepth(0.5, "row"), (0,)),
        (StochasticDepth(0.5, "batch"), ()),
        (nn.Dropout1d(0.5), (0, 1)),
        (nn.Dropout2d(0.5), (0, 1)),
        (nn.Dropout3d(0.5), (0, 1)),
    ],
)
def test_a_mask_is_one_number_per_sample_batch_or_channel(layer: nn.Module, varies: tuple[int, ...]) -> None:
    model = keyed(layer)
    shape = (
        (64, 5, 4) if isinstance(layer, nn.Dropout1d) else (64, 5, 4, 2, 3)[: 5 if "3d" in str(layer) else 4]
    )
    output = model(torch.ones(shape))
    assert set(output.unique().tolist()) <= {0.0, 2.0}
    for dimension in range(output.dim()):
        assert (output.std(dimension).any().item()) == (dimension in varies)


def test_unbatched_channels_are_those_of_torch() -> None:
    for layer, shape in ((nn.Dropout1d(0.5), (200, 3)), (nn.Dropout3d(0.5), (200, 3, 3, 3))):
        output = keyed(layer)(torch.ones(shape)).flatten(1)
        assert output[:, 0].unique().tolist() == [0, 2]
        assert not output.std(1).any()


def test_a_mask_follows_from_its_key_alone() -> None:
    model, x = keyed(nn.Dropout(0.5)), torch.ones(64, 64)
    masks = Masks(model, seed=0)

    def draw(at: LocalStep, model: nn.Module = model, masks: Masks = masks) -> Tensor:
        masks.begin(at)
        return model(x)

    expected, again = draw(STEP), model(x)
    assert not torch.equal(expected, again)  # a second call in a pass
    torch.manual_seed(5)
    assert torch.equal(draw(STEP), expected)
    assert torch.equal(model(x), again)
    other = copy.deepcopy(model)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads < 3 else 1)
    try:
        assert torch.equal(draw(STEP, other, Masks(other, seed=0)), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draw(STEP), expected)
    masks.begin(STEP)
    channels_last = x.reshape(4, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(channels_last).reshape(64, 64), expected)
    different = [draw(STEP._replace(**{key: 9})) for key in ("round", "client", "step")]
    different.append(draw(STEP, model, Masks(model, seed=1)))
    for passes in range(2):
        for batch in range(2):
            masks.begin_alignment(STEP, batch, passes)
            different.append(model(x))
    drawn = [expected, again, *different]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_layers_keep_their_places_and_names_and_those_with_p_0_stay() -> None:
    class Own(nn.Dropout):
        pass

    shared = nn.Dropout(0.1, inplace=True)
    still, own = nn.Dropout(0.0), Own(0.5)
    model = nn.Sequential(nn.Linear(2, 2), shared, still, own, nn.ModuleDict({"a": shared}).eval())
    names = list(model.state_dict())
    key_masks(model)
    assert list(model.state_dict()) == names
    assert isinstance(model[1], KeyedMask)
    assert (model[1].name, model[1].p) == ("1", 0.1)
    assert model[4]["a"] is model[1]
    assert model[2] is still
    assert model[3] is own
    dry = nn.Sequential(nn.Linear(2, 2), still)
    masks = Masks(dry, seed=0)
    assert not masks
    masks.begin(STEP)


def test_layers_of_parts_that_share_them_have_their_own_keys() -> None:
    client, server = (nn.Sequential(*[nn.Sequential(nn.Dropout(0.5)) for _ in range(300)]) for _ in range(2))
    whole = nn.ModuleDict({"client": client, "server": server})
    key_masks(client, server, client, server, whole)
    for half in (client, server):
        assert [layer[0].name for layer in half] == [f"{i}.0" for i in range(300)]


def test_alignment_differentiates_dropout_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    key_masks(model)
    masks, z, y = Masks(model, 0), torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3

    def objective(weight: Tensor) -> Tensor:
        masks.begin(STEP)
        z_ = z.detach().requires_grad_()
        weights = {**dict(model.named_parameters()), "0.weight": weight}
        outputs = torch.func.functional_call(model, weights, (z_,))
        (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, y), z_, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(objective, model[0].weight.detach().clone().requires_grad_())


def test_a_checkpointed_call_has_the_mask_that_it_had() -> None:
    model = keyed(nn.Dropout(0.5))
    x = torch.ones(50, requires_grad=True)
    output = checkpoint(lambda x: model(x) * x, x, use_reentrant=False)
    output.sum().backward()
    assert torch.equal(x.grad, 2 * output.detach())
    twice = checkpoint(lambda x: model(model(x)), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="0 is called more than once, and again in the backward pass"):
        twice.sum().backward()


# Whole trainings


@pytest.mark.parametrize("name", [WET, COPIED])
def test_splitfed_v1_is_fedavg_with_dropout_too(name: tuple[str, str]) -> None:
    split, whole = (train_locally(tree(*name, algorithm)) for algorithm in ("splitfed_v1", "fedavg"))
    finals = [name for name in split.tensors if name.startswith("final ")]
    assert len(finals) >= 4
    for final in finals:
        difference = (split.tensors[final] - whole.tensors[final]).norm()
        assert difference <= 1e-10 * whole.tensors[final].norm()
    assert split.lines[-1]["train_loss"] == pytest.approx(whole.lines[-1]["train_loss"], rel=1e-9)


def test_the_server_model_as_auxiliary_estimates_the_true_gradient_with_dropout_too() -> None:
    still = {party: {"lr": 0, "weight_decay": 0} for party in ("server", "auxiliary")}
    keys = tree(*WET, "fsl_sage", transport="local", optimizer=still, rounds=1)
    keys["algorithm"]["alignment"]["solver"] = "lbfgs"  # whose passes have the masks of the true gradients
    experiment = Experiment.prepare(from_tree(keys))
    experiment.split.auxiliary = copy.deepcopy(experiment.split.server)
    experiment.rehearsal = Rehearsal(experiment.algorithm, experiment.task, experiment.split)
    lines: list[dict[str, Any]] = []
    Trainer(experiment, open_world(experiment.config)).train(lambda line, reports: lines.append(line))
    assert lines[0]["drift"]["nmse"] < 1e-20
    assert lines[0]["alignment"]["nmse_before"] < 1e-20


def test_the_same_run_twice_and_another_seed() -> None:
    one, again, other = (
        without_seconds(train_locally({**tree(*COPIED, "fsl_sage"), "seed": seed}).lines)
        for seed in (0, 0, 1)
    )
    assert one == again != other


def test_a_run_that_goes_on_repeats_itself_to_the_last_bit(tmp_path: Path) -> None:
    keys = {**tree(*COPIED, "fsl_sage"), "transport": "local", "output": str(tmp_path)}

    def final(name: str, *rounds: int) -> dict[str, Tensor]:
        for until in rounds:
            folder = train({**keys, "name": name, "rounds": until}).folder
        return torch.load(folder / "model.pt", weights_only=True)

    whole, resumed = final("whole", 3), final("resumed", 1, 3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_steps_of_models_that_draw_masks_are_not_captured(recorder: Recorder) -> None:
    keys = tree(*WET, "fsl_sage", transport="local", graphs="auto")

    def enabled(model: dict[str, Any]) -> tuple[bool, bool]:
        config = from_tree({**keys, "model": model})
        client: Client = Trainer(Experiment.prepare(config), open_world(config)).clients[0]
        return client.passes._enabled, client.whole_steps._enabled

    assert enabled(keys["model"]) == (False, False)
    assert enabled({"name": "simple_conv"}) == (True, True)


# Draws that nothing keys


@pytest.mark.parametrize("name", ["functional", "attention", "pythons", "numpys"])
def test_other_draws_are_refused_in_the_reproducible_orders(name: str) -> None:
    message = mistake(Experiment.prepare, from_tree(tree(name, "1", "fsl_sage")))
    assert message == (
        f"model.name: got 'support.random_models:{name}', which in training draws random numbers "
        "that no seed determines (the server half, in 3.1), expected one whose random layers are nn.Dropout "
        "or torchvision's StochasticDepth, or server.order: arrival (it is round_robin)"
    )


def test_a_model_is_looked_at_and_left_as_it_was() -> None:
    halves = build(Model(name="support.random_models:functional", cut="1"), 10, (1, 8, 8), 0, torch.float32)
    before = copy.deepcopy(halves.server.state_dict())
    states = torch.get_rng_state(), random.getstate()
    assert unkeyed_draws(halves, (1, 8, 8), auxiliary=True) == "the server half, in 3.1"
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    for name, tensor in halves.server.state_dict().items():
        assert torch.equal(tensor, before[name])
    still = build(Model(name="support.random_models:nothing", cut="1"), 10, (1, 8, 8), 0, torch.float32)
    assert unkeyed_draws(still, (1, 8, 8), auxiliary=True) is None


def test_such_a_run_ends_with_status_2_or_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, 'model: {name: "support.random_models:functional", cut: "1"}')
    arguments = [
        *("train", str(config), "transport=local", "rounds=1", f"output={tmp_path}", "clients.batch_size=8"),
        *("data.train_limit=60", "data.test_limit=20", "data.partition=iid"),
    ]
    assert main(arguments) == 2
    assert "server.order: arrival (it is round_robin)" in capsys.readouterr().err
    assert main([*arguments, "server.order=arrival"]) == 0
    said = "".join(capsys.readouterr())
    assert (
        "warning: model.name: support.random_models:functional draws random numbers that no seed determines "
        "(the server half, in 3.1): runs differ" in said
    )
