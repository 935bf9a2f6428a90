"""launch/local.sh: how many ranks, signals, exit statuses, and that no rank is left behind."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import fslsage_rpc
from fslsage_rpc.config.schema import Clients, Config
from support.commands import fslsage_on_ranks
from support.equality import assert_identical, assert_whole
from support.job_processes import end_job, members, survivors
from support.run_folders import finished
from support.trees import tree
from support.user_input import mistake

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))

import job

LOCAL = str(Path(__file__).parent.parent / "launch" / "local.sh")
RUN_SECONDS = 90


@pytest.mark.parametrize(
    ("gpus", "cores", "clients", "ranks"),
    [(8, 64, 100, 9), (8, 64, 4, 5), (1, 64, 100, 2), (0, 64, 4, 5), (0, 4, 100, 4), (0, 1, 100, 2)],
)
def test_ranks_follow_gpus_or_else_cores(gpus: int, cores: int, clients: int, ranks: int) -> None:
    assert job.suitable_ranks(Config(clients=Clients(count=clients)), gpus, cores) == ranks
    elastic = Config(clients=Clients(count=clients, on_loss="drop"))
    assert job.suitable_ranks(elastic, gpus, cores) == max(ranks, 3)  # one host's loss is not the run's


def test_one_client_needs_no_second_host() -> None:
    assert job.suitable_ranks(Config(clients=Clients(count=1, on_loss="drop")), 0, 2) == 2


@pytest.mark.gate
def test_launchers_are_told_in_words_that_a_shell_can_read(tmp_path: Path) -> None:
    config = write(tmp_path, output=str(tmp_path / "it's here"))
    script = f'{job.describe(["train", config, "ranks=4"])}\necho "$folder,$ranks"'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == f"{tmp_path}/it's here/run,4\n"


def test_wrong_input_is_found_before_a_rank_starts(tmp_path: Path) -> None:
    config = write(tmp_path)
    assert "command: got 'evaluate runs/a'" in mistake(job.describe, ["evaluate", "runs/a"])
    assert "comm.interface: got 'nosuch'" in mistake(job.describe, ["train", config, "comm.interface=nosuch"])
    assert "clients.count: got 3" in mistake(job.describe, ["train", config, "ranks=5"])
    assert "ranks: got 'two'" in mistake(job.describe, ["train", config, "ranks=two"])
    alone = ["model.name=resnet18", "clients.batch_size=1"]
    assert "batch of 1" in mistake(job.describe, ["train", config, *alone])
    variants = ["bench.variants={fedavg: [algorithm.name=fedavg]}", "bench.reference=fedavg", *alone]
    assert "bench.variants.fedavg: clients.batch_size" in mistake(job.describe, ["bench", config, *variants])
    assert "batch of 1" in mistake(job.describe, ["check", config, *alone])
    fslsage_rpc.train(tree(tmp_path, name="run", rounds=1))
    assert "seed: got 7" in mistake(job.describe, ["train", config, "transport=local", "seed=7"])


def test_what_the_users_code_prints_is_no_word_of_the_launchers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loud.py").write_text(
        "import torch\n\n\ndef net(num_classes):\n    print('exit 3')\n    return torch.nn.Sequential("
        "torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    keys = ["model={name: loud:net, cut: '1'}", "model.auxiliary.kind=linear"]
    assert job.main(["train", write(tmp_path), *keys, "ranks=2"]) == 0
    said = capsys.readouterr()
    assert "exit 3" in said.err
    assert all("=" in line for line in said.out.splitlines())


def write(folder: Path, **keys: object) -> str:
    """A configuration file of a run in `folder/run`."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree(folder, name="run", transport="rpc") | keys), encoding="utf-8")
    return str(path)


@contextmanager
def started(*arguments: str, log: Path, **options: object) -> Iterator[subprocess.Popen[str]]:
    """The launcher as the first process of a session, that none of its job's processes outlives."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [LOCAL, *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            **options,  # type: ignore[call-overload]
        )
    try:
        yield process
        assert survivors(f"{log.parent}/") == []
    finally:
        end_job(process, f"{log.parent}/")


def wait_until(condition: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def rounds(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.gate
def test_a_stopped_job_is_status_75(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started("train", write(tmp_path), "ranks=2", "rounds=5000", log=log) as launcher:
        wait_until(lambda: rounds(tmp_path) >= 2, log)
        launcher.terminate()
        assert launcher.wait(RUN_SECONDS) == 75, log.read_text()
    assert (tmp_path / "run" / "STOPPED").exists()
    assert "Traceback" not in log.read_text()


@pytest.mark.nightly  # a quarter of a minute each
@pytest.mark.parametrize("form", [[], ["--elastic"]])
def test_ctrl_c_on_a_terminal_stops_the_job_which_goes_on_to_the_same_end(
    form: list[str], tmp_path: Path
) -> None:
    log, config = tmp_path / "log", write(tmp_path)
    terminal, its_end = pty.openpty()

    def take_terminal() -> None:
        os.close(os.open(os.ttyname(its_end), os.O_RDWR))  # becomes the session's
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in a shell's background ignores

    command = (*form, "train", config, "ranks=3")
    with started(*command, "rounds=5000", log=log, stdin=its_end, preexec_fn=take_terminal) as launcher:
        wait_until(lambda: rounds(tmp_path) >= 2, log)
        os.write(terminal, b"\x03")
        assert launcher.wait(RUN_SECONDS) == 75, log.read_text()
    assert "Traceback" not in log.read_text()
    done = rounds(tmp_path)
    with started(*command, f"rounds={done + 2}", log=log) as launcher:
        assert launcher.wait(RUN_SECONDS) == 0, log.read_text()
    run = finished(tmp_path / "run")
    assert_whole(run)
    whole = fslsage_rpc.train(tree(tmp_path, name="whole", rounds=done + 2))
    assert run.summary["test_loss"] == pytest.approx(whole.summary["test_loss"], rel=1e-10)


@pytest.mark.nightly  # half a minute
def test_torchrun_starts_the_ranks_again_after_one_was_killed(tmp_path: Path) -> None:
    log, config = tmp_path / "log", write(tmp_path, rounds=40)
    with started("train", config, "ranks=3", log=log) as launcher:
        wait_until(lambda: rounds(tmp_path) >= 3, log)
        os.kill(members(f"{tmp_path}/")[1], signal.SIGKILL)
        assert launcher.wait(2 * RUN_SECONDS) == 0, log.read_text()  # two starts on a busy host
    assert "goes on from round" in log.read_text()
    fslsage_on_ranks(3, tmp_path, "train", config, "name=whole")
    assert_identical(finished(tmp_path / "whole"), finished(tmp_path / "run"))


@pytest.mark.nightly  # half a minute
def test_elastic_ranks_go_on_without_a_killed_one_which_is_started_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = write(tmp_path, clients={"count": 3, "batch_size": 16, "on_loss": "drop"})
    with started("--elastic", "train", config, "ranks=3", "rounds=50000", log=log) as launcher:
        wait_until(lambda: rounds(tmp_path) >= 3, log)
        os.kill(members(f"{tmp_path}/")[2], signal.SIGKILL)
        wait_until(lambda: "rank 2 has joined: clients 1 are back" in log.read_text(), log)
        launcher.terminate()
        assert launcher.wait(RUN_SECONDS) == 75, log.read_text()
    said = log.read_text()
    assert "rank 2 is lost (its process has died, or its connection to rank 0): clients 1 leave" in said
    assert "local.sh: rank 2 has ended with status 137 and is started again" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss, joined = (line for line in lines if "event" in line)
    assert (loss["event"], joined["event"]) == ("loss", "joined")
    trained = [line for line in lines if "event" not in line]
    assert [line["round"] for line in trained] == list(range(1, len(trained) + 1))
    absent = range(loss["round"], joined["round"])
    assert [1 not in line["participants"] for line in trained] == [
        line["round"] in absent for line in trained
    ]


@pytest.mark.nightly  # half a minute each
@pytest.mark.parametrize("form", [[], ["--elastic"]])
def test_a_second_signal_ends_the_job_at_once(form: list[str], tmp_path: Path) -> None:
    log, long_round = tmp_path / "log", "algorithm.alignment.epochs=1000000"
    with started(*form, "train", write(tmp_path), "ranks=3", long_round, log=log) as launcher:
        wait_until((tmp_path / "run" / "partition.json").exists, log)
        launcher.terminate()
        wait_until(lambda: "once more ends it at once" in log.read_text(), log)
        assert launcher.poll() is None
        launcher.terminate()
        sent = time.monotonic()
        assert launcher.wait(RUN_SECONDS) not in (0, 75), log.read_text()
        assert time.monotonic() - sent < 20
    assert rounds(tmp_path) == 0
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.nightly  # as long as torchrun's patience
def test_a_round_may_take_longer_than_torchrun_would_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started("train", write(tmp_path), "ranks=3", "rounds=50000", log=log) as launcher:
        wait_until(lambda: rounds(tmp_path) >= 2, log)
        slow = members(f"{tmp_path}/")[1]
        os.kill(slow, signal.SIGSTOP)
        launcher.terminate()
        time.sleep(35)
        assert launcher.poll() is None
        os.kill(slow, signal.SIGCONT)
        assert launcher.wait(RUN_SECONDS) == 75, log.read_text()
    assert "Traceback" not in log.read_text()
    assert (tmp_path / "run" / "STOPPED").exists()
