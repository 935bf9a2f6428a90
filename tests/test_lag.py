"""Alignment behind the training: what is taken up when, who waits, and who does not."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fslsage_rpc.algorithms import create
from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import AlgorithmKeys, AlignmentKeys, OptimizerKeys
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.measure.activity import Abandoned, Activity
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import (
    Align,
    Answer,
    BeginAlignment,
    Body,
    ClientStep,
    Collect,
    Push,
    Request,
)
from fslsage_rpc.parties.server import Server
from fslsage_rpc.training.experiment import Experiment
from support.rank_program import train_locally
from support.trees import Tree, tree
from support.user_input import mistake

TIMEOUT = 20
SGD = OptimizerKeys(name="sgd", lr=0.1)


# The algorithm's page


def sage(
    lag: int,
    every: int | None = 4,
    participation: float = 1.0,
    start: Literal["paper", "warm_start"] = "paper",
) -> FslSage:
    federation = Federation([40] * 6, participation, 10, 1, seed=3)
    of_algorithm = AlgorithmKeys(align_every=every, alignment=AlignmentKeys(lag=lag), start=start)
    made = create(of_algorithm, federation)
    assert isinstance(made, FslSage)
    return made


def test_a_fitted_model_is_taken_up_so_many_rounds_later() -> None:
    made = sage(lag=3)
    assert [t for t in range(12) if made.aligns(0, t)] == [0, 4, 8]
    assert [t for t in range(12) if made.collects(0, t)] == [3, 7, 11]
    assert not any(sage(lag=0).collects(0, t) for t in range(12))
    assert not any(sage(lag=2, every=None).collects(0, t) for t in range(12))


def test_a_warm_start_counts_alignments_from_the_second_round() -> None:
    made = sage(lag=2, start="warm_start")
    assert [t for t in range(10) if made.aligns(0, t)] == [1, 5, 9]
    assert [t for t in range(10) if made.collects(0, t)] == [3, 7]


def test_a_client_that_was_away_collects_when_it_is_back_and_always_before_it_aligns_again() -> None:
    made = sage(lag=3, participation=0.4)
    for client in range(6):
        begun: int | None = None
        collected = 0
        for t in range(60):
            if client not in made.federation.participants(t):
                continue
            due = made.aligns(client, t)
            takes_up = made.collects(client, t)
            assert takes_up == (begun is not None and (t >= begun + 3 or due))
            collected += takes_up
            begun = t if due else None if takes_up else begun
        assert collected > 5


# Numbers


def frozen(lag: int) -> Tree:
    """Client and server models stay as they are: an alignment's targets do not depend on its round."""
    still = {party: {"name": "sgd", "lr": 0.0, "weight_decay": 0.0} for party in ("client", "server")}
    algorithm = {"align_every": 4, "average_auxiliary": "never", "alignment": {"lag": lag}}
    return tree(Path("nowhere"), {"optimizer": still, "algorithm": algorithm}, rounds=9)


@pytest.mark.parametrize("lag", [1, 2])
def test_the_same_models_are_taken_up_later(lag: int) -> None:
    waiting, behind = train_locally(frozen(0)), train_locally(frozen(lag))
    expected = [line["alignment"] for line in waiting.lines]
    assert [line["alignment"] for line in behind.lines] == [*[None] * lag, *expected[: 9 - lag]]
    moved = [line["wire_bytes"]["auxiliary_down"] for line in waiting.lines]
    assert [line["wire_bytes"]["auxiliary_down"] for line in behind.lines] == [*[0] * lag, *moved[: 9 - lag]]
    drifts = [line["drift"] for line in waiting.lines]
    assert behind.lines[0]["drift"] != drifts[0]  # of the second upload, by the model that was fitted at once
    assert behind.lines[lag + 1]["drift"] == drifts[lag + 1] != drifts[lag]


def test_models_in_use_are_averaged_when_they_are_taken_up_and_those_being_fitted_are_not() -> None:
    """The last fit of each client starts from the average; what it comes to is not averaged with any."""
    keys = frozen(1)
    keys["algorithm"]["average_auxiliary"] = "alignment"
    outcome = train_locally(
        {**keys, "rounds": 4}
    )  # taken up and averaged in the second round, begun in the last
    mine = [outcome.tensors[f"client {client} auxiliary/floats"] for client in range(3)]
    assert torch.equal(mine[0], mine[1])
    assert torch.equal(mine[0], mine[2])
    for client in range(3):
        assert torch.equal(outcome.tensors[f"server's auxiliary of {client}/floats"], mine[0])


# Who waits


class Held:
    """Runs the server's work on a thread of its own, but for fits, which wait until they are let go."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self.fits: list[Callable[[], None]] = []

    def start(self, kind: str, number: int, work: Callable[[], None]) -> None:
        if kind == "fit":
            self.fits.append(work)
        else:
            self._pool.submit(work)

    def let_go(self) -> None:
        """The next fit."""
        self._pool.submit(self.fits.pop(0)).result(TIMEOUT)


def aligning_server(start: Any) -> tuple[Server, AuxiliaryFit]:
    torch.manual_seed(0)
    keys = AlignmentKeys(epochs=3, batch_size=4, buffer_size=8, lag=1)
    auxiliary, model, context = nn.Linear(4, 3), nn.Linear(4, 3), Context()
    fit = AuxiliaryFit(auxiliary, ScheduledOptimizer(SGD, auxiliary.parameters()), keys, context)
    lane = Lane(model, ScheduledOptimizer(SGD, model.parameters()), "round_robin", Context())
    initial = (fit.weights, None)
    return Server(initial, nn.Linear(4, 4), {0: lane}, {0: fit}, True, start, Context()), fit


def test_a_round_ends_while_a_model_is_fitted_and_who_collects_it_waits() -> None:
    answers: dict[str, Answer] = {}
    there = threading.Event()

    def submit(number: int, body: Body) -> None:
        def take(answer: Answer) -> None:
            answers[body.kind] = answer
            if isinstance(body, Collect):
                there.set()

        server.submit(Request(0, number, number, body), take)

    push = Push(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    with ThreadPoolExecutor(2) as pool:
        held = Held(pool)
        server, fit = aligning_server(held.start)
        before = fit.weights.clone()
        server.announce(0, {0: [0, 0]}, [0])
        server.go_on()
        submit(0, push)
        submit(1, BeginAlignment())
        server.wait()
        assert answers["begin_alignment"].value is None
        assert len(held.fits) == 1
        assert server.report(1.0).alignments == []
        state = server.state()["fits"][0]
        assert len(state["inputs"]["targets"]) == 2  # 5 samples in batches of 4
        server.announce(1, {0: [0, 1]}, [0], collecting=[0])
        submit(0, push)
        submit(1, Collect())
        assert not there.wait(0.2)  # it is not fitted
        held.let_go()
        assert there.wait(TIMEOUT)
        fitted = answers["collect"].value
        assert not torch.equal(fitted.floats, before.floats)
        assert torch.equal(fit.weights.floats, before.floats)  # until the client's next request has its turn
        submit(1, push)
        server.wait()
        assert torch.equal(fit.weights.floats, fitted.floats)
        assert len(server.report(1.0).alignments) == 1
        assert "inputs" not in server.state()["fits"][0]


def test_an_alignment_that_was_not_begun_cannot_be_collected() -> None:
    with ThreadPoolExecutor(1) as pool:
        server, _ = aligning_server(Held(pool).start)
        server.announce(0, {0: [0]}, [0])
        message = mistake(server.submit, Request(0, 0, 0, Collect()), lambda answer: None)
    assert message.endswith("collects for client 0, which has begun no alignment")


def test_fits_give_way_to_lanes_rest_between_rounds_and_end_with_the_training() -> None:
    activity, steps, ended = Activity(workers=1), threading.Semaphore(0), threading.Event()
    may_step = threading.Semaphore(0)

    def fit() -> None:
        try:
            with activity.of("fit"):
                while True:
                    activity.give_way()
                    steps.release()
                    assert may_step.acquire(timeout=TIMEOUT)
        except Abandoned:
            ended.set()

    def comes_to_its_next_batch(within: float = TIMEOUT) -> bool:
        return steps.acquire(timeout=within)

    thread = threading.Thread(target=fit)
    thread.start()
    assert comes_to_its_next_batch()
    with activity.of("lane"):
        may_step.release()
        assert not comes_to_its_next_batch(within=0.1)
    assert comes_to_its_next_batch()
    resting = threading.Thread(target=activity.rest)
    resting.start()
    resting.join(0.1)
    assert resting.is_alive()  # it is in a batch
    may_step.release()
    resting.join(TIMEOUT)
    assert not resting.is_alive()
    assert not comes_to_its_next_batch(within=0.1)
    activity.go_on()
    assert comes_to_its_next_batch()
    activity.end()
    may_step.release()
    assert ended.wait(TIMEOUT)
    thread.join(TIMEOUT)


# Refusals


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"alignment": {"lag": 4}, "align_every": 4},
            "algorithm.alignment.lag: got 4, expected fewer rounds than algorithm.align_every (4)",
        ),
        (
            {"alignment": {"lag": 1}, "average_auxiliary": "round"},
            "algorithm.average_auxiliary: got 'round', expected never or alignment, as "
            "algorithm.alignment.lag is 1",
        ),
        ({"alignment": {"lag": -1}}, "algorithm.alignment.lag: got -1, expected an integer >= 0"),
        (
            {"warm_start": True},  # beside `start`
            "algorithm.warm_start: got true, expected none: it is algorithm.start now",
        ),
        ({"warm_start": [1]}, "algorithm.warm_start: got [1], expected none: it is algorithm.start now"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], line: str) -> None:
    def prepare() -> None:
        Experiment.prepare(from_tree(tree(Path("nowhere"), {"algorithm": keys})))

    assert mistake(prepare) == line


def test_a_key_that_an_old_folder_has_is_read() -> None:
    for old, start in ((False, "paper"), (True, "warm_start")):
        assert from_tree({"algorithm": {"warm_start": old}}) == from_tree({"algorithm": {"start": start}})


class BeginsTwice(Algorithm):
    auxiliary = "aligned"

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        yield Push(z, y)
        if step == 0:
            yield BeginAlignment()
        client.backward(z, client.estimate(z, y))


class CollectsAtOnce(BeginsTwice):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        yield Push(z, y)
        if step == 0:
            client.auxiliary_weights.load((yield Collect()))
        client.backward(z, client.estimate(z, y))


class CollectsTooEarly(BeginsTwice):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        yield Push(z, y)
        if step == 0:
            yield BeginAlignment()
            client.auxiliary_weights.load((yield Collect()))
        client.backward(z, client.estimate(z, y))


class AlignsMeanwhile(BeginsTwice):
    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        yield Push(z, y)
        yield Align() if t == 1 else BeginAlignment()
        client.backward(z, client.estimate(z, y))


@pytest.mark.parametrize(
    ("kind", "lag", "words"),
    [
        (BeginsTwice, 0, "yields BeginAlignment, where algorithm.alignment.lag is 0"),
        (BeginsTwice, 1, "yields BeginAlignment in round 2 for client 0, which has one to collect"),
        (CollectsAtOnce, 1, "yields Collect in round 1 for client 0, which has begun none before that round"),
        (
            CollectsTooEarly,
            1,
            "yields Collect in round 1 for client 0, which has begun none before that round",
        ),
        (AlignsMeanwhile, 1, "yields BeginAlignment in round 1 for client 0, which has one to collect"),
    ],
)
def test_what_is_begun_is_collected_once_before_the_next(kind: type, lag: int, words: str) -> None:
    keys = {"name": f"test_lag:{kind.__name__}", "alignment": {"lag": lag}}
    assert mistake(train_locally, tree(Path("nowhere"), {"algorithm": keys})).endswith(f"client_step {words}")


# Drift


def test_the_drift_is_null_where_clients_train_their_auxiliary_models() -> None:
    def drifts(**keys: Any) -> list[bool]:
        lines = train_locally(tree(Path("nowhere"), {"algorithm": keys}, rounds=5)).lines
        return [line["drift"] is not None for line in lines]

    assert drifts(start="warm_start", alignment={"lag": 1}) == [False, True, True, True, True]
    assert drifts(start="warm_start") == [False, True, True, True, True]
    assert drifts(start="paper") == [True] * 5
