"""The findings of `fslsage check`, and what in them is worth a warning."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fslsage_rpc.algorithms import ALGORITHMS, Algorithm
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.algorithms.paper_ledger import paper_bytes
from fslsage_rpc.algorithms.rehearsal import Rehearsal
from fslsage_rpc.check.links import CollectiveSpeed
from fslsage_rpc.check.machine import Disk, Machine
from fslsage_rpc.check.one_round import Use
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.placement import GpuPlace
from fslsage_rpc.measure.host_load import BUSY, CoreTimes, busy_by_host
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.models.flat import module_bytes, trainable
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.transport.choices import SHM_CORES_PER_RANK, hidden_gpus
from fslsage_rpc.units import GIB, MIB

MOST_REHEARSED = 100_000
"""local steps of an algorithm, from which its bytes are counted"""
NEARLY = 0.9
"""the share of what is left of a memory from which on it may not do for the whole run"""
COPIES = 3
"""the most that a rank holds of its part of a checkpoint while that is written, beside the next round"""


@dataclass(frozen=True)
class Rank:
    """All that one rank has to say."""

    machine: Machine
    disk: Disk
    sees_output: bool
    """it sees a file that rank 0 has put into `output`"""
    use: Use | None = None
    """what a round has taken; None where none was trained"""
    idle: CoreTimes | None = None
    """what its host's cores did while all ranks waited"""

    @property
    def more_bytes(self) -> int:
        """Bytes of the host's memory that it wants beside those that it had before the round, at the most; 0
        where that is not known.
        """
        if self.use is None or self.use.peak is None or self.machine.resident_bytes is None:
            return 0
        return max(0, self.use.peak - self.machine.resident_bytes) + COPIES * self.use.checkpoint


@dataclass(frozen=True)
class ModelSize:
    """The client, server or auxiliary model: its parameters, and their bytes with the buffers."""

    parameters: int
    bytes: int
    trained: int
    """the parameters that are not frozen"""
    trained_bytes: int
    """of those, with the buffers: what is averaged, sent and counted"""

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """Count a model."""
        trained = module_bytes(model)
        frozen = sum(weights.nbytes for weights in model.parameters() if not weights.requires_grad)
        count, moving = (sum(w.numel() for w in some) for some in (model.parameters(), trainable(model)))
        return cls(count, trained + frozen, moving, trained)


@dataclass(frozen=True)
class Outlook:
    """All that a configuration comes to."""

    config: Config
    models: dict[str, ModelSize]
    smashed_bytes: int
    """of one sample at the cut"""
    paper_bytes: dict[str, float | None]
    """by algorithm: the paper ledger's of one round, a mean; None where it depends on values"""
    rounds_counted: int
    """that the mean is over, from the first on"""
    interval: int
    """rounds of an alignment interval; 1 for an algorithm without alignments"""
    line: Mapping[str, Any] | None
    """the metrics line of the round that was trained; None where none was"""

    @classmethod
    def of(cls, experiment: Experiment, line: Mapping[str, Any] | None) -> "Outlook":
        """Look at an experiment, of which a round may have been trained."""
        config, split = experiment.config, experiment.split
        algorithms: dict[str, Algorithm] = {
            name: kind(config.algorithm, experiment.federation) for name, kind in ALGORITHMS.items()
        }
        algorithms[config.algorithm.name] = experiment.algorithm  # which may be the user's own
        halves = {"client": split.client, "server": split.server, "auxiliary": split.auxiliary}
        return cls(
            config=config,
            models={name: ModelSize.of(half) for name, half in halves.items()},
            smashed_bytes=experiment.sizes().smashed,
            paper_bytes={name: _paper_bytes(experiment, each) for name, each in algorithms.items()},
            rounds_counted=rounds_counted(experiment),
            interval=experiment.algorithm.interval,
            line=line,
        )

    @property
    def whole_bytes(self) -> int:
        """The size of the whole model."""
        return self.models["client"].bytes + self.models["server"].bytes

    def run_seconds(self, aligned: int) -> float:
        """All rounds and evaluations, estimated from the round that was trained.

        Args:
            aligned: how many rounds have alignments. Others lack the seconds in which it was alignment alone.
        """
        assert self.line is not None
        rounds, evaluations = self.config.rounds, math.ceil(self.config.rounds / self.config.evaluation.every)
        less: float = (rounds - aligned) * self.line["phases"]["server"][Phase.ALIGNMENT]
        total: float = rounds * self.line["round_seconds"] + evaluations * self.line["evaluation_seconds"]
        return total - less


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
    outlook: Outlook | None = None
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
    def disk_bytes(self) -> int | None:
        """Size of the run folder's checkpoints and model at the most; None where no round was trained."""
        if self.outlook is None or self.outlook.line is None:
            return None
        checkpoint = sum(rank.use.checkpoint for rank in self.ranks if rank.use)
        return self.outlook.whole_bytes + (self.config.checkpoint.keep + 1) * checkpoint  # one in the making

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
        found += [
            f"{host}: others have {share:.0%} of its cores, so seconds measured now are not to be trusted"
            for host, share in self.busy.items()
            if share is not None and share > BUSY
        ]
        share = self.outlook.line["host_busy"] if self.outlook and self.outlook.line else None
        if share is not None and share > BUSY:
            found.append(f"others had {share:.0%} of a host's cores in the round: do not trust its seconds")
        return found

    def _about_memory(self) -> list[str]:
        found = []
        for host, ranks in self.hosts.items():
            wanted = sum(self.ranks[rank].more_bytes for rank in ranks)
            known = [b for rank in ranks if (b := self.ranks[rank].machine.memory_bytes) is not None]
            if known and wanted > NEARLY * min(known):
                found.append(
                    f"{host}: a round and its checkpoint want about {sized(wanted)} of memory more, and "
                    f"{sized(min(known))} were left"
                )
        on_gpu: Counter[GpuPlace] = Counter()
        free: dict[GpuPlace, int] = {}
        for rank in self.ranks:
            if rank.use and rank.use.gpu_peak is not None and rank.machine.gpu_bytes is not None:
                on_gpu[rank.machine.gpu] += rank.use.gpu_peak
                free[rank.machine.gpu] = rank.machine.gpu_bytes[0]
        return found + [
            f"{place.host}: a round has taken {sized(taken)} of its GPU {place.gpu}, and "
            f"{sized(free[place])} were free"
            for place, taken in on_gpu.items()
            if taken > NEARLY * free[place]
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
        if free is not None and (filled := self.disk_bytes) is not None and filled > free:
            found.append(
                f"output {output!r}: the run would fill about {sized(filled)}, and {sized(free)} are free"
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
        sent = paper_bytes(algorithm, course, sizes).coded if course else None
        if sent is None:
            return None
        total += sent
    return total / rounds


def rounds_counted(experiment: Experiment) -> int:
    """How many rounds the mean is over: all, or of many steps the first ones, in whole intervals."""
    federation, interval = experiment.federation, experiment.algorithm.interval
    steps = sum(federation.steps(client) for client in federation.participants(0))
    some = max(1, MOST_REHEARSED // steps // interval) * interval
    return min(experiment.config.rounds, some)


def sized(amount: float) -> str:
    """In MiB or GiB."""
    return f"{amount / GIB:,.1f} GiB" if amount >= GIB else f"{amount / MIB:,.1f} MiB"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
