"""SIGTERM and Ctrl-C: the run stops after the round under way, says so, and goes on as if it never had."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import fslsage_rpc
from fslsage_rpc.config.schema import Config
from fslsage_rpc.job import stopping
from fslsage_rpc.job.stopping import INTERRUPTED, NOBODY_READS, STOPPED, StopRequest
from fslsage_rpc.runs.checkpoint_files import complete_folders
from fslsage_rpc.runs.screen import Screen
from support.commands import fslsage_on_ranks
from support.equality import assert_equal_runs
from support.job_processes import end_job, members, outer_environment, survivors
from support.run_folders import lines
from support.small_run import ROUNDS, TREE, write
from support.trees import BENCH

A_LONG_ROUND = "algorithm.alignment.epochs=1000000"
ALONE = [sys.executable, "-m", "fslsage_rpc"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
TORCHRUN += ["--nproc_per_node=3", "-m", "fslsage_rpc"]


@contextmanager
def started(tmp_path: Path, *overrides: str, command: list[str] = ALONE) -> Iterator[subprocess.Popen[str]]:
    """A run in a process group of its own, as a shell starts one; none of it outlives the test."""
    config = write(tmp_path)
    process = subprocess.Popen(
        [*command, "train", config, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=outer_environment(),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    try:
        yield process
    finally:
        end_job(process, config)


def wait_for_rounds(folder: Path, rounds: int, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: len(lines(folder)) >= rounds, process)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run that nobody stops, by transport; each is made once."""

    @functools.cache
    def made(transport: str) -> Path:
        folder = tmp_path_factory.mktemp(transport)
        if transport == "rpc":
            fslsage_on_ranks(3, folder, "train", write(folder))
        else:
            fslsage_rpc.train({**TREE, "output": str(folder)})
        return folder / "run"

    return made


@pytest.mark.parametrize(
    "transport",
    [pytest.param("local", marks=pytest.mark.nightly), pytest.param("rpc", marks=pytest.mark.gate)],
)
def test_sigterm_stops_after_the_round_and_the_run_goes_on(
    transport: str, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    folder = tmp_path / "run"
    with started(tmp_path, f"transport={transport}") as process:
        wait_for_rounds(folder, 2, process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert errors == ""
    rounds = len(lines(folder))
    assert 2 <= rounds < ROUNDS
    checkpoint = complete_folders(folder / "checkpoints")[0]
    assert checkpoint.name == f"round-{rounds:06d}"
    how = f"after round {rounds} of {ROUNDS}; the same command goes on from {checkpoint}"
    assert output.splitlines()[-1] == f"stopped on request {how}"
    assert (folder / "STOPPED").read_text() == f"goes on from {checkpoint}\n"
    assert not (folder / "summary.json").exists()

    if transport == "local":
        fslsage_rpc.train({**TREE, "output": str(tmp_path)})
    else:
        with started(tmp_path) as process:
            _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    assert not (folder / "STOPPED").exists()
    assert_equal_runs(whole(transport), folder)


def test_a_run_that_was_gone_on_with_counts_its_rounds_from_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = {"wire_bytes": {}, "test_accuracy": None, "round_seconds": 0.1}
    line |= {"train_loss": 1.0, "train_loss_of": "uploads"}
    screen = Screen(Config(rounds=50))
    screen.show_resumed([{**line, "round": round} for round in range(1, 13)], Path("before"))
    screen.show_round({**line, "round": 13})
    screen.show_stopped(Path("now"))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "stopped on request after round 13 of 50; the same command goes on from now"


@pytest.mark.nightly
def test_ctrl_c_of_the_self_launching_form_is_no_traceback(tmp_path: Path) -> None:
    with started(tmp_path, "ranks=2") as process:
        wait_for_rounds(tmp_path / "run", 1, process)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        output, errors = process.communicate(timeout=60)
        assert survivors(str(tmp_path)) == []
    assert (process.returncode, errors) == (STOPPED, "")
    assert output.splitlines()[-1].startswith("stopped on request after round ")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("rank", "under_torchrun"), [(0, False), (2, False), (2, True)], ids=["server", "client", "torchrun"]
)
def test_a_signal_to_one_rank_stops_all(rank: int, under_torchrun: bool, tmp_path: Path) -> None:
    with started(tmp_path, command=TORCHRUN if under_torchrun else ALONE) as process:
        wait_for_rounds(tmp_path / "run", 2, process)
        os.kill(members(str(tmp_path))[rank], signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    if under_torchrun:  # to which any other status of a rank is a failure
        assert process.returncode == 0
        assert (tmp_path / "run" / "STOPPED").exists()
    else:
        assert (process.returncode, errors) == (STOPPED, "")
    assert output.splitlines()[-1].startswith("stopped on request after round ")


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_torchrun_a_stopped_run_says_so_in_its_folder(
    number: signal.Signals, tmp_path: Path, whole: Callable[[str], Path]
) -> None:
    with started(tmp_path, command=TORCHRUN) as process:
        wait_for_rounds(tmp_path / "run", 2, process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode != 0  # torchrun's own, and it shows a traceback of its own
    assert "fslsage_rpc:" not in errors
    assert "exitcode" not in errors, "a rank failed"
    assert output.splitlines()[-1].startswith("stopped on request after round ")
    assert (tmp_path / "run" / "STOPPED").exists()
    fslsage_on_ranks(3, tmp_path, "train", str(tmp_path / "run.yaml"))
    assert_equal_runs(whole("rpc"), tmp_path / "run")


@pytest.mark.nightly
@pytest.mark.parametrize("transport", ["local", "rpc"])
def test_a_second_signal_ends_the_run_at_once_with_nothing_half_written(
    transport: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with started(tmp_path, f"transport={transport}", A_LONG_ROUND) as process:
        wait_for(lambda: (folder / "partition.json").exists(), process)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert any(
            "SIGTERM: stops after this round; once more ends it at once" in said for said in process.stdout
        )
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - sent < 15
        assert survivors(str(tmp_path)) == []
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert lines(folder) == []
    names = {path.name for path in folder.iterdir()} - {"tensorboard", ".lock"}  # which holds nothing now
    assert names == {"config.yaml", "environment.json", "partition.json", "metrics.jsonl"}


@pytest.mark.nightly
@pytest.mark.parametrize("transport", ["local", "rpc"])
def test_a_run_whose_reader_has_gone_ends_quietly(transport: str, tmp_path: Path) -> None:
    with started(tmp_path, f"transport={transport}", "rounds=1000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("round 1/1000 ")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == NOBODY_READS
        assert survivors(str(tmp_path)) == []
        process.stdout = None


def status_without_reader(*arguments: str, read: int = 0) -> tuple[int, str]:
    """The status and the errors of a command whose reader goes after so many lines, output buffered."""
    environment = {k: v for k, v in outer_environment().items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [*ALONE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(read):
            assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        status = process.wait(60)
        process.stdout = None
    finally:
        end_job(process, arguments[-1])
    return status, errors


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["local", "rpc"])
@pytest.mark.parametrize("command", ["train", "bench"])
def test_a_reader_may_go_before_the_first_line_or_later(command: str, transport: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump((TREE if command == "train" else BENCH) | {"output": str(tmp_path)}))
    for lines_read in (0, 1, 3):
        arguments = (command, str(config), f"transport={transport}", f"name=read-{lines_read}")
        assert status_without_reader(*arguments, read=lines_read) == (NOBODY_READS, "")
        assert survivors(str(tmp_path)) == []


@pytest.mark.gate
@pytest.mark.timeout(120)
def test_commands_that_only_show_something_end_quietly_without_a_reader(tmp_path: Path) -> None:
    run = fslsage_rpc.train({**TREE, "output": str(tmp_path), "transport": "local", "rounds": 1})
    config = str(run.folder / "config.yaml")
    for arguments in (
        ["--help"],
        ["evaluate", str(run.folder)],
        ["check", "--cuts", config],
        ["train", config],
    ):
        assert status_without_reader(*arguments) == (NOBODY_READS, ""), arguments


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["local", "rpc"])
def test_sigterm_leaves_no_traceback_whenever_it_comes(transport: str, tmp_path: Path) -> None:
    for tenths in (2, 10, 25, 45, 70, 100):
        overrides = f"transport={transport}", "rounds=3000", f"name=after-{tenths}"
        with started(tmp_path, *overrides) as process:
            time.sleep(tenths / 10)  # moments of the start, whatever this host makes of them
            process.terminate()
            _, errors = process.communicate(timeout=60)
            assert process.returncode in (STOPPED, 128 + signal.SIGTERM, -signal.SIGTERM)
            assert errors == ""
            assert survivors(str(tmp_path)) == []


@contextmanager
def signals_taken() -> Iterator[StopRequest]:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        yield stop
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_request_is_noted_also_while_the_main_thread_runs_no_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "INSISTENCE_SECONDS", 3600.0)
    taken = threading.Semaphore(0)
    take = StopRequest._take

    def note(self: StopRequest, number: int) -> None:
        take(self, number)
        taken.release()

    monkeypatch.setattr(StopRequest, "_take", note)
    with signals_taken() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert taken.acquire(timeout=60)
        assert stop()
        os.kill(os.getpid(), signal.SIGTERM)  # the first one's echo
        assert taken.acquire(timeout=60)


def test_a_run_that_has_stopped_does_not_ask_for_patience_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "INSISTENCE_SECONDS", 3600.0)
    said: list[str] = []
    with StopRequest(said.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop():
            time.sleep(0.01)
        patience = stop._patience
        assert patience is not None
        stop.obeyed()
        patience.join(60)  # it would ask for patience only after an hour
        assert not patience.is_alive()
    assert said == []


PROGRAM = """
from fslsage_rpc.job.stopping import StopRequest
import fslsage_rpc.job.stopping as stopping
stopping.INSISTENCE_SECONDS = 2.0
import torch
with StopRequest():
    print("ready", flush=True)
    torch.futures.Future().wait()  # in C++, for ever
"""


@pytest.mark.nightly
def test_a_second_signal_ends_a_process_that_waits_in_a_library() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # two that come together are one
        process.send_signal(signal.SIGTERM)  # the first one's echo
        time.sleep(3)  # longer than insistence takes to begin
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()


IMPORTING = """
import os, signal
from fslsage_rpc.job.stopping import uninterrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        print("imported")
    print("gone on")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.nightly
def test_ctrl_c_waits_until_modules_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("imported\ninterrupted\n", "")


AT_ONCE = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "fslsage_rpc.cli":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
from fslsage_rpc.__main__ import main
sys.exit(main())
"""


@pytest.mark.nightly
def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "")
