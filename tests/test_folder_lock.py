"""One writer of a run folder at a time, by the system's lock or signs of life; a dead one's file is none."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import yaml

import fslsage_rpc
from fslsage_rpc.runs import folder_lock
from fslsage_rpc.runs.folder_lock import NAME, FolderLock, Holder
from support.commands import said
from support.job_processes import members, started_job
from support.run_folders import lines
from support.small_run import write
from support.trees import BENCH, Tree, tree
from support.user_input import mistake

GONE = 2**22 + 1  # no process has so high an id on Linux


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life that come, and are missed, in a moment."""
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "SETTLING_SECONDS", 0.0)
    monkeypatch.setattr(folder_lock, "POLL_SECONDS", 0.01)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def name(folder: Path, holder: Holder) -> None:
    """Leave a file as a holder does that was killed."""
    (folder / NAME).write_bytes(holder.written())


def elsewhere() -> Holder:
    """A holder on another host."""
    return replace(Holder.here(), host="elsewhere", machine="another", process=1)


@contextmanager
def touched(path: Path) -> Iterator[None]:
    """A holder elsewhere gives signs of life."""
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("hasty")
def test_a_folder_has_one_holder_at_a_time(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        message = mistake(FolderLock, tmp_path)
        text = json.loads((tmp_path / NAME).read_text())
        assert (text["host"], text["process"]) == (os.uname().nodename, os.getpid())
        who = f"process {os.getpid()} on host {text['host']}, since {text['since']}"
        assert message.startswith(
            f"name: got {tmp_path.name!r}, where another run is writing to {tmp_path} ({who})"
        )
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path):
        pass


@pytest.mark.usefixtures("hasty", "without_locks")
def test_signs_of_life_hold_a_folder_where_there_are_no_locks(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        assert f"process {os.getpid()} on host" in mistake(FolderLock, tmp_path)
        lock.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_file_of_a_process_that_has_ended_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 3600.0)
    monkeypatch.setattr(folder_lock, "SETTLING_SECONDS", 0.0)
    name(tmp_path, replace(Holder.here(), process=GONE))
    FolderLock(tmp_path).release()


def test_with_the_systems_lock_no_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 3600.0)
    for text in (Holder.here().written(), b"", b"{}", b"[]", b"\0\xff", b'{"attempts": 3}'):
        (tmp_path / NAME).write_bytes(text)
        FolderLock(tmp_path).release()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_on_another_host_holds_it_while_it_gives_signs_of_life(
    locks: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Locks of some mounts do not reach other hosts."""
    if not locks:
        request.getfixturevalue("without_locks")
    name(tmp_path, elsewhere())
    with touched(tmp_path / NAME):
        assert "(process 1 on host elsewhere, since " in mistake(FolderLock, tmp_path)
    FolderLock(tmp_path).release()


@pytest.mark.usefixtures("hasty", "without_locks")
@pytest.mark.parametrize("job", folder_lock.ATTEMPTS)
def test_an_earlier_attempt_of_the_same_job_is_waited_for(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(job, "17")
    name(tmp_path, elsewhere())
    ended = threading.Event()

    def restart() -> None:
        FolderLock(tmp_path).release()
        ended.set()

    with touched(tmp_path / NAME):
        assert "elsewhere" in mistake(FolderLock, tmp_path)  # as a second start in the same allocation
        monkeypatch.setenv(folder_lock.ATTEMPTS[job], "1")
        threading.Thread(target=restart, daemon=True).start()
        assert not ended.wait(10 * folder_lock.PATIENCE_SECONDS)
    assert ended.wait(60)


@pytest.mark.usefixtures("hasty")
def test_who_was_silent_for_too_long_writes_no_more(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        name(tmp_path, elsewhere())
        assert "(process 1 on host elsewhere" in mistake(lock.check)
    assert (tmp_path / NAME).exists()  # the other's


@pytest.mark.usefixtures("hasty")
def test_train_and_bench_refuse_a_folder_that_another_run_writes_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees: dict[str, Tree] = {
        "train": tree(tmp_path, name="run", rounds=1),
        "bench": BENCH | {"name": "timed"},
    }
    for command, keys in trees.items():
        config, folder = tmp_path / f"{command}.yaml", tmp_path / str(keys["name"])
        config.write_text(yaml.safe_dump(keys | {"output": str(tmp_path), "transport": "local"}))
        (folder / "rounds").mkdir(parents=True)
        (folder / "rounds" / "one.jsonl").touch()
        with FolderLock(folder):
            done = said(capsys, command, config)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(
            f"fslsage_rpc: name: got {folder.name!r}, where another run is writing "
        )
        assert done.stderr.count("\n") == 1
        assert (folder / "rounds" / "one.jsonl").exists()
        assert said(capsys, command, config).returncode == 0
        assert not (folder / NAME).exists()


def test_a_complete_run_is_shown_evaluated_and_reported_while_another_process_has_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tree(tmp_path, name="run", rounds=1)
    run = fslsage_rpc.train(keys)
    with FolderLock(run.folder):
        fslsage_rpc.train(keys)
        assert "complete already" in capsys.readouterr().out
        assert said(capsys, "evaluate", run.folder).returncode == 0
        assert said(capsys, "report", run.folder, "--out", tmp_path / "page").returncode == 0


def test_a_refused_run_leaves_the_folder_to_others(tmp_path: Path) -> None:
    keys = tree(tmp_path, name="run", rounds=1)
    assert "batch of 1" in mistake(
        fslsage_rpc.train, {**keys, "model": {"name": "resnet18"}, "clients": {"batch_size": 1}}
    )
    assert not (tmp_path / "run" / NAME).exists()
    run = fslsage_rpc.train(keys)
    assert "seed: got 7" in mistake(fslsage_rpc.train, {**keys, "seed": 7})
    assert not (run.folder / NAME).exists()


# With processes


@contextmanager
def started(folder: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A run that no other shares its last override with; nothing of it outlives the test."""
    with (folder / "said").open("w") as said:
        command = ["train", write(folder), *overrides]
        with started_job(command, overrides[-1], stdout=said, stderr=subprocess.PIPE) as process:
            yield process


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_locked(file: IO[str]) -> bool:
    """Does the system give this process its lock on the file?"""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize(
    "transport",
    [pytest.param("local", marks=pytest.mark.nightly), pytest.param("rpc", marks=pytest.mark.gate)],
)
def test_a_second_start_is_refused_and_one_after_a_kill_goes_on(transport: str, tmp_path: Path) -> None:
    folder, how = tmp_path / "run", f"transport={transport}"
    with started(tmp_path, how, "rounds=90000") as first:
        wait_until(lambda: len(lines(folder)) >= 2)
        with started(tmp_path, how, "resume=never", "rounds=90001") as second:
            _, errors = second.communicate(timeout=90)
        assert second.returncode == 2
        assert errors.startswith("fslsage_rpc: name: got 'run', where another run is writing to ")
        holder = members(f"{tmp_path}/").get(0, first.pid)
        assert f"(process {holder} on host {os.uname().nodename}, since " in errors
        assert errors.count("\n") == 1
        so_far = len(lines(folder))
        wait_until(lambda: len(lines(folder)) > so_far)  # the first goes on
        first.kill()  # its ranks end by themselves, which takes a moment
        with started(tmp_path, how, "rounds=90002") as again:
            wait_until(lambda: len(lines(folder)) > so_far + 2)
            again.terminate()
            _, errors = again.communicate(timeout=90)
        assert (again.returncode, errors) == (75, "")
        assert "goes on from round " in (tmp_path / "said").read_text()
    rounds = [line["round"] for line in lines(folder)]
    assert rounds == list(range(1, len(rounds) + 1))


HOLDS = """
import os, subprocess, sys, time
from pathlib import Path
from fslsage_rpc.runs.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
forked = os.fork()
if forked == 0:
    time.sleep(60)
    os._exit(0)
other = subprocess.Popen(["sleep", "60"], close_fds=False)
print(forked, other.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.gate
def test_no_child_keeps_the_lock_of_a_process_that_was_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True)
    children: list[int] = []
    try:
        assert holder.stdout is not None
        children = [int(word) for word in holder.stdout.readline().split()]
        holder.kill()
        holder.wait(30)
        with open(tmp_path / NAME) as file:
            wait_until(lambda: is_locked(file))  # the forked child lets go once it runs
        assert {child for child in children if Path(f"/proc/{child}").exists()} == set(children)
    finally:
        holder.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
        holder.communicate(timeout=30)


def test_a_wait_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(folder_lock, "RESTART_SECONDS", 0.5)
    monkeypatch.setattr(folder_lock, "TELLING_SECONDS", 0.0)
    said: list[str] = []
    with FolderLock(tmp_path):
        mistake(FolderLock, tmp_path, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"waits for process {os.getpid()} on host ")
