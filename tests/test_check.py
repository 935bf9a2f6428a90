"""`fslsage check` sees what is there, trains one round, says what training will take, and changes nothing."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fslsage_rpc
from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.check import findings
from fslsage_rpc.check.display import CheckScreen
from fslsage_rpc.check.findings import COPIES, Findings, ModelSize, Outlook, Rank, rounds_counted
from fslsage_rpc.check.machine import Disk, Machine
from fslsage_rpc.check.one_round import Use, dearest_round, fill_buffers
from fslsage_rpc.check.run import examine, risky
from fslsage_rpc.cli import main
from fslsage_rpc.config import loading as configuration
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.memory import status_bytes
from fslsage_rpc.device.placement import GpuPlace
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.runs.checkpoint_files import complete_folders
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer
from fslsage_rpc.units import MIB
from support.commands import fslsage, fslsage_on_ranks
from support.trees import tree
from support.user_input import mistake

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
PEAKS = Path(__file__).with_name("support") / "peak_program.py"
GIB = 2**30


@pytest.fixture(autouse=True)
def nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the half second in which what others do would be seen."""
    monkeypatch.setattr("fslsage_rpc.check.run.WAIT_SECONDS", 0.0)


# One round, and what the run will take


def examined(tmp_path: Path, *changes: dict[str, Any], **keys: Any) -> Findings:
    found = examine(from_tree(tree(tmp_path, *changes, **keys)), configured=True)
    assert found is not None
    return found


def outlook_of(found: Findings) -> tuple[Outlook, Any]:
    assert found.outlook is not None
    assert found.outlook.line is not None
    return found.outlook, found.outlook.line


def test_a_round_is_trained_and_evaluated_and_leaves_nothing(tmp_path: Path) -> None:
    found = examined(tmp_path, rounds=5, name="run")
    outlook, line = outlook_of(found)
    assert line["round"] == 5  # aligned: 1, 3 and 5
    assert line["round_seconds"] > 0
    assert line["evaluation_seconds"] > 0
    assert line["test_accuracy"] is not None
    experiment = Experiment.prepare(outlook.config)
    asked = [ask.kind for asks in experiment.rehearsal.course(4).asks.values() for ask in asks]
    assert {kind: times["count"] for kind, times in line["requests"].items()} == {
        kind: asked.count(kind) for kind in ("push", "align")
    }
    (rank,) = found.ranks
    resident, peak = status_bytes("VmRSS"), rank.use and rank.use.peak
    before = rank.machine.resident_bytes or 0
    assert resident is None or (peak is not None and peak >= before - MIB > 0)  # Linux counts roughly
    assert rank.use is not None
    assert rank.more_bytes >= COPIES * rank.use.checkpoint > 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    def contents() -> dict[Path, tuple[int, bytes]]:
        files = (file for file in tmp_path.rglob("*") if file.is_file())
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    fslsage_rpc.train(tree(tmp_path, name="run", rounds=2))
    before = contents()
    examined(tmp_path, name="run", rounds=2)
    assert contents() == before


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 4),  # aligned: 0, 2 and 4 of 6
        ({"start": "warm_start"}, 5),  # 1, 3 and 5
        ({"align_every": 100}, 0),
        ({"name": "cse_fsl"}, 0),
    ],
)
def test_the_round_is_the_last_one_with_alignments(
    tmp_path: Path, changes: dict[str, Any], number: int
) -> None:
    experiment = Experiment.prepare(from_tree(tree(tmp_path, {"algorithm": changes})))
    assert dearest_round(experiment) == number


@pytest.mark.parametrize("samples", [60, 10**6])
def test_alignment_buffers_are_as_full_as_in_that_round(tmp_path: Path, samples: int) -> None:
    keys = {"algorithm": {"alignment": {"buffer_size": samples}}}
    experiment = Experiment.prepare(from_tree(tree(tmp_path, keys)))
    trainer, trained = (
        Trainer(each, open_world(each.config)) for each in (experiment, Experiment.prepare(experiment.config))
    )
    fill_buffers(trainer, 2)
    trained.complete_round(0, lambda line, _: None)
    trained.complete_round(1, lambda line, _: None)
    assert trainer.server is not None
    assert trained.server is not None
    sizes = {client: len(fit.buffer) for client, fit in trainer.server.fits.items()}
    assert sizes == {client: len(fit.buffer) for client, fit in trained.server.fits.items()}
    assert min(sizes.values()) > 0


def test_seconds_of_a_run_are_rounds_and_evaluations_of_the_one_measured() -> None:
    config = from_tree({"rounds": 10, "evaluation": {"every": 4}})
    line = {"round_seconds": 5.0, "evaluation_seconds": 1.0, "phases": {"server": {"alignment": 3.0}}}
    outlook = Outlook(config, {}, 1, {}, 10, 2, line)
    assert outlook.run_seconds(10) == 10 * 5.0 + 3 * 1.0  # evaluated: 4, 8 and 10
    assert outlook.run_seconds(5) == 5 * 5.0 + 5 * (5.0 - 3.0) + 3 * 1.0


def test_a_part_of_a_model_is_counted_with_and_without_what_is_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    buffers = 2 * 2 * 4 + 8  # mean, variance and the count of batches
    assert ModelSize.of(model) == ModelSize(8 + 4, 12 * 4 + buffers, 4, 4 * 4 + buffers)


def test_no_checkpoints_take_no_memory_and_no_disk(tmp_path: Path) -> None:
    found = examined(tmp_path, {"checkpoint": {"every": None}}, rounds=1)
    outlook, _ = outlook_of(found)
    assert [rank.use and rank.use.checkpoint for rank in found.ranks] == [0]
    assert found.disk_bytes == outlook.models["client"].bytes + outlook.models["server"].bytes


@pytest.mark.parametrize("participation", [0.6, 1.0])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_checkpoints_and_paper_bytes_are_those_of_the_run(
    tmp_path: Path, name: str, participation: float
) -> None:
    keys = {
        "algorithm": {"name": name},
        "clients": {"participation": participation},
        "model": {"name": "resnet56", "arguments": {"width": 4}},
        "data": {"partition": "iid", "train_limit": 60},
    }
    config = tree(tmp_path, keys, rounds=4 if participation < 1 else 2, name=name)
    found = examined(tmp_path, config)
    outlook, _ = outlook_of(found)
    federation = Experiment.prepare(outlook.config).federation
    assert {id for number in range(outlook.config.rounds) for id in federation.participants(number)} == {
        0,
        1,
        2,
    }
    run = fslsage_rpc.train(*as_arguments(tmp_path, config))
    mean = outlook.paper_bytes[name]
    assert mean is not None
    assert mean * outlook.config.rounds == pytest.approx(run.summary["paper_bytes_total"])
    folder = complete_folders(run.folder / "checkpoints")[0]
    written = sum(file.stat().st_size for file in folder.glob("*.pt"))
    (rank,) = found.ranks
    assert rank.use is not None
    assert rank.use.checkpoint == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize(
    ("every", "average", "codec", "participation"),
    [
        (1, "never", "none", 1.0),
        (1, "never", "bf16", 1.0),
        (1, "alignment", "none", 1.0),
        (1, "never", "none", 0.6),
        (2, "never", "none", 1.0),  # where no checkpoint is written while a fit is under way
    ],
)
def test_a_checkpoint_holds_the_inputs_of_fits_behind_the_training(
    tmp_path: Path, every: int, average: str, codec: str, participation: float
) -> None:
    keys = {
        "algorithm": {"average_auxiliary": average, "alignment": {"lag": 1}},
        "checkpoint": {"every": every},
        "comm": {"codec": {"auxiliary": codec}},
        "clients": {"participation": participation},
        "model": {"name": "resnet56", "arguments": {"width": 4}},
        "data": {"partition": "iid", "train_limit": 240},
    }
    config = tree(tmp_path, keys, rounds=4 if participation == 1 else 5, name="lagged")
    (rank,) = examined(tmp_path, config).ranks
    run = fslsage_rpc.train(*as_arguments(tmp_path, config))
    folders = complete_folders(run.folder / "checkpoints")
    written = max(sum(file.stat().st_size for file in folder.glob("*.pt")) for folder in folders)
    assert rank.use is not None
    assert rank.use.checkpoint == pytest.approx(written, rel=0.01)


def test_a_round_that_collects_is_measured_with_what_it_collects(tmp_path: Path) -> None:
    """Clients that take part now and then may collect and align in the same round."""
    keys = {"algorithm": {"alignment": {"lag": 1}}, "clients": {"participation": 0.6}}
    config = from_tree(tree(tmp_path, keys, rounds=9))
    experiment = Experiment.prepare(config)
    number = dearest_round(experiment)
    asked = [ask.kind for asks in experiment.rehearsal.course(number).asks.values() for ask in asks]
    assert "collect" in asked
    _, line = outlook_of(examined(tmp_path, to_tree(config)))
    assert {kind: times["count"] for kind, times in line["requests"].items()} == {
        kind: asked.count(kind) for kind in set(asked)
    }


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ({"lag": 1}, None),
        (
            {"lag": 1, "align_every": None},
            " is not used by fsl_sage, which aligns nothing behind the training",
        ),
        ({"lag": 3, "align_every": 4}, ": got 3, so that no fitted model is taken up by round 3"),
        ({"lag": 1, "name": "cse_fsl"}, None),  # which uses no key of alignments, and that is said elsewhere
    ],
)
def test_a_lag_that_does_nothing_is_a_warning(
    tmp_path: Path, keys: dict[str, Any], warning: str | None
) -> None:
    others = {key: value for key, value in keys.items() if key != "lag"}
    config = from_tree(tree(tmp_path, {"algorithm": {"alignment": {"lag": keys["lag"]}, **others}}, rounds=3))
    said = [] if warning is None else [f"algorithm.alignment.lag{warning}"]
    assert Experiment.prepare(config).warnings == said


def test_clients_that_are_seldom_there_take_models_up_and_send_them_late(tmp_path: Path) -> None:
    clients = {"count": 50, "participation": 0.02}
    keys = {"algorithm": {"alignment": {"lag": 1}}, "comm": {"codec": {"auxiliary": "int8"}}}
    config = from_tree(tree(tmp_path, keys, clients=clients, data={"partition": "iid"}, rounds=60, seed=1))
    experiment = Experiment.prepare(config)
    several = range(2 * experiment.algorithm.interval + 1)
    assert not experiment.rehearsal.asks_for({"collect"}, several)  # nobody is back yet
    assert experiment.warnings == []


def test_seconds_are_told_apart_from_those_of_alignments_behind_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"algorithm": {"alignment": {"lag": 1}}}
    found = examined(tmp_path, keys)
    outlook, line = outlook_of(found)
    for transport, words in (
        ("local", ("with alignment: ", "of which nothing but alignment ", "the others have no alignment.")),
        ("rpc", ("with alignment behind the training: ", "and fits end before they are collected.")),
    ):
        CheckScreen()._show_seconds(outlook, line, transport)
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


def as_arguments(tmp_path: Path, config: dict[str, Any]) -> list[str]:
    path = tmp_path / "config.json"  # which is YAML
    path.write_text(json.dumps(config))
    return [str(path)]


@pytest.mark.timeout(450)
@pytest.mark.nightly
@pytest.mark.parametrize(
    "overrides",
    [
        ["rounds=3"],
        [
            "rounds=3",
            "algorithm.alignment.epochs=1",
            "model.name=resnet18",
            "data.name=synthetic",
            "data.train_limit=800",
            "data.test_limit=128",
        ],
    ],
)
def test_the_peak_of_one_round_is_near_that_of_a_run(tmp_path: Path, overrides: list[str]) -> None:
    keys = [QUICKSTART, *overrides, "name=run", f"output={tmp_path}", "comm.transports=[uv]", "device=cpu"]
    for command in ("train", "check"):
        job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        job += ["--nproc_per_node=3"]
        subprocess.run([*job, str(PEAKS), str(tmp_path), command, *keys], check=True, timeout=200)
    for rank in range(3):
        measured = json.loads((tmp_path / f"train-{rank}.json").read_text())
        one_round, with_checkpoint = json.loads((tmp_path / "check.json").read_text())[rank]
        assert 0.95 * one_round < measured < 1.05 * with_checkpoint


# Warnings


def machine(**changes: Any) -> Machine:
    return dataclasses.replace(
        Machine(
            host="a",
            device="cpu",
            device_name="x",
            gpu=GpuPlace("a", None),
            addresses=["10.0.0.1"],
            loopback=False,
            interfaces=["eth0"],
            open_ports=[],
            core_ids=frozenset(range(64)),
            threads=1,
            memory_bytes=8 * GIB,
            host_bytes=16 * GIB,
            resident_bytes=GIB,
            gpu_bytes=None,
            shares_by_mps=False,
            versions={"torch": "2.15"},
        ),
        **changes,
    )


def rank(use: Use | None = None, sees: bool = True, disk: Disk | None = None, **changes: Any) -> Rank:
    return Rank(machine(**changes), disk or Disk("runs", 9 * GIB, None), sees, use)


def warnings(
    *ranks: Rank, averaging: str | None = "gloo", transports: Any = ("uv",), outlook: Outlook | None = None
) -> list[str]:
    world = {"transport": "rpc", "averaging": averaging, "rpc_transports": transports}
    return Findings(Config(), ranks, world, {}, None, outlook).warnings()


def on_gpu(host: str, gpu: str, *others: str, **changes: Any) -> Rank:
    """A rank of a host with three GPUs; where `others` are given, the rank sees these and its own alone."""
    visible = frozenset({gpu, *others} if others else "123")
    return rank(host=host, gpu=GpuPlace(host, gpu, visible), gpu_bytes=(GIB, 2 * GIB), **changes)


def test_a_server_that_shares_a_clients_gpu_is_not_in_the_way_of_nccl() -> None:
    shared = next(line for line in warnings(on_gpu("a", "1"), on_gpu("a", "1")) if "share" in line)
    assert shared == (
        "ranks 0, 1 share one GPU of a: they take turns on it and never overlap; MPS would help, started "
        "there by nvidia-cuda-mps-control -d"
    )


def test_ranks_that_share_a_gpu_by_mps_take_no_turns() -> None:
    by_mps = on_gpu("a", "1", shares_by_mps=True)
    (shared,) = warnings(on_gpu("a", "2", shares_by_mps=True), by_mps, by_mps, averaging=None)
    assert shared == "ranks 1, 2 share one GPU of a by MPS, and NCCL refuses that"


@pytest.mark.parametrize("folder", [True, False])
def test_mps_is_known_by_its_control_pipe(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    if folder:
        os.mkfifo(tmp_path / "control")
    assert Machine.here(torch.device("cpu")).shares_by_mps == folder


def test_nothing_wrong_is_no_warning() -> None:
    assert warnings(rank(), rank(), rank()) == []
    assert warnings(rank(host="a"), rank(host="b")) == []
    assert warnings(on_gpu("a", "1"), on_gpu("a", "2"), on_gpu("a", "3"), averaging="nccl") == []
    assert warnings(rank(loopback=True, addresses=["127.0.0.1"]), rank(loopback=True)) == []  # one host


def test_bytes_of_many_steps_are_counted_in_the_first_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.prepare(from_tree({"rounds": 50, "data": {"partition": "iid"}}))
    assert rounds_counted(experiment) == 50
    steps = sum(experiment.federation.steps(client) for client in range(4))
    monkeypatch.setattr(findings, "MOST_REHEARSED", 25 * steps)
    assert rounds_counted(experiment) == 20  # whole intervals of 10


HALF = ModelSize(1, GIB // 2, 1, 1)
BUSY = Outlook(Config(), {"client": HALF, "server": HALF}, 1, {}, 1, 1, {"host_busy": 0.3})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            warnings(rank(), rank(host="b", loopback=True, addresses=["127.0.1.1"])),
            ["127.0.1.1", "comm.interface"],
        ),
        (
            warnings(rank(), on_gpu("a", "1"), on_gpu("a", "1")),
            ["ranks 1, 2", "share one GPU of a", "NCCL refuses that"],
        ),
        (warnings(rank(), on_gpu("a", "1"), on_gpu("a", "2")), ["Gloo", "GPUs"]),
        (
            warnings(on_gpu("b", "1"), on_gpu("a", "1"), on_gpu("a", "2", "1"), averaging="nccl"),
            ["a: ranks 1, 2 do not see the same GPUs", "host memory", "--gpu-bind=none"],
        ),
        (
            warnings(
                rank(core_ids=frozenset({0, 1, 2})), rank(core_ids=frozenset()), transports=("shm", "uv")
            ),
            ["uv"],
        ),
        (warnings(rank(core_ids=frozenset({0, 1, 2})), rank(), transports=None), []),
        (warnings(rank(core_ids=frozenset({0})), rank(core_ids=frozenset({0}))), ["2 ranks share 1 cores"]),
        (
            warnings(
                rank(core_ids=frozenset(range(4)), threads=4), rank(core_ids=frozenset(range(4)), threads=4)
            ),
            ["8 threads", "OMP_NUM_THREADS=2"],
        ),
        (
            warnings(rank(Use(5 * GIB, None, GIB)), rank(Use(2 * GIB, None, 0))),
            ["want about 8.0 GiB of memory more", "8.0 GiB were left"],
        ),
        (warnings(rank(Use(5 * GIB, None, GIB)), rank(Use(2 * GIB, None, 0), host="b")), []),
        (
            warnings(on_gpu("a", "1", use=Use(GIB, GIB, 0))),
            ["taken 1.0 GiB of its GPU 1", "1.0 GiB were free"],
        ),
        (warnings(on_gpu("a", "1", use=Use(GIB, GIB // 2, 0))), []),
        (warnings(rank(), rank(sees=False)), ["rank 1 does not see", "all hosts share"]),
        (warnings(rank(disk=Disk("/runs", None, "Read-only file system"))), ["/runs", "Read-only"]),
        (warnings(rank(Use(GIB, None, 3 * GIB)), outlook=BUSY), ["about 10.0 GiB", "9.0 GiB are free"]),
        (warnings(rank(), outlook=BUSY), ["others had 30% of a host's cores in the round"]),
        (warnings(rank(), rank(versions={"torch": "2.11"})), ["torch", "2.15 on rank 0; 2.11 on rank 1"]),
    ],
)
def test_each_of_these_is_one_warning(found: list[str], words: list[str]) -> None:
    relevant = [line for line in found if all(word in line for word in words)] if words else found
    assert len(relevant) == bool(words), found


def test_one_client_rank_averages_with_nobody() -> None:
    world = {"averaging": None, "rpc_transports": ("uv",)}
    findings = Findings(Config(), [on_gpu("a", "1"), on_gpu("a", "2")], world, {}, None)
    assert findings.why_averaging() == "one client rank"
    assert findings.warnings() == []


@pytest.mark.parametrize(("channels", "warned"), [(["basic", "cuda_gdr"], True), (["basic"], False)])
def test_channels_that_may_end_the_ranks_are_a_warning_before_they_meet(
    channels: list[str], warned: bool
) -> None:
    config = from_tree({"comm": {"channels": channels}})
    assert bool(risky(config)) == warned
    assert risky(dataclasses.replace(config, transport="local")) == []


def test_ranks_bound_to_cores_of_their_own_do_not_crowd_a_host() -> None:
    bound = [rank(core_ids=frozenset(range(4 * r, 4 * r + 4)), threads=4) for r in range(3)]
    assert warnings(*bound) == []


def test_memory_that_a_system_does_not_tell_is_not_guessed() -> None:
    for untold in (rank(), rank(Use(None, None, GIB)), rank(Use(GIB, None, GIB), resident_bytes=None)):
        assert untold.more_bytes == 0
    assert rank(Use(2 * GIB, None, GIB)).more_bytes == 4 * GIB


# The command


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_alone_without_a_configuration_it_shows_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check"]) == 0
    shown = capsys.readouterr().out
    assert "One process" in shown
    assert f"torch {torch.__version__}" in shown
    assert listing(tmp_path) == []


def test_with_a_configuration_it_shows_what_would_be_done_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "not" / "there"
    keys = ["transport=local", f"output={output}", "algorithm.name=fedavg", "algorithm.align_every=3"]
    assert main(["check", QUICKSTART, *keys]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"client +104,128 +0\.4 MiB +37\.4% +104,128 +0\.4 MiB", shown)
    assert re.search(r"fsl_sage +4\.0 MiB", shown)
    assert "fedavg (configured)" in shown
    assert "warning: algorithm.align_every is not used by fedavg" in shown
    shown = " ".join(shown.split())
    assert f"free in {tmp_path}; the run would fill" in shown
    assert shown.startswith(
        "Trains and evaluates round 1 of 50, 48 local steps of 4 clients, to measure it ..."
    )
    assert re.search(r"Round 1, without alignment: [\d.]+ s; evaluation [\d.]+ s\. Requests: none\.", shown)
    assert re.search(r"Estimate for 50 rounds: [\d.]+ (s|min)\.", shown)
    assert listing(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path: Path) -> None:
    output = tmp_path / "file"
    output.write_text("")
    config = from_tree({"transport": "local", "output": str(output)})
    findings = examine(config, configured=False)
    assert findings is not None
    assert findings.warnings() == [
        f"output '{output}': rank 0 on {os.uname().nodename} cannot write to {output} (not a folder)"
    ]


def test_a_configuration_that_cannot_run_is_refused_as_by_training() -> None:
    config = from_tree({"transport": "local", "clients": {"count": 2000}})
    assert "clients.count: got 2000" in mistake(examine, config, True)
    assert main(["check", QUICKSTART, "clients.cuont=3"]) == 2


def test_a_name_that_the_file_system_does_not_take_is_refused_as_by_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "LONGEST_NAME", 1000)  # some file systems take less than others
    config = from_tree(tree(tmp_path, name="x" * 300))
    refused = [mistake(examine, config, True), mistake(fslsage_rpc.train, to_tree(config))]
    assert refused[0] == refused[1]
    assert refused[0].startswith("name: got 'xxx")
    assert f"expected one that the file system of {tmp_path} takes" in refused[0]


@pytest.mark.nightly
def test_on_ranks_it_measures_their_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (f"output={tmp_path / 'runs'}", "comm.transports=[uv]", "device=cpu")
    monkeypatch.setenv("COLUMNS", "150")
    shown = fslsage_on_ranks(3, tmp_path, "check", QUICKSTART, *keys)
    for number, role in ((0, "server"), (1, "clients"), (2, "clients")):
        assert re.search(rf"{number} \({role}\).*127\.0\.0\.1 \(lo\)", shown), shown
    for number in (1, 2):
        assert re.search(rf"rank {number} - rank 0 +[\d.]+ ms .*MB/s", shown), shown
    assert "gloo (the client ranks compute on CPUs); an all-reduce over 2 client ranks takes" in shown
    found = " ".join(shown.split())
    assert re.search(r"Round 50, with alignment: [\d.]+ s, of which nothing but alignment [\d.]+ s", found)
    assert "Requests: 24 push, 4 align." in found
    assert re.search(r"50 rounds: \S+ \w+ if all are like this one, \S+ \w+ if 25 are and", found)
    memory = re.findall(r"^ +([012])((?: +[\d,]+\.\d){5}) *$", shown, re.MULTILINE)
    assert [number for number, _ in memory] == ["0", "1", "2"]
    for _, columns in memory:
        before, peak, part, left, in_all = (float(each.replace(",", "")) for each in columns.split())
        assert 0 < part < before <= peak < in_all
        assert left < in_all
    assert not (tmp_path / "runs").exists()


@pytest.mark.nightly
def test_ranks_that_cannot_meet_end_it_with_status_1_behind_the_likely_reason() -> None:
    done = fslsage(
        "check",
        QUICKSTART,
        "comm.timeout_seconds=5",
        "comm.interface=lo",
        "ranks=2",
        seconds=100,
        COLUMNS="150",
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29917",
    )
    assert done.returncode == 1
    first, *_, last = done.stderr.strip().splitlines()
    assert first.startswith("warning:")
    assert "listen on 127.0.0.1, that of interface lo, and no other host can reach it" in first
    assert "did not start" in last
