"""The real transport's choices for the machines at hand: interface, channels, device maps, averaging.

To be imported where torch has been built without torch.distributed, too.
"""

import os
import socket
from collections import defaultdict
from collections.abc import Sequence

import torch

from fslsage_rpc.config.schema import Comm
from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.device.placement import GpuPlace, choose_device
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


def choose_channels(wanted: Sequence[str] | None, places: Sequence[GpuPlace], maps: DeviceMaps) -> list[str]:
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


def hidden_gpus(places: Sequence[GpuPlace]) -> dict[str, list[int]]:
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


def default_transports() -> list[str] | None:
    """uv where cores are few, else None: TensorPipe's own choice, which prefers shm on one host."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return ["uv"] if len(usable_cores()) < SHM_CORES_PER_RANK * local_ranks else None


def bind_interface(keys: Comm) -> str | None:
    """Make RPC, Gloo and NCCL use one interface: the configured one, or loopback where all is on one host."""
    interface = keys.interface
    if interface is None and on_one_host():
        interface = next((name for name in ("lo", "lo0") if name in interfaces()), None)
    for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if keys.interface is not None:
            os.environ[variable] = keys.interface
        elif interface is not None:
            os.environ.setdefault(variable, interface)  # what the user has set stays
    return os.environ.get("TP_SOCKET_IFNAME")


def on_one_host() -> bool:
    """Are all ranks of the job on this host? Known of jobs of torchrun and of our launchers."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")


def interfaces() -> list[str]:
    """The names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def rpc_available() -> bool:
    """Does this build of torch have the RPC framework? (On macOS and Windows some have not.)"""
    if not torch.distributed.is_available():
        return False
    from torch.distributed import rpc

    return rpc.is_available()


def has_channel(name: str) -> bool:
    """Does this build of torch, which has the RPC framework, know that channel of TensorPipe?"""
    from torch.distributed import rpc

    try:
        rpc.TensorPipeRpcBackendOptions(_channels=[name])
    except RuntimeError:
        return False
    return True


def nccl_available(keys_device: str) -> bool:
    """Could NCCL average on the configured device: is it built in, and is there a GPU?"""
    return choose_device(keys_device, 0).type == "cuda" and torch.distributed.is_nccl_available()
