"""What users add of their own: every listing of docs/extending.md as it stands there, and what is refused."""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import fslsage_rpc
from fslsage_rpc.algorithms import Algorithm, create, find
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.algorithms.splitfed import SplitFedV1
from fslsage_rpc.cli import main
from fslsage_rpc.config.loading import from_tree, load, to_tree
from fslsage_rpc.config.schema import Config, Data
from fslsage_rpc.data.datasets import load as load_images
from fslsage_rpc.data.datasets import spec_of
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.models.splitting import build
from fslsage_rpc.models.zoo import ModelEntry
from fslsage_rpc.notebook import Run
from fslsage_rpc.parties.codecs import create as create_codec
from fslsage_rpc.parties.requests import ClientStep
from fslsage_rpc.plan.prediction import predict
from fslsage_rpc.plan.scenario import Costs, Scenario
from fslsage_rpc.report.looks import ALGORITHMS as LOOKS
from fslsage_rpc.report.looks import color_of, look_of, rank_of
from fslsage_rpc.tasks import Task, open_task
from fslsage_rpc.tasks.images import ImageTask
from fslsage_rpc.training.experiment import Experiment, check
from support.commands import entries_of, fslsage, offer_commands
from support.report_folders import write_run
from support.trees import ALGORITHM
from support.user_input import mistake

DOCUMENT = Path(__file__).parent.parent / "docs" / "extending.md"
HERE = "test_extending"
SMALL: dict[str, Any] = {
    "rounds": 2,
    "device": "cpu",
    "transport": "local",
    "clients": {"count": 2, "batch_size": 12},
    "data": {"train_limit": 48, "test_limit": 24},
    "algorithm": {**ALGORITHM, "alignment": {"epochs": 2}},
}


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two trees of keys, the second over the first."""
    both = [key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)]
    return {**below, **above, **{key: merged(below[key], above[key]) for key in both}}


def tree(*changes: dict[str, Any]) -> dict[str, Any]:
    """The small run with changes."""
    result = SMALL
    for change in changes:
        result = merged(result, change)
    return result


# The listings


@dataclass(frozen=True)
class Listing:
    """A section's module, and the keys that use it."""

    file: str
    code: str
    keys: str

    def configuration(self) -> dict[str, Any]:
        return yaml.safe_load(self.keys)


def listings() -> dict[str, Listing]:
    found = {}
    for section in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        (code,), (keys,) = (
            re.findall(rf"```{language}\n(.*?)```", section, re.S) for language in ("python", "(?:yaml|ini)")
        )
        found[section.splitlines()[0]] = Listing(code.splitlines()[0].removeprefix("# "), code, keys)
    return found


LISTINGS = listings()
COMMAND = "A command"
TRAINED = [title for title in LISTINGS if title != COMMAND]


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user who has written all of it."""
    for listing in LISTINGS.values():
        (tmp_path / listing.file).write_text(listing.code)
        monkeypatch.delitem(sys.modules, listing.file.removesuffix(".py"), raising=False)
    (tmp_path / "photos").mkdir()
    drawn = np.random.default_rng(0)
    for name, count in (("train", 100), ("test", 50)):
        images = drawn.integers(0, 200, (count, 8, 8, 3), dtype=np.uint8)
        labels = np.arange(count) % 3
        images[np.arange(count), labels] = 255  # a bright row
        np.savez(tmp_path / "photos" / f"{name}.npz", images=images, labels=labels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_there_is_one_of_each_and_each_is_short() -> None:
    algorithms = ["An algorithm", "An algorithm that asks by values"]
    models = ["A model", "A model with defaults"]
    others = ["An aggregation", "An auxiliary model", "A task", "A codec"]
    assert [*models, "A dataset", *algorithms, *others] == TRAINED
    for listing in LISTINGS.values():
        lines = [*listing.code.splitlines(), *listing.keys.splitlines()]
        assert len(lines) < 40
        assert all(len(line) <= 110 for line in lines)


@pytest.mark.parametrize("title", TRAINED)
def test_a_listing_trains_goes_on_and_is_evaluated(
    title: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = LISTINGS[title].configuration()
    if title.startswith("A model"):  # it has more to learn than these few steps would do
        keys = merged({"optimizer": {party: {"lr": 0.01} for party in ("client", "server")}}, keys)
    Path("run.yaml").write_text(yaml.safe_dump(tree(keys)))
    assert main(["train", "run.yaml"]) == 0
    assert main(["train", "run.yaml", "rounds=4"]) == 0
    said = capsys.readouterr()
    assert "goes on from round" in said.out + said.err
    assert said.err == ""
    assert load("runs/run/config.yaml") == load("run.yaml", ["rounds=4"])
    lines = [json.loads(line) for line in Path("runs/run/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    summary = json.loads(Path("runs/run/summary.json").read_text())
    assert summary["algorithm"] == keys.get("algorithm", {}).get("name", "fsl_sage")
    assert main(["evaluate", "runs/run"]) == 0
    accuracy, loss = lines[-1]["test_accuracy"], lines[-1]["test_loss"]
    assert capsys.readouterr().out == f"test accuracy {accuracy:.4f}  test loss {loss:.4f}\n"


def test_a_command_is_there_once_its_package_names_it(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(working_directory)
    offer_commands(monkeypatch, **entries_of(LISTINGS[COMMAND].keys))
    lines = [{"round": 1, "round_seconds": 0.5}, {"round": 2, "round_seconds": 1.25}]
    Path("metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["slowest", "."]) == 0
    assert capsys.readouterr().out == "round 2: 1.25 s\n"


def test_an_entry_has_its_defaults_and_its_arguments(working_directory: Path) -> None:
    keys = from_tree(LISTINGS["A model with defaults"].configuration()).model
    split = build(keys, 10, (1, 8, 8), 0, torch.float32)
    assert split.smashed_shape == (8, 8, 8)
    assert [name for name, _ in split.auxiliary.named_children()] == ["2", "3", "fc"]
    said = mistake(build, replace(keys, arguments={"wide": 1}), 10, (1, 8, 8), 0, torch.float32)
    unknown = "model.arguments.wide: unknown argument of small:net"
    assert said == f"{unknown}; did you mean model.arguments.width?"


def test_a_codec_of_signs_keeps_them_and_the_mean_magnitude(working_directory: Path) -> None:
    keys = from_tree(LISTINGS["A codec"].configuration()).comm.codec.gradient
    x = torch.tensor([[[1.0, -2.0], [3.0, -2.0]], [[0.5, 0.5], [0.5, -0.5]]])
    decoded = torch.tensor([[[2.0, -2.0], [2.0, -2.0]], [[0.5, 0.5], [0.5, -0.5]]])
    for kind, given, expected in (
        ("gradient", x, decoded),
        ("smashed", x, decoded),
        ("auxiliary", x[0].flatten(), decoded[0].flatten()),
    ):
        codec = create_codec(keys, kind)
        assert codec is not None
        parts = codec.encode(given, torch.Generator())
        assert torch.equal(codec.decode(parts, given.shape, given.dtype), expected)
        assert codec.nbytes(given.shape, given.dtype) == sum(part.nbytes for part in parts)


def two_layers(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    features = torch.Size(image_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, num_classes))


def no_auxiliary(cut: str) -> str:
    raise KeyError(cut)


for_texts = ModelEntry(two_layers, samples="texts")
cut_nowhere = ModelEntry(two_layers, default_cut="9")
unsure = ModelEntry(two_layers, default_cut="1", auxiliary=no_auxiliary)
headless = ModelEntry(two_layers, default_cut="1", head=("9",))
made_by_none = ModelEntry(None, default_cut="1")  # type: ignore[arg-type]
WRONG_ENTRIES = {
    "for_texts": "model.name: got {}, a model for texts, expected one for images, as data.name has them",
    "cut_nowhere": "model.cut: got '9', expected a module of the model, as 1, 2 (",
    "unsure": "model.name: got {}, of which no auxiliary model can be made (KeyError: '1')",
    "headless": "model.name: got {}, of which no auxiliary model can be made (AttributeError: ",
    "made_by_none": "model.name: got {}, which fails on images of 1x8x8 (TypeError: ",
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_an_entry_that_is_wrong_is_refused_in_one_line(name: str) -> None:
    own = f"{HERE}:{name}"
    keys = {"transport": "local", "model": {"name": own, "cut": "1" if name == "for_texts" else None}}
    assert mistake(check, from_tree(keys), 1).startswith(WRONG_ENTRIES[name].format(repr(own)))


def test_a_task_may_give_labels_in_another_type_than_it_says(working_directory: Path) -> None:
    """Batches of floating-point labels come in the type of the weights."""
    keys = tree(LISTINGS["A task"].configuration(), {"precision": "fp64"})
    assert len(fslsage_rpc.train({**keys, "output": str(working_directory)}).rounds) == 2


@pytest.mark.nightly
def test_all_of_them_train_on_ranks_of_their_own(
    working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As at a user's prompt: ranks are started, and find the modules in the working directory."""
    keys: dict[str, Any] = {"comm": {"transports": ["uv"], "timeout_seconds": 60}, "precision": "fp64"}
    for title in ("A dataset", "An algorithm", "An auxiliary model", "A model"):  # the last one's model
        keys = merged(keys, LISTINGS[title].configuration())
    keys["model"]["auxiliary"] = LISTINGS["An auxiliary model"].configuration()["model"]["auxiliary"]
    variants = {"own": [], "splitfed_v1": ["algorithm.name=splitfed_v1"]}
    keys = tree(keys, {"bench": {"variants": variants, "repeats": 1}})
    Path("run.yaml").write_text(yaml.safe_dump(keys))

    far = ("train", "run.yaml", "name=far", "transport=rpc", "ranks=3")
    done = fslsage(*far, OMP_NUM_THREADS="1", PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert main(["train", "run.yaml", "name=near"]) == 0
    capsys.readouterr()
    assert [main(["evaluate", f"runs/{name}"]) for name in ("far", "near")] == [0, 0]
    scores = capsys.readouterr().out.splitlines()
    assert scores[0] == scores[1]

    wrong = fslsage(*far, "algorithm.name=patient:Impatient")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines() == [
        "fslsage_rpc: algorithm.name: got 'patient:Impatient', which cannot be imported (AttributeError: "
        "module 'patient' has no attribute 'Impatient')"
    ]

    pytest.importorskip("matplotlib")
    assert main(["bench", "run.yaml", "name=bench"]) == 0
    assert main(["report", "runs/far", "runs/near", "runs/bench", "--out", "report"]) == 0
    assert "| patient:PatientSplitFed: own |" in Path("report/report.md").read_text()


# Algorithms


PATIENT = {"algorithm": {"name": "patient:PatientSplitFed"}}


def test_check_shows_what_an_algorithm_of_the_users_own_would_send(
    working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(tree(PATIENT)))
    assert main(["check", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert "patient:PatientSplitFed (configured)" in out
    assert "fsl_sage" in out


def test_reports_import_nothing_and_put_the_users_own_last(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fslsage_rpc.report import tables
    from fslsage_rpc.report.series import group
    from fslsage_rpc.report.sources import read

    algorithms = {"a": "nowhere:B", "b": "nowhere:A", "c": "fedavg", "d": "nowhere:A"}
    folders = [
        write_run(tmp_path / name, [0.5], algorithm={"name": algorithm, "upload_every": 5 + (name == "d")})
        for name, algorithm in algorithms.items()
    ]
    series = group(read([str(folder) for folder in folders])[0])
    assert [one.label for one in series] == [
        "FedAvg",
        "nowhere:A, algorithm.upload_every=5",
        "nowhere:A, algorithm.upload_every=6",
        "nowhere:B, algorithm.upload_every=5",
    ]
    assert tables.runs_table(series).rows[3][0] == series[3].label


def test_algorithms_of_the_users_own_look_the_same_in_all_figures() -> None:
    looks = {name: look_of(name) for name in ("fedavg", "a:A", "a:B", "b:A")}
    assert len({(look.color, look.marker) for look in looks.values()}) == len(looks)
    assert looks["a:A"].color == color_of("a:A")
    assert looks["a:A"].color not in {color for _, color in LOOKS.values()}
    assert sorted(["b:A", "fedavg", "a:A", "fsl_sage"], key=rank_of) == [
        *("fsl_sage", "fedavg", "a:A", "b:A")
    ]


def test_plan_predicts_it(
    working_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(tree(PATIENT)))
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plan", "run.yaml", "--bandwidth", "100mbit", "--rtt", "20ms", "--clients", "2,4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    mine = [row for row in rows if row[:1] == ["patient:PatientSplitFed"]]
    assert [row[1] for row in mine] == ["2", "4"]
    assert all(float(seconds) > 0 for row in mine for seconds in row[2:])
    assert rows.index(mine[0]) > max(place for place, row in enumerate(rows) if row[:1] == ["fedavg"])


def test_plan_takes_it_for_splitfed_where_it_exchanges_every_batch(working_directory: Path) -> None:
    """But for the auxiliary models, which are averaged, and trained before a batch goes up."""
    predicted, clients = {}, 4
    for name in ("patient:PatientSplitFed", "splitfed_v2"):
        keys = tree({"clients": {"count": clients}, "algorithm": {"name": name, "upload_every": 1}})
        scenario = Scenario(from_tree(keys), LinkSpeed(0.02, 1e6, 1e6), client_ranks=clients)
        predicted[name] = predict(scenario, Costs(server=1e-3, sending=1e-3, handling=2e-3), server_workers=2)
    patient, splitfed = predicted.values()
    auxiliary = scenario.sizes.auxiliary
    assert patient.wire_bytes - splitfed.wire_bytes == 2 * (clients - 1) * auxiliary
    assert patient.paper_bytes - splitfed.paper_bytes == 2 * clients * auxiliary
    steps = 2 * (clients - 1)  # of the ring, each with its share of the models
    assert patient.round_seconds - splitfed.round_seconds == pytest.approx(steps * auxiliary / clients / 1e6)


class Lazy(FslSage):
    """Uploads only where it aligns."""

    def client_step(self, client: Any, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if self.aligns(client.id, t):
            yield from super().client_step(client, t, step, x, y)
            return
        z = client.forward(x)
        client.backward(z, client.estimate(z, y))


class NoGenerator(SplitFedV1):
    def client_step(self, client: Any, t: int, step: int, x: Tensor, y: Tensor) -> Any:
        return None


class Wishing(SplitFedV1):
    def client_step(self, client: Any, t: int, step: int, x: Tensor, y: Tensor) -> Any:
        yield "a gradient"


def train(*changes: dict[str, Any], output: Path) -> Run:
    return fslsage_rpc.train(tree(*changes, {"output": str(output)}))


def own(kind: type) -> dict[str, Any]:
    return {"algorithm": {"name": f"{HERE}:{kind.__name__}"}}


def test_a_subclass_of_a_known_algorithm_writes_only_what_differs(tmp_path: Path) -> None:
    lines = train(own(Lazy), output=tmp_path).rounds
    assert [line["requests"]["push"]["count"] if line["requests"] else 0 for line in lines] == [2, 0]
    assert lines[1]["train_loss"] is None  # the server had nothing to train on
    assert "diverged" not in lines[1]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NoGenerator, "returns NoneType, expected it to yield its requests"),
        (Wishing, "yields str, expected one of Push, Exchange, Align, BeginAlignment, Collect"),
    ],
)
def test_a_step_that_yields_no_requests_is_refused(kind: type, words: str, tmp_path: Path) -> None:
    message = mistake(fslsage_rpc.train, tree(own(kind), {"output": str(tmp_path)}))
    assert message == f"algorithm.name: got '{HERE}:{kind.__name__}', whose client_step {words}"


class Unfinished(Algorithm):
    """Lacks its method."""


class WrongKind(FslSage):
    auxiliary = "borrowed"  # type: ignore[assignment]


class Forgetful(SplitFedV1):
    def ranking(self, t: int) -> list[int]:
        return [0]


class NoInterval(SplitFedV1):
    interval = 0


class Averaging(SplitFedV1):
    average_auxiliary = "sometimes"  # type: ignore[assignment]


class AlwaysAveraging(FslSage):
    average_auxiliary = "round"


class Raising(SplitFedV1):
    def __init__(self, keys: Any, federation: Any):
        raise RuntimeError("not\ntoday")


NOT_ALGORITHMS = [
    ("nowhere:A", "which cannot be imported (ModuleNotFoundError"),
    (f"{HERE}:Nothing", "which cannot be imported (AttributeError"),
    (f"{HERE}:SMALL", "expected a subclass of fslsage_rpc.algorithms.Algorithm"),
    (f"{HERE}:tree", "expected a subclass of fslsage_rpc.algorithms.Algorithm"),
    (f"{HERE}:Unfinished", "which lacks client_step"),
    (f"{HERE}:WrongKind", "whose auxiliary is 'borrowed', expected one of none, aligned, trained"),
    (f"{HERE}:Forgetful", "whose ranking is [0], expected the participants, [0, 1], in some order"),
    (f"{HERE}:NoInterval", "whose interval is 0, expected rounds, from 1 on"),
    (f"{HERE}:Averaging", "whose average_auxiliary is 'sometimes', expected one of never, alignment, round"),
    (f"{HERE}:Raising", "which fails (RuntimeError: not"),
]


@pytest.mark.parametrize(("name", "words"), NOT_ALGORITHMS)
def test_what_is_no_algorithm_is_refused(name: str, words: str) -> None:
    keys = from_tree({"algorithm": {"name": name}}).algorithm
    message = mistake(create, keys, Federation([40, 40], 1.0, 20, 1, 0))
    assert message.startswith(f"algorithm.name: got {name!r}, ")
    assert words in message


def test_averages_of_every_round_do_not_go_with_a_lag() -> None:
    name = f"{HERE}:AlwaysAveraging"
    keys = from_tree({"algorithm": {"name": name, "alignment": {"lag": 2}}}).algorithm
    assert mistake(create, keys, Federation([40, 40], 1.0, 20, 1, 0)) == (
        f"algorithm.name: got {name!r}, whose average_auxiliary is 'round', which algorithm.alignment.lag, "
        "2, does not allow"
    )


def test_an_unfinished_class_is_found_before_anything_else() -> None:
    assert "lacks" in mistake(check, from_tree(tree(own(Unfinished))), 1)
    assert find(f"{HERE}:Lazy") is Lazy


# Datasets


def striped(root: str, train: bool) -> tuple[Any, Any]:
    return np.full((6, 2, 4, 4), 51, np.uint8), [0, 1, 2] * 2


def drawing(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8), torch.arange(5, dtype=torch.int32)


def other_shape(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 1, 4, 4 if train else 5, dtype=torch.uint8), torch.arange(5)


def further_label(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5) + (not train)


def floats(root: str, train: bool) -> tuple[Tensor, Tensor]:
    images, labels = drawing(root, train)
    return 3 * images.double() - 700, labels


def now_floats(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return drawing(root, train) if train else floats(root, train)


def infinite(root: str, train: bool) -> tuple[Tensor, Tensor]:
    images, labels = floats(root, train)
    images[3, 0, 1, 1] = float("inf")
    return images, labels


def integers(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 1, 4, 4, dtype=torch.int32), torch.arange(5)


def no_class(root: str, train: bool) -> tuple[Tensor, Tensor]:
    images, labels = drawing(root, train)
    return images, labels.long() + (labels == 4) * 10**9


def one_class(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return drawing(root, train)[0], torch.full((5,), 3)


def fewer_labels(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(4)


def real_labels(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.rand(5)


def negative(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5) - 1


def empty(root: str, train: bool) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.arange(0)


def unnamed(folder: str, train: bool) -> tuple[Tensor, Tensor]:
    return drawing(folder, train)


def single(root: str, train: bool) -> Tensor:
    return drawing(root, train)[0]


def leaving(root: str, train: bool) -> None:
    raise SystemExit("no files\nat all")


def test_a_dataset_is_what_its_training_samples_say() -> None:
    keys = Data(name=f"{HERE}:striped", train_limit=4)
    spec = spec_of(keys)
    assert (spec.train_samples, spec.classes, spec.image_shape) == (6, 3, (2, 4, 4))
    assert spec.mean == pytest.approx((0.2, 0.2))
    assert spec.std == (1.0, 1.0)
    images = load_images(keys, train=True)
    assert images.images.shape == (4, 2, 4, 4)
    assert images.labels.tolist() == [0, 1, 2, 0]


def test_mean_and_deviation_are_those_of_the_pixels() -> None:
    keys = Data(name=f"{HERE}:drawing")
    spec, again = spec_of(keys), spec_of(keys)
    assert spec == again  # torch's generator is seeded
    pixels = load_images(keys, train=True).images.double() / 255
    assert spec.mean == pytest.approx((pixels.mean().item(),))
    assert spec.std == pytest.approx((pixels.std(correction=0).item(),))
    assert not torch.equal(load_images(keys, train=False).images, load_images(keys, train=True).images)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:f", "which cannot be imported (ModuleNotFoundError"),
        (f"{HERE}:SMALL", "expected a function that returns images and labels, or a Task"),
        (
            f"{HERE}:other_shape",
            "which gives test images [1, 4, 5] with labels to 4, expected [1, 4, 4] and 4",
        ),
        (
            f"{HERE}:further_label",
            "which gives test images [1, 4, 4] with labels to 5, expected [1, 4, 4] and 4",
        ),
        (
            f"{HERE}:integers",
            "which gives torch.int32 [5, 1, 4, 4] and torch.int64 [5], expected uint8 or float images",
        ),
        (
            f"{HERE}:now_floats",
            "which gives test images of torch.float64, expected torch.uint8 as in training",
        ),
        (f"{HERE}:infinite", "whose training images are not all finite numbers"),
        (f"{HERE}:no_class", "which gives a training label of 1000000004, expected labels 0 to 99999"),
        (
            f"{HERE}:fewer_labels",
            "torch.int64 [4], expected uint8 or float images [N, C, H, W] and N integer",
        ),
        (
            f"{HERE}:real_labels",
            "torch.float32 [5], expected uint8 or float images [N, C, H, W] and N integer",
        ),
        (f"{HERE}:negative", "which gives training labels below 0"),
        (f"{HERE}:empty", "which gives no training samples"),
        (f"{HERE}:unnamed", "which fails (TypeError"),
        (f"{HERE}:single", "which fails (ValueError"),
        (f"{HERE}:leaving", "which fails (SystemExit: no files)"),
    ],
)
def test_what_is_no_dataset_is_refused(name: str, words: str) -> None:
    config = from_tree({"transport": "local", "data": {"name": name, "partition": "iid"}})
    message = mistake(check, config, 1)
    assert message.startswith(f"data.name: got {name!r}, ")
    assert words in message


@pytest.mark.parametrize("augment", [True, False])
def test_float_images_are_taken_as_they_are(augment: bool) -> None:
    config = from_tree(tree({"data": {"name": f"{HERE}:floats", "train_limit": None, "test_limit": None}}))
    task = open_task(config)
    samples = task.load(train=True)
    batches = task.batches(samples, 5, torch.device("cpu"))
    expected = floats("", True)[0].float()
    ((x, _),) = batches.in_order()
    assert torch.equal(x, samples.tensors[0].float())
    assert x.dtype == expected.dtype
    ((shuffled, labels),) = batches.shuffled(0, 0, 0, 1, augment)
    assert torch.equal(shuffled[labels.argsort()], x)


def test_float_images_train(tmp_path: Path) -> None:
    keys = {"data": {"name": f"{HERE}:floats", "partition": "iid", "train_limit": None, "test_limit": None}}
    model = {"model": {"name": f"{HERE}:logits", "cut": "0"}, "output": str(tmp_path)}
    run = fslsage_rpc.train(tree(keys, model))
    assert run.rounds[-1]["train_loss"] is not None


def logits(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    pixels = torch.Size(image_shape).numel()
    return nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(pixels, num_classes))


def seven(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return logits(7, image_shape)


def four(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return logits(4, image_shape)


def positions(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, num_classes, 1))


def prepared(data: str, model: str) -> Experiment:
    keys = {"name": f"{HERE}:{data}", "partition": "iid", "train_limit": None, "test_limit": None}
    return Experiment.prepare(
        from_tree(tree({"data": keys, "model": {"name": f"{HERE}:{model}", "cut": "0"}}))
    )


def test_outputs_without_a_label_are_worth_a_warning() -> None:
    warning = f"model.name: {HERE}:seven has 7 outputs, where the training samples have 5 labels"
    assert prepared("drawing", "seven").warnings == [warning]
    assert prepared("drawing", "logits").warnings == []


def test_samples_of_one_class_are_worth_a_warning() -> None:
    warning = "data.name: all 5 training samples have the label 3: nothing is learnt"
    assert prepared("one_class", "logits").warnings == [warning]


@pytest.mark.parametrize(("model", "given"), [("four", [4]), ("positions", [5, 4, 4])])
def test_a_model_without_a_logit_for_each_class_is_refused(model: str, given: list[int]) -> None:
    message = mistake(prepared, "drawing", model)
    expected = f"which gives {given} for an image, expected [5], one logit for each class"
    assert message == f"model.name: got '{HERE}:{model}', {expected}"


# Auxiliary models


def linear(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(smashed_shape).numel(), num_classes))


def normalising(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(smashed_shape[0]),
        nn.ReLU(inplace=True),
        nn.Hardsigmoid(),
        linear(smashed_shape, num_classes),
    )


def one_class_more(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return linear(smashed_shape, num_classes + 1)


def too_small(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3, num_classes))


def no_weights(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Flatten()


def no_module(smashed_shape: tuple[int, ...], num_classes: int) -> object:
    return lambda z: z


def counting(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    model = linear(smashed_shape, num_classes)
    model.register_buffer("seen", torch.zeros(1, dtype=torch.bool))
    return model


class Pair(nn.Linear):
    def forward(self, z: Tensor) -> Any:
        return super().forward(z), z


def pair(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Pair(smashed_shape[-1], num_classes)


class Once(nn.Linear):
    """Has a derivative, which has none."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(F.hardsigmoid(z.flatten(1)))


def once(smashed_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Once(torch.Size(smashed_shape).numel(), num_classes)


def auxiliary(kind: str, **keys: Any) -> dict[str, Any]:
    return {"model": {"auxiliary": {"kind": f"{HERE}:{kind}", **keys}}}


def test_an_auxiliary_model_follows_from_the_seed_and_leaves_the_models_as_they_were() -> None:
    torch.manual_seed(3)
    mine = open_task(from_tree(tree(auxiliary("linear"))))
    built = {seed: open_task(from_tree(tree(auxiliary("linear"), {"seed": seed}))).build() for seed in (0, 1)}
    weights = [split.auxiliary.own[1].weight for split in (mine.build(), built[0], built[1])]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    known = open_task(from_tree(tree())).build()
    for name, weight in known.whole().state_dict().items():
        assert torch.equal(weight, built[0].whole().state_dict()[name])


@pytest.mark.parametrize(
    ("algorithm", "precision"), [("fsl_sage", "fp64"), ("fsl_sage", "bf16"), ("cse_fsl", "fp32")]
)
def test_an_auxiliary_model_trains_in_every_precision(algorithm: str, precision: str, tmp_path: Path) -> None:
    keys = {
        "precision": precision,
        "algorithm": {"name": algorithm, "align_every": 1},
    }
    lines = train(auxiliary("normalising"), keys, output=tmp_path).rounds
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    if algorithm == "fsl_sage":
        assert lines[0]["alignment"]["nmse_after"] < lines[0]["alignment"]["nmse_before"]


def test_a_linear_one_is_drawn_as_the_built_in_kind_is() -> None:
    mine, known = (
        open_task(from_tree(tree({"model": {"auxiliary": {"kind": kind}}}))).build().auxiliary
        for kind in (f"{HERE}:linear", "linear")  # of simple_conv, whose classifier takes all positions
    )
    assert torch.equal(mine.own[1].weight, known.fc.weight)


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        (auxiliary("nothing"), "kind", "which cannot be imported (AttributeError"),
        (auxiliary("SMALL"), "kind", "expected a function that returns a model"),
        (auxiliary("striped"), "kind", "which fails for smashed data of 64x2x2 (TypeError"),
        (
            auxiliary("one_class_more"),
            "kind",
            "gives [2, 11] for smashed data [2, 64, 2, 2], expected [2, 10]",
        ),
        (auxiliary("too_small"), "kind", "which fails on smashed data [2, 64, 2, 2] (RuntimeError"),
        (auxiliary("no_weights"), "kind", "which returns a model without weights that train"),
        (auxiliary("no_module"), "kind", "which returns function, expected a torch.nn.Module"),
        (auxiliary("pair"), "kind", "which gives tuple for smashed data [2, 64, 2, 2], expected [2, 10]"),
        (auxiliary("counting"), "kind", "where own.seen is torch.bool: weights are floating-point"),
        (auxiliary("linear", until="fc1"), "until", "got 'fc1', expected null"),
        (auxiliary("linear", width=3), "width", "got 3, expected null"),
        (auxiliary("linear", width_multiplier=0.5), "width_multiplier", "got 0.5, expected null"),
    ],
)
def test_what_is_no_auxiliary_model_is_refused(keys: dict[str, Any], key: str, words: str) -> None:
    message = mistake(check, from_tree(tree(keys)), 1)
    assert message.startswith(f"model.auxiliary.{key}: got ")
    assert words in message


def test_one_that_cannot_be_aligned_is_refused() -> None:
    message = mistake(Experiment.prepare, from_tree(tree(auxiliary("once"))))
    assert message.startswith(
        f"model.auxiliary.kind: got '{HERE}:once', whose layers cannot be differentiated"
    )


def test_its_batch_norm_needs_two_samples() -> None:
    keys = {"clients": {"batch_size": 23}, "data": {"partition": "iid"}}
    message = mistake(Experiment.prepare, from_tree(tree(auxiliary("normalising"), keys)))
    assert message.startswith("algorithm.alignment.batch_size: ") or message.startswith(
        "clients.batch_size: "
    )


# Tasks


class DigitValue(ImageTask):
    """The value of a digit by regression: one output, and the squared error."""

    def __init__(self, config: Config):
        super().__init__(
            from_tree({**to_tree(config), "data": {**to_tree(config)["data"], "name": "digits"}})
        )
        self.classes = 1

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], y.to(outputs.dtype))

    def tally(self, outputs: Tensor, y: Tensor) -> Tensor:
        error = (outputs[:, 0] - y).double()
        return torch.stack([error.square(), (error.abs() < 0.5).double(), torch.ones_like(error)]).sum(1)


class Misnumbered(DigitValue):
    """Has 9 groups by its own account, and labels of 10."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.groups = 9


class Half(Task):
    """Lacks its methods."""


class Speechless(DigitValue):
    def __init__(self, config: Config):
        Task.__init__(self, config)


class Refusing(DigitValue):
    def __init__(self, config: Config):
        raise OSError("no disk")


@pytest.mark.parametrize("algorithm", ["splitfed_v2", "fedavg"])
def test_a_task_may_change_a_little_of_one_that_is_there(algorithm: str, tmp_path: Path) -> None:
    keys = {"data": {"name": f"{HERE}:DigitValue"}, "algorithm": {"name": algorithm}}
    run = train(keys, output=tmp_path)
    assert run.rounds[1]["test_loss"] < run.rounds[0]["test_loss"]
    partition = json.loads((run.folder / "partition.json").read_text())
    assert len(partition[0]["labels"]) == 10


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Half, "a Task that lacks batches, load, loss, prepare, tally, train_samples"),
        (Speechless, "a Task that does not say its sample_shape, classes, groups"),
        (Refusing, "a Task that fails (OSError: no disk)"),
    ],
)
def test_what_is_no_task_is_refused(kind: type, words: str) -> None:
    name = f"{HERE}:{kind.__name__}"
    assert mistake(open_task, from_tree({"data": {"name": name}})) == f"data.name: got {name!r}, {words}"


def test_a_label_beyond_a_tasks_groups_is_refused() -> None:
    name = f"{HERE}:Misnumbered"
    message = mistake(Experiment.prepare, from_tree(tree({"data": {"name": name}})))
    assert message == f"data.name: got {name!r}, which gives training labels 0 to 9, expected 0 to 8"
