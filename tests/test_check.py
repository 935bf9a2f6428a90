"""`fslsage check` sees what is there, says what training will do, and changes nothing."""

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
from fslsage_rpc.check.findings import Findings, Rank, Run, rounds_counted
from fslsage_rpc.check.machine import Disk, Machine
from fslsage_rpc.check.memory import CPU, Activations, Estimate, Memory, _saved_by
from fslsage_rpc.check.run import examine, risky
from fslsage_rpc.cli import main
from fslsage_rpc.config import loading as configuration
from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.data import datasets
from fslsage_rpc.device.placement import GpuPlace
from fslsage_rpc.models.flat import module_bytes
from fslsage_rpc.parties.turns import MOST_OPEN_STEPS
from fslsage_rpc.runs.checkpoint_files import complete_folders
from fslsage_rpc.training.experiment import Experiment
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


# What a run will take


def estimate(tmp_path: Path, *changes: dict[str, Any], **keys: Any) -> tuple[Experiment, Estimate]:
    experiment = Experiment.prepare(from_tree(tree(tmp_path, *changes, **keys)))
    return experiment, Estimate(experiment)


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
    assert Machine.here(CPU).shares_by_mps == folder


def test_what_autograd_keeps_is_counted_once() -> None:
    x = torch.ones(8, 3, dtype=torch.float32)
    weights = torch.ones(3, 5, requires_grad=True)
    assert sorted(_saved_by(lambda: (x @ weights).exp())) == [8 * 3 * 4, 8 * 5 * 4]
    assert _saved_by(lambda: x.requires_grad_() * x) == [8 * 3 * 4]


def test_activations_per_sample_leave_out_what_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    _, memory = estimate(tmp_path)
    linear = torch.nn.Linear(64, 7).double()
    found = memory._activations(lambda x, y: linear(x.flatten(1)).exp())
    assert found == Activations(kept=8 * (64 + 7), largest=8 * 64)


def test_activations_are_counted_where_larger_batches_have_another_order_in_memory(tmp_path: Path) -> None:
    keys = {"data": {"name": "synthetic", "train_limit": 96}, "model": {"name": "resnet56", "cut": "layer2"}}
    _, memory = estimate(tmp_path, keys, precision="fp32")
    assert memory._whole.kept > memory._client.kept > 0


@pytest.mark.parametrize(
    ("changes", "models", "moments"),
    [
        ({"algorithm": {"name": "fedavg"}}, lambda c, s, a: c + s, 2),
        ({"algorithm": {"name": "splitfed_v1"}}, lambda c, s, a: c, 2),
        ({"algorithm": {"name": "cse_fsl"}}, lambda c, s, a: c + a, 2),
        (
            {"algorithm": {"name": "fedavg"}, "optimizer": {"client": {"name": "sgd"}}},
            lambda c, s, a: c + s,
            0,
        ),
    ],
)
def test_a_client_ranks_models_and_optimizer_states(
    tmp_path: Path, changes: dict[str, Any], models: Any, moments: int
) -> None:
    experiment, memory = estimate(tmp_path, changes)
    split = experiment.split
    one = models(*(module_bytes(half) for half in (split.client, split.server, split.auxiliary)))
    two = memory.of_clients([0, 2])
    assert two.models == 2 * one
    assert two.optimizers == 2 * moments * one + one  # and one client's gradients
    assert two.data == sum(len(experiment.parts[client]) for client in (0, 2)) * (64 + 8)


def test_a_server_holds_a_replica_or_an_auxiliary_model_for_each_client(tmp_path: Path) -> None:
    for name, copies, fits in (
        ("splitfed_v1", 3, 0),
        ("splitfed_v2", 1, 0),
        ("fsl_sage", 2, 3),  # with the lane's snapshot
        ("fedavg", 0, 0),
    ):
        experiment, memory = estimate(tmp_path, {"algorithm": {"name": name}})
        client, server, auxiliary = (
            module_bytes(half)
            for half in (experiment.client_model(), experiment.split.server, experiment.split.auxiliary)
        )
        test = datasets.load(experiment.config.data, train=False)
        found, on_gpu = (memory.of_server(2, 1, test, device) for device in (CPU, torch.device("cuda")))
        start = auxiliary if fits else 0
        assert found.models == 2 * client + start + copies * server + fits * auxiliary
        assert bool(found.alignment) == bool(fits)
        assert found.models - on_gpu.models == (server if fits else 0)  # no snapshot there


@pytest.mark.parametrize(
    ("algorithm", "most"),
    [
        ({"name": "splitfed_v2"}, MOST_OPEN_STEPS),
        ({"name": "fsl_sage"}, MOST_OPEN_STEPS),
        ({"name": "fsl_sage", "align_every": None}, 1),
        ({"name": "cse_fsl"}, 1),
    ],
)
def test_a_rank_keeps_the_activations_of_the_steps_that_may_wait_at_once(
    tmp_path: Path, algorithm: dict[str, Any], most: int
) -> None:
    experiment, memory = estimate(tmp_path, {"algorithm": algorithm}, clients={"count": MOST_OPEN_STEPS + 2})
    one, some, all_of_them = (memory.of_clients(range(clients)) for clients in (1, most, MOST_OPEN_STEPS + 2))
    batch = max(max(sizes) for sizes in experiment.federation.batch_sizes)
    assert all_of_them.activations == some.activations
    assert some.activations - one.activations == (most - 1) * batch * memory._client.kept
    assert all_of_them.requests == MOST_OPEN_STEPS * batch * memory._sample
    test = datasets.load(experiment.config.data, train=False)
    assert memory.of_server(1, 1, test, CPU).requests == all_of_them.requests


def test_no_checkpoints_take_no_memory_and_no_disk(tmp_path: Path) -> None:
    experiment, memory = estimate(tmp_path, {"checkpoint": {"every": None}})
    assert memory.of_clients([0]).checkpoint == 0
    sizes = experiment.sizes()
    assert Run.of(experiment, memory).disk_bytes == sizes.client + sizes.server


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_checkpoints_and_paper_bytes_are_those_of_the_run(tmp_path: Path, name: str) -> None:
    keys = {
        "algorithm": {"name": name},
        "model": {"name": "resnet56", "arguments": {"width": 4}},
        "data": {"partition": "iid", "train_limit": 60},
    }
    config = tree(tmp_path, keys, rounds=2, name=name)
    experiment = Experiment.prepare(from_tree(config))
    memory = Estimate(experiment)
    expected = Run.of(experiment, memory)
    run = fslsage_rpc.train(*as_arguments(tmp_path, config))
    assert expected.paper_bytes[name] * 2 == run.summary["paper_bytes_total"]
    folder = complete_folders(run.folder / "checkpoints")[0]
    written = sum(file.stat().st_size for file in folder.glob("*.pt"))
    # What is written besides numbers: names, step counters, the archive's headers.
    assert written * 0.75 < memory.states.checkpoint() <= written * 1.01


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
def test_estimated_memory_is_near_the_measured_peak(tmp_path: Path, overrides: list[str]) -> None:
    keys = [QUICKSTART, *overrides, "name=run", f"output={tmp_path}", "comm.transports=[uv]", "device=cpu"]
    for command in ("train", "check"):
        job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        job += ["--nproc_per_node=3"]
        subprocess.run([*job, str(PEAKS), str(tmp_path), command, *keys], check=True, timeout=200)
    for rank in range(3):
        measured = json.loads((tmp_path / f"train-{rank}.json").read_text())
        estimated = json.loads((tmp_path / "check.json").read_text())[rank]
        assert 0.85 < estimated / measured < 1.25  # what it adds up need not meet in time


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
            resident_bytes=GIB,
            peak_bytes=GIB,
            gpu_free_bytes=None,
            shares_by_mps=False,
            versions={"torch": "2.15"},
        ),
        **changes,
    )


def rank(memory: Memory | None = None, sees: bool = True, disk: Disk | None = None, **changes: Any) -> Rank:
    return Rank(machine(**changes), disk or Disk("runs", 9 * GIB, None), sees, memory)


def warnings(
    *ranks: Rank, averaging: str | None = "gloo", transports: Any = ("uv",), run: Run | None = None
) -> list[str]:
    world = {"transport": "rpc", "averaging": averaging, "rpc_transports": transports}
    return Findings(Config(), ranks, world, {}, None, run).warnings()


def on_gpu(host: str, gpu: str, *others: str, **changes: Any) -> Rank:
    """A rank of a host with three GPUs; where `others` are given, the rank sees these and its own alone."""
    visible = frozenset({gpu, *others} if others else "123")
    return rank(host=host, gpu=GpuPlace(host, gpu, visible), gpu_free_bytes=GIB, **changes)


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


FULL = Run({}, {"client": 1, "server": 1}, {}, {}, 1, {}, 1, disk_bytes=10 * GIB)


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
        (warnings(rank(Memory(models=5 * GIB)), rank(Memory(data=5 * GIB))), ["10.0 GiB", "8.0 GiB"]),
        (warnings(on_gpu("a", "1", memory=Memory(models=2 * GIB))), ["GPU 1", "2.0 GiB", "1.0 GiB free"]),
        (warnings(rank(), rank(sees=False)), ["rank 1 does not see", "all hosts share"]),
        (warnings(rank(disk=Disk("/runs", None, "Read-only file system"))), ["/runs", "Read-only"]),
        (warnings(rank(), run=FULL), ["10.0 GiB", "9.0 GiB"]),
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


def test_memory_at_the_peak_counts_what_a_rank_lets_go() -> None:
    holding = Rank(machine(resident_bytes=3 * GIB, peak_bytes=3 * GIB), Disk("", 1, None), True)
    grows = dataclasses.replace(holding, memory=Memory(models=2 * GIB), released_bytes=GIB)
    assert grows.resident_then_bytes == 4 * GIB
    shrinks = dataclasses.replace(grows, released_bytes=3 * GIB)
    assert shrinks.resident_then_bytes == 3 * GIB


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
    assert f"free in {tmp_path}; the run would fill" in " ".join(shown.split())
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
