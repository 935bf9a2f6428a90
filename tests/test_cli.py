"""The command line as a user meets it: exit statuses, one-line errors, and the same run twice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import fslsage_rpc
from fslsage_rpc import InputError, cli
from fslsage_rpc.errors import FIRST_WORD_SECONDS, HostError
from fslsage_rpc.training.experiment import check
from fslsage_rpc.transport.choices import has_channel
from support.commands import fslsage, said
from support.trees import ALGORITHM, MODEL

SMALL = {
    "name": "small",
    "rounds": 3,
    "ranks": 2,
    "transport": "local",
    "device": "cpu",
    "clients": {"count": 2, "batch_size": 64},
    "data": {"train_limit": 200, "test_limit": 50},
    "model": MODEL,
    "algorithm": {**ALGORITHM, "alignment": {"epochs": 2}},
}
FOLDER = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "partition.json", "model.pt"}
FOLDER |= {"checkpoints"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "runs")}))
    return path


def test_a_run_shows_its_rounds_and_ends_in_a_table(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = said(capsys, "train", config)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["round 1/3", "round 2/3", "round 3/3"]
    for word in ("test accuracy", "forward_backward", "smashed_up", "paper ledger"):
        assert word in done.stdout
    folder = tmp_path / "runs" / "small"
    assert {path.name for path in folder.iterdir()} - {"tensorboard"} == FOLDER

    again = said(capsys, "train", config)
    assert again.returncode == 0
    assert "complete already" in again.stdout
    assert "resume=never" in again.stdout
    assert "round 1/3" not in again.stdout

    evaluated = said(capsys, "evaluate", folder)
    last = json.loads((folder / "summary.json").read_text())["test_accuracy"]["last"]
    assert evaluated.stdout.startswith(f"test accuracy {last:.4f}")

    changed = said(capsys, "train", config, "seed=1")
    assert changed.returncode == 2
    assert changed.stderr.startswith("fslsage_rpc: seed: got 1, expected 0")
    assert said(capsys, "train", config, "seed=1", "resume=never").returncode == 0


@pytest.mark.gate
def test_the_self_launching_form_trains_over_rpc(config: Path, tmp_path: Path) -> None:
    keys = ("transport=rpc", "ranks=2", "comm.transports=[uv]", "comm.channels=[basic]")
    done = fslsage("train", config, *keys)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("round 3/3") == 1
    environment = json.loads((tmp_path / "runs" / "small" / "environment.json").read_text())
    assert environment["transport"] == "rpc"
    assert environment["rpc_transports"] == ["uv"]
    assert environment["rpc_channels"] == ["basic"]
    assert environment["averaging"] is None  # one client rank
    assert len(environment["ranks"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["clients.cuont=3"], ["clients.cuont", "clients.count"]),
        (["clients.count=many"], ["clients.count", "'many'", "an integer >= 1 and <= 1000000000"]),
        (["clients.participation=1.5"], ["clients.participation", "1.5", "<= 1"]),
        (["clients.count=1", "ranks=3", "transport=rpc"], ["clients.count", "at least 2"]),
        (["clients.count=300"], ["clients.count", "300", "at most 200"]),
        (["model.cut=layer9"], ["model.cut", "layer9", "pool2"]),
        (
            ["data.name=mnist", "data.download=false", "data.root=nowhere"],
            ["data.root", "train-images-idx3-ubyte"],
        ),
        (["data.partition=file", "data.partition_file=none.json"], ["data.partition_file", "none.json"]),
        (["model.name=resnet18", "clients.batch_size=33"], ["clients.batch_size", "BatchNorm"]),
        (["transport=rpc", "comm.interface=nosuch"], ["comm.interface", "nosuch", "lo"]),
        (
            ["transport=rpc", "comm.channels=[cuda_xth]"],
            ["comm.channels", "[cuda_xth]", "cma, mpt_uv, basic"],
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    config: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = said(capsys, "train", config, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""


@pytest.mark.gate
def test_bad_input_is_the_status_of_the_process(config: Path) -> None:
    done = fslsage("train", config, "clients.cuont=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fslsage_rpc: clients.cuont: unknown key; did you mean clients.count?\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_bad_input(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = said(capsys, "train", config, "device=cuda")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "device: got 'cuda'" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["tarin", "x.yaml"], ["train"], ["train", "nofile.yaml"], ["evaluate", "x"]],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = said(capsys, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_an_output_folder_that_cannot_be_made(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = said(capsys, "train", config, f"output={tmp_path / 'file'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "output" in done.stderr


def test_the_python_entry_point_runs_locally_whatever_the_transport(tmp_path: Path) -> None:
    run = fslsage_rpc.train({**SMALL, "transport": "rpc", "output": str(tmp_path)})
    assert run.folder == tmp_path / "small"
    assert [line["round"] for line in run.rounds] == [1, 2, 3]
    assert run.summary["rounds"] == 3
    model = torch.load(run.folder / "model.pt", weights_only=True)
    assert "conv1.weight" in model
    assert "fc3.bias" in model


def test_the_python_entry_point_raises_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clients\.cuont"):
        fslsage_rpc.train({"clients": {"cuont": 1}})
    with pytest.raises(InputError, match=r"model\.cut"):
        fslsage_rpc.train({**SMALL, "model": {"cut": "x"}, "output": str(tmp_path)})


def test_stopping_at_an_accuracy_or_a_load(tmp_path: Path) -> None:
    tree = {**SMALL, "output": str(tmp_path), "rounds": 9}
    reached = fslsage_rpc.train({**tree, "name": "a", "stop": {"accuracy": 0.01}})
    assert len(reached.rounds) == 1
    per_round = reached.rounds[0]["paper_bytes"]
    loaded = fslsage_rpc.train({**tree, "name": "b", "stop": {"paper_gib": 1.5 * per_round / 2**30}})
    assert len(loaded.rounds) == 2
    assert loaded.rounds[-1]["test_accuracy"] is not None


def test_keys_that_the_algorithm_does_not_use_are_named_once(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = said(capsys, "train", config, "algorithm.name=splitfed_v1")
    assert done.returncode == 0
    assert done.stdout.count("algorithm.align_every is not used by splitfed_v1") == 1


@pytest.mark.gate
def test_under_torchrun_only_rank_0_reports_bad_input_and_all_end(config: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += ["--nproc_per_node=3"]
    command += ["-m", "fslsage_rpc", "train", str(config), "transport=rpc", "clients.cuont=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1  # torchrun's, whatever the ranks' was
    ours = [line for line in done.stderr.splitlines() if line.startswith("fslsage_rpc:")]
    assert ours == ["fslsage_rpc: clients.cuont: unknown key; did you mean clients.count?"]
    assert "exitcode  : 2" in done.stderr


@pytest.mark.gate
def test_a_torchrun_job_with_an_address_needs_no_host_name_that_resolves(config: Path) -> None:
    if subprocess.run(["sh", "-c", "unshare --uts hostname x"], capture_output=True).returncode != 0:
        pytest.skip("nobody may give a host another name here")
    start = "hostname nosuchhost.invalid && exec torchrun --standalone --local-addr=127.0.0.1"
    job = f"--nproc_per_node=2 -m fslsage_rpc train {config} rounds=1 transport=rpc comm.transports=[uv]"
    command = ["unshare", "--uts", "bash", "-c", f"{start} {job}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            shown, _ = process.communicate(timeout=100)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    assert "round 1/1" in shown


def test_rpc_is_refused_by_name_where_torch_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fslsage_rpc.transport.choices.rpc_available", lambda: False)
    keys = fslsage_rpc.Config()
    with pytest.raises(InputError, match=r"transport: got 'rpc', expected local"):
        check(keys, ranks=3)
    keys.transport = "local"
    check(keys, ranks=1)


def test_a_channel_that_this_build_of_torch_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_channel("basic")
    assert not has_channel("nosuch")
    monkeypatch.setattr("fslsage_rpc.transport.choices.has_channel", lambda name: name != "cma")
    keys = fslsage_rpc.Config()
    keys.comm.channels = ["basic", "cma"]
    with pytest.raises(
        InputError, match=r"comm\.channels: got 'cma', expected one that this build of torch has"
    ):
        check(keys, ranks=3)


def test_one_rank_alone_is_refused_with_rpc() -> None:
    with pytest.raises(InputError, match=r"transport: got 'rpc' on 1 rank"):
        check(fslsage_rpc.Config(), ranks=1)


def test_a_complete_run_without_checkpoints_is_not_replaced_by_a_longer_one_unasked(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "train", config, "rounds=1", "checkpoint.every=null").returncode == 0
    longer = said(capsys, "train", config, "rounds=2")
    assert (longer.returncode, longer.stderr.count("\n")) == (2, 1)
    assert longer.stderr.startswith("fslsage_rpc: rounds: got 2, expected 1")
    assert "has no checkpoint to go on from" in longer.stderr


def test_an_alignment_batch_of_one_sample_is_refused_where_there_is_batch_norm(tmp_path: Path) -> None:
    keys = {
        **SMALL,
        "output": str(tmp_path),
        "model": {"name": "resnet18"},
        "clients": {"count": 2, "batch_size": 50},
    }
    with pytest.raises(InputError, match=r"algorithm\.alignment\.batch_size: got 49"):
        fslsage_rpc.train({**keys, "algorithm": {"start": "paper", "alignment": {"batch_size": 49}}})


@pytest.mark.parametrize(
    ("rank", "local_rank", "waits"),
    [(0, 0, 0), (1, 1, 1), (2, 0, 1), (3, 1, 2)],
    ids=["rank 0", "rank 1", "rank 2", "rank 3"],
)
def test_the_first_rank_of_a_host_is_the_one_that_speaks_of_it(
    rank: int,
    local_rank: int,
    waits: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Others wait longer, for its end to end them."""
    waited: list[float] = []
    monkeypatch.setattr("fslsage_rpc.cli.time.sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    cli._report(HostError("comm.interface: got 'fast0'"))
    assert sum(waited) == waits * FIRST_WORD_SECONDS
    assert "comm.interface: got 'fast0'" in capsys.readouterr().err
