"""The order of images in memory is chosen by timing, within seconds, and is the same for equal processors."""

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fslsage_rpc
from fslsage_rpc.bench.bench_screen import BenchScreen
from fslsage_rpc.bench.run import bench
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.device import placement
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.models.segment import Segment, differentiated_twice
from fslsage_rpc.runs.checkpoint_files import complete_folders, read_manifest
from fslsage_rpc.training import order_choice
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.order_choice import SECONDS, agree, choose, image_passes, measure, order_images
from fslsage_rpc.transport.local import LocalTransport
from support.trees import BENCH, Tree, merged, tree

Cost = Callable[[int, bool], float]
"""seconds of a pass on so many samples, reordered or not"""
AUTO: Tree = {"model": {"memory_format": "auto"}}
EVEN: Tree = {"data": {"partition": "iid", "train_limit": 96}}
RESIDUAL: Tree = {
    **EVEN,
    "model": {
        **AUTO["model"],
        "name": "support.batch_norm_model:residual",
        "cut": "blocks.0",
        "auxiliary": {"until": "blocks.1"},
    },
}
HERE = placement.device_name(placement.CPU)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_choice, "_remembered", {})


class Stopwatch:
    """Stands still but for the passes that are made by it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Simulated:
    """A pass that takes as long as it is said to."""

    def __init__(self, watch: Stopwatch, cost: Cost, batch: int = 128, alike: bool = True):
        self.batch, self.alike = batch, alike
        self._watch, self._cost = watch, cost
        self.made: list[tuple[int, bool]] = []

    def run(self, samples: int, reordered: bool) -> None:
        self.made.append((samples, reordered))
        self._watch.now += self._cost(samples, reordered)

    def same_numbers(self) -> bool:
        return self.alike


def chosen(*costs: Cost, **keys: Any) -> tuple[list[str], list[Simulated], float]:
    """The choices, the passes that were made for them, and the seconds that they took."""
    watch = Stopwatch()
    passes = [Simulated(watch, cost, **keys) for cost in costs]
    found = choose({str(number): each for number, each in enumerate(passes)}, wall=watch, own=watch)
    return list(found.values()), passes, watch.now - 100


def by_factor(factor: float, seconds: float = 0.01) -> Cost:
    return lambda samples, reordered: seconds * (factor if reordered else 1)


def test_the_faster_order_is_chosen_where_it_wins_by_more_than_noise() -> None:
    found, _, _ = chosen(*map(by_factor, (0.5, 0.96, 0.98, 1.0, 2.0)))
    assert found == ["channels_last"] * 2 + ["contiguous"] * 3


def test_orders_take_turns_on_whole_batches_after_warming_up() -> None:
    _, (each,), _ = chosen(by_factor(1.0), batch=50)
    assert each.made[:5] == [(samples, False) for samples in (2, 2, 4, 16, 50)]
    warm, *pairs = each.made[5:]
    assert warm == (50, True)
    assert pairs == [(50, reordered) for pair in range(5) for reordered in (pair % 2 == 1, pair % 2 == 0)]


@pytest.mark.parametrize(("factor", "disturbed"), [(2.0, 3), (0.5, 4)])
def test_a_disturbance_decides_nothing(factor: float, disturbed: int) -> None:
    """The first pass of the faster order takes a second more."""
    numbers, usual = iter(range(100)), by_factor(factor)
    cost: Cost = lambda samples, reordered: usual(samples, reordered) + (next(numbers) == disturbed)  # noqa: E731
    found, (each,), _ = chosen(cost, batch=2)
    assert each.made[disturbed] == (2, factor < 1)
    assert found == ["channels_last" if factor < 1 else "contiguous"]


def test_long_passes_are_made_on_fewer_samples_within_the_time() -> None:
    cost: Cost = lambda samples, reordered: 0.03 * samples * (0.8 if reordered else 1)  # noqa: E731
    found, passes, seconds = chosen(*[cost] * 4)
    assert found == ["channels_last"] * 4
    assert all(2 < max(samples for samples, _ in each.made) < 128 for each in passes)
    assert seconds <= SECONDS


def test_what_does_not_get_its_turn_stays_contiguous() -> None:
    found, (first, second), seconds = chosen(by_factor(0.1, seconds=2 * SECONDS), by_factor(0.5))
    assert found == ["contiguous"] * 2
    assert (first.made, second.made) == ([(2, False)] * 2, [])
    assert seconds == 4 * SECONDS  # no pass is cut short


def test_a_part_that_fails_or_computes_something_else_stays_contiguous() -> None:
    def failing(samples: int, reordered: bool) -> float:
        if reordered:
            raise RuntimeError("view size is not compatible")
        return 0.01

    assert chosen(failing, by_factor(0.5))[0] == ["contiguous", "channels_last"]
    assert chosen(by_factor(0.5), alike=False)[0] == ["contiguous"]


# The passes of a model


def prepared(output: Path, *changes: Tree, **keys: Any) -> Experiment:
    images: Tree = {"data": {"name": "synthetic"}, "precision": "fp32"}
    return Experiment.prepare(from_tree(tree(output, images, EVEN, AUTO, *changes, **keys)))


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("fsl_sage", ["estimate 16", "client step 16", "server step 16", "fit 25"]),
        ("cse_fsl", ["auxiliary step 16", "client step 16", "server step 16"]),
        ("splitfed_v1", ["client step 16", "server step 16"]),
        ("fedavg", ["whole-model step 16"]),
    ],
)
def test_the_passes_are_those_of_the_algorithm(algorithm: str, expected: list[str], tmp_path: Path) -> None:
    experiment = prepared(tmp_path, {"algorithm": {"name": algorithm}, "model": {"name": "resnet18"}})
    passes = list(image_passes(experiment))
    assert [f"{each.kind} {each.batch}" for each in passes] == expected
    assert [each.kind for each in passes if each.twice] == ["fit"] * (algorithm == "fsl_sage")
    for each in passes:
        each.run(2, reordered=True)
        assert each.same_numbers()


def test_only_parts_that_convolve_images_are_timed(tmp_path: Path) -> None:
    linear = prepared(tmp_path)  # simple_conv: behind the cut are linear layers
    assert [each.name for each in image_passes(linear)] == ["client step on [16, 3, 32, 32]"]
    large = prepared(tmp_path, {"clients": {"batch_size": 500}, "data": {"train_limit": 900}})
    assert [each.batch for each in image_passes(large)] == [128]


def test_models_and_random_numbers_are_left_as_they_were(tmp_path: Path) -> None:
    experiment = prepared(tmp_path, {"model": {"name": "resnet18"}})
    split = experiment.split
    parts = split.client, split.server, split.auxiliary
    before, generator = copy.deepcopy([part.state_dict() for part in parts]), torch.get_rng_state()
    passes = {each.name: each for each in image_passes(experiment)}

    def all_of(passes: Mapping[str, Any]) -> dict[str, str]:
        for each in passes.values():
            assert each.same_numbers()
            each.run(2, reordered=True)
        return dict.fromkeys(passes, "channels_last")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_choice, "choose", all_of)
        assert set(measure(experiment, passes).values()) == {"channels_last"}
    assert torch.equal(torch.get_rng_state(), generator)
    for part, state in zip(parts, before, strict=True):
        assert part.training
        assert all(parameter.grad is None for parameter in part.parameters())
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())


class Strided(nn.Module):
    """Reads memory as it lies, so that another order gives other numbers, and no error."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 32 * 32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        return self.fc(x.as_strided((x.size(0), 4 * 32 * 32), (4 * 32 * 32, 1)))


def test_models_of_the_users_own_that_need_the_usual_order_keep_it(tmp_path: Path) -> None:
    for name in ("test_segment:Viewing", "test_order_choice:Strided"):
        experiment = prepared(tmp_path, {"model": {"name": name, "cut": "stem"}})
        client, server = (each for each in image_passes(experiment) if each.kind.endswith(" step"))
        watch = Stopwatch()
        assert client.same_numbers()
        assert choose({"server": server}, wall=watch, own=watch) == {"server": "contiguous"}


# Ranks


class Ranks:
    """Threads that gather and broadcast, each as one rank of a job."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size, timeout=30)
        self._values: list[Any] = [None] * size
        self.size = size

    def of(self, rank: int) -> Any:
        transport = LocalTransport(placement.CPU)
        transport.rank = rank

        def gather(value: Any) -> list[Any] | None:
            self._values[rank] = value
            self._barrier.wait()
            gathered = list(self._values)
            self._barrier.wait()
            return None if rank else gathered

        def broadcast(value: Any) -> Any:
            if rank == 0:
                self._values[0] = value
            self._barrier.wait()
            received = copy.deepcopy(self._values[0])
            self._barrier.wait()
            return received

        transport.gather, transport.broadcast = gather, broadcast  # type: ignore[method-assign]
        return transport


def agreed(processors: list[str], known: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, Any], list[Any]]:
    """The orders of passes `a` and `b` that all ranks agree on, and which ranks have measured which."""
    ranks = Ranks(len(processors))
    results: list[Any] = [None] * ranks.size
    measured: list[Any] = []

    def one(rank: int) -> None:
        def measure_here(names: list[str]) -> dict[str, str]:
            measured.append((rank, names))
            return dict.fromkeys(names, f"by {rank}")

        before = known if rank == 0 else {}
        results[rank] = agree(ranks.of(rank), processors[rank], ["a", "b"], before, measure_here)

    threads = [threading.Thread(target=one, args=[rank]) for rank in range(ranks.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == results[0] for result in results)
    return results[0], sorted(measured)


def test_the_first_rank_of_each_processor_measures_for_all_of_them() -> None:
    orders, measured = agreed(["fast", "slow", "fast", "slow"], {})
    assert orders == {"fast": {"a": "by 0", "b": "by 0"}, "slow": {"a": "by 1", "b": "by 1"}}
    assert measured == [(0, ["a", "b"]), (1, ["a", "b"])]


def test_what_the_servers_rank_knows_is_not_measured_again() -> None:
    known = {"fast": {"a": "kept", "b": "kept"}, "slow": {"a": "kept"}, "gone": {"a": "kept"}}
    orders, measured = agreed(["fast", "slow", "new"], known)
    assert orders == known | {"slow": {"a": "kept", "b": "by 1"}, "new": {"a": "by 2", "b": "by 2"}}
    assert measured == [(1, ["b"]), (2, ["a", "b"])]


def test_a_processor_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "PROCESSORS", tmp_path / "cpuinfo")
    assert placement.device_name(placement.CPU)  # without the file, what Python knows
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9V74\nflags\t\t: fpu\n")
    assert placement.device_name(placement.CPU) == "AMD EPYC 9V74"


# Runs


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The passes of each timing; of clients and fits they gain."""
    seen: list[list[str]] = []

    def choose_some(passes: Mapping[str, Any]) -> dict[str, str]:
        if passes:
            seen.append(list(passes))
        gains = ("client step", "fit")
        return {name: "channels_last" if name.startswith(gains) else "contiguous" for name in passes}

    monkeypatch.setattr(order_choice, "choose", choose_some)
    return seen


def test_each_part_takes_the_order_of_its_pass(timings: list[list[str]], tmp_path: Path) -> None:
    experiment = prepared(tmp_path, {"model": {"name": "resnet18"}})
    order_images(experiment, open_world(experiment.config))
    split, x = experiment.split, torch.empty(2, 3, 32, 32)
    for part, expected in ((split.client, True), (split.server, False), (split.auxiliary, False)):
        assert isinstance(part, Segment)
        assert part.reorders(x) is expected
    with differentiated_twice():
        assert split.auxiliary.reorders(x)  # type: ignore[operator]
    assert len(timings) == 1


def test_an_order_that_is_asked_for_is_not_timed(timings: list[list[str]], tmp_path: Path) -> None:
    for memory_format in ("contiguous", "channels_last"):
        experiment = prepared(tmp_path, {"model": {"name": "resnet18", "memory_format": memory_format}})
        order_images(experiment, open_world(experiment.config))
        assert experiment.image_orders == {}
    assert timings == []


def test_a_run_that_goes_on_keeps_its_orders(
    timings: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tree(tmp_path, RESIDUAL, rounds=2, checkpoint={"every": 1})
    folder = fslsage_rpc.train(keys).folder
    (names,) = timings
    orders = ["contiguous", "channels_last", "contiguous", "channels_last"]
    expected = {HERE: dict(zip(names, orders, strict=True))}
    manifest = complete_folders(folder / "checkpoints")[0] / "manifest.json"
    for path, inside in ((folder / "environment.json", []), (manifest, ["manifest"])):
        found = json.loads(path.read_text())
        for key in inside:
            found = found[key]
        assert found["image_order"] == expected
    monkeypatch.setattr(order_choice, "_remembered", {})
    fslsage_rpc.train(keys | {"rounds": 3})
    assert timings == [names]
    assert json.loads((folder / "environment.json").read_text())["image_order"] == expected
    assert read_manifest(complete_folders(folder / "checkpoints")[0]).image_orders == expected


def test_what_a_checkpoint_does_not_have_is_timed(
    timings: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of another processor, or of an older version."""
    keys = tree(tmp_path, RESIDUAL, rounds=1, checkpoint={"every": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_choice, "device_name", lambda device: "another")
        folder = fslsage_rpc.train(keys).folder
    monkeypatch.setattr(order_choice, "_remembered", {})
    fslsage_rpc.train(keys | {"rounds": 2})
    path = complete_folders(folder / "checkpoints")[0] / "manifest.json"
    content = json.loads(path.read_text())["manifest"]
    assert content["image_order"].keys() == {"another", HERE}
    del content["image_order"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"manifest": content, "sha256": digest}))
    monkeypatch.setattr(order_choice, "_remembered", {})
    fslsage_rpc.train(keys | {"rounds": 3})
    assert timings == [timings[0]] * 3
    assert json.loads((folder / "environment.json").read_text())["image_order"].keys() == {HERE}


def test_variants_of_one_model_are_timed_once(timings: list[list[str]], tmp_path: Path) -> None:
    variants = {
        "fsl_sage": [],
        "cse_fsl": ["algorithm.name=cse_fsl"],
        "longer": ["model.auxiliary.until=blocks.2"],
    }
    keys = merged(BENCH, {**RESIDUAL, "transport": "local", "output": str(tmp_path), "rounds": 2})
    keys["bench"] = {"variants": variants, "reference": "fsl_sage", "repeats": 2, "warmup_rounds": 0}
    config = from_tree(keys)
    folder = bench(config, BenchScreen(config))
    first, second, third = timings
    assert {name.split(" on ")[0] for name in first} == {"estimate", "client step", "server step", "fit"}
    assert {name.split(" on ")[0] for name in second} == {"auxiliary step"}
    assert {name.split(" on ")[0] for name in third} == {"estimate", "fit"}
    records = json.loads((folder / "bench.json").read_text())["variants"]
    orders = [record["image_order"][HERE] for record in records.values()]
    assert orders[0] == orders[2]
    assert list(orders[0]) == first
    assert list(orders[1]) == [*second, *first[1:3]]
