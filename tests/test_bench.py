"""The benchmark: its statistics by hand, its refusals, and one of it from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fslsage_rpc.bench.pieces import fit_seconds
from fslsage_rpc.bench.statistics import BenchRun, quartiles, summarise
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Bench
from fslsage_rpc.config.variants import bench_variants
from support.commands import fslsage_on_ranks, said
from support.trees import BENCH
from support.user_input import mistake


def line(seconds: float, elapsed: float = 0.0, accuracy: float | None = None) -> dict[str, Any]:
    return {
        "round": 1,
        "round_seconds": seconds,
        "cpu_seconds": {"ranks": [seconds, seconds]},
        "host_busy": None,
        "elapsed_seconds": elapsed,
        "test_accuracy": accuracy,
        "phases": {"client": {"data": seconds / 2}, "server": {"idle": seconds}},
        "requests": {
            "push": {
                "count": 2,
                "round_trip_seconds": 1.0,
                "send_seconds": 0.1,
                "queue_seconds": 0.2,
                "compute_seconds": 0.4,
                "wire_seconds": 0.4,
                "up_bytes": 100,
                "down_bytes": 20,
            }
        },
        "wire_bytes": {"smashed_up": 100},
        "paper_bytes": 10,
        "paper_bytes_total": 10,
    }


def run(variant: str, repeat: int, seconds: list[float], interval: int = 1) -> BenchRun:
    return BenchRun(variant, repeat, interval, [line(s) for s in seconds], [s / 2 for s in seconds])


def test_a_sample_is_a_whole_alignment_interval_behind_the_warm_up() -> None:
    seven = run("a", 0, [9, 9, 1, 3, 2, 4, 100], interval=2)
    assert seven.samples(warmup_rounds=1) == [range(2, 4), range(4, 6)]  # the last round is half an interval
    assert seven.samples(warmup_rounds=0)[0] == range(0, 2)
    keys = Bench(variants={"a": []}, reference="a", warmup_rounds=1)
    record = summarise([seven], keys)["a"]
    assert record["round_seconds"] == {"median": 2.5, "q1": 2.25, "q3": 2.75, "n": 2}
    assert record["efficiency"] == 0.5
    assert record["bound_seconds"] == 1.25
    assert record["phases"]["client"] == {"data": 1.25}  # means over the rounds of the samples alone


def test_fits_behind_the_training_are_in_the_bound_of_their_interval() -> None:
    """Two rounds of 4 s, whose own bounds are 2 s; on all workers the fits take so long in each."""
    for fits, bound in (([3.0, 0.0], 2.0), ([1.5, 4.5], 3.0), ([0.0, 7.0], 3.5)):
        one = run("a", 0, [4.0] * 4, interval=2)
        one.fits += [9.0, 9.0, *fits]  # of the warm-up, which counts for nothing
        record = summarise([one], Bench(variants={"a": []}, reference="a", warmup_rounds=1))["a"]
        assert (record["bound_seconds"], record["efficiency"]) == (bound, bound / 4)


def test_seconds_of_fits_are_those_of_the_device_that_makes_them() -> None:
    on_cpu = {"cpu_seconds": {"server": {"alignment": 2.0, "step": 1.0}}}
    assert fit_seconds(on_cpu) == 2.0
    assert fit_seconds({"cpu_seconds": {"server": {"step": 1.0}}}) == 0.0
    on_gpu = {"client": {}, "server": {"alignment": 0.5}}
    assert fit_seconds({**on_cpu, "device_seconds": on_gpu}) == 0.5
    no_fit_in_it = {"client": {}, "server": {"step": 0.5}}
    assert fit_seconds({**on_cpu, "device_seconds": no_fit_in_it}) == 0.0
    gpu_of_clients = {"client": {"data": 0.5}, "server": {}}
    assert fit_seconds({**on_cpu, "device_seconds": gpu_of_clients}) == 2.0


def test_ratios_are_paired_within_each_repeat() -> None:
    runs = [run("ref", 0, [1, 1]), run("a", 0, [2, 2]), run("a", 1, [30, 30]), run("ref", 1, [10, 10])]
    keys = Bench(variants={"a": [], "ref": []}, reference="ref", warmup_rounds=0)
    assert summarise(runs, keys)["a"]["ratio_to_reference"] == {"median": 2.5, "q1": 2.25, "q3": 2.75}
    assert summarise(runs, keys)["ref"]["ratio_to_reference"] == {"median": 1, "q1": 1, "q3": 1}


def test_requests_are_means_of_one_and_bytes_over_wire_seconds() -> None:
    keys = Bench(variants={"a": []}, reference="a", warmup_rounds=0)
    (push,) = summarise([run("a", 0, [1, 1])], keys)["a"]["requests"].values()
    assert push == {
        "per_round": 2,
        "round_trip_seconds": 0.5,
        "send_seconds": pytest.approx(0.05),
        "queue_seconds": pytest.approx(0.1),
        "compute_seconds": pytest.approx(0.2),
        "wire_seconds": pytest.approx(0.2),
        "bytes_per_second": pytest.approx(300),
    }


def test_the_way_to_a_target_accuracy() -> None:
    lines = [line(1, 1, 0.2), line(1, 2, None), line(1, 3, 0.9), line(1, 4, 0.95)]
    reached = BenchRun("a", 0, 1, lines, [1] * 4)
    keys = Bench(variants={"a": []}, reference="a", target_accuracy=0.9)
    assert summarise([reached], keys)["a"]["target"] == {
        "accuracy": 0.9,
        "rounds": 3,
        "seconds": 3,
        "wire_bytes": 300,
        "paper_bytes": 10,
    }
    keys = Bench(variants={"a": []}, reference="a", target_accuracy=0.99)
    assert summarise([reached], keys)["a"]["target"] is None


def test_one_value_has_no_quartiles() -> None:
    assert quartiles([3.0]) == {"median": 3.0, "q1": None, "q3": None}


def bench_tree(**keys: Any) -> dict[str, Any]:
    return {"bench": {"variants": {"a": ["algorithm.name=fedavg"], "b": []}, "reference": "b", **keys}}


def test_variants_are_overrides_of_one_configuration() -> None:
    configs = bench_variants(from_tree({**bench_tree(), "rounds": 7}))
    assert {name: config.algorithm.name for name, config in configs.items()} == {
        "a": "fedavg",
        "b": "fsl_sage",
    }
    assert all(config.rounds == 7 for config in configs.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variants": {}}, "bench.variants: got {}, expected variants, as "),
        ({"reference": "c"}, "bench.reference: got 'c', expected one of the variants a, b"),
        ({"variants": {"b": ["ranks=4"]}}, "bench.variants.b: got ranks=4, expected keys that "),
        ({"variants": {"b": ["comm.transports=[uv]"]}}, "bench.variants.b: got comm.transports=[uv], "),
        ({"variants": {"b": ["seed"]}}, "bench.variants.b: seed: expected key=value"),
        ({"variants": {"b": ["clients.cout=3"]}}, "bench.variants.b: clients.cout: unknown key"),
        ({"variants": {"b": [], "../x": []}}, "bench.variants: got '../x', expected names of "),
    ],
)
def test_variants_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    assert mistake(bench_variants, from_tree(bench_tree(**keys))).startswith(message)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**BENCH, "output": str(tmp_path / "runs")}, sort_keys=False))
    return path


@pytest.mark.nightly
def test_a_benchmark_runs_in_order_and_in_reverse_and_ends_in_tables(config: Path, tmp_path: Path) -> None:
    shown = fslsage_on_ranks(2, tmp_path, "bench", config)
    order = [line.split()[2] for line in shown.splitlines() if line.startswith("repeat ")]
    assert order == ["fsl_sage", "splitfed_v1", "fedavg", "fedavg", "splitfed_v1", "fsl_sage"]
    for word in ("s / round", "efficiency", "exchange", "align", "target accuracy", "round trip", "bench.md"):
        assert word in shown, shown

    folder = tmp_path / "runs" / "small"
    result = json.loads((folder / "bench.json").read_text())
    assert result["reference"] == "splitfed_v1"
    assert len(result["environment"]["ranks"]) == 2
    assert all(speeds["0"]["round_trip_seconds"] > 0 for speeds in result["environment"]["link_speeds"])
    assert list(result["variants"]) == ["fsl_sage", "splitfed_v1", "fedavg"]
    samples = {name: record["round_seconds"]["n"] for name, record in result["variants"].items()}
    assert samples == {
        "fsl_sage": 2,
        "splitfed_v1": 6,
        "fedavg": 6,
    }  # one interval, or three rounds, a repeat
    for record in result["variants"].values():
        seconds = record["round_seconds"]
        assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
        assert record["bound_seconds"] > 0
        assert 0 < record["efficiency"] <= 1.05  # the link is measured on its own: a little noise
        assert sum(record["phases"]["client"].values()) == pytest.approx(
            sum(record["phases"]["server"].values()), rel=1e-6
        )
        assert record["target"]["rounds"] == 1
    assert result["variants"]["splitfed_v1"]["ratio_to_reference"]["median"] == 1
    rounds = (folder / "rounds" / "fsl_sage-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in rounds] == [1, 2, 3, 4]
    for row in ("| fsl_sage |", "| splitfed_v1 | exchange |", "efficiency = bound / measured"):
        assert row in (folder / "bench.md").read_text()


def test_wrong_input_is_one_line_before_anything_is_run(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = said(capsys, "bench", config, "transport=local", "rounds=3", "bench.warmup_rounds=2")
    assert done.returncode == 2
    wrong = "bench.variants.fsl_sage: rounds: got 3, expected at least 4: a whole alignment interval (2)"
    behind = "behind bench.warmup_rounds (2), to whole intervals"
    assert done.stderr.strip() == f"fslsage_rpc: {wrong} {behind}"


def test_a_benchmark_runs_all_rounds_whatever_stop_says_in_one_process_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**BENCH, "transport": "local", "output": str(tmp_path), "stop": {"accuracy": 0.01}}
    keys["clients"] = {"count": 3, "batch_size": 16, "participation": 0.3}
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(keys, sort_keys=False))
    done = said(capsys, "bench", config)
    assert done.returncode == 0, done.stderr
    assert "no links: one process" in done.stdout
    assert not (tmp_path / "small" / "checkpoints").exists()
    text = (tmp_path / "small" / "bench.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["variants"]["fedavg"]["round_seconds"]["n"] == 6


def test_a_run_and_a_benchmark_keep_out_of_each_others_folder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "train", config, "transport=local").returncode == 0
    done = said(capsys, "bench", config, "transport=local")
    assert done.returncode == 2
    assert "holds a training run; choose another name" in done.stderr
    again = said(capsys, "train", config, "transport=local")
    assert "complete already" in again.stdout
    folder = tmp_path / "runs" / "other"
    folder.mkdir()
    (folder / "bench.json").write_text("{}")
    done = said(capsys, "train", config, "transport=local", "name=other")
    assert done.returncode == 2
    assert "holds a benchmark; choose another" in done.stderr
