"""A real SLURM on this machine: two nodes, each with a network, a host name and processes of its own.

Needs root and Debian's packages slurm-wlm, munge and iproute2. Everything ends with this process, however
that ends.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")
ISOLATE = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")
HOSTS = {"node1": "10.78.0.1", "node2": "10.78.0.2"}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
START_SECONDS = 20.0
REQUEUE_SECONDS = 3.0
"""a node refuses what was sent in the second of a job's end: its credential has been revoked"""

CONFIGURATION = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName=node[1-2] CPUs=4 State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# The first process of a node: at the end of its input it ends, and with it every process of the node.
NODE = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
echo ready
read
"""


def why_not() -> str | None:
    """Name what is missing here, if anything."""
    if os.geteuid() != 0:
        return "needs root, to make the nodes"
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [command for command in COMMANDS if shutil.which(command, path=search) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: apt-get install slurm-wlm munge iproute2)"
    probe = subprocess.run(
        [*ISOLATE, "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"],
        capture_output=True,
        text=True,
    )
    return f"cannot make namespaces: {probe.stderr.strip()}" if probe.returncode else None


class Node:
    """A host of the cluster, as long as its context lasts."""

    def __init__(self, name: str, folder: Path):
        self._name, self._folder = name, folder

    def __enter__(self) -> "Node":
        self._process = subprocess.Popen(
            [*ISOLATE, "bash", "-e", "-c", NODE.format(name=self._name, folder=self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text())
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()  # closes its input
        assert self._process.returncode is not None

    def run(self, *command: str, folder: Path | None = None) -> str:
        """Run a command on this host.

        Returns:
            What it printed.
        """
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid"]
        done = subprocess.run(
            [*enter, f"--wd={folder or self._folder}", *command],
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def _environment(self) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        environment["PATH"] += ":/usr/sbin:/sbin"
        return {**environment, "SLURM_CONF": str(self._folder / "slurm.conf")}


class Cluster:
    """The commands of a running cluster, as on its first node."""

    def __init__(self, nodes: list[Node]):
        self.nodes = nodes

    def submit(self, folder: Path, *arguments: str, **environment: str) -> str:
        """Submit a job from a folder, to which it writes slurm.log.

        Returns:
            The job's number.
        """
        variables = ",".join(["ALL", *(f"{key}={value}" for key, value in environment.items())])
        options = ["--parsable", "--output=slurm.log", f"--export={variables}"]
        return self.nodes[0].run("sbatch", *options, *arguments, folder=folder).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self._of_job(job, "JobState")

    def status(self, job: str) -> int:
        """The exit status of an ended job's batch script."""
        return int(self._of_job(job, "ExitCode").partition(":")[0])

    def wait(self, job: str, seconds: float) -> int:
        """Wait for a job to end.

        Returns:
            Its exit status.
        """
        deadline = time.monotonic() + seconds
        while self.state(job) not in ENDED:
            assert time.monotonic() < deadline, self.nodes[0].run("scontrol", "show", "job", job)
            time.sleep(0.5)
        return self.status(job)

    def start_now(self, job: str) -> None:
        """Spare a requeued job most of the two minutes that SLURM lets it wait."""
        time.sleep(REQUEUE_SECONDS)
        self.nodes[0].run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _of_job(self, job: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self.nodes[0].run("scontrol", "show", "job", job))
        assert found is not None
        return found[1]


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A SLURM of two nodes of 4 CPUs, joined by one link, their interfaces eth0."""
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder), encoding="utf-8")
    hosts = {"localhost": "127.0.0.1", **HOSTS}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(128))
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    with ExitStack() as stack:
        nodes = [stack.enter_context(Node(name, folder)) for name in HOSTS]
        ends = [["name", "eth0", "netns", str(node.pid)] for node in nodes]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for node, address in zip(nodes, HOSTS.values(), strict=True):
            node.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")
        nodes[0].run("munged", "--force", f"--key-file={key}", *munge)
        nodes[0].run("slurmctld")
        for node in nodes:
            node.run("slurmd")
        deadline = time.monotonic() + START_SECONDS
        while nodes[0].run("sinfo", "--noheader", "--states=idle", "--format=%D").strip() != "2":
            assert time.monotonic() < deadline, nodes[0].run("sinfo")
            time.sleep(0.1)
        yield Cluster(nodes)
