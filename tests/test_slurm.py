"""launch/slurm.sbatch on a real SLURM of two nodes: both forms, jobs that are requeued, wrong input."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from fslsage_rpc.job.stopping import STOPPED
from fslsage_rpc.notebook import Run
from support.equality import assert_identical, assert_whole
from support.job_processes import members
from support.run_folders import finished, lines
from support.slurm_cluster import HOSTS, Cluster, cluster, why_not
from support.trees import tree

SCRIPT = str(Path(__file__).parent.parent / "launch" / "slurm.sbatch")
JOB_SECONDS = 300
ROUNDS = 30
VARIANTS: dict[str, list[str]] = {"fsl_sage": [], "splitfed_v1": ["algorithm.name=splitfed_v1"]}
pytestmark = pytest.mark.timeout(2 * JOB_SECONDS)  # they need root and Debian's slurm-wlm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(
    slurm: Cluster,
    folder: Path,
    launcher: str,
    *overrides: str,
    command: str = "train",
    requeue: bool = True,
    **environment: str,
) -> str:
    """Submit a job of 2 nodes with 2 ranks each, its run in `folder/run`."""
    keys = tree(Path("."), rounds=ROUNDS, name="run", transport="rpc", data={"train_limit": 600})
    keys["comm"]["interface"] = "eth0"
    (folder / "job.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    options = ["--nodes=2", "--ntasks-per-node=2", "--job-name=test"]
    if not requeue:
        options.append("--no-requeue")
    return slurm.submit(
        folder,
        *options,
        SCRIPT,
        command,
        "job.yaml",
        *overrides,
        LAUNCHER=launcher,
        PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
        **environment,
    )


def log(folder: Path) -> str:
    return "".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("slurm*.log")))


def wait_until(condition: Callable[[], object], folder: Path, seconds: float = JOB_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log(folder)
        time.sleep(0.1)


def in_round(folder: Path, rounds: int) -> Callable[[], bool]:
    """Has the run so many rounds behind it?"""
    metrics = folder / "run" / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= rounds


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The job run to its end, in both forms."""
    runs = {}
    for launcher in ("torchrun", "srun"):
        folder = tmp_path_factory.mktemp(launcher)
        assert slurm.wait(submit(slurm, folder, launcher), JOB_SECONDS) == 0, log(folder)
        runs[launcher] = finished(folder / "run")
    return runs


@pytest.mark.gate
def test_both_forms_train_on_both_nodes_to_the_same_end(undisturbed: dict[str, Run]) -> None:
    assert_whole(undisturbed["srun"])
    assert_identical(undisturbed["srun"], undisturbed["torchrun"])
    for launcher, run in undisturbed.items():
        environment = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
        hosts = [rank["host"] for rank in environment["ranks"]]
        assert environment["interface"] == "eth0"
        if launcher == "srun":
            assert hosts == ["node1", "node1", "node2", "node2"]
        else:  # whose nodes are in no order
            assert sorted(hosts) == ["node1", "node1", "node2", "node2"]


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_job_that_is_stopped_before_its_time_limit_goes_on_where_it_was(
    launcher: str, slurm: Cluster, undisturbed: dict[str, Run], tmp_path: Path
) -> None:
    job = submit(slurm, tmp_path, launcher)
    wait_until(in_round(tmp_path, 3), tmp_path)
    slurm.nodes[0].run("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@120 does
    wait_until(lambda: slurm.state(job) == "PENDING", tmp_path)
    stopped_after = (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n")
    assert 3 <= stopped_after < ROUNDS
    assert "Traceback" not in log(tmp_path)
    assert (tmp_path / "run" / "STOPPED").exists()
    slurm.start_now(job)
    assert slurm.wait(job, JOB_SECONDS) == 0, log(tmp_path)
    assert f"goes on from round {stopped_after} " in log(tmp_path)
    assert not (tmp_path / "run" / "STOPPED").exists()
    run = finished(tmp_path / "run")
    assert_whole(run)
    assert_identical(undisturbed[launcher], run)


@pytest.mark.nightly
def test_a_requeued_job_goes_on_from_its_last_checkpoint(
    slurm: Cluster, undisturbed: dict[str, Run], tmp_path: Path
) -> None:
    """As after preemption or the loss of a node: nobody asked the ranks first."""
    job = submit(slurm, tmp_path, "srun")
    wait_until(in_round(tmp_path, 3), tmp_path)
    slurm.nodes[0].run("scontrol", "requeue", job)
    wait_until(lambda: slurm.state(job) == "PENDING", tmp_path)
    slurm.start_now(job)
    assert slurm.wait(job, JOB_SECONDS) == 0, log(tmp_path)
    assert_identical(undisturbed["srun"], finished(tmp_path / "run"))


@pytest.mark.nightly
def test_where_nothing_is_requeued_a_stopped_job_is_status_75(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "srun", requeue=False)
    wait_until(in_round(tmp_path, 1), tmp_path)
    slurm.nodes[0].run("scancel", "--signal=TERM", job)
    assert slurm.wait(job, JOB_SECONDS) == STOPPED, log(tmp_path)
    assert (tmp_path / "run" / "STOPPED").exists()


@pytest.mark.nightly
def test_under_plain_srun_the_others_go_on_without_a_killed_rank(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "srun", "clients.on_loss=drop")
    wait_until(in_round(tmp_path, 3), tmp_path)
    os.kill(members(f"{sys.executable}\0-m\0fslsage_rpc\0train\0job.yaml")[3], signal.SIGKILL)
    assert slurm.wait(job, JOB_SECONDS) == 0, log(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (loss,) = (line for line in lines if "event" in line)
    assert (loss["event"], loss["rank"], loss["clients"]) == ("loss", 3, [2])
    assert [line["round"] for line in lines if "event" not in line] == list(range(1, ROUNDS + 1))
    assert all(
        (2 in line["participants"]) == (line["round"] < loss["round"])
        for line in lines
        if "event" not in line
    )


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_check_looks_at_every_rank_of_the_job(launcher: str, slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, launcher, command="check", COLUMNS="160")
    assert slurm.wait(job, JOB_SECONDS) == 0, log(tmp_path)
    shown = log(tmp_path)
    for host, address in HOSTS.items():
        assert len(re.findall(rf"{host}.*{re.escape(address)} \(eth0\)", shown)) == 2, shown
    for rank in (1, 2, 3):
        assert re.search(rf"rank {rank} - rank 0 +[\d.]+ ms .*MB/s", shown), shown
    assert "an all-reduce over 3 client ranks takes" in shown
    assert not (tmp_path / "run").exists()


def submit_sweep(slurm: Cluster, folder: Path, *options: str) -> str:
    """Submit a sweep of two variants with two seeds, in `folder/study`; each job is two ranks on one node."""
    keys = tree(Path("."), rounds=12, name="study", transport="rpc", data={"train_limit": 600})
    keys["comm"]["interface"] = "eth0"
    keys["sweep"] = {"variants": VARIANTS, "seeds": [0, 1]}
    (folder / "study.yaml").write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    allocation = ("--nodes=1", "--ntasks-per-node=2", "--job-name=test", "--output=slurm-%a.log")
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LAUNCHER": "srun"}
    return slurm.submit(folder, *allocation, *options, SCRIPT, "sweep", "study.yaml", **environment)


@pytest.mark.nightly
def test_jobs_of_an_array_share_a_sweep_and_one_that_was_killed_goes_on(
    slurm: Cluster, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    array = submit_sweep(slurm, tmp_path, "--array=0-1")
    first, second = f"{array}_0", f"{array}_1"
    run = study / "splitfed_v1-seed0"
    wait_until(lambda: len(lines(run)) >= 3, tmp_path)
    slurm.nodes[0].run("scancel", "--full", "--signal=KILL", second)
    wait_until(lambda: slurm.state(second) == "CANCELLED", tmp_path)
    assert slurm.wait(first, JOB_SECONDS) == 0
    shown = (tmp_path / "slurm-0.log").read_text(encoding="utf-8")
    assert "2/2  fsl_sage-seed1  accuracy" in shown, shown
    assert not (run / "summary.json").exists()
    assert not (study / "splitfed_v1-seed1").exists()
    again = f"{submit_sweep(slurm, tmp_path, '--array=1')}_1"
    assert slurm.wait(again, JOB_SECONDS) == 0
    assert "goes on from round" in (run / "log.txt").read_text(encoding="utf-8")
    for variant in VARIANTS:
        for seed in (0, 1):
            assert_whole(finished(study / f"{variant}-seed{seed}"))


@pytest.mark.nightly
def test_a_job_of_a_sweep_that_is_stopped_before_its_time_limit_is_requeued(
    slurm: Cluster, tmp_path: Path
) -> None:
    job = f"{submit_sweep(slurm, tmp_path, '--array=0-1')}_0"
    run = tmp_path / "study" / "fsl_sage-seed0"
    wait_until(lambda: len(lines(run)) >= 3, tmp_path)
    slurm.nodes[0].run("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@120 does
    wait_until(lambda: slurm.state(job) == "PENDING", tmp_path)
    stopped_after = len(lines(run))
    assert 3 <= stopped_after < 12
    slurm.start_now(job)
    assert slurm.wait(job, JOB_SECONDS) == 0, log(tmp_path)
    assert f"goes on from round {stopped_after} " in (run / "log.txt").read_text(encoding="utf-8")
    assert_whole(finished(run))
    assert_whole(finished(tmp_path / "study" / "fsl_sage-seed1"))


@pytest.mark.nightly
def test_a_cancelled_job_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "srun")
    wait_until(in_round(tmp_path, 1), tmp_path)
    slurm.nodes[0].run("scancel", job)
    slurm.wait(job, JOB_SECONDS)
    time.sleep(2)
    assert slurm.state(job) == "CANCELLED"


@pytest.mark.nightly
def test_an_interface_that_is_on_no_node_is_refused_by_name(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "torchrun", "comm.interface=nosuch")
    assert slurm.wait(job, JOB_SECONDS) == 2
    assert log(tmp_path) == "fslsage_rpc: comm.interface: got 'nosuch', expected one of lo, eth0\n"


@pytest.mark.nightly
def test_an_interface_that_one_node_lacks_is_refused_by_name_there(slurm: Cluster, tmp_path: Path) -> None:
    slurm.nodes[0].run("ip", "link", "add", "fast0", "type", "veth", "peer", "name", "fast1")
    job = submit(slurm, tmp_path, "srun", "comm.interface=fast0")
    assert slurm.wait(job, JOB_SECONDS) != 0
    refusal = (
        r"fslsage_rpc: comm\.interface: got 'fast0', expected one of lo, eth0 \(on rank [23], host node2\)"
    )
    assert len(re.findall(refusal, log(tmp_path))) == 1


@pytest.mark.nightly
def test_ranks_that_a_firewall_keeps_apart_end_and_say_so(slurm: Cluster, tmp_path: Path) -> None:
    """Packets are dropped, so nothing fails; only SLURM's own port is open, and those of the other node."""
    rule = ["INPUT", "--protocol", "tcp", "--syn", "!", "--destination-port", "6818", "--jump", "DROP"]
    if shutil.which("iptables", path="/usr/sbin:/sbin") is None:
        pytest.skip("needs iptables (Debian: apt-get install iptables)")
    slurm.nodes[1].run("iptables", "--append", *rule)
    try:
        job = submit(slurm, tmp_path, "srun", "comm.timeout_seconds=20")
        assert slurm.wait(job, JOB_SECONDS) == 1
    finally:
        slurm.nodes[1].run("iptables", "--delete", *rule)
    ours = [line for line in log(tmp_path).splitlines() if line.startswith("fslsage_rpc:")]
    assert len(ours) == 1
    assert "could not connect to all other ranks within 30 s: is there a firewall" in ours[0]
