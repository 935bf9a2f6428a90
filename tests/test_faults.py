"""A fault at a named rank, round and place ends all ranks in bounded time, with one message of ours that says
which rank, where and why; torchrun's restart goes on from the last checkpoint as if nothing had been.
"""

import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from debian import install
from job_processes import end_job, members, outer_environment, survivors
from small_run import TREE, assert_close_runs, lines

import fslsage_rpc
from fslsage_rpc.training.checkpoint_files import MANIFEST

pytestmark = pytest.mark.waits

PROGRAM = str(Path(__file__).with_name("faulty_rank.py"))
END_SECONDS = 45
"""from the fault until all ranks are gone; torchrun itself leaves a stopped process 30 s"""
START_SECONDS = 60
HOST = platform.node()


@dataclass
class Ended:
    """A job that has ended: its status, our messages, what it showed, and the seconds from the fault until
    all ranks of the attempt that it struck were gone.
    """

    status: int
    messages: list[str]
    output: str
    seconds: float


def run_faulty(
    fault: str,
    tmp_path: Path,
    *overrides: str,
    ranks: int = 3,
    restarts: int = 0,
    within: Sequence[str] = (),
) -> Ended:
    """Train on a torchrun job, started `within` another command, with a fault, and see all of it gone."""
    config, moment = tmp_path / "run.yaml", tmp_path / "fault-time"
    config.write_text(yaml.safe_dump({**TREE, "output": str(tmp_path)}))
    command = [*within, sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}"]
    command += [f"--max_restarts={restarts}", PROGRAM, "train", str(config), *overrides]
    finished = int(fault.split(":")[1]) - 1
    variables = {
        "FAULT": fault,
        "FAULT_TIME": str(moment),
        "FAULT_AFTER": str(tmp_path / "run" / "checkpoints" / f"round-{finished:06d}" / MANIFEST),
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
    try:
        wait_for(lambda: moment.exists() or process.poll() is not None)
        assert moment.exists(), f"the fault has not happened: {said.read_text()}"
        struck = set(members(str(config)).values())
        wait_for(lambda: not struck.intersection(survivors(str(config))))
        seconds = time.time() - float(moment.read_text())
        wait_for(lambda: process.poll() is not None)
        assert survivors(str(config)) == []
    finally:
        end_job(process, str(config))
    messages = [line for line in said.read_text().splitlines() if line.startswith("fslsage_rpc: ")]
    noise = [line for line in said.read_text().splitlines() if "tensorpipe" in line.lower()]
    assert [line for line in noise if line not in messages] == []
    print(*messages, f"{seconds:.1f} s", sep="\n")
    assert len(messages) == 1, said.read_text()
    return Ended(process.returncode, messages, shown.read_text(), seconds)


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
FAULTS = {
    "2:4:computing:kill": rf"{LOST_CLIENT}round 4: {ENDED}",
    "2:4:uploading:kill": rf"{LOST_CLIENT}round 4.*: {ENDED}",
    "2:5:alignment:kill": rf"{LOST_CLIENT}round 5.*: {ENDED}",
    "2:4:all-reduce:kill": rf"{LOST_CLIENT}round 4 \(averaging\): {ENDED}",
    "0:4:serving:kill": rf"{LOST_SERVER}round 4.*: {ENDED}",
    "0:5:fitting:kill": rf"{LOST_SERVER}round 5.*: {ENDED}",
    "2:4:writing:kill": rf"{LOST_CLIENT}round 4.*: {ENDED}",
    "0:4:writing:kill": rf"{LOST_SERVER}round 4.*: {ENDED}",
    "1:4:computing:raise": rf"fslsage_rpc: rank 1 \(clients, host {re.escape(HOST)}\) failed in round 4: "
    r"ZeroDivisionError: a fault for the test",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_restarted_job_ends_as_one_that_was_never_disturbed(
    fault: str, tmp_path: Path, undisturbed: Path
) -> None:
    ended = run_faulty(fault, tmp_path, restarts=1)
    assert re.fullmatch(FAULTS[fault], ended.messages[0]), ended.messages
    assert ended.seconds < END_SECONDS
    round, place = int(fault.split(":")[1]), fault.split(":")[2]
    again = 1 if place == "writing" else 0
    assert_went_on(ended, round, tmp_path, undisturbed, again)


def assert_went_on(ended: Ended, round: int, folder: Path, undisturbed: Path, again: int = 0) -> None:
    """The restart did the round under way again, and so many that had been finished, and no other; it ended
    as if nothing had been.
    """
    assert ended.status == 0
    assert f"goes on from round {round - 1 - again} (" in ended.output
    assert_close_runs(undisturbed, folder / "run")


@pytest.mark.slow
def test_an_exception_on_a_rank_is_the_last_word_and_ends_all(tmp_path: Path) -> None:
    ended = run_faulty("1:3:computing:raise", tmp_path)
    assert ended.status == 1
    assert re.fullmatch(FAULTS["1:4:computing:raise"].replace("round 4", "round 3"), ended.messages[0])
    assert ended.seconds < END_SECONDS
    assert [line["round"] for line in lines(tmp_path / "run")] == [0, 1]


@pytest.mark.slow  # torchrun gives a stopped process 30 s before it kills it
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_falls_silent_is_named(rank: int, tmp_path: Path, undisturbed: Path) -> None:
    place, which, why = {
        0: ("serving", LOST_SERVER, "the job's store, which is there, has not answered for 5 s"),
        2: ("computing", LOST_CLIENT, "no sign of life for 5 s"),
    }[rank]
    ended = run_faulty(f"{rank}:3:{place}:stop", tmp_path, "comm.timeout_seconds=5", restarts=1)
    assert re.fullmatch(rf"{which}round 3.*: {why}", ended.messages[0])
    assert ended.seconds < 5 + END_SECONDS
    assert_went_on(ended, 3, tmp_path, undisturbed)


@pytest.mark.slow
def test_a_connection_that_is_cut_between_live_ranks_is_named(tmp_path: Path, undisturbed: Path) -> None:
    ended = run_faulty("2:3:computing:cut", tmp_path, restarts=1)
    assert re.search(r"rank \d \(.*\) lost a connection in round 3.*it is the network", ended.messages[0])
    assert ended.seconds < END_SECONDS
    assert_went_on(ended, 3, tmp_path, undisturbed)


ALONE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""in a network of its own, so that its firewall is no other program's"""


@pytest.mark.slow  # needs root
@pytest.mark.parametrize("place", ["alignment", "all-reduce"])
def test_a_connection_that_carries_nothing_any_more_is_noticed(
    place: str, tmp_path: Path, undisturbed: Path
) -> None:
    if shutil.which("iptables") is None:
        install()
    check = subprocess.run([*ALONE, "iptables", "--list"], capture_output=True, text=True)
    if check.returncode:
        pytest.skip(f"needs a network namespace and iptables ({check.stderr.strip()})")
    round = 5 if place == "alignment" else 3
    ended = run_faulty(
        f"2:{round}:{place}:mute", tmp_path, "comm.timeout_seconds=5", restarts=1, within=ALONE
    )
    assert re.search(
        rf"rank \d \(.*\) lost a connection in round {round}.*it is the network", ended.messages[0]
    )
    assert ended.seconds < 5 + END_SECONDS
    assert_went_on(ended, round, tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_never_starts_is_named(rank: int, tmp_path: Path, undisturbed: Path) -> None:
    ended = run_faulty(f"{rank}:0:start:absent", tmp_path, "comm.timeout_seconds=10", restarts=1)
    expected = f"rank {rank} did not start within 10 s"
    if rank == 0:
        expected = "rank 0 did not open the job's store at .*, port .*, within 10 s .*"
    assert re.fullmatch(f"fslsage_rpc: {expected}", ended.messages[0])
    assert ended.seconds < START_SECONDS + END_SECONDS
    assert ended.status == 0  # the restart had all ranks
    assert_close_runs(undisturbed, tmp_path / "run")
