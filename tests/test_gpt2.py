"""GPT-2 in two halves: the transformers library's numbers, all of its blocks, and adapters that train."""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fslsage_rpc.config.loading import from_tree, load
from fslsage_rpc.language.data import IGNORED
from fslsage_rpc.models.cuts import list_cuts
from fslsage_rpc.models.flat import copy_of, flatten, module_bytes, trainable
from fslsage_rpc.models.splitting import SplitModel, build
from fslsage_rpc.models.tracing import TokenShape
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit, cut_layer_gradient
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.tasks import Task, open_task
from fslsage_rpc.training.experiment import check
from support.commands import fslsage
from support.toy_language import data_arguments, model_arguments, toy_config, toy_tree
from support.trees import Tree
from support.user_input import mistake

pytest.importorskip("transformers")
pytest.importorskip("peft")

LAYERS = 4
GPT2 = "fslsage_rpc.language.model:gpt2"
FP32: Tree = {"precision": "fp32"}
NO_LORA = model_arguments(lora={"rank": None})
ALL_TRAIN = model_arguments(lora={"frozen": False})
PRETRAINED_SIZES = model_arguments(width=None, layers=None, heads=None)


def built(root: Path, *changes: Tree) -> tuple[Task, SplitModel]:
    task = open_task(toy_config(root, *changes))
    return task, task.build()


def batch(task: Task, size: int = 5) -> tuple[Tensor, Tensor]:
    """The first training texts: x, y `[size, T]`."""
    return next(task.batches(task.load(train=True), size, torch.device("cpu")).in_order())


def parts(split: SplitModel) -> dict[str, nn.Module]:
    return {"client": split.client, "server": split.server, "auxiliary": split.auxiliary}


def adapters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module.named_parameters() if "lora_" in name}


def with_adapters_at_work(split: SplitModel) -> SplitModel:
    """B starts at zero, which hides everything before it."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in parts(split).values():
            for name, weight in adapters(part).items():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) / 10)
    return split


@pytest.fixture(scope="module")
def pretrained(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as the transformers library saves its own GPT-2, and that model."""
    import transformers

    task = open_task(toy_config(toy_root))
    config = transformers.GPT2Config(
        vocab_size=task.classes, n_positions=64, n_embd=16, n_layer=LAYERS, n_head=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for weight in model.parameters():  # biases and norms too, which would start at 0 and 1
                weight.add_(torch.randn_like(weight) / 10)
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    return folder, model


# The same numbers as the transformers library's


@pytest.mark.nightly
def test_weights_and_tokenizer_are_found_by_their_names_on_the_hub(
    toy_root: Path, pretrained: tuple[Path, Any], tmp_path: Path
) -> None:
    """As the hub's client has stored them, without a network."""
    toy_hub = tmp_path / "hub" / "models--somebody--toy"
    snapshot = toy_hub / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(pretrained[0], snapshot)
    for file in (toy_root / "tokenizer").iterdir():
        shutil.copy(file, snapshot)
    (toy_hub / "refs").mkdir()
    (toy_hub / "refs" / "main").write_text(snapshot.name)
    names = [data_arguments(tokenizer="somebody/toy"), model_arguments(pretrained="somebody/toy")]
    tree = toy_tree(toy_root, PRETRAINED_SIZES, *names, FP32)
    tree |= {"name": "hub", "output": str(tmp_path / "runs")}
    config = tmp_path / "config.json"  # which is YAML
    config.write_text(json.dumps(tree))
    done = fslsage("train", config, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    trained = torch.load(tmp_path / "runs" / "hub" / "model.pt", weights_only=True)
    ours, theirs = trained["ln_f.weight"], pretrained[1].transformer.ln_f.weight
    assert torch.equal(ours, theirs)  # frozen


@pytest.mark.parametrize("changes", [[NO_LORA], []], ids=["plain", "adapters that start at zero"])
def test_a_pretrained_model_gives_the_librarys_own_logits(
    toy_root: Path, pretrained: tuple[Path, Any], changes: list[Tree]
) -> None:
    folder, theirs = pretrained
    loaded = model_arguments(pretrained=str(folder))
    task, split = built(toy_root, FP32, PRETRAINED_SIZES, loaded, *changes)
    x, _ = batch(task)
    with torch.no_grad():
        expected = theirs(x).logits
        z = split.client.eval()(x)
        assert expected.abs().mean() > 0.1
        torch.testing.assert_close(split.whole().eval()(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(split.server.eval()(z), expected, rtol=1e-5, atol=1e-5)
        # The other blocks and the head again, with the attention that can be differentiated twice.
        torch.testing.assert_close(split.auxiliary.eval()(z), expected, rtol=1e-5, atol=1e-5)
    if not changes:
        with_adapters_at_work(split)
        with torch.no_grad():
            assert not torch.allclose(split.whole()(x), expected, atol=1e-3)


def test_without_its_tied_head_the_model_has_the_librarys_weights(
    toy_root: Path, pretrained: tuple[Path, Any]
) -> None:
    folder, theirs = pretrained
    _, split = built(toy_root, FP32, PRETRAINED_SIZES, NO_LORA, model_arguments(pretrained=str(folder)))
    ours = split.whole().state_dict()
    expected = {
        re.sub(r"^transformer\.(wte|wpe)", r"embedding.\1", name).removeprefix("transformer."): weight
        for name, weight in theirs.state_dict().items()
    }
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_embedding_and_head_start_equal_and_are_two(toy_root: Path) -> None:
    _, split = built(toy_root, ALL_TRAIN)
    embedding, head = split.client.embedding.wte.weight, split.server.lm_head.weight
    assert torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()
    assert split.auxiliary.lm_head.weight.data_ptr() not in (embedding.data_ptr(), head.data_ptr())
    with torch.no_grad():
        head.add_(1.0)
    assert not torch.equal(embedding, head)


def test_the_auxiliary_models_derivatives_are_those_of_finite_differences(toy_root: Path) -> None:
    task, split = built(toy_root)
    with_adapters_at_work(split)
    x, y = batch(task, 3)
    z = split.client(x).detach()
    weights = trainable(split.auxiliary)

    def objective(create_graph: bool) -> Tensor:
        return cut_layer_gradient(split.auxiliary, z, y, task.loss, create_graph).square().sum() * 1e4

    derivatives = torch.autograd.grad(objective(True), weights)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    step, ends = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(direction, alpha=sign * step)
        ends.append(objective(False).item())
    expected = (ends[0] - ends[1]) / (2 * step)
    along = sum((d * v).sum().item() for d, v in zip(derivatives, directions, strict=True))
    assert abs(expected) > 1e-6
    assert along == pytest.approx(expected, rel=1e-6)


# Two halves are the whole, and no block is left out


@pytest.mark.parametrize("cut", ["embedding", "h.0", "h.1", "h.2"])
def test_the_halves_are_the_whole_and_so_are_their_gradients(toy_root: Path, cut: str) -> None:
    task, split = built(toy_root, ALL_TRAIN, {"model": {"cut": cut, "auxiliary": {"until": "h.3"}}})
    with_adapters_at_work(split)
    x, y = batch(task)
    split.whole().eval(), split.client.eval(), split.server.eval()
    with torch.no_grad():
        torch.testing.assert_close(split.server(split.client(x)), split.whole()(x), rtol=1e-12, atol=1e-12)
    split.whole().train(), split.client.train(), split.server.train()
    z = split.client(x)
    received = z.detach().requires_grad_()
    task.loss(split.server(received), y).backward()
    z.backward(received.grad)
    found = {name: weight.grad for name, weight in split.whole().named_parameters()}
    split.whole().zero_grad(set_to_none=True)
    task.loss(split.whole()(x), y).backward()
    assert len(found) == 2 + LAYERS * (12 + 4 + 4) + 3  # c_attn as three, and four adapters
    for name, weight in split.whole().named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-9, atol=1e-14, msg=name)


def blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from module.get_submodule("h").named_children()


def test_every_block_of_every_part_runs(toy_root: Path) -> None:
    task, split = built(toy_root)
    with_adapters_at_work(split)
    x, _ = batch(task)
    z = split.client(x).detach()
    inputs = {"client": x, "server": z, "auxiliary": z}
    held = {}
    for name, part in parts(split).items():
        held[name] = [number for number, _ in blocks(part)]
        for number, block in blocks(part):
            for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
                kept = linear.weight.detach().clone()
                with torch.no_grad():
                    before = part(inputs[name])
                    linear.weight.add_(torch.randn_like(kept))  # not a constant: hidden states sum to 0
                    after = part(inputs[name])
                    linear.weight.copy_(kept)
                assert not torch.allclose(before, after), (name, number, linear)
    assert held == {"client": ["0"], "server": ["1", "2", "3"], "auxiliary": ["1", "2", "3"]}


def test_every_adapter_of_every_part_gets_a_gradient_and_nothing_else_does(toy_root: Path) -> None:
    """The published program runs one block of the server's and the auxiliary model's alone."""
    task, split = built(toy_root)
    with_adapters_at_work(split)
    x, y = batch(task, 8)
    z = split.client(x)
    received = z.detach().requires_grad_()
    task.loss(split.server(received), y).backward()
    z.backward(received.grad)
    optimizer = ScheduledOptimizer(task.config.optimizer.auxiliary, trainable(split.auxiliary))
    context = Context(loss=task.loss)
    fit = AuxiliaryFit(split.auxiliary, optimizer, task.config.algorithm.alignment, context)
    fit.buffer.add(received.detach(), y)
    server_gradients = {name: weight.grad.clone() for name, weight in adapters(split.server).items()}
    (target,) = fit.targets(split.server)
    for name, weight in adapters(split.server).items():
        assert torch.equal(weight.grad, server_gradients[name])  # targets leave the server as it was
    fit._accumulate(target)
    counted = {}
    for part, module in parts(split).items():
        for name, weight in module.named_parameters():
            assert weight.requires_grad == ("lora_" in name), name
            if weight.requires_grad:
                assert weight.grad is not None, (part, name)
                assert weight.grad.abs().max() > 0, (part, name)
            else:
                assert weight.grad is None, (part, name)
        counted[part] = len(adapters(module))
    assert counted == {"client": 4, "server": 4 * 3, "auxiliary": 4 * 3}
    projections = {re.sub(r"^.*c_attn\.(.)\.lora_(.).*$", r"\1\2", name) for name in adapters(split.server)}
    assert projections == {"qA", "qB", "vA", "vB"}


def test_the_medium_configuration_splits_all_24_blocks_and_adapts_them() -> None:
    """On the meta device, where nothing is allocated; the sizes are those of its pretrained weights."""
    keys = load(Path(__file__).parents[1] / "configs" / "e2e_gpt2_medium.yaml", [])
    sizes = {"pretrained": None, "width": 1024, "layers": 24, "heads": 16}
    length = keys.data.arguments["tokens"]
    with torch.device("meta"):
        model = dataclasses.replace(keys.model, arguments=keys.model.arguments | sizes)
        split = build(model, 50_257, TokenShape((length,)), 0, torch.float32)
        tokens = torch.zeros(1, length, dtype=torch.int64)
        for half in (split.server, split.auxiliary):
            assert half(split.client(tokens)).shape == (1, length, 50_257)
    held = {name: [int(number) for number, _ in blocks(part)] for name, part in parts(split).items()}
    assert held == {"client": [0], "server": list(range(1, 24)), "auxiliary": [1, 2, 3]}
    assert {name: len(adapters(part)) for name, part in parts(split).items()} == {
        name: 4 * len(numbers) for name, numbers in held.items()
    }
    trained = {name: sum(p.numel() for p in trainable(part)) for name, part in parts(split).items()}
    assert trained == {name: len(numbers) * 2 * 4 * 2 * 1024 for name, numbers in held.items()}


# Frozen weights


def test_only_weights_that_train_are_flattened_and_counted(toy_root: Path) -> None:
    _, split = built(toy_root)
    of_a_block = 2 * (2 * 16 + 16 * 2) * 8  # A and B of q and v, of rank 2, in fp64
    for part, number in zip(parts(split).values(), (1, 3, 3), strict=True):
        assert module_bytes(part) == flatten(copy_of(part, torch.device("cpu"))).nbytes == number * of_a_block
    _, unfrozen = built(toy_root, ALL_TRAIN)
    for part in parts(unfrozen).values():
        assert module_bytes(part) == sum(weight.numel() for weight in part.parameters()) * 8


def test_copies_share_what_is_frozen_and_nothing_else(toy_root: Path) -> None:
    _, split = built(toy_root)
    for part in parts(split).values():
        copies = [copy_of(part, torch.device("cpu")) for _ in range(3)]
        for each in copies:
            flatten(each)
        for name, weight in part.named_parameters():
            places = [dict(each.named_parameters())[name].data_ptr() for each in copies]
            assert len({*places, weight.data_ptr()}) == (4 if weight.requires_grad else 1), name
        assert copies[0].state_dict().keys() == part.state_dict().keys()


# Padding


def test_no_cut_layer_gradient_is_at_padding_nor_depends_on_what_is_there(toy_root: Path) -> None:
    task, split = built(toy_root, {"loss": {"label_smoothing": 0.1}})
    with_adapters_at_work(split)
    x, y = batch(task, 8)
    places = torch.arange(x.shape[1])
    last = (y != IGNORED).mul(places).max(1).values  # where the end is predicted
    padding = places > last[:, None]
    assert padding.any(1).all()
    z = split.client(x).detach()
    other_z = torch.where(padding[..., None], torch.randn_like(z), z)
    other_x = torch.where(padding, torch.randint_like(x, task.classes), x)
    torch.testing.assert_close(split.client(other_x)[~padding], z[~padding], rtol=0, atol=1e-12)
    for model in (split.server, split.auxiliary):
        gradient = cut_layer_gradient(model, z, y, task.loss)
        assert not gradient[padding].any()
        assert gradient[~padding].abs().sum(1).min() > 0  # of the meaning representation too
        other = cut_layer_gradient(model, other_z, y, task.loss)
        assert not other[padding].any()
        torch.testing.assert_close(other[~padding], gradient[~padding], rtol=1e-10, atol=1e-14)


# What is refused, in one line


WRONG: dict[str, tuple[list[Tree], str]] = {
    "heads": ([model_arguments(heads=3)], r"model\.arguments\.heads: got 3, expected a divisor of 16"),
    "blocks": (
        [model_arguments(layers=0)],
        r"model\.arguments\.layers: got 0, expected an integer >= 1 .* or null",
    ),
    "an unknown key of adapters": (
        [model_arguments(lora={"ranks": 2})],
        r"model\.arguments\.lora\.ranks: unknown argument of lora; did you mean .*\.rank\?",
    ),
    "adapters of no rank": (
        [model_arguments(lora={"rank": 0})],
        r"model\.arguments\.lora\.rank: got 0, expected an integer >= 1 .* or null",
    ),
    "mlp": (
        [{"model": {"auxiliary": {"kind": "mlp", "width": 8}}}],
        r"model\.auxiliary\.kind: got 'mlp', expected copy or linear: .*",
    ),
    "narrow copy": (
        [{"model": {"auxiliary": {"width_multiplier": 0.5}}}],
        r"model\.auxiliary\.width_multiplier: got 0\.5, expected null.*",
    ),
    "no such block": (
        [{"model": {"cut": "h.9"}}],
        r"model\.cut: got 'h\.9', expected a module of the model, as h\..* \(fslsage check .*\)",
    ),
    "inside a block": (
        [{"model": {"cut": "h.1.attn"}}],
        r"model\.cut: got 'h\.1\.attn', .*nearest that work: h\.0.*h\.1.*",
    ),
    "between the embeddings": (
        [ALL_TRAIN, {"model": {"cut": "embedding.wte"}}],
        r"model\.cut: got 'embedding\.wte', where more than one tensor crosses; nearest that work: .*",
    ),
    "nothing trains before the cut": (
        [{"model": {"cut": "embedding"}}],
        r"model\.cut: got 'embedding', where all weights before it are frozen; nearest that work: h\.0, .*",
    ),
    "nothing trains behind the cut": (
        [{"model": {"cut": "h.3", "auxiliary": {"kind": "linear"}}}],
        r"model\.cut: got 'h\.3', where all weights behind it are frozen; nearest that work: h\.1, h\.2 .*",
    ),
    "the head": (
        [{"model": {"cut": "lm_head"}}],
        r"model\.cut: got 'lm_head', where no weights are behind it; nearest that work: .*",
    ),
    "a frozen auxiliary": (
        [{"model": {"auxiliary": {"kind": "linear"}}}],
        r"model\.auxiliary\.kind: got 'linear', .*frozen; expected copy",
    ),
    "auxiliary before the cut": (
        [{"model": {"cut": "h.1", "auxiliary": {"until": "h.0"}}}],
        r"model\.auxiliary\.until: got 'h\.0', expected a module behind the cut, h\.1",
    ),
    "auxiliary too long": (
        [{"model": {"cut": "h.2"}}],
        r"model\.auxiliary\.until: got 'h\.5', expected a module of the model, as h\..*",
    ),
    "not there": (
        [PRETRAINED_SIZES, model_arguments(pretrained="no/such/folder")],
        r"model\.arguments\.pretrained: got 'no/such/folder', which cannot be loaded .*",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_in_one_line(toy_root: Path, changes: list[Tree], expected: str) -> None:
    said = mistake(lambda: open_task(toy_config(toy_root, *changes)).build())
    assert re.fullmatch(expected, said), said


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("data", {"name": "digits"}, f"got {GPT2!r}, a model for texts, expected one for images"),
        ("model", {"name": "simple_conv"}, "got 'simple_conv', a model for images, expected one for texts"),
    ],
)
def test_a_model_for_other_samples_is_refused(
    toy_root: Path, section: str, keys: Tree, expected: str
) -> None:
    config = from_tree({**toy_tree(toy_root), section: keys})
    said = mistake(lambda: open_task(config).build())
    assert said == f"model.name: {expected}, as data.name has them"


def test_a_check_before_training_finds_it_too(toy_root: Path) -> None:
    said = mistake(check, toy_config(toy_root, {"model": {"cut": "embedding"}}), 1)
    assert said.startswith("model.cut: got 'embedding'")


@pytest.mark.parametrize("key", ["width", "layers", "heads"])
def test_a_pretrained_model_has_its_own_sizes(toy_root: Path, pretrained: tuple[Path, Any], key: str) -> None:
    keys = model_arguments(**{"pretrained": str(pretrained[0]), key: 4})
    said = mistake(built, toy_root, PRETRAINED_SIZES, keys)
    assert said == f"model.arguments.{key}: got 4, expected null: the pretrained model has its own"


@pytest.mark.parametrize("keys", [{"tokens": 65}, {"vocabulary": "full"}], ids=["tokens", "vocabulary"])
def test_a_pretrained_model_of_other_sizes_is_refused(
    toy_root: Path, pretrained: tuple[Path, Any], keys: Tree
) -> None:
    said = mistake(
        built,
        toy_root,
        PRETRAINED_SIZES,
        model_arguments(pretrained=str(pretrained[0])),
        data_arguments(**keys),
    )
    assert said.startswith(f"model.arguments.pretrained: got {str(pretrained[0])!r}, for ")
    assert "(data.arguments.vocabulary)" in said
    assert "(data.arguments.tokens)" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"n_embd": "wide"}'),
        ("model.safetensors", None),
        ("model.safetensors", b"garbage"),
        ("model.safetensors", b""),
    ],
)
def test_a_pretrained_folder_that_is_damaged_is_refused(
    toy_root: Path, pretrained: tuple[Path, Any], tmp_path: Path, name: str, content: bytes | None
) -> None:
    for file in pretrained[0].iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is not None:
        (tmp_path / name).write_bytes(content)
    said = mistake(built, toy_root, PRETRAINED_SIZES, model_arguments(pretrained=str(tmp_path)))
    assert said.startswith(f"model.arguments.pretrained: got {str(tmp_path)!r}"), said


def test_weights_that_a_pretrained_folder_lacks_are_not_made_up(
    toy_root: Path, pretrained: tuple[Path, Any], tmp_path: Path
) -> None:
    import transformers

    config = copy.deepcopy(pretrained[1].config)
    config.n_layer = LAYERS + 2
    for file in pretrained[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config.save_pretrained(tmp_path)
    assert transformers.GPT2Config.from_pretrained(tmp_path).n_layer == LAYERS + 2
    said = mistake(built, toy_root, PRETRAINED_SIZES, model_arguments(pretrained=str(tmp_path)))
    assert said.startswith(f"model.arguments.pretrained: got {str(tmp_path)!r}"), said


def test_cuts_with_adapters_are_listed_where_both_sides_train(toy_root: Path) -> None:
    task = open_task(toy_config(toy_root, model_arguments(layers=2)))
    with torch.device("meta"):
        cuts = [cut.name for cut in list_cuts(task.config.model, task.classes, task.sample_shape)]
    assert [name for name in cuts if name.count(".") < 2] == ["h.0"]
    # Without them: `embedding`, and `h.1` and `ln_f` too.
    task = open_task(toy_config(toy_root, NO_LORA, model_arguments(layers=1)))
    with torch.device("meta"):
        cuts = [cut.name for cut in list_cuts(task.config.model, task.classes, task.sample_shape)]
    assert [name for name in cuts if name.count(".") < 2] == ["embedding", "h.0", "ln_f"]
