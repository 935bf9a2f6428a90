"""A fault on one rank ends all ranks in bounded time, with one message of ours, the last on the screen."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).with_name("faulty_rank.py"))
QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
END_SECONDS = 45
START_SECONDS = 60


def run_faulty(fault: str, tmp_path: Path, *overrides: str) -> tuple[int, list[str], float]:
    """Run the quickstart with a fault under torchrun.

    Returns:
        The exit status, the lines of the ranks (torchrun's own left out), and the seconds from start to end.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", PROGRAM]
    command += ["train", QUICKSTART, f"output={tmp_path}", "comm.transports=[uv]", *overrides]
    log = tmp_path / "torchrun.log"
    started = time.monotonic()
    with log.open("w") as torchrun_says:
        process = subprocess.Popen(
            command,
            env={**os.environ, "FAULT": fault},
            stdout=subprocess.DEVNULL,
            stderr=torchrun_says,
            text=True,
            start_new_session=True,
        )
        try:
            status = process.wait(START_SECONDS + END_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - started
    lines = log.read_text().splitlines()
    ours = [i for i, line in enumerate(lines) if line.startswith("fslsage_rpc:")]
    assert len(ours) <= 1, lines
    assert not [line for line in lines if "tensorpipe" in line.lower()], "a wall of transport errors"
    return status, [lines[i] for i in ours], seconds


def survivors(tmp_path: Path) -> list[str]:
    """Processes of the job that are still there."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"output={tmp_path}" in line]


@pytest.mark.parametrize("rank", [1, 2])
def test_an_exception_on_a_rank_is_the_last_word_and_ends_all(rank: int, tmp_path: Path) -> None:
    status, messages, seconds = run_faulty(f"{rank}:20:raise", tmp_path)
    assert status == 1
    assert messages == [f"fslsage_rpc: rank {rank} (clients) failed: ZeroDivisionError: a fault for the test"]
    assert seconds < START_SECONDS + END_SECONDS
    assert survivors(tmp_path) == []


def test_a_killed_rank_ends_all_and_keeps_the_finished_rounds(tmp_path: Path) -> None:
    status, _, _ = run_faulty("1:60:kill", tmp_path)
    assert status == 1
    assert survivors(tmp_path) == []
    lines = (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= 1


@pytest.mark.slow  # torchrun gives a stopped process 30 s before it kills it
def test_a_rank_that_falls_silent_is_named(tmp_path: Path) -> None:
    status, messages, _ = run_faulty("2:20:stop", tmp_path, "comm.timeout_seconds=5")
    assert status == 1
    assert messages == ["fslsage_rpc: rank 0: rank 2 has given no sign of life for 5 s"]
    assert survivors(tmp_path) == []
