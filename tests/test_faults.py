"""A fault at a named rank, round and place ends all ranks in bounded time, with one message of ours that says
which rank, where and why; torchrun's restart goes on from the last checkpoint as if nothing had been.
"""

import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import fslsage_rpc
from support.equality import assert_close_runs
from support.job_processes import end_job, members, outer_environment, survivors
from support.run_folders import lines
from support.small_run import TREE, write

PROGRAM = str(Path(__file__).with_name("support") / "faulty_rank.py")
END_SECONDS = 45
"""from the fault until all ranks are gone; torchrun itself leaves a stopped process 30 s"""
START_SECONDS = 60
HOST = platform.node()


@dataclass
class Ended:
    """A job that has ended: its status, what it showed, and for each fault our message, and the seconds until
    all ranks of the attempt that it struck were gone.
    """

    status: int
    output: str
    messages: list[str]
    seconds: list[float]


def run_faulty(
    faults: Sequence[str],
    tmp_path: Path,
    *overrides: str,
    restarts: int | None = None,
    within: Sequence[str] = (),
) -> Ended:
    """Train on a torchrun job, started `within` another command, with a fault in each attempt, restarted so
    often, or after all of them, and see each attempt gone.
    """
    config = write(tmp_path)
    restarts = len(faults) if restarts is None else restarts
    command = [*within, sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1"]
    command += ["--nproc_per_node=3", f"--max_restarts={restarts}", PROGRAM, "train", config, *overrides]
    variables = {
        "FAULTS": " ".join(faults),
        "FAULT_FOLDER": str(tmp_path),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    shown, said = tmp_path / "shown", tmp_path / "said"
    with shown.open("w") as output, said.open("w") as errors:
        process = subprocess.Popen(
            command,
            env={**outer_environment(), **variables},
            stdout=output,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    seconds = []
    try:
        for number, fault in enumerate(faults):
            moment = tmp_path / f"fault-{number}"
            wait_for(lambda moment=moment: moment.exists() or process.poll() is not None)
            assert moment.exists(), f"{fault} has not happened: {said.read_text()}"
            struck = set(members(config).values())
            wait_for(lambda struck=struck: not struck.intersection(survivors(config)))
            seconds.append(time.time() - float(moment.read_text()))
        wait_for(lambda: process.poll() is not None)
        assert survivors(config) == []
    finally:
        end_job(process, config)
    messages = [line for line in said.read_text().splitlines() if line.startswith("fslsage_rpc: ")]
    noise = [line for line in said.read_text().splitlines() if "tensorpipe" in line.lower()]
    assert [line for line in noise if line not in messages] == []
    for fault, message, took in zip(faults, messages, seconds, strict=False):
        print(f"{fault}: {message} ({took:.1f} s)")
    assert len(messages) == len(faults), said.read_text()
    return Ended(process.returncode, shown.read_text(), messages, seconds)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS + END_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, equal but for the rounding of a sum."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return fslsage_rpc.train({**TREE, "output": str(folder), "transport": "local"}).folder


LOST_CLIENT = rf"fslsage_rpc: rank 2 \(clients, host {re.escape(HOST)}\) was lost in "
LOST_SERVER = rf"fslsage_rpc: rank 0 \(server, host {re.escape(HOST)}\) was lost in "
ENDED = "its process has ended"
RAISED = rf"fslsage_rpc: rank 1 \(clients, host {re.escape(HOST)}\) failed in "
ERROR = "ZeroDivisionError: a fault for the test"
FAULTS = {
    "one of each": {
        "2:4:uploading:kill": rf"{LOST_CLIENT}round 4.*: {ENDED}",
        "0:5:fitting:kill": rf"{LOST_SERVER}round 5.*: {ENDED}",
    },
    "of a client rank": {
        "2:2:computing:kill": rf"{LOST_CLIENT}round 2: {ENDED}",
        "2:5:alignment:kill": rf"{LOST_CLIENT}round 5.*: {ENDED}",
        "2:7:all-reduce:kill": rf"{LOST_CLIENT}round 7 \(averaging\): {ENDED}",
        "2:9:writing:kill": rf"{LOST_CLIENT}round 9.*: {ENDED}",
        "1:11:computing:raise": rf"{RAISED}round 11: {ERROR}",
    },
    "of the server": {
        "0:4:serving:kill": rf"{LOST_SERVER}round 4.*: {ENDED}",
        "0:7:writing:kill": rf"{LOST_SERVER}round 7.*: {ENDED}",
    },
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(FAULTS[kind], marks=pytest.mark.gate if kind == "one of each" else pytest.mark.nightly)
        for kind in FAULTS
    ],
    ids=FAULTS,
)
def test_a_job_restarted_after_each_fault_ends_as_one_that_was_never_disturbed(
    faults: dict[str, str], tmp_path: Path, undisturbed: Path, request: pytest.FixtureRequest
) -> None:
    ended = run_faulty(list(faults), tmp_path)
    if request.node.get_closest_marker("nightly"):
        assert max(ended.seconds) < END_SECONDS
    for expected, message in zip(faults.values(), ended.messages, strict=True):
        assert re.fullmatch(expected, message)
    assert_went_on(ended, list(faults), tmp_path, undisturbed)


def assert_went_on(ended: Ended, faults: Sequence[str], folder: Path, undisturbed: Path) -> None:
    """Each restart did the round under way again, the one before too if its checkpoint was not whole, and
    no other; the job ended as if nothing had been.
    """
    assert ended.status == 0
    finished = []
    for fault in faults:
        _, round, place, _ = fault.split(":")
        finished.append(int(round) - (2 if place == "writing" else 1))
    assert [int(round) for round in re.findall(r"goes on from round (\d+) \(", ended.output)] == finished
    assert_close_runs(undisturbed, folder / "run")


@pytest.mark.nightly
def test_an_exception_on_a_rank_is_the_last_word_and_ends_all(tmp_path: Path) -> None:
    ended = run_faulty(["1:3:computing:raise"], tmp_path, restarts=0)
    assert ended.status == 1
    assert re.fullmatch(rf"{RAISED}round 3: {ERROR}", ended.messages[0])
    assert ended.seconds[0] < END_SECONDS
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2]


@pytest.mark.nightly  # torchrun gives a stopped process 30 s before it kills it
@pytest.mark.timeout(400)
def test_a_silent_rank_and_a_cut_connection_are_named(tmp_path: Path, undisturbed: Path) -> None:
    faults = {
        "0:3:serving:stop": rf"{LOST_SERVER}round 3.*: the job's store, which is there, has not answered for "
        "5 s",
        "2:5:computing:stop": rf"{LOST_CLIENT}round 5.*: no sign of life for 5 s",
        "2:7:computing:cut": r".*rank \d \(.*\) lost a connection in round 7.*it is the network.*",
    }
    ended = run_faulty(list(faults), tmp_path, "comm.timeout_seconds=5")
    for expected, message in zip(faults.values(), ended.messages, strict=True):
        assert re.fullmatch(expected, message)
    assert max(ended.seconds[:2]) < 5 + END_SECONDS
    assert ended.seconds[2] < END_SECONDS
    assert_went_on(ended, list(faults), tmp_path, undisturbed)


ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""in a network of its own, so that its firewall is no other program's"""


@pytest.mark.nightly  # needs root
@pytest.mark.timeout(400)
def test_a_connection_that_carries_nothing_any_more_is_noticed(tmp_path: Path, undisturbed: Path) -> None:
    check = subprocess.run([*ALONE, "iptables", "--list"], capture_output=True, text=True)
    if check.returncode:
        pytest.skip(f"needs a network namespace and iptables ({check.stderr.strip()})")
    faults = ["2:3:all-reduce:mute", "2:5:alignment:mute"]
    ended = run_faulty(faults, tmp_path, "comm.timeout_seconds=5", within=ALONE)
    for round, message in zip((3, 5), ended.messages, strict=True):
        assert re.search(rf"rank \d \(.*\) lost a connection in round {round}.*it is the network", message)
    assert max(ended.seconds) < 5 + END_SECONDS
    assert_went_on(ended, faults, tmp_path, undisturbed)


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_rank_that_never_starts_is_named(tmp_path: Path, undisturbed: Path) -> None:
    ended = run_faulty(["0:1:start:absent", "2:1:start:absent"], tmp_path, "comm.timeout_seconds=10")
    assert re.fullmatch(
        r"fslsage_rpc: rank 0 did not open the job's store at .*, port .*, within 10 s .*", ended.messages[0]
    )
    assert ended.messages[1] == "fslsage_rpc: rank 2 did not start within 10 s"
    assert max(ended.seconds) < START_SECONDS + END_SECONDS
    assert ended.status == 0  # the last attempt had all ranks
    assert_close_runs(undisturbed, tmp_path / "run")
