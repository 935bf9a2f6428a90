"""`fslsage sweep`: what is trained, skipped, gone on with and reported; the report has a file of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, ClassVar

import pytest
import yaml

from fslsage_rpc.cli import main
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.variants import sweep_runs
from fslsage_rpc.job.stopping import STOPPED
from fslsage_rpc.sweep import run as sweeping
from fslsage_rpc.sweep.sweep_screen import pace_of, seconds_left, spelled
from fslsage_rpc.sweep.watched_run import WatchedRun
from support.commands import said
from support.equality import assert_identical
from support.job_processes import started_job, survivors
from support.run_folders import finished, lines
from support.trees import tree
from support.user_input import mistake

VARIANTS = {"fsl_sage": [], "splitfed_v1": ["algorithm.name=splitfed_v1"]}
NEVER_FINITE = "optimizer.server.lr=1.0e+300"


def write(
    folder: Path, variants: Mapping[str, Any] = VARIANTS, seeds: Sequence[int] = (0, 1), **keys: Any
) -> str:
    """The configuration of a sweep in this folder."""
    keys = {"name": "study", "rounds": 2, "evaluation": {"every": 1}, **keys}
    config = tree(folder, {"sweep": {"variants": dict(variants), "seeds": list(seeds)}}, keys)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return str(path)


class InThisProcess:
    """A process that is none: what it would do is done as it is started.

    Attributes:
        started: the commands of all so far.
    """

    started: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], stdout: IO[bytes], env: Mapping[str, str], **others: Any):
        type(self).started.append(command)
        assert command[:4] == [sys.executable, "-m", "fslsage_rpc", "train"]
        self.returncode = main(command[3:])

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[InThisProcess]]:
    InThisProcess.started = []
    monkeypatch.setattr("fslsage_rpc.sweep.watched_run.subprocess.Popen", InThisProcess)
    monkeypatch.setattr(sweeping, "POLL_SECONDS", 0.0)
    monkeypatch.setattr("fslsage_rpc.report.terminal.has_matplotlib", lambda: False)  # figures take seconds
    return InThisProcess


def trained(processes: type[InThisProcess]) -> list[str]:
    """The names of the runs that were started since this was last asked."""
    names = [Path(command[-1]).parent.name for command in processes.started]
    processes.started.clear()
    return names


def sweep(capsys: pytest.CaptureFixture[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return said(capsys, "sweep", *arguments)


def test_every_variant_is_trained_with_every_seed_and_then_nothing_is_left(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path)
    done = sweep(capsys, config)
    assert done.returncode == 0, done.stderr
    names = [f"{variant}-seed{seed}" for seed in (0, 1) for variant in VARIANTS]
    assert trained(in_this_process) == names
    for name in names:
        assert finished(tmp_path / "study" / name).summary["rounds"] == 2
    assert "4/4  splitfed_v1-seed1  accuracy 0." in done.stdout
    again = sweep(capsys, config)
    assert again.returncode == 0
    assert trained(in_this_process) == []
    assert "4 of 4 runs are complete already" in again.stdout


def test_a_run_of_a_sweep_is_the_run_that_train_makes(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, seeds=[3])
    assert sweep(capsys, config, "--only", "splitfed_v1").returncode == 0
    alone = ["seed=3", "name=alone", "algorithm.name=splitfed_v1"]
    assert said(capsys, "train", config, *alone).returncode == 0
    assert_identical(finished(tmp_path / "alone"), finished(tmp_path / "study" / "splitfed_v1-seed3"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("splitfed_v1", ["splitfed_v1-seed0", "splitfed_v1-seed1"]),
        ("*-seed1", ["fsl_sage-seed1", "splitfed_v1-seed1"]),
        ("f*", ["fsl_sage-seed0", "fsl_sage-seed1"]),
        ("fsl_sage-seed0", ["fsl_sage-seed0"]),
    ],
)
def test_a_pattern_names_variants_or_runs(tmp_path: Path, pattern: str, names: list[str]) -> None:
    config = from_tree(yaml.safe_load(Path(write(tmp_path)).read_text()))
    assert [run.config.name for run in sweeping.selected(config, pattern)] == names


def test_jobs_of_an_array_share_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = sweep_runs(from_tree(yaml.safe_load(Path(write(tmp_path, seeds=range(5))).read_text())))
    for key, value in (("MIN", 2), ("COUNT", 3), ("MAX", 4)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", str(value))
    shares = []
    for number in (2, 3, 4):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        shares.append(sweeping.share(runs))
    assert [len(share) for share in shares] == [4, 3, 3]
    assert sorted(run.folder for share in shares for run in share) == sorted(run.folder for run in runs)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    assert mistake(sweeping.share, runs) == "--array: got a job 6 of 3 from 2 on, expected an array as 0-3"


def test_what_fails_or_diverges_is_reported_and_stops_no_other(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"lost": [], "unready": [], "wild": [NEVER_FINITE], "sound": []}
    config = write(tmp_path, variants, seeds=[0])
    (tmp_path / "study" / "lost-seed0" / "metrics.jsonl").mkdir(parents=True)  # cannot be written to
    (tmp_path / "study" / "unready-seed0").touch()  # is no folder
    done = sweep(capsys, config)
    assert done.returncode == 1
    assert trained(in_this_process) == ["lost-seed0", "wild-seed0", "sound-seed0"]
    said = done.stdout.splitlines()
    assert any(line.startswith("1/4  lost-seed0  failed: ") for line in said)
    assert any(line.startswith("2/4  unready-seed0  failed: cannot be started (") for line in said)
    assert any("3/4  wild-seed0" in line and "diverged in round 1" in line for line in said)
    assert any(line.startswith("4/4  sound-seed0  accuracy") for line in said)
    assert any(line.startswith("lost-seed0 failed: ") for line in said)
    again = sweep(capsys, config)
    assert again.returncode == 1
    assert trained(in_this_process) == ["lost-seed0"]  # one that has diverged is complete


def test_more_rounds_are_gone_on_with(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, seeds=[0])
    assert sweep(capsys, config).returncode == 0
    assert sweep(capsys, config, "rounds=3", "sweep.seeds=[0, 4]").returncode == 0
    assert len(trained(in_this_process)) == 2 + 4
    assert [line["round"] for line in lines(tmp_path / "study" / "fsl_sage-seed0")] == [1, 2, 3]
    straight = said(capsys, "train", config, "rounds=3", "seed=0", "name=straight")
    assert straight.returncode == 0
    assert_identical(finished(tmp_path / "straight"), finished(tmp_path / "study" / "fsl_sage-seed0"))


def test_other_settings_in_the_same_folder_are_refused_before_anything_is_trained(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, seeds=[0])
    assert sweep(capsys, config, "--only", "fsl_sage").returncode == 0
    trained(in_this_process)
    other = sweep(capsys, config, "clients.batch_size=8", "--only", "splitfed_v1")
    assert other.returncode == 2
    assert "clients.batch_size: got 8, expected 16 as in the run in" in other.stderr
    assert trained(in_this_process) == []
    assert yaml.safe_load((tmp_path / "study" / "sweep.yaml").read_text())["clients"]["batch_size"] == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=1", "rounds: got 1, expected 2 or more, as the run in"),
        ("evaluation.every=2", "evaluation.every: got 2, expected 1 as in the run in"),
        ("ranks=2", "ranks: got 2, expected 3 as in the run in"),
    ],
)
def test_runs_of_one_mean_are_measured_alike(
    tmp_path: Path,
    in_this_process: type[InThisProcess],
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    config = write(tmp_path, seeds=[0])
    assert sweep(capsys, config, "--only", "fsl_sage").returncode == 0
    refused = sweep(capsys, config, override)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"fslsage_rpc: {message}")
    assert sweep(capsys, config, "comm.timeout_seconds=99", "checkpoint.keep=1").returncode == 0
    assert trained(in_this_process) == ["fsl_sage-seed0", "splitfed_v1-seed0"]


def test_runs_are_replaced_by_others_where_that_is_asked_for(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, seeds=[0])
    assert sweep(capsys, config).returncode == 0
    trained(in_this_process)
    anew = ("clients.batch_size=8", "rounds=1", "resume=never")
    assert sweep(capsys, config, *anew, "--only", "fsl_sage").returncode == 2  # the other would stay
    assert trained(in_this_process) == []
    assert sweep(capsys, config, *anew).returncode == 0
    assert trained(in_this_process) == ["fsl_sage-seed0", "splitfed_v1-seed0"]
    assert len(lines(tmp_path / "study" / "fsl_sage-seed0")) == 1
    assert sweep(capsys, config, *anew[:2]).returncode == 0
    assert trained(in_this_process) == []


def test_a_later_sweep_changes_no_settings_of_runs_that_an_earlier_one_has_yet_to_begin(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, seeds=[0])
    assert sweep(capsys, config).returncode == 0
    for command in in_this_process.started:
        planned = yaml.safe_load(Path(command[-1]).read_text())
        assert (planned["rounds"], planned["sweep"]["variants"]) == (2, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep.variants={}"], "sweep.variants: got {}, expected variants, as "),
        (["--only", "x*"], "--only: got 'x*', expected a pattern for some of fsl_sage, splitfed_v1"),
        (["--launch", "'abc"], '--launch: got "\'abc", expected a program that is there, as '),
        (["--launch", "launch/nosuch.sh"], "--launch: got 'launch/nosuch.sh', expected a program "),
        (["--launch", ""], "--launch: got '', expected a program that is there, as launch/local.sh"),
        (["--jobs", "1000"], "--jobs: got 1000, expected at most "),
        (["--jobs", "0"], "--jobs: got '0', expected a whole number from 1 on"),
        (["model.cut=nowhere"], "sweep.variants.fsl_sage: model.cut: got 'nowhere', expected "),
        (["transport=rpc", "ranks=5"], "sweep.variants.fsl_sage: clients.count: got 3, expected at least 4"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    refused = sweep(capsys, write(tmp_path), *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"fslsage_rpc: {message}")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_folder_of_something_else_is_no_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    assert said(capsys, "train", config).returncode == 0
    refused = sweep(capsys, config)
    assert "holds a training run; choose another" in refused.stderr
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "sweep.yaml").touch()
    refused = said(capsys, "train", config, "name=sweeps")
    assert refused.returncode == 2
    assert "holds a sweep; choose another" in refused.stderr


def test_a_rank_of_a_job_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    refused = sweep(capsys, write(tmp_path))
    assert refused.stderr.startswith("fslsage_rpc: sweep: got a rank of a job, expected no launcher, or ")


def test_a_dry_run_lists_runs_with_bytes_and_time_and_trains_none(
    tmp_path: Path, in_this_process: type[InThisProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, rounds=1000, stop={"paper_gib": 1e-6})
    done = sweep(capsys, config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "study").exists()
    assert "PREDICTED runs" in done.stdout
    assert "4 of 4 runs are left: about" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if "-seed" in line]
    assert [row[0] for row in rows] == [f"{name}-seed{seed}" for seed in (0, 1) for name in VARIANTS]
    assert all(1 <= int(row[1]) < 1000 for row in rows)  # the ledger's limit is reached before
    assert sweep(capsys, config, "--only", "fsl_sage-seed0", "rounds=2").returncode == 0
    rows = [line for line in sweep(capsys, config, "--dry-run").stdout.splitlines() if "-seed" in line]
    assert ["*" in row for row in rows] == [True, False, True, False]  # rounds of it have been timed


def line(number: int, seconds: float = 1.0, **keys: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl`, as far as a sweep looks at it."""
    figures = {"round": number, "round_seconds": seconds, "evaluation_seconds": 1.0}
    return {**figures, "test_accuracy": 0.5, "paper_bytes_total": 1000 * number, **keys}


def watched(tmp_path: Path, done: Mapping[str, Sequence[float]], rounds: int = 10) -> list[WatchedRun]:
    """Runs of these variants, of which so many rounds have taken so many seconds."""
    variants = {name: [] for name in done}
    config = from_tree({"rounds": rounds, "output": str(tmp_path), "sweep": {"variants": variants}})
    runs = [WatchedRun(run) for run in sweep_runs(config)]
    for run, seconds in zip(runs, done.values(), strict=True):
        for number, each in enumerate(seconds, start=1):
            run.progress.add(line(number, each))
    return runs


def test_time_left_goes_by_rounds_of_the_same_variant_or_else_of_all(tmp_path: Path) -> None:
    runs = watched(tmp_path, {"a": [1.0] * 4, "b": [5.0, 7.0], "c": []})
    assert pace_of(runs) == {"a": 2.0, "b": 7.0}
    mean = (4 * 2.0 + 2 * 7.0) / 6
    assert seconds_left(runs, jobs=1) == pytest.approx(6 * 2.0 + 8 * 7.0 + 10 * mean)
    assert seconds_left(runs, jobs=2) == pytest.approx((6 * 2.0 + 8 * 7.0 + 10 * mean) / 2)
    runs[1].failure, runs[2].summary = "lost", {}
    assert seconds_left(runs, jobs=2) == pytest.approx(6 * 2.0)
    assert seconds_left(watched(tmp_path, {"a": []}), jobs=1) is None


def test_time_left_ends_with_the_paper_ledger(tmp_path: Path) -> None:
    variants = {"variants": {"a": []}}
    config = from_tree({"rounds": 1000, "output": str(tmp_path), "stop": {"paper_gib": 1}, "sweep": variants})
    (run,) = (WatchedRun(run) for run in sweep_runs(config))
    assert run.rounds_left == 1000
    run.progress.add(line(1, paper_bytes_total=2**28))
    assert run.rounds_left == 3
    assert seconds_left([run], jobs=1) == pytest.approx(3 * 2.0)


def test_a_run_is_watched_by_what_its_file_has_grown_by(tmp_path: Path) -> None:
    (planned,) = sweep_runs(from_tree({"output": str(tmp_path), "sweep": {"variants": {"a": []}}}))
    run, metrics = WatchedRun(planned), planned.folder / "metrics.jsonl"
    planned.folder.mkdir(parents=True)
    first, second = (json.dumps(line(number, test_accuracy=None)) for number in (1, 2))
    seen = []
    for text in (
        first[:10],  # is being written
        f"{first}\n{second}",
        f"{first}\n{second}\n",
        f'{first}\n{second}\n{{"event": "loss"}}\n{{"round": 3}}\nx\n',  # what is no round is left out
        f"{json.dumps(line(1))}\n",  # goes on from an earlier round
    ):
        metrics.write_text(text)
        run.look()
        seen.append((run.progress.rounds, run.progress.seconds, run.progress.accuracy))
    assert seen == [(0, 0, None), (1, 2, None), (2, 4, None), (2, 4, None), (1, 2, 0.5)]


class Ended:
    """A process that has ended with a status."""

    def __init__(self, status: int):
        self._status, self.signals = status, list[int]()

    def poll(self) -> int:
        return self._status

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.mark.parametrize(
    ("status", "asked", "stopped"),
    [
        (STOPPED, True, True),
        (STOPPED, False, True),
        (-signal.SIGTERM, True, True),
        (128 + signal.SIGTERM, True, True),
        (-signal.SIGTERM, False, False),
        (-signal.SIGKILL, True, False),
        (1, True, False),
    ],
)
def test_a_run_that_ends_as_it_was_asked_to_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, asked: bool, stopped: bool
) -> None:
    (planned,) = sweep_runs(from_tree({"output": str(tmp_path), "sweep": {"variants": {"a": []}}}))
    run, process = WatchedRun(planned), Ended(status)
    monkeypatch.setattr("fslsage_rpc.sweep.watched_run.subprocess.Popen", lambda *_, **others: process)
    run.start(["program"], {})
    if asked:
        run.ask_to_stop()
    assert run.ended()
    assert (run.stopped, run.failure is None) == (stopped, stopped)
    assert process.signals == [signal.SIGTERM] * asked


def test_a_signal_reaches_a_run_that_is_being_started(
    tmp_path: Path, in_this_process: type[InThisProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Ended(STOPPED)

    def popen(*arguments: Any, **others: Any) -> Ended:
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr("fslsage_rpc.sweep.watched_run.subprocess.Popen", popen)
    assert main(["sweep", write(tmp_path)]) == STOPPED
    assert process.signals == [signal.SIGTERM]
    assert not (tmp_path / "study" / "splitfed_v1-seed0").exists()


def test_durations_are_spelled_to_about_a_twentieth() -> None:
    assert [spelled(seconds) for seconds in (7.4, 99.0, 170.0, 5999.0, 7200.0, 80_000.0)] == [
        *("7 s", "99 s", "3 min", "100 min", "2.0 h", "22 h"),
    ]


@pytest.mark.parametrize(
    ("gpus", "variables"),
    [
        (0, [{"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "2"}]),
        (
            3,
            [
                {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "4,6"},
                {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "5"},
            ],
        ),
    ],
)
def test_runs_side_by_side_share_cores_and_gpus(
    gpus: int, variables: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "usable_cores", lambda: frozenset(range(12)))
    monkeypatch.setattr(sweeping, "gpu_count", lambda device: gpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    config = from_tree({"ranks": 3})
    slots = sweeping.Slots(config, jobs=2)
    assert [slots.environment(slot, config) for slot in slots.free] == variables
    assert sweeping.Slots(config, jobs=1).environment(0, config) == {}


# With processes


def started(config: str, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """A sweep; none of it outlives the test."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return started_job(["sweep", config, *arguments], str(Path(config).parent), **streams)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)


def said_at_end(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=150)[0]


@pytest.mark.gate
@pytest.mark.timeout(600)
def test_a_sweep_that_is_stopped_and_one_whose_run_is_killed_go_on(tmp_path: Path) -> None:
    """On ranks; then the numbers are those of runs that were never cut off, in one process."""
    config = write(tmp_path, seeds=[0], rounds=12, transport="rpc", ranks=2)
    study = tmp_path / "study"
    first, second = study / "fsl_sage-seed0", study / "splitfed_v1-seed0"
    with started(config) as process:
        wait_for(lambda: len(lines(first)) >= 2, process)
        process.send_signal(signal.SIGTERM)
        text = said_at_end(process)
        assert process.returncode == STOPPED, text
    assert "fsl_sage-seed0  stopped after round" in text
    stopped_after = len(lines(first))
    assert 2 <= stopped_after < 12
    assert not second.exists()
    with started(config) as process:
        wait_for(lambda: len(lines(first)) > stopped_after, process)
        for each in survivors("fsl_sage-seed0/train.yaml"):  # its launcher and its ranks
            os.kill(each, signal.SIGKILL)
        text = said_at_end(process)
        assert process.returncode == 1, text
    assert "1/2  fsl_sage-seed0  failed: " in text
    assert "2/2  splitfed_v1-seed0  accuracy" in text
    with started(config) as process:
        text = said_at_end(process)
        assert process.returncode == 0, text
    assert "1 of 2 runs are complete already" in text
    assert "All 2 runs are complete." in text
    assert (study / "report" / "report.html").exists()
    assert survivors(str(tmp_path)) == []
    assert (first / "log.txt").read_text().count("goes on from round") == 2
    for run in sweep_runs(from_tree(yaml.safe_load(Path(config).read_text()))):
        keys = [f"name=whole-{run.config.name}", "transport=local", *VARIANTS[run.variant]]
        assert main(["train", config, *keys]) == 0
        assert_identical(finished(tmp_path / f"whole-{run.config.name}"), finished(study / run.config.name))


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_runs_side_by_side_have_the_numbers_of_runs_one_after_the_other(tmp_path: Path) -> None:
    config = write(tmp_path)
    with started(config, "--jobs", "2", "output=" + json.dumps(str(tmp_path / "beside"))) as process:
        assert said_at_end(process).count("accuracy") >= 4
        assert process.returncode == 0
    with started(config) as process:
        said_at_end(process)
        assert process.returncode == 0
    for name in (f"{variant}-seed{seed}" for variant in VARIANTS for seed in (0, 1)):
        assert_identical(finished(tmp_path / "study" / name), finished(tmp_path / "beside" / "study" / name))


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_launcher_starts_each_run(tmp_path: Path) -> None:
    config = write(tmp_path, seeds=[0], transport="rpc", ranks=2, rounds=3)
    launcher = Path(__file__).parent.parent / "launch" / "local.sh"
    with started(config, "--launch", str(launcher), "ranks=2") as process:
        text = said_at_end(process)
        assert process.returncode == 0, text
    assert finished(tmp_path / "study" / "splitfed_v1-seed0").summary["rounds"] == 3
