"""The rehearsal of `client_step`: what stands in for a client, and what is refused, at once or later."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import fslsage_rpc
from fslsage_rpc.algorithms.fedavg import FedAvg
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.algorithms.rehearsal import StandIn
from fslsage_rpc.algorithms.splitfed import SplitFedV1
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Align, ClientStep, Exchange, Push
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support.elastic_job import ElasticJob
from support.rank_program import train_locally
from support.trees import Tree, tree
from support.user_input import mistake

DOCUMENT = Path(__file__).parent.parent / "docs" / "extending.md"
OF_THE_ROUND_LOOP = {
    *("batches", "end_round", "state", "load_state"),
    *("auxiliary", "owns_auxiliary", "encode", "decode"),
}
"""of a client, what no `client_step` has a use for"""


def by(kind: type, **keys: Any) -> Tree:
    return tree(Path("nowhere"), {"algorithm": {"name": f"test_rehearsal:{kind.__name__}"}}, **keys)


def refused(train: Callable[[Tree], object], keys: Tree) -> str:
    """The words on the `client_step` of a class, which must be refused."""
    message, got = (
        mistake(train, keys),
        f"algorithm.name: got {keys['algorithm']['name']!r}, whose client_step ",
    )
    assert message.startswith(got)
    return message.removeprefix(got)


def prepare(keys: Tree) -> Experiment:
    return Experiment.prepare(from_tree(keys))


# What stands in for a client


def public(kind: type) -> dict[str, Any]:
    """The public methods and properties of a class."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


def test_the_stand_in_has_all_of_a_client_that_a_step_may_use() -> None:
    expected = {name: of for name, of in public(Client).items() if name not in OF_THE_ROUND_LOOP}
    assert public(StandIn).keys() - {"note"} == expected.keys()
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, its in expected.items():
        mine = public(StandIn)[name]
        assert type(mine) is type(its), name
        mine, its = (each.fget if isinstance(each, property) else each for each in (mine, its))
        assert inspect.signature(mine) == inspect.signature(its), name
        assert f"`{name}`" in text or f"`client.{name}." in text, name


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("name", ["fsl_sage", "splitfed_v1", "fedavg"])
def test_it_computes_tensors_like_a_clients(name: str, precision: str) -> None:
    keys = {"algorithm": {"name": name}, "data": {"train_limit": 60}}
    experiment = prepare(tree(Path("nowhere"), keys, precision=precision))
    rehearsal = experiment.rehearsal
    client = Trainer(experiment, open_world(experiment.config)).clients[0]
    x, y = next(client.batches(0))
    computed = (x, y) if name == "fedavg" else (x, y, client.forward(x))
    for mine, its in zip(rehearsal._batch(len(x)), computed, strict=name != "fedavg"):
        assert mine.is_meta
        assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
    models = [(rehearsal._weights, client.weights)]
    if name == "fsl_sage":
        assert rehearsal._auxiliary is not None
        models.append((rehearsal._auxiliary, client.auxiliary_weights))
    for weights, expected in models:
        assert weights.nbytes == expected.nbytes
        assert weights.floats.dtype == expected.floats.dtype


# What is refused at once


class ReadsNorm(SplitFedV1):
    """Takes the true gradient only where its own is large."""

    auxiliary = "trained"

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        gradient = client.train_auxiliary(z, y)
        if gradient.norm() > 1:
            gradient = yield Exchange(z, y)
        client.backward(z, gradient)


class ReadsItem(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Push(client.forward(x)[: y.max().item()], y)


class PicksSamples(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        yield Push(z[y > 4], y[y > 4])


class CountsLabels(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Push(client.forward(x), y.unique())


class AsNumpy(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        if z.detach().numpy().mean() > 0:
            yield Push(z, y)


FAILS = r"fails in its rehearsal, at test_rehearsal\.py, line \d+ \("
HINT = "); it may read no numbers, unless it says requests_depend_on_values = True"


@pytest.mark.parametrize("kind", [ReadsNorm, ReadsItem, PicksSamples, CountsLabels, AsNumpy])
def test_a_class_that_reads_values_is_told_to_say_so(kind: type) -> None:
    said = refused(prepare, by(kind))
    assert re.match(FAILS, said)
    assert said.endswith(HINT)


def test_a_mistake_that_has_nothing_to_do_with_values_is_told_with_its_line() -> None:
    assert re.fullmatch(FAILS + r"ZeroDivisionError: not\)", refused(prepare, by(Raises)))


class AlignsWithout(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        client.auxiliary_weights.load((yield Align()))
        client.backward(z, z)


class AlignsAsIs(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Align()


class AlignsItsOwn(AlignsWithout):
    auxiliary = "trained"


class EstimatesWithout(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        client.backward(z, client.estimate(z, y))
        yield Push(z, y)


class TrainsWithout(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        client.backward(z, client.train_auxiliary(z, y))
        yield Push(z, y)


class WholeExchanges(FedAvg):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Exchange(x, y)


class WholeAligns(FedAvg):
    auxiliary = "aligned"

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Align()


class Nothing(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Push(client.forward(x)[:0], y[:0])


class TooFewLabels(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Exchange(client.forward(x), y[1:])


class OtherShape(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Push(x, y)


class HalfLabels(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        yield Push(client.forward(x), y.int())


class WholeStep(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        client.train_whole_model(x, y)
        yield from ()


class CutStep(FedAvg):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        client.forward(x)
        yield from ()


class Counts(SplitFedV1):
    """Pushes once."""

    steps = 0

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        self.steps += 1
        if self.steps == 1:
            yield Push(z, y)


class AlignsOnNothing(FslSage):
    """Exchanges, which fills no alignment buffer."""

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        client.backward(z, (yield Exchange(z, y)))
        yield Align()


class NoGradient(SplitFedV1):
    """Takes a push's answer, which is none, for a gradient."""

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        client.backward(z, (yield Push(z, y)))


def test_backward_takes_a_gradient_like_smashed_data() -> None:
    said = "TypeError: backward got NoneType for a gradient, of smashed data [16, 64, 2, 2]"
    assert re.fullmatch(FAILS + re.escape(said) + r"\)", refused(prepare, by(NoGradient)))


class RanksTwo(SplitFedV1):
    """Would leave clients out from the second round on."""

    def ranking(self, t: int) -> list[int]:
        return self.federation.participants(t)[: 2 if t else None]


def test_a_ranking_is_of_all_participants_in_every_round(tmp_path: Path) -> None:
    keys = {**by(RanksTwo, rounds=2), "output": str(tmp_path)}
    assert "whose ranking is [0, 1], expected the participants, [0, 1, 2" in mistake(fslsage_rpc.train, keys)


class Raises(SplitFedV1):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        raise ZeroDivisionError("not\nto-day")
        yield


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (AlignsWithout, "uses an auxiliary model, where auxiliary is 'none'"),
        (AlignsAsIs, "yields Align, where auxiliary is 'none'"),
        (AlignsItsOwn, "yields Align, where auxiliary is 'trained'"),
        (
            EstimatesWithout,
            "uses an auxiliary model, where auxiliary is 'none'",
        ),
        (
            TrainsWithout,
            "uses an auxiliary model, where auxiliary is 'none'",
        ),
        (WholeExchanges, "yields Exchange, where client_holds_whole_model leaves no server model"),
        (WholeAligns, "yields Align, where client_holds_whole_model leaves no server model"),
        (Nothing, "yields smashed data of 0 samples with 0 labels, expected as many, and at least one"),
        (
            TooFewLabels,
            "yields smashed data of 16 samples with 15 labels, expected as many, and at least one",
        ),
        (OtherShape, "yields z [16, 1, 8, 8] of torch.float64, expected [16, 64, 2, 2] of torch.float64"),
        (HalfLabels, "yields y [16] of torch.int32, expected [16] of torch.int64"),
        (WholeStep, "calls train_whole_model, where client_holds_whole_model is False"),
        (CutStep, "calls forward, where client_holds_whole_model is True"),
        (Counts, "asks otherwise when it is rehearsed again: by what it remembers"),
        (AlignsOnNothing, "yields Align in round 1 for client 0, which has pushed nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(kind: type, words: str) -> None:
    assert refused(prepare, by(kind)) == words


@pytest.mark.parametrize(
    "kind",
    [AlignsWithout, AlignsAsIs, EstimatesWithout, TrainsWithout, WholeExchanges, Nothing, TooFewLabels],
)
def test_what_is_not_rehearsed_is_refused_when_it_is_asked(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(prepare, by(kind))
    monkeypatch.setattr(kind, "requests_depend_on_values", True)
    assert refused(train_locally, {**by(kind), "server": {"order": "arrival"}}) == said


# What departs from its rehearsal


class TrainsUnannounced(FslSage):
    """Trains its auxiliary model only where there are numbers."""

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if not x.is_meta:
            client.train_auxiliary(client.forward(x), y)
        yield from super().client_step(client, t, step, x, y)


def test_training_an_auxiliary_model_that_was_not_rehearsed_ends_the_run(tmp_path: Path) -> None:
    keys = {**by(TrainsUnannounced, rounds=2), "output": str(tmp_path)}
    said = refused(fslsage_rpc.train, keys)
    assert said == "trains the auxiliary model, which it did not in its rehearsal"


def says(gradient: Tensor) -> bool:
    """Do values say so? In a rehearsal they do not."""
    return not gradient.is_meta and bool(gradient.isfinite().all())


class Departing(SplitFedV1):
    """Pushes, in its rehearsal."""

    auxiliary = "trained"

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        gradient = client.train_auxiliary(z, y)
        yield from self.ask(says(gradient), t, step, z, y)
        client.backward(z, gradient)

    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        if not departs:
            yield Push(z, y)


class PushesHalf(Departing):
    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        n = len(y)
        yield Push(z[: n // 2], y[: n // 2]) if departs else Push(z, y)


class PushesFloats(Departing):
    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        yield Push(z.float() if departs else z, y)


class Exchanges(Departing):
    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        yield Exchange(z, y) if departs else Push(z, y)


class PushesTwice(Departing):
    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        yield Push(z, y)
        if departs:
            yield Push(z, y)


class PushesLater(Departing):
    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        if step == (1 if departs else 0):
            yield Push(z, y)


class PushesSooner(Departing):
    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        if step == (0 if departs else 1):
            yield Push(z, y)


class PushesAtLast(Departing):
    def ask(self, departs: bool, t: int, step: int, z: Tensor, y: Tensor) -> ClientStep:
        if t == 1 and departs:
            yield Push(z, y)


WHOLE, HALF = "16 samples, 32,768 bytes", "8 samples, 16,384 bytes"
DEPARTURES = [
    (PushesHalf, 0, f"push of {HALF}", f"push of {WHOLE}"),
    (PushesFloats, 0, "push of 16 samples, 16,384 bytes", f"push of {WHOLE}"),
    (Exchanges, 0, f"exchange of {WHOLE}", f"push of {WHOLE}"),
    (Departing, 0, "nothing", f"push of {WHOLE}"),
    (PushesTwice, 0, f"push of {WHOLE}", "nothing"),
    (PushesLater, 0, "nothing", f"push of {WHOLE}"),
    (PushesSooner, 0, f"push of {WHOLE}", "nothing"),
    (PushesAtLast, 0, f"push of {WHOLE}", "nothing"),
]


@pytest.mark.parametrize(("kind", "step", "got", "expected"), DEPARTURES)
def test_a_step_that_departs_from_its_rehearsal_ends_the_run(
    kind: type, step: int, got: str, expected: str
) -> None:
    prepare(by(kind))  # it can be rehearsed
    assert refused(train_locally, by(kind)) == (
        f"asks at local step {step}: {got}, expected {expected} as in its rehearsal; if that depends on "
        "values, it may say requests_depend_on_values = True"
    )


@pytest.mark.nightly
@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", [PushesHalf, Departing, PushesTwice])
def test_a_departure_ends_all_ranks_in_one_line(kind: type, tmp_path: Path) -> None:
    with ElasticJob(3, {**by(kind), "clients": {"count": 4, "on_loss": "fail"}}, tmp_path).start() as job:
        assert 2 in job.wait(0, 1, 2), job.said
    (message,) = [line for line in job.said.splitlines() if line.startswith("fslsage_rpc: ")]
    assert message.startswith(f"fslsage_rpc: algorithm.name: got 'test_rehearsal:{kind.__name__}', whose ")
    assert " as in its rehearsal; " in message
