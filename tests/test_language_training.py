"""Training GPT-2 on texts: every algorithm learns, only adapters travel, and the transports agree."""

import json
import math
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fslsage_rpc
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.language import data as e2e
from fslsage_rpc.language.data import IGNORED
from fslsage_rpc.notebook import Run
from fslsage_rpc.tasks import open_task
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support.commands import fslsage
from support.equality import OWN_COLLECTIVES, assert_identical, assert_same
from support.rank_program import Outcome, train_locally, train_on_ranks
from support.run_folders import everything
from support.toy_language import pairs, toy_config, toy_tree
from support.trees import Tree, merged

pytest.importorskip("transformers")
pytest.importorskip("peft")

ALGORITHMS = ("fsl_sage", "cse_fsl", "splitfed_v1", "splitfed_v2", "fedavg")
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
BLOCK = 2 * (2 * 16 + 16 * 2) * 8
"""bytes of a block's adapters: A and B of q and v, of rank 2, in fp64"""
CLIENT, SERVER, AUXILIARY = BLOCK, 3 * BLOCK, 3 * BLOCK
SMASHED = 48 * 16 * 8
CLIENTS = 3
UPLOADED = (8 + 6) + (8 + 5) + (8 + 5)
"""samples in a round: 22, 21 and 21 texts in batches of 8, of which every second is uploaded"""
TEXTS = 64
FEW: Tree = {"data": {"train_limit": 24, "test_limit": 4}}
"""one step of each client in a round"""


def of(name: str) -> Tree:
    return {"algorithm": {"name": name}}


@pytest.fixture(scope="module")
def local(toy_root: Path) -> dict[str, Outcome]:
    """Two rounds of each algorithm, adapters alone."""
    return {name: train_locally(toy_tree(toy_root, of(name))) for name in ALGORITHMS}


@pytest.fixture(scope="module")
def start(toy_root: Path) -> dict[str, torch.Tensor]:
    """What the whole model starts from."""
    return open_task(toy_config(toy_root)).build().whole().state_dict()


# Each algorithm learns, and only what is not frozen


@every_algorithm
def test_adapters_alone_lower_the_loss(name: str, local: dict[str, Outcome]) -> None:
    first, last = local[name].lines
    assert last["train_loss"] < first["train_loss"]
    assert last["test_loss"] < first["test_loss"]
    assert last["test_perplexity"] == pytest.approx(math.exp(last["test_loss"]))
    assert 0 < last["test_accuracy"] < 1


@every_algorithm
def test_frozen_weights_never_change_and_all_adapters_do(
    name: str, local: dict[str, Outcome], start: dict[str, torch.Tensor]
) -> None:
    end = {key.removeprefix("final "): t for key, t in local[name].tensors.items() if key.startswith("final")}
    assert end.keys() == start.keys()
    changed = {key for key in start if not torch.equal(start[key], end[key])}
    assert changed == {key for key in start if "lora_" in key}
    assert len(changed) == 4 * 4


# What travels and what is kept


@every_algorithm
def test_only_adapters_are_sent_and_counted(name: str, local: dict[str, Outcome]) -> None:
    uploaded = {"fsl_sage": UPLOADED, "cse_fsl": UPLOADED, "fedavg": 0}.get(name, TEXTS)
    client = CLIENT + SERVER if name == "fedavg" else CLIENT
    auxiliary = AUXILIARY if name in ("fsl_sage", "cse_fsl") else 0
    for round, line in enumerate(local[name].lines):
        aligned = name == "fsl_sage" and round == 0
        averaged = aligned or name == "cse_fsl"
        down = uploaded * SMASHED if name.startswith("splitfed") else 0
        assert line["wire_bytes"] == {
            "smashed_up": uploaded * SMASHED,
            "labels_up": uploaded * 48 * 8,
            "gradient_down": down,
            "auxiliary_down": CLIENTS * AUXILIARY if aligned else 0,
            "weights_allreduce": 0,  # one rank
            "initial_broadcast": CLIENTS * (client + auxiliary) if round == 0 else 0,
            "evaluation": client,
        }
        paper = CLIENTS * 2 * client + uploaded * SMASHED + down
        paper += CLIENTS * AUXILIARY if aligned else 0
        paper += CLIENTS * 2 * AUXILIARY if averaged else 0
        assert line["paper_bytes"] == paper


def test_the_clients_of_a_rank_share_their_frozen_weights(toy_root: Path) -> None:
    config = toy_config(toy_root)
    trainer = Trainer(Experiment.prepare(config), open_world(config))
    assert trainer.server is not None
    models = [client.model for client in trainer.clients.values()]
    fits = [fit.model for fit in trainer.server.fits.values()]
    auxiliaries = [client.auxiliary._model for client in trainer.clients.values()]
    for group in (models, [*fits, *auxiliaries]):
        for weights in zip(*(dict(model.named_parameters()).items() for model in group), strict=True):  # type: ignore[union-attr]
            ((name,),) = {tuple({name for name, _ in weights})}
            places = {weight.data_ptr() for _, weight in weights}
            assert len(places) == (len(weights) if "lora_" in name else 1), name


def test_a_checkpoint_holds_adapters_and_model_pt_the_whole_model(
    toy_root: Path, tmp_path: Path, start: dict[str, torch.Tensor]
) -> None:
    keys = {"rounds": 1, "name": "run", "output": str(tmp_path)}
    run = fslsage_rpc.train(toy_tree(toy_root, of("splitfed_v1"), FEW, keys))
    saved = torch.load(run.folder / "model.pt", weights_only=True)
    assert saved.keys() == start.keys()
    assert all(saved[name].shape == start[name].shape for name in start)
    sizes = {name: t.numel() for name, t in everything(run).items() if isinstance(t, torch.Tensor)}
    assert max(sizes.values()) == SERVER // 8
    # Client and replica, with two moments each, of three clients; and the averages.
    assert sum(sizes.values()) < (CLIENTS + 1) * 3 * (CLIENT + SERVER) // 8 + 200
    (parts,) = (run.folder / "checkpoints").glob("round-*")
    largest = max(file.stat().st_size for file in parts.iterdir())
    assert 3 * CLIENTS * (CLIENT + SERVER) < largest < (run.folder / "model.pt").stat().st_size


# The same numbers another way


def test_splitfed_v1_is_fedavg(local: dict[str, Outcome]) -> None:
    split, whole = (local[name] for name in ("splitfed_v1", "fedavg"))
    names = [name for name in split.tensors if name.startswith("final ")]
    assert len(names) > 50
    for name in names:
        torch.testing.assert_close(split.tensors[name], whole.tensors[name], rtol=1e-9, atol=1e-12)
    for a, b in zip(split.lines, whole.lines, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-10)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-10)


@pytest.mark.nightly
def test_two_rounds_and_two_more_are_four_to_the_last_bit(toy_root: Path, tmp_path: Path) -> None:
    schedule = {"name": "LinearWarmupDecay", "arguments": {"warmup": 4, "total": 20}, "per": "step"}
    keys = {
        "model": {"arguments": {"layers": 2, "lora": {"frozen": False}}, "auxiliary": {"until": "h.1"}},
        "optimizer": {party: {"scheduler": schedule} for party in ("client", "server", "auxiliary")},
        "evaluation": {"every": 2},
    }

    def run(name: str, rounds: int) -> Run:
        where = {"rounds": rounds, "name": name, "output": str(tmp_path)}
        return fslsage_rpc.train(toy_tree(toy_root, FEW, keys, where))

    run("parts", 2)
    assert_identical(run("whole", 4), run("parts", 4))


@pytest.mark.nightly
@pytest.mark.timeout(500)
def test_rpc_equals_local(toy_root: Path, local: dict[str, Outcome], tmp_path: Path) -> None:
    trees = [merged(toy_tree(toy_root, of(name)), {"transport": "rpc"}) for name in ALGORITHMS]
    remote = train_on_ranks(3, trees, tmp_path / "job", timeout=450)
    for name, outcome in zip(ALGORITHMS, remote, strict=True):
        assert_same(local[name], outcome)
        client = CLIENT + SERVER if name == "fedavg" else CLIENT
        for round, line in enumerate(outcome.lines):
            auxiliary = name == "cse_fsl" or (name == "fsl_sage" and round == 0)
            # A ring over two client ranks moves 2 (n - 1) S.
            assert line["wire_bytes"][OWN_COLLECTIVES] == 2 * (client + (AUXILIARY if auxiliary else 0))


# Losses and rates


def test_label_smoothing_is_in_the_training_loss_alone(toy_root: Path) -> None:
    task = open_task(toy_config(toy_root, {"loss": {"label_smoothing": 0.1}}))
    y = torch.randint(task.classes, (2, 48), generator=torch.Generator().manual_seed(0))
    y[0, 3:9] = y[1, :7] = IGNORED
    outputs = torch.randn(2, 48, task.classes, dtype=torch.float64)
    there = y != IGNORED
    logs = F.log_softmax(outputs[there], -1)
    plain = -logs.gather(1, y[there][:, None]).mean()
    smooth = 0.9 * plain + 0.1 * -logs.mean(1).mean()
    torch.testing.assert_close(task.loss(outputs, y), smooth)
    score = task.score(task.tally(outputs, y) + task.tally(outputs, y))
    assert score.loss == pytest.approx(plain.item())
    assert score.accuracy == (outputs.argmax(-1) == y).sum().item() / there.sum().item()
    assert score.metrics == {"perplexity": pytest.approx(math.exp(plain.item()))}


def test_a_warm_up_counts_each_models_own_steps(toy_root: Path) -> None:
    schedule = {"name": "LinearWarmupDecay", "arguments": {"warmup": 5, "total": 30}, "per": "step"}
    parties = ("client", "server", "auxiliary")
    config = toy_config(toy_root, FEW, {"optimizer": {party: {"scheduler": schedule} for party in parties}})
    trainer = Trainer(Experiment.prepare(config), open_world(config))
    trainer.train(lambda line, reports: None)
    assert trainer.server is not None
    lanes, fits = trainer.server.lanes, trainer.server.fits
    steps = {
        2: [client.optimizer for client in trainer.clients.values()],  # one in each of two rounds
        CLIENTS * 2: [lanes[0].optimizer],  # an upload of each client and round
        4: [fit.optimizer for fit in fits.values()],  # of one batch, in the first round
    }
    for number, optimizers in steps.items():
        expected = 0.01 * (number / 5 if number < 5 else (30 - number) / 25)
        for optimizer in optimizers:
            assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


# A model for texts that is the user's own


def perceptron(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(num_classes, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, num_classes)
    )


@pytest.mark.parametrize(
    "auxiliary",
    [
        {"kind": "linear"},
        {"kind": "mlp", "width": 8},
        {"until": "2"},
        {"until": "2", "width_multiplier": 0.5},
    ],
    ids=str,
)
def test_an_auxiliary_model_says_something_at_every_token(toy_root: Path, auxiliary: Tree) -> None:
    model = {"name": "test_language_training:perceptron", "cut": "0", "auxiliary": auxiliary}
    tree = {**toy_tree(toy_root, FEW), "model": model}
    split = open_task(from_tree(tree)).build()
    tokens = torch.zeros(2, 48, dtype=torch.int64)
    z = split.client(tokens)
    assert z.shape == (2, 48, 16)
    assert split.auxiliary(z).shape == split.whole()(tokens).shape
    changed = split.auxiliary(z.index_fill(1, torch.tensor([5]), 1.0)) != split.auxiliary(z)
    assert changed.any(-1).nonzero().tolist() == [[0, 5], [1, 5]]
    first, last = train_locally(tree).lines
    assert last["train_loss"] < first["train_loss"]
    assert first["alignment"]["nmse_after"] < first["alignment"]["nmse_before"]


# The dataset itself


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_small_model_learns_more_of_real_texts_than_how_frequent_tokens_are(
    e2e_root: Path, tmp_path: Path
) -> None:
    config = Path(__file__).parent.parent / "configs" / "e2e_gpt2_tiny.yaml"
    keys = ["name=tiny", "ranks=3", f"output={tmp_path}", "device=cpu", "comm.transports=[uv]"]
    keys += ["data.test_limit=100"]
    keys += [f"data.root={e2e_root}", f"data.arguments.tokenizer={e2e_root / 'gpt2_tokenizer'}"]
    done = fslsage("train", config, *keys, seconds=550, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    task = open_task(fslsage_rpc.config.loading.load(config, keys))
    references = [" " + pair.reference for pair in e2e.read(str(e2e_root), "train", 800)]
    counts = Counter(n for text in task.vocabulary.encode(references) for n in (*text, task.vocabulary.end))
    entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    assert entropy < 6
    assert lines[-1]["test_loss"] < entropy - 1
    assert lines[-1]["test_loss"] < lines[0]["test_loss"] < math.log(task.classes)
    assert lines[0]["alignment"]["nmse_after"] < lines[0]["alignment"]["nmse_before"]


@pytest.fixture(scope="module")
def e2e_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real dataset and GPT-2's tokenizer: in data/, or unpacked from ../shared/data."""
    checkout = Path(__file__).parent.parent
    if (checkout / "data" / "e2e").is_dir() and (checkout / "data" / "gpt2_tokenizer").is_dir():
        return checkout / "data"
    archives = [checkout.parent / "shared" / "data" / f"{name}.zip" for name in ("e2e", "gpt2_tokenizer")]
    missing = [str(archive) for archive in archives if not archive.is_file()]
    if missing:
        pytest.skip(f"needs data/e2e and data/gpt2_tokenizer, or {' and '.join(missing)}")
    root = tmp_path_factory.mktemp("data")
    for archive in archives:
        zipfile.ZipFile(archive).extractall(root / archive.stem)
    return root


def test_the_toys_sizes_are_what_these_tests_count_with() -> None:
    assert len(pairs()["train"]) == TEXTS
