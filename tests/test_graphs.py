"""Captured steps against steps that are not, bit for bit; CUDA's graphs themselves are in test_cuda.py."""

import gc
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import AlignmentKeys, OptimizerKeys, SchedulerKeys
from fslsage_rpc.device.graphs import SHAPES, Graphed
from fslsage_rpc.job.local_world import LocalWorld
from fslsage_rpc.notebook import train
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.training.assembly import build_server
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from support.batch_norm_model import CUT
from support.equality import assert_same_bits
from support.rank_program import train_locally
from support.recorded_graphs import Recorder, recorder
from support.stand_in_cuda import GPU, Cuda, Process, cuda, process
from support.unequal_clients import unequal_clients

__all__ = ["cuda", "process", "recorder"]
pytestmark = pytest.mark.filterwarnings("error:graphs")  # that something could not be captured


def tree(folder: Path, algorithm: str, graphs: str = "auto", **changes: Any) -> dict[str, Any]:
    """Three rounds of three unequal clients, whose last batches are short, with rates that move."""
    keys = {
        "client": {"scheduler": {"name": "CosineAnnealingLR", "arguments": {"T_max": 20}, "per": "round"}},
        "server": {"scheduler": {"name": "ExponentialLR", "arguments": {"gamma": 0.9}, "per": "step"}},
        "auxiliary": {"name": "sgd", "lr": 0.05},
    }
    return {
        **unequal_clients(folder, algorithm),
        "device": "cpu",
        "graphs": graphs,
        "optimizer": keys,
        **changes,
    }


@pytest.mark.parametrize("algorithm", ["splitfed_v2", "fedavg"])
def test_captured_steps_change_no_number(algorithm: str, tmp_path: Path, recorder: Recorder) -> None:
    without = train_locally(tree(tmp_path, algorithm, "never"))
    assert recorder.captures == 0
    assert_same_bits(without, train_locally(tree(tmp_path, algorithm)))
    assert recorder.captures > 0
    assert recorder.replays > 2 * recorder.captures


@pytest.mark.nightly
def test_running_statistics_and_a_warm_start_in_bf16_too(tmp_path: Path, recorder: Recorder) -> None:
    model = {"name": "support.batch_norm_model:residual", "cut": CUT}
    changes: dict[str, Any] = {"precision": "bf16", "model": model, "rounds": 2}
    keys = [tree(tmp_path, "fsl_sage", graphs, **changes) for graphs in ("never", "auto")]
    for each in keys:
        each["algorithm"]["start"] = "warm_start"
    assert_same_bits(train_locally(keys[0]), train_locally(keys[1]))
    assert recorder.captures > 0


def test_what_is_refused_runs_without_and_says_so_once(tmp_path: Path, recorder: Recorder) -> None:
    without = train_locally(tree(tmp_path, "fsl_sage", "never"))
    recorder.refuse = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as a program's: the same once
        refused = train_locally(tree(tmp_path, "fsl_sage"))
    assert_same_bits(without, refused)
    said = [str(warning.message) for warning in caught]
    assert said == ["graphs: could not capture (CUDA error: operation not permitted): such steps run without"]
    assert recorder.captures == 0


def test_on_a_cpu_nothing_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_tree({**tree(tmp_path, "fsl_sage"), "transport": "local"})
    trainer = Trainer(Experiment.prepare(config), LocalWorld(config))
    trainer.train_round(0)
    trainer.train_round(1)
    assert trainer.server is not None
    assert all(steps.shapes == 0 for steps in trainer.server.lanes[0].steps.values())
    assert all(client.passes.shapes == 0 for client in trainer.clients.values())


def test_a_run_with_graphs_goes_on_from_a_checkpoint(tmp_path: Path, recorder: Recorder) -> None:
    def model(name: str, graphs: str, *rounds: int) -> dict[str, torch.Tensor]:
        for until in rounds:
            keys = tree(tmp_path, "fsl_sage", graphs)
            folder = train(
                {**keys, "output": str(tmp_path), "resume": "auto", "name": name, "rounds": until}
            ).folder
        return torch.load(folder / "model.pt", weights_only=True)

    expected, found = model("whole", "never", 3), model("resumed", "auto", 1, 3)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert recorder.captures > 0


def lane_of(graphs: bool, keys: OptimizerKeys) -> Lane:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return Lane(model, ScheduledOptimizer(keys, model.parameters()), "arrival", Context(graphs=graphs))


def batch(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def test_every_shape_has_a_graph_up_to_a_limit_and_answers_stay_as_they_were(recorder: Recorder) -> None:
    plain, graphed = (lane_of(graphs, OptimizerKeys()) for graphs in (False, True))
    sizes = [8, 8, 8, 3, 8, 3, 3, *range(9, 9 + SHAPES), *range(9, 9 + SHAPES), 8, 3]
    answers = []
    for seed, size in enumerate(sizes):
        expected, answer = (lane.train(*batch(size, seed), gradient=True) for lane in (plain, graphed))
        answers.append((expected, answer))
    assert graphed.steps[True].shapes == SHAPES
    assert graphed.steps[False].shapes == 0
    for expected, answer in answers:  # a graph's own tensors have been written over since
        assert torch.equal(expected, answer)  # type: ignore[arg-type]
    assert torch.equal(plain.weights.floats, graphed.weights.floats)
    assert torch.equal(plain.weights.integers, graphed.weights.integers)
    assert plain.losses.take() == graphed.losses.take()


def test_a_setting_that_a_graph_has_taken_as_it_was_may_not_move(recorder: Recorder) -> None:
    """CyclicLR turns Adam's momentum, too, of which captured steps have the value, not the place."""
    arguments = {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 3}
    keys = OptimizerKeys(scheduler=SchedulerKeys(name="CyclicLR", arguments=arguments, per="step"))
    plain, graphed = (lane_of(graphs, keys) for graphs in (False, True))
    for seed in range(8):
        for lane in (plain, graphed):
            lane.train(*batch(8, seed), gradient=False)
    assert recorder.captures == 1
    assert torch.equal(plain.weights.floats, graphed.weights.floats)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_moving_rate_reaches_captured_steps_and_checkpoints_see_a_number(
    name: str, recorder: Recorder
) -> None:
    scheduler = SchedulerKeys(name="ExponentialLR", arguments={"gamma": 0.5}, per="round")
    keys = OptimizerKeys(name=name, lr=0.1, scheduler=scheduler)  # type: ignore[arg-type]
    plain, graphed = (lane_of(graphs, keys) for graphs in (False, True))
    for seed in range(6):
        for lane in (plain, graphed):
            lane.train(*batch(8, seed), gradient=False)
            lane.optimizer.end_round()
    assert recorder.replays == 5
    assert torch.equal(plain.weights.floats, graphed.weights.floats)
    states = [lane.state()["optimizer"]["optimizer"]["param_groups"] for lane in (plain, graphed)]
    assert states[0] == states[1]
    assert isinstance(states[1][0]["lr"], float)


def test_a_fit_captures_its_step_and_stops_where_it_would(recorder: Recorder) -> None:
    fits = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = ScheduledOptimizer(OptimizerKeys(lr=1e-2), model.parameters())
        keys = AlignmentKeys(epochs=20, batch_size=25, buffer_size=40, tolerance=0.02)
        fits.append(AuxiliaryFit(model, optimizer, keys, Context(graphs=graphs)))
    targets = []
    for seed, size in enumerate((25, 15)):
        z, y = batch(size, seed)
        targets.append((z.double(), y, batch(size, seed + 10)[0].double()))
    for _ in range(2):
        record, captured = (fit.fit(targets).read() for fit in fits)
        assert torch.equal(fits[0].fitted.floats, fits[1].fitted.floats)
        assert record == captured
        assert record["passes"] < 20
    assert recorder.captures == 2  # one for each batch; the second alignment needs no more


def add_one(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x + 1,)


def test_a_thread_captures_only_what_it_has_computed_itself(recorder: Recorder) -> None:
    """Libraries make handles, and plans of a convolution, at a thread's first use: not in a capture."""
    step, other = Graphed(enabled=True), Graphed(enabled=True)

    def call(step: Graphed, size: int) -> None:
        step(add_one, torch.ones(size))

    threads = [ThreadPoolExecutor(1) for _ in range(2)]
    for thread in threads:
        thread.submit(call, other, 2).result()
        thread.submit(call, step, 3).result()
        assert (step.shapes, other.shapes) == (0, 0)
    threads[1].submit(call, step, 3).result()
    threads[0].submit(call, step, 3).result()  # replays what the other thread has captured
    assert (step.shapes, other.shapes) == (1, 0)
    assert (recorder.captures, recorder.replays) == (1, 2)
    for thread in threads:
        thread.shutdown()


@pytest.mark.parametrize("fails_in", ["begin", "work", "work and end", "end"])
def test_a_failed_capture_leaves_nothing_under_way(
    fails_in: str, cuda: Cuda, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else blocks that two streams have used are never free again, and no graph can be replayed."""
    released: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: released.append(pool))
    good, bad, after = (Graphed(enabled=True) for _ in range(3))

    def work(x: torch.Tensor) -> tuple[torch.Tensor]:
        if fails_in.startswith("work") and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return (x + 1,)

    with torch.cuda.stream(torch.cuda.Stream()):
        ones = torch.ones(2, device=GPU)
        for _ in range(2):
            good(add_one, ones)
        bad(work, ones)
        cuda.refuses[fails_in.removeprefix("work and ")] = 1
        with pytest.warns(UserWarning, match="could not capture .* such steps run without"):
            bad(work, ones)
        assert bad(work, ones)[0].tolist() == [2.0, 2.0]
        assert not process.captures
        assert released == ([] if fails_in == "work" else [bad._pool])
        for step in (good, after, after):
            step(add_one, ones)
    assert (bad.shapes, good.shapes, after.shapes) == (0, 1, 1)
    cuda.check()


def test_nothing_is_replayed_while_another_thread_captures(recorder: Recorder) -> None:
    """Up to torch 2.11 the replay fails: all graphs share the state of the device's random generator."""
    step, events = Graphed(enabled=True), list[str]()
    for _ in range(2):
        step(add_one, torch.ones(2))
    replaying, about_to = threading.Event(), threading.Event()

    def replay() -> None:
        about_to.wait(60)
        step(add_one, torch.ones(2))
        events.append("replayed")
        replaying.set()

    def slow(x: torch.Tensor) -> tuple[torch.Tensor]:
        about_to.set()
        replaying.wait(0.2)  # in vain
        events.append("computed")
        return (x,)

    other, thread = Graphed(enabled=True), threading.Thread(target=replay)
    other(add_one, torch.ones(2))
    thread.start()
    other(slow, torch.ones(2))
    thread.join()
    assert events[0] == "computed"
    assert sorted(events) == ["computed", "computed", "replayed"]


def test_parties_are_freed_when_nobody_holds_them(tmp_path: Path) -> None:
    """Without the garbage collector's help, which does not know how large they are."""
    config = from_tree({**tree(tmp_path, "fsl_sage", "never"), "transport": "local"})
    trainer = Trainer(Experiment.prepare(config), LocalWorld(config))
    trainer.train_round(0)
    assert trainer.server is not None
    parties = (trainer.clients[0], trainer.server.lanes[0], trainer.server.fits[0])
    alive = [weakref.ref(party.weights.floats) for party in parties]
    gc.disable()
    try:
        del trainer, parties
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


class Beside(LocalWorld):
    """Lanes and fits have threads of their own, as over RPC."""

    works_beside = True


def test_lanes_and_fits_that_share_streams_are_not_captured(recorder: Recorder) -> None:
    tree = {"device": "cpu", "graphs": "auto", "clients": {"count": 31}, "data": {"partition": "iid"}}
    config = from_tree(tree)
    with pytest.warns(UserWarning, match="graphs: for at most 30 clients: the server's steps run without"):
        server = build_server(Experiment.prepare(config), Beside(config), None, None)
    z, y = torch.randn(4, 64, 2, 2), torch.arange(4)
    for _ in range(3):
        server.lanes[0].train(z, y, gradient=False)
    assert recorder.captures == 0
