"""Assertions that two trainings, or two runs, are the same."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fslsage_rpc.notebook import Run
from support.rank_program import Outcome
from support.run_folders import everything, lines
from support.small_run import ROUNDS

MEASURED = (
    *("round_seconds", "elapsed_seconds", "evaluation_seconds", "cpu_seconds", "host_busy"),
    *("phases", "requests", "peak_memory"),
)
OWN_COLLECTIVES = "weights_allreduce"  # depends on the number of ranks by definition; all else travels by RPC


def without_seconds(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures that are equal in equal runs."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same(a: Outcome, b: Outcome) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, expected in a.tensors.items():
        difference = (b.tensors[name].double() - expected.double()).norm()
        assert difference <= 1e-10 * expected.double().norm(), name
    assert len(a.lines) == len(b.lines) > 0
    for expected, line in zip(a.lines, b.lines, strict=True):
        for key in ("train_loss", "test_loss", "test_accuracy"):
            assert line[key] == (expected[key] and pytest.approx(expected[key], rel=1e-9)), key
        for key in ("alignment", "drift"):
            assert line[key] == (expected[key] and pytest.approx(expected[key], rel=1e-6)), key
        for key in ("round", "paper_bytes", "paper_bytes_total", "participants"):
            assert line[key] == expected[key], key
        by_rpc = [
            {k: v for k, v in x["wire_bytes"].items() if k != OWN_COLLECTIVES} for x in (expected, line)
        ]
        assert by_rpc[0] == by_rpc[1]


def assert_same_bits(a: Outcome, b: Outcome) -> None:
    """The same weights, losses, alignments, drifts and bytes, to the last bit."""
    assert a.tensors.keys() == b.tensors.keys()
    for name, expected in a.tensors.items():
        assert torch.equal(b.tensors[name], expected), name
    for expected_line, line in zip(a.lines, b.lines, strict=True):
        for key in ("train_loss", "test_loss", "alignment", "drift", "wire_bytes"):
            assert line[key] == expected_line[key], key


def assert_identical(a: Run, b: Run) -> None:
    """Bit for bit: every party's state, the model, and the figures that are not seconds."""
    expected, found = everything(a), everything(b)
    assert expected.keys() == found.keys()
    assert sum(isinstance(value, torch.Tensor) for value in expected.values()) > 20
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]
        assert same, name
    models = [torch.load(run.folder / "model.pt", weights_only=True) for run in (a, b)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert without_seconds(a.rounds) == without_seconds(b.rounds)
    for key in ("rounds", "test_accuracy", "test_loss", "wire_bytes", "wire_bytes_per_client"):
        assert a.summary[key] == b.summary[key], key


def assert_whole(run: Run) -> None:
    """One line for each round, and a clock and a ledger that add up."""
    assert [line["round"] for line in run.rounds] == list(range(1, run.summary["rounds"] + 1))
    for each, total in (("round_seconds", "elapsed_seconds"), ("paper_bytes", "paper_bytes_total")):
        sums = np.cumsum([line[each] for line in run.rounds])
        assert [line[total] for line in run.rounds] == pytest.approx(sums)
    assert run.summary["training_seconds"] == run.rounds[-1]["elapsed_seconds"]
    assert [line["wire_bytes"]["initial_broadcast"] > 0 for line in run.rounds] == [True] + [False] * (
        len(run.rounds) - 1
    )


def assert_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """To 1e-10."""
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            difference = (value.double() - found[name].double()).norm()
            assert difference <= 1e-10 * value.double().norm(), name
        elif "client_bytes" not in name:  # averaging moves bytes between ranks
            assert value == found[name] or value == pytest.approx(found[name], rel=1e-12), name


def assert_equal_runs(a: Path, b: Path) -> None:
    """On the same number of ranks: to the last bit, but for seconds; one line for each round."""
    mine, its = lines(a), lines(b)
    assert [line["round"] for line in its] == list(range(1, ROUNDS + 1))
    assert without_seconds(mine) == without_seconds(its)
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (a, b)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def assert_close_runs(a: Path, b: Path) -> None:
    """On different numbers of ranks: to the rounding of a sum."""
    mine, its = lines(a), lines(b)
    assert [line["round"] for line in its] == list(range(1, ROUNDS + 1))
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert [line[key] for line in its] == pytest.approx([line[key] for line in mine], rel=1e-10)
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (a, b)]
    for name, weights in models[0].items():
        torch.testing.assert_close(models[1][name], weights, rtol=1e-10, atol=1e-12)


def assert_device_seconds(outcome: Outcome) -> None:
    """FSL-SAGE on a GPU has the device's seconds of every phase that computes, and of no wait."""
    for round, line in enumerate(outcome.lines):
        seconds = line["device_seconds"]
        assert {"data", "forward_backward", "estimate", "averaging"} <= seconds["client"].keys()
        assert {"step", "drift", "averaging"} <= seconds["server"].keys()
        assert seconds["server"].get("alignment", 0.0) > 0 or round == 1
        assert not any(name.endswith("_wait") for name in seconds["client"])
        assert 0 < sum(seconds["client"].values()) <= 1.1 * line["round_seconds"]
