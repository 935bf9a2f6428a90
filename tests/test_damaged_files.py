"""Whatever has become of a file, it is used, refused in one line, or (a checkpoint) named and left out."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fslsage_rpc
from fslsage_rpc.cli import main
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Data
from fslsage_rpc.data import datasets
from fslsage_rpc.data.partitions import partition
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.calibration import read_calibration
from fslsage_rpc.plan.scenario import Costs
from fslsage_rpc.report.sources import read
from fslsage_rpc.runs.checkpoint_files import FOLDER
from fslsage_rpc.runs.run_folder import RunFolder
from fslsage_rpc.runs.screen import Screen
from fslsage_rpc.training.evaluation import Score, evaluate_run
from support.image_files import idx, write_mnist
from support.report_folders import write_bench, write_run
from support.trees import BENCH, tree
from support.user_input import one_line

Damage = Callable[[bytes], bytes | None]
"""from what a file held to what it holds; None: it is gone"""


def few(examples: int) -> settings:
    """Examples of what takes its time: so many where the profile has 100."""
    return settings(max_examples=examples * settings.default.max_examples // 100)


def flipped(data: bytes, place: float, bit: int) -> bytes:
    at = min(int(place * len(data)), len(data) - 1)
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :] if data else data


PLACES = st.floats(0, 1)
DAMAGES: st.SearchStrategy[Damage] = st.one_of(
    st.builds(lambda place, bit: lambda data: flipped(data, place, bit), PLACES, st.integers(0, 7)),
    st.builds(lambda place: lambda data: data[: int(place * len(data))], PLACES),
    st.builds(
        lambda place, junk: (
            lambda data: data[: (at := int(place * len(data)))] + junk + data[at + len(junk) :]
        ),
        PLACES,
        st.binary(min_size=1, max_size=40),
    ),
    st.builds(lambda junk: lambda data: data + junk, st.binary(min_size=1, max_size=40)),
    st.builds(lambda junk: lambda data: junk, st.binary(max_size=40)),
    st.just(lambda data: None),
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values in a JSON value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in below for found in places(inner, (*path, key)))]


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one value in it replaced or taken out."""
    value = copy.deepcopy(value)
    *above, last = draw(st.sampled_from(places(value)[1:]))
    inner = value
    for key in above:
        inner = inner[key]
    if draw(st.booleans()):
        inner[last] = draw(JSON)
    else:
        del inner[last]
    return value


def put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def used_or_refused(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or None where it refuses in one line; nothing else may happen."""
    try:
        return function(*arguments)
    except InputError as error:
        one_line(error)
        return None


# Run folders and their checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of three rounds, with a checkpoint after each of the last two."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "config.json"
    config.write_text(json.dumps(tree(folder / "runs", rounds=3, name="run", evaluation={"every": 1})))
    return fslsage_rpc.train(str(config)).folder


def copied(original: Path, tmp_path: Path) -> Path:
    """A fresh copy of a run folder, as `output/run`."""
    folder = tmp_path / "runs" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    return folder


def sound_checkpoints(folder: Path, original: Path) -> list[Path]:
    """The checkpoints all of whose files, and whose beginning of metrics.jsonl, are still what they were."""

    def same(name: str, lines: int | None = None) -> bool:
        ours, theirs = folder / name, original / name
        if not ours.is_file():
            return False
        if lines is None:
            return ours.read_bytes() == theirs.read_bytes()
        beginning = b"".join(theirs.read_bytes().splitlines(keepends=True)[:lines])
        return ours.read_bytes()[: len(beginning)] == beginning

    return [
        each
        for each in sorted((folder / "checkpoints").iterdir(), reverse=True)
        if all(same(f"checkpoints/{each.name}/{file}") for file in ("manifest.json", "rank-0.pt"))
        and same("metrics.jsonl", int(FOLDER.fullmatch(each.name)[1]))  # type: ignore[index]
    ]


CHECKPOINT_FILES = ["metrics.jsonl"] + [
    f"checkpoints/round-00000{round}/{file}" for round in (2, 3) for file in ("manifest.json", "rank-0.pt")
]


@few(25)
@given(st.dictionaries(st.sampled_from(CHECKPOINT_FILES), DAMAGES, min_size=1, max_size=3))
def test_a_damaged_checkpoint_is_named_and_left_out_for_the_one_before(
    finished: Path, tmp_path: Path, damages: dict[str, Damage]
) -> None:
    folder = copied(finished, tmp_path)
    for name, damage in damages.items():
        put(folder / name, damage((folder / name).read_bytes()))
    sound = sound_checkpoints(folder, finished)
    said: list[str] = []
    more = from_tree(tree(tmp_path / "runs", rounds=4, name="run", evaluation={"every": 1}))
    found = used_or_refused(RunFolder, more, said.append)
    if found is None:  # a complete run without a checkpoint is not started again unasked
        assert sound == []
        return
    assert found.manifest is not None
    assert found.manifest.folder == sound[0]
    assert len(found.lines) == found.manifest.rounds
    newer = [f"{folder}/checkpoints/round-000003"] if found.manifest.rounds == 2 else []
    for line in said:
        assert line.endswith(": this checkpoint is left out")
        assert any(line.startswith(name) for name in [*newer, str(folder / "metrics.jsonl")])


@few(25)
@given(st.sampled_from(["config.yaml", "summary.json", "partition.json", "environment.json"]), DAMAGES)
def test_a_damaged_run_folder_is_shown_gone_on_with_or_refused(
    finished: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    folder = copied(finished, tmp_path)
    put(folder / name, damage((folder / name).read_bytes()))
    look(tmp_path)


@few(25)
@given(st.data())
def test_an_altered_summary_is_shown_or_the_run_is_gone_on_with(
    finished: Path, tmp_path: Path, data: st.DataObject
) -> None:
    folder = copied(finished, tmp_path)
    summary = json.loads((finished / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(data.draw(altered(summary) | JSON)))
    look(tmp_path)


def look(tmp_path: Path) -> None:
    """What `train` does with a run folder before it trains."""
    config = from_tree(tree(tmp_path / "runs", rounds=3, name="run", evaluation={"every": 1}))
    found = used_or_refused(RunFolder, config, lambda line: None)
    if found and found.finished_summary:
        Screen(config).show_finished(found.finished_summary, found.path, found.has_checkpoint)
    if found:
        used_or_refused(found.check_partition, [])


@few(25)
@given(st.sampled_from(["model.pt", "config.yaml"]), DAMAGES)
def test_a_damaged_model_is_evaluated_or_refused(
    finished: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    folder = copied(finished, tmp_path)
    put(folder / name, damage((folder / name).read_bytes()))
    assert isinstance(used_or_refused(evaluate_run, folder), Score | None)


# Reports and plans


@few(40)
@given(st.sampled_from(["config.yaml", "metrics.jsonl", "summary.json", "environment.json"]), DAMAGES)
def test_a_report_of_damaged_files_is_made_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, damage: Damage
) -> None:
    folder = write_run(tmp_path_factory.mktemp("report") / "run", [0.1, 0.2, None, 0.4])
    put(folder / name, damage((folder / name).read_bytes()))
    report_on(folder)


@few(40)
@given(st.data())
def test_a_report_of_altered_figures_is_made_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write_run(tmp_path_factory.mktemp("report") / "run", [0.1, 0.2, None, 0.4])
    name = data.draw(st.sampled_from(["metrics.jsonl", "summary.json", "environment.json"]))
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    changed = data.draw(altered(lines))
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in changed))
    report_on(folder)


def test_a_whole_number_beyond_all_floats_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [0.1])
    line = json.loads((folder / "metrics.jsonl").read_text())
    (folder / "metrics.jsonl").write_text(json.dumps({**line, "elapsed_seconds": 10**400}) + "\n")
    assert used_or_refused(read, [str(folder)]) is None


@few(40)
@given(st.data())
def test_a_report_of_an_altered_benchmark_is_made_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write_bench(tmp_path_factory.mktemp("report") / "bench")
    bench = json.loads((folder / "bench.json").read_text())
    (folder / "bench.json").write_text(json.dumps(data.draw(altered(bench) | JSON)))
    report_on(folder)


def report_on(folder: Path) -> None:
    """The page, but for its figures, which are the same code for all numbers."""
    used_or_refused(read, [str(folder)])


@pytest.mark.nightly
@few(12)
@given(st.data())
def test_the_figures_too_are_drawn_of_what_is_let_in(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("report")
    bench = write_bench(folder / "bench")
    run = write_run(folder / "run", [0.1, 0.2, None, 0.4])
    figures = json.loads((bench / "bench.json").read_text())
    (bench / "bench.json").write_text(json.dumps(data.draw(altered(figures))))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in data.draw(altered(lines))))
    assert main(["report", str(bench), str(run), "--out", str(folder / "out")]) in (0, 2)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a benchmark in one process, made to look as if it had been measured over links."""
    folder = tmp_path_factory.mktemp("benchmark")
    config = folder / "bench.json"
    config.write_text(json.dumps({**BENCH, "output": str(folder), "transport": "local"}))
    assert main(["bench", str(config)]) == 0
    result = json.loads((folder / "small" / "bench.json").read_text())
    speed = {"round_trip_seconds": 0.001, "up_bytes_per_second": 1e8, "down_bytes_per_second": 1e8}
    result["environment"]["link_speeds"] = [{"0": speed}] * len(result["environment"]["link_speeds"])
    result["environment"]["ranks"] *= 2
    (folder / "small" / "bench.json").write_text(json.dumps(result))
    return folder / "small"


def calibrate_from(folder: Path) -> None:
    """Costs that are read are numbers, so that predictions can be made of them."""
    calibration = used_or_refused(read_calibration, folder, from_tree(BENCH))
    for costs in calibration.costs.values() if calibration else ():
        if not isinstance(costs, str):
            assert all(map(math.isfinite, (*costs[:6], costs.efficiency)))
            assert costs.efficiency > 0


@pytest.mark.nightly
def test_a_sound_benchmark_is_read_and_one_with_impossible_rounds_refused(
    benchmark: Path, tmp_path: Path
) -> None:
    assert isinstance(read_calibration(benchmark, from_tree(BENCH)).costs["fsl_sage"], Costs)
    folder = copied(benchmark, tmp_path)
    path = sorted((folder / "rounds").iterdir())[0]
    first, *rest = path.read_text().splitlines()
    line = {**json.loads(first), "round": 10**15}  # whose participants nobody could count
    path.write_text("\n".join([json.dumps(line), *rest]) + "\n")
    assert used_or_refused(read_calibration, folder, from_tree(BENCH)) is None


@pytest.mark.nightly
@few(40)
@given(st.integers(0, 50), DAMAGES)
def test_a_plan_from_damaged_files_is_made_or_refused(
    benchmark: Path, tmp_path: Path, number: int, damage: Damage
) -> None:
    folder = copied(benchmark, tmp_path)
    files = [folder / "bench.json", folder / "config.yaml", *sorted((folder / "rounds").iterdir())]
    path = files[number % len(files)]
    put(path, damage(path.read_bytes()))
    calibrate_from(folder)


@pytest.mark.nightly
@few(40)
@given(st.data())
def test_a_plan_from_altered_figures_is_made_or_refused(
    benchmark: Path, tmp_path: Path, data: st.DataObject
) -> None:
    folder = copied(benchmark, tmp_path)
    if data.draw(st.booleans()):
        result = json.loads((folder / "bench.json").read_text())
        keep = {"environment": result["environment"]}  # all that is read of it
        (folder / "bench.json").write_text(json.dumps(data.draw(altered(keep))))
    else:
        path = data.draw(st.sampled_from(sorted((folder / "rounds").iterdir())))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in data.draw(altered(lines))))
    calibrate_from(folder)


# Data


@given(st.sampled_from(datasets.MNIST_FILES), DAMAGES)
def test_damaged_mnist_files_are_read_as_images_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, damage: Damage
) -> None:
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    path = root / "MNIST" / "raw" / name
    put(path, damage(path.read_bytes()))
    load_both(root)


SIZES = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 30), max_size=3)


@given(st.sampled_from(datasets.MNIST_FILES), st.integers(0, 255), st.integers(0, 255), SIZES, st.binary())
def test_mnist_files_of_any_kind_and_shape_are_read_as_images_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, kind: int, axes: int, sizes: list[int], body: bytes
) -> None:
    root = tmp_path_factory.mktemp("data")
    write_mnist(root)
    header = bytes([0, 0, kind, axes]) + b"".join(size.to_bytes(4, "big") for size in sizes)
    (root / "MNIST" / "raw" / name).write_bytes(header + body)
    load_both(root)


def load_both(root: Path) -> None:
    for train in (True, False):
        data = used_or_refused(datasets.load, Data(name="mnist", root=str(root), download=False), train)
        if data is not None:
            assert data.images.shape == (len(data.labels), 1, 28, 28)
            assert 0 <= data.labels.min() <= data.labels.max() < 10


def test_images_and_labels_of_other_numbers_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    keys = Data(name="mnist", root=str(tmp_path), download=False)
    for labels in (np.zeros(6), np.zeros(8), np.full(7, 10), np.zeros(0)):
        (raw / "train-labels-idx1-ubyte").write_bytes(idx(labels))
        assert used_or_refused(datasets.load, keys, True) is None


@few(40)
@given(st.integers(0, 5), DAMAGES)
def test_a_damaged_cifar_archive_is_refused(
    tmp_path_factory: pytest.TempPathFactory, number: int, damage: Damage
) -> None:
    root = tmp_path_factory.mktemp("data")
    for file in datasets.SPECS["cifar10"].files:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(b"")
    path = root / datasets.SPECS["cifar10"].files[number]
    put(path, damage(b"\x80\x02}q\x01U\x04dataq\x02." * 20))
    assert used_or_refused(datasets.load, Data(name="cifar10", root=str(root), download=False), True) is None


@given(
    st.binary(max_size=40)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.lists(st.lists(st.integers(-1, 5) | JSON, max_size=4), max_size=3).map(
        lambda v: json.dumps(v).encode()
    )
)
def test_any_partition_file_divides_the_samples_or_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "partition.json"
    path.write_bytes(content)
    keys = Data(partition="file", partition_file=str(path))
    parts = used_or_refused(partition, keys, np.zeros(5, dtype=np.int64), 2, 0)
    if parts is not None:
        used = [int(index) for part in parts for index in part]
        assert len(parts) == 2
        assert len(used) == len(set(used))
        assert set(used) <= set(range(5))
