"""The values that GPUs are held to are those of a CPU, and delays change none of them."""

from pathlib import Path

import pytest
import torch

from fslsage_rpc.measure.timeline import Timeline
from support import random_delays
from support.cpu_reference import ALGORITHMS, assert_as_on_a_cpu, tree
from support.rank_program import train_locally, train_on_ranks


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_file_has_what_this_version_computes(algorithm: str, tmp_path: Path) -> None:
    """`support/cpu_reference.py` makes it anew, where a change is to change numbers."""
    assert_as_on_a_cpu(train_locally(tree(tmp_path, algorithm, "cpu")), algorithm)


def test_another_number_is_seen(tmp_path: Path) -> None:
    outcome = train_locally(tree(tmp_path, "fsl_sage", "cpu"))
    name = "server's auxiliary of 1/floats"
    outcome.tensors[name][7] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="auxiliary of 1"):
        assert_as_on_a_cpu(outcome, "fsl_sage")


def test_phases_are_delayed_and_waits_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(random_delays, "delay", lambda seconds, device: slept.append(seconds))
    monkeypatch.setattr(Timeline, "phase", random_delays.delayed_phase(0))
    timeline = Timeline(device=torch.device("cpu"))
    for name in ("step", "upload_wait", "drift"):
        with timeline.phase(name):
            pass
    assert timeline.take().keys() == {"step", "upload_wait", "drift"}
    assert len(slept) == 2
    assert 0 < min(slept) < max(slept) < random_delays.LONGEST_SECONDS


@pytest.mark.gate
def test_delays_change_no_number_over_rpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDOM_DELAYS", "1")
    trees = [tree(tmp_path, algorithm, "cpu") for algorithm in ALGORITHMS]
    trees = [{**tree, "comm": {**tree["comm"], "transports": ["uv"]}} for tree in trees]
    outcomes = train_on_ranks(2, trees, tmp_path / "job")
    for algorithm, outcome in zip(ALGORITHMS, outcomes, strict=True):
        assert_as_on_a_cpu(outcome, algorithm)
