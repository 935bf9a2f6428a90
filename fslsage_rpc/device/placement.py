"""Which GPU each rank is on, and what follows: how requests' tensors travel, what averages the weights."""

import os
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fslsage_rpc.errors import InputError

SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"
"""set to 1, NCCL 2.30 and later takes several ranks on one GPU; its own and experimental"""

SHM_CORES_PER_RANK = 2
"""TensorPipe's shm transport keeps up to a core busy per rank, also while it waits"""

CPU_CHANNELS = ("cma", "mpt_uv", "basic")
"""TensorPipe's ways for tensors in host memory, best first"""

CUDA_CHANNELS = ("cuda_xth", "cuda_ipc", "cuda_basic")
"""likewise for those on GPUs; without cuda_gdr, RDMA, on which some machines abort (pytorch issue 130513)"""

DeviceMaps = dict[int, tuple[torch.device, torch.device]]
"""per client rank its GPU and the server's, each as its own rank calls it"""


def device_maps(devices: Sequence[torch.device], wanted: str) -> DeviceMaps:
    """The client ranks whose requests' tensors go from their GPU straight to the server's: all that have one,
    if the server has one. The others' pass through host memory.

    Args:
        devices: by rank.
        wanted: the key `comm.device_maps`.
    """
    server, *clients = devices
    if wanted == "never" or server.type != "cuda":
        return {}
    return {rank: (mine, server) for rank, mine in enumerate(clients, start=1) if mine.type == "cuda"}


def choose_channels(
    wanted: Sequence[str] | None, places: Sequence["GpuPlace"], maps: DeviceMaps
) -> list[str]:
    """The channels of TensorPipe, best first: those asked for, else all that suit the job, without cuda_gdr.

    Some abort the process when it looks for a way to another rank, whether tensors then take that or not.

    Args:
        wanted: the key `comm.channels`.
        places: where each rank is.
        maps: see `device_maps`.

    Raises:
        InputError: those that are asked for lead from no rank's memory, or GPU, to the server's.
    """
    if wanted is None:
        left_out = "cuda_ipc" if hidden_gpus(places) else None
        return [each for each in (*CPU_CHANNELS, *(CUDA_CHANNELS if maps else ())) if each != left_out]
    one_host = len({place.host for place in places}) == 1
    leading: tuple[str, ...] = CPU_CHANNELS if one_host else ("mpt_uv", "basic")
    if not set(leading) & set(wanted):
        raise lacking(wanted, leading)
    within_hosts = all(places[rank].host == places[0].host for rank in maps)
    leading = (*(["cuda_ipc"] if within_hosts else []), "cuda_gdr", "cuda_basic")
    if maps and not set(leading) & set(wanted):
        raise lacking(wanted, leading, "for tensors on GPUs; or comm.device_maps=never")
    return list(wanted)


def lacking(wanted: Sequence[str], leading: Sequence[str], what_for: str = "") -> InputError:
    """None of the channels asked for leads where tensors have to go, as one of these would."""
    expected = f"expected one of {', '.join(leading)} among them"
    return InputError(f"comm.channels: got [{', '.join(wanted)}], {expected} {what_for}".rstrip())


def hidden_gpus(places: Sequence["GpuPlace"]) -> dict[str, list[int]]:
    """The hosts whose ranks do not all see the same GPUs, and those of their ranks that see any.

    TensorPipe's cuda_ipc aborts on a GPU that one rank of a host sees and another does not, in use or not:
    tensorpipe issue 412.

    Args:
        places: where each rank is.
    """
    seeing = defaultdict(list)
    for rank, place in enumerate(places):
        if place.visible:
            seeing[place.host].append(rank)
    return {h: ranks for h, ranks in seeing.items() if len({places[r].visible for r in ranks}) > 1}


Cores = tuple[str, frozenset[int]]
"""a host, and the cores of it that a rank may run on"""


def fair_threads(rank: int, cores: Sequence[Cores]) -> int:
    """A rank's share of its cores, which others may use too (all of a host, or none where ranks are bound).

    Args:
        cores: by rank.
    """
    host, mine = cores[rank]
    sharing = sum(other == host and bool(theirs & mine) for other, theirs in cores)
    return max(1, len(mine) // sharing)


@dataclass(frozen=True)
class GpuPlace:
    """A rank's host and the identity of its GPU there, if it has one.

    `visible`: the identities of all GPUs that it sees, none where it computes on a CPU.
    """

    host: str
    gpu: str | None
    visible: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, device: torch.device) -> "GpuPlace":
        """Where this process is, with this device."""
        host = os.uname().nodename
        if device.type != "cuda":
            return cls(host, None)
        gpu, *seen = (
            str(torch.cuda.get_device_properties(each).uuid)
            for each in (device, *range(torch.cuda.device_count()))
        )
        return cls(host, gpu, frozenset(seen))


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU's memory that are free, and of all of it; None for a CPU."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    """Begin to look for `peak_device_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int | None:
    """The most that this process's tensors have taken of a GPU, with what torch keeps for the next ones; None
    for a CPU.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def choose_averaging(wanted: str, clients: Sequence[GpuPlace], nccl_built: bool) -> str | None:
    """nccl where it can be had, which needs every client rank on a GPU of its own; else gloo. None where one
    client rank is alone, with nobody to average with.

    Args:
        wanted: the key `comm.averaging`.
        clients: where each client rank is.

    Raises:
        InputError: NCCL is asked for and cannot be had.
    """
    refused = "comm.averaging: got 'nccl', expected auto or gloo:"
    shared = len(set(clients)) < len(clients)
    possible = nccl_built and all(place.gpu is not None for place in clients)
    if wanted == "nccl":
        if not possible:
            raise InputError(f"{refused} not every client rank has a GPU and NCCL")
        if shared and os.environ.get(SHARED_GPUS) != "1":
            raise InputError(f"{refused} client ranks share a GPU, which NCCL refuses")
    if len(clients) == 1:
        return None
    return "nccl" if wanted == "nccl" or (possible and not shared and wanted == "auto") else "gloo"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the host's processor."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return gpu or platform.processor() or platform.machine()
