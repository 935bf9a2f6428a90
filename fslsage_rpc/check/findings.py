"""What `fslsage check` has found out, and what in it is worth a warning."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fslsage_rpc.algorithms import ALGORITHMS, Algorithm
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.algorithms.paper_ledger import paper_bytes
from fslsage_rpc.algorithms.rehearsal import Rehearsal
from fslsage_rpc.check.links import CollectiveSpeed
from fslsage_rpc.check.machine import Disk, Machine
from fslsage_rpc.check.memory import Estimate, Memory
from fslsage_rpc.config.schema import Config
from fslsage_rpc.measure.host_load import BUSY, CoreTimes, busy_by_host
from fslsage_rpc.models.flat import module_bytes, trainable
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.transport.choices import SHM_CORES_PER_RANK, hidden_gpus

MIB, GIB = 2**20, 2**30
MOST_REHEARSED = 100_000
"""local steps of an algorithm, from which its bytes are counted"""


@dataclass(frozen=True)
class Rank:
    """What one rank has to say."""

    machine: Machine
    disk: Disk
    sees_output: bool
    """it sees a file that rank 0 has put into `output`"""
    memory: Memory | None = None
    """what it will need beside what it has; None without a configuration"""
    released_bytes: int = 0
    """of what it has, the training samples of all clients, which it will let go"""
    idle: CoreTimes | None = None
    """what its host's cores did while all ranks waited"""

    @property
    def more_bytes(self) -> int | None:
        """Bytes of the host's memory that it will want beside those that it has now, at the most."""
        if self.memory is None:
            return None
        on_gpu = self.machine.gpu.gpu is not None
        held = self.memory.of_host if on_gpu else self.memory.total
        return max(self.memory.data, held - self.released_bytes)

    @property
    def resident_then_bytes(self) -> int | None:
        """Its resident memory at the peak, estimated."""
        machine, more = self.machine, self.more_bytes
        if machine.resident_bytes is None or machine.peak_bytes is None or more is None:
            return None
        return max(machine.peak_bytes, machine.resident_bytes + more)


@dataclass(frozen=True)
class Run:
    """What a configuration comes to."""

    parameters: dict[str, int]
    """of the client, server and auxiliary model"""
    bytes: dict[str, int]
    """of these, with the buffers"""
    trained: dict[str, int]
    """the parameters that are not frozen"""
    trained_bytes: dict[str, int]
    """of those, with the buffers: what is averaged, sent and counted"""
    smashed_bytes: int
    """of one sample at the cut"""
    paper_bytes: dict[str, float | None]
    """by algorithm: the paper ledger's of one round, a mean; None where it depends on values"""
    interval: int
    """rounds of an alignment interval; 1 for an algorithm without alignments"""
    disk_bytes: int
    """of the run folder's checkpoints and model at their largest"""
    rounds_counted: int = 0
    """that the mean of `paper_bytes` is over, from the first on"""
    frozen_bytes: dict[str, int] = field(default_factory=dict)
    """of the frozen weights that a client's rank and the server's have, each once"""

    @classmethod
    def of(cls, experiment: Experiment, estimate: Estimate) -> "Run":
        """That of an experiment."""
        config, split, sizes = experiment.config, experiment.split, experiment.sizes()
        halves = {"client": split.client, "server": split.server, "auxiliary": split.auxiliary}
        algorithms: dict[str, Algorithm] = {
            name: kind(config.algorithm, experiment.federation) for name, kind in ALGORITHMS.items()
        }
        algorithms[config.algorithm.name] = experiment.algorithm  # which may be the user's own
        paper = {name: _paper_bytes(experiment, algorithm) for name, algorithm in algorithms.items()}
        kept = 0 if config.checkpoint.every is None else config.checkpoint.keep + 1  # one is being written
        trained_bytes = {name: module_bytes(half) for name, half in halves.items()}
        frozen_bytes = {
            name: sum(p.nbytes for p in half.parameters() if not p.requires_grad)
            for name, half in halves.items()
        }
        frozen = sum(frozen_bytes.values())
        unseen = 0 if experiment.algorithm.client_holds_whole_model else frozen_bytes["server"]
        whole_bytes = {name: trained_bytes[name] + frozen_bytes[name] for name in halves}
        return cls(
            parameters={name: sum(p.numel() for p in half.parameters()) for name, half in halves.items()},
            bytes=whole_bytes,
            trained={name: sum(p.numel() for p in trainable(half)) for name, half in halves.items()},
            trained_bytes=trained_bytes,
            smashed_bytes=sizes.smashed,
            paper_bytes=paper,
            rounds_counted=rounds_counted(experiment),
            interval=experiment.algorithm.interval,
            disk_bytes=kept * estimate.states.checkpoint() + whole_bytes["client"] + whole_bytes["server"],
            frozen_bytes={"client": frozen - unseen, "server": frozen},
        )


@dataclass(frozen=True)
class Findings:
    """All ranks, the ways between them, and what the run would leave on disk."""

    config: Config
    ranks: Sequence[Rank]
    world: Mapping[str, Any]
    """see `Transport.describe`"""
    links: Mapping[int, LinkSpeed]
    """by client rank"""
    averaging: CollectiveSpeed | None
    run: "Run | None" = None
    """what the configuration comes to, if there is one"""
    unused_keys: Sequence[str] = ()
    experiment_warnings: Sequence[str] = ()

    def warnings(self) -> list[str]:
        """One line each."""
        return [
            *self._about_addresses(),
            *self._about_gpus(),
            *self._about_cores(),
            *self._about_memory(),
            *self._about_output(),
            *self._about_versions(),
            *(f"algorithm.{key} is not used by {self.config.algorithm.name}" for key in self.unused_keys),
            *self.experiment_warnings,
        ]

    @property
    def hosts(self) -> dict[str, list[int]]:
        """The ranks on each host."""
        found = defaultdict(list)
        for rank, each in enumerate(self.ranks):
            found[each.machine.host].append(rank)
        return dict(found)

    @property
    def busy(self) -> dict[str, float | None]:
        """By host the share of its cores that others had while all ranks waited; None: it does not tell."""
        return busy_by_host([each.idle for each in self.ranks if each.idle])

    def why_averaging(self) -> str:
        """Why weights are averaged by what they are averaged by."""
        wanted, places = self.config.comm.averaging, [each.machine.gpu for each in self.ranks[1:]]
        if self.world["averaging"] is None:
            return "one client rank" if places else "one process"
        if wanted != "auto":
            return f"comm.averaging is {wanted}"
        if self.world["averaging"] == "nccl":
            return "every client rank has a GPU of its own"
        if all(place.gpu is None for place in places):
            return "the client ranks compute on CPUs"
        if any(place.gpu is None for place in places):
            return "not every client rank has a GPU"
        return "client ranks share a GPU" if len(set(places)) < len(places) else "this torch has no NCCL"

    def _about_addresses(self) -> list[str]:
        if len(self.hosts) < 2:
            return []
        inward = [
            f"rank {rank} ({', '.join(each.machine.addresses)} on {each.machine.host})"
            for rank, each in enumerate(self.ranks)
            if each.machine.loopback
        ]
        if not inward:
            return []
        return [
            f"addresses that other hosts cannot reach: {'; '.join(inward)}. Set comm.interface, or the "
            "host's name resolves to 127.x in /etc/hosts"
        ]

    def _about_gpus(self) -> list[str]:
        found = []
        shared = defaultdict(list)
        for rank, each in enumerate(self.ranks):
            if each.machine.gpu.gpu is not None:
                shared[each.machine.gpu].append(rank)
        for place, ranks in shared.items():
            if len(ranks) > 1:
                by_mps = all(self.ranks[rank].machine.shares_by_mps for rank in ranks)
                two_average = len([rank for rank in ranks if rank > 0]) > 1
                found.append(
                    f"ranks {_listed(ranks)} share one GPU of {place.host}"
                    + (" by MPS" if by_mps else ": they take turns on it and never overlap")
                    + (", and NCCL refuses that" if two_average else "")
                    + ("" if by_mps else "; MPS would help, started there by nvidia-cuda-mps-control -d")
                )
        for host, ranks in hidden_gpus([each.machine.gpu for each in self.ranks]).items():
            found.append(
                f"{host}: ranks {_listed(ranks)} do not see the same GPUs, so tensors between them pass "
                "through host memory; let all ranks of a host see all of its GPUs, under SLURM by "
                "--gpus-per-node and --gpu-bind=none"
            )
        with_gpu = [each for each in self.ranks[1:] if each.machine.gpu.gpu is not None]
        if with_gpu and self.world["averaging"] == "gloo":
            found.append(f"weights are averaged by Gloo though there are GPUs: {self.why_averaging()}")
        return found

    def _about_cores(self) -> list[str]:
        found = []
        transports = self.world["rpc_transports"]
        takes_shm = transports is not None and ("shm" in transports or isinstance(transports, str))
        for host, ranks in self.hosts.items():
            machines = [self.ranks[rank].machine for rank in ranks]
            cores = len(frozenset().union(*(machine.core_ids for machine in machines)))
            threads = sum(machine.threads for machine in machines)
            if takes_shm and len(ranks) > 1 and cores < SHM_CORES_PER_RANK * len(ranks):
                found.append(
                    f"{host}: the shm transport keeps up to a core busy per rank, also while it waits, and "
                    f"{len(ranks)} ranks have {cores} cores; set comm.transports=[uv]"
                )
            if len(ranks) > cores:
                found.append(f"{host}: {len(ranks)} ranks share {cores} cores, so they take turns")
            elif threads > cores:
                found.append(
                    f"{host}: {len(ranks)} ranks compute on {threads} threads and have {cores} cores; set "
                    f"OMP_NUM_THREADS={cores // len(ranks)}"
                )
        return found + [
            f"{host}: others have {share:.0%} of its cores, so seconds measured now are not to be trusted"
            for host, share in self.busy.items()
            if share is not None and share > BUSY
        ]

    def _about_memory(self) -> list[str]:
        found = []
        for host, ranks in self.hosts.items():
            wanted = sum(self.ranks[rank].more_bytes or 0 for rank in ranks)
            left = min(
                (b for rank in ranks if (b := self.ranks[rank].machine.memory_bytes) is not None),
                default=None,
            )
            if left is not None and wanted > left:
                found.append(
                    f"{host}: its ranks would want about {size(wanted)} of memory more, and it has "
                    f"{size(left)}"
                )
        on_gpu: Counter[Any] = Counter()
        free: dict[Any, int] = {}
        for rank, each in enumerate(self.ranks):
            if each.machine.gpu_free_bytes is not None and each.memory is not None:
                own = each.memory.total - each.memory.of_host
                frozen = self.run.frozen_bytes if self.run else {}
                on_gpu[each.machine.gpu] += own + frozen.get("client" if rank else "server", 0)
                free[each.machine.gpu] = each.machine.gpu_free_bytes
        return found + [
            f"{place.host}: its GPU {place.gpu} would have to hold about {size(wanted)}, and it has "
            f"{size(free[place])} free"
            for place, wanted in on_gpu.items()
            if wanted > free[place]
        ]

    def _about_output(self) -> list[str]:
        output, found = self.config.output, []
        for rank, each in enumerate(self.ranks):
            writes = rank == 0 or self.config.checkpoint.every is not None
            if each.disk.problem is not None and writes:
                found.append(
                    f"output {output!r}: rank {rank} on {each.machine.host} cannot write to "
                    f"{each.disk.folder} ({each.disk.problem})"
                )
        blind = [rank for rank, each in enumerate(self.ranks) if not each.sees_output]
        if blind and self.ranks[0].disk.problem is None and self.config.checkpoint.every is not None:
            found.append(
                f"output {output!r}: rank {_listed(blind)} does not see what rank 0 writes there; "
                "checkpoints need a file system that all hosts share"
            )
        free = self.ranks[0].disk.free_bytes
        if free is not None and self.run is not None and self.run.disk_bytes > free:
            found.append(
                f"output {output!r}: the run would fill about {size(self.run.disk_bytes)}, and {size(free)} "
                "are free"
            )
        return found

    def _about_versions(self) -> list[str]:
        found = []
        for name in self.ranks[0].machine.versions:
            by_version = defaultdict(list)
            for rank, each in enumerate(self.ranks):
                by_version[each.machine.versions[name]].append(rank)
            if len(by_version) > 1:
                kinds = "; ".join(f"{version} on rank {_listed(r)}" for version, r in by_version.items())
                found.append(f"different versions of {name}: {kinds}")
        return found


def _paper_bytes(experiment: Experiment, algorithm: Algorithm) -> float | None:
    """The paper ledger's bytes of an algorithm's round, mean over the rounds that are counted."""
    rehearsal = Rehearsal(algorithm, experiment.task, experiment.split)
    sizes, total, rounds = experiment.sizes(), 0, rounds_counted(experiment)
    for round in range(rounds):
        course = rehearsal.course(round)
        if course is None:
            return None
        total += paper_bytes(algorithm, course, sizes)
    return total / rounds


def rounds_counted(experiment: Experiment) -> int:
    """How many rounds the mean is over: all, or of many steps the first ones, in whole intervals."""
    federation, interval = experiment.federation, experiment.algorithm.interval
    steps = sum(federation.steps(client) for client in federation.participants(0))
    some = max(1, MOST_REHEARSED // steps // interval) * interval
    return min(experiment.config.rounds, some)


def size(bytes: float) -> str:
    """In MiB or GiB."""
    return f"{bytes / GIB:,.1f} GiB" if bytes >= GIB else f"{bytes / MIB:,.1f} MiB"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
