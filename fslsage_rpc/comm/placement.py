"""Which GPU each rank is on, and what follows: how requests' tensors travel, what averages the weights."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fslsage_rpc.errors import InputError

SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"
"""set to 1, NCCL 2.30 and later takes several ranks on one GPU; its own and experimental"""

SHM_CORES_PER_RANK = 2
"""TensorPipe's shm transport keeps up to a core busy per rank, also while it waits"""

ONE_HOST_CHANNELS = ["cma", "mpt_uv", "basic", "cuda_xth", "cuda_ipc", "cuda_basic"]
"""TensorPipe's, best first, without cuda_gdr: RDMA, of no use on one host, and some machines abort on it"""

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


@dataclass(frozen=True)
class GpuPlace:
    """A rank's host and the identity of its GPU there, if it has one."""

    host: str
    gpu: str | None

    @classmethod
    def of(cls, device: torch.device) -> "GpuPlace":
        """Where this process is, with this device."""
        on_gpu = device.type == "cuda"
        gpu = str(torch.cuda.get_device_properties(device).uuid) if on_gpu else None
        return cls(os.uname().nodename, gpu)


def choose_averaging(wanted: str, clients: Sequence[GpuPlace], nccl_built: bool) -> str:
    """nccl where it can be had, which needs every client rank on a GPU of its own; else gloo.

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
        return "nccl"
    return "nccl" if possible and not shared and wanted == "auto" else "gloo"
