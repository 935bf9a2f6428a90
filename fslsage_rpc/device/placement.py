"""The GPU of each rank, and what torch is told of it."""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.streams import own_stream
from fslsage_rpc.errors import HostError

CPU = torch.device("cpu")
PROCESSORS = Path("/proc/cpuinfo")


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
    """Begin to look for `peak_device_bytes` anew.

    What torch keeps from an earlier training would count, so it is given back first.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int | None:
    """The most that this process's tensors have taken of a GPU, with what torch keeps for the next ones; None
    for a CPU.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def gpu_number(rank: int, size: int) -> int:
    """The number, on its host, of the GPU of one of so many ranks: see `choose_device`.

    Clients take the GPUs from the first on; the server takes one of its own where one is left.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if rank == 0:
        return min(int(os.environ.get("LOCAL_WORLD_SIZE", size)), max(torch.cuda.device_count(), 1)) - 1
    on_server_host = rank == local_rank
    return local_rank - 1 if on_server_host else local_rank


def gpu_count(keys_device: str) -> int:
    """The GPUs that a job of this configuration may use here."""
    return 0 if keys_device == "cpu" else torch.cuda.device_count()


def choose_device(keys_device: str, index: int) -> torch.device:
    """The device of a rank that would take GPU number `index` of its host.

    Raises:
        HostError: a GPU is asked for and torch sees none.
    """
    if keys_device == "cuda" and not torch.cuda.is_available():
        raise HostError("device: got 'cuda', expected auto or cpu: torch sees no CUDA device here")
    if keys_device == "cpu" or not torch.cuda.is_available():
        return CPU
    return torch.device("cuda", index % torch.cuda.device_count())


def open_device(config: Config, index: int) -> torch.device:
    """The device of a rank that would take GPU number `index`, made the current one, TF32 as configured.

    With CUDA graphs the thread gets a stream of its own: on the device's default one none can be captured. It
    keeps that for all its worlds, whose parties find their tensors in it.
    """
    device = choose_device(config.device, index)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_tf32(config.tf32)
        if config.graphs == "auto" and torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
            torch.cuda.set_stream(own_stream(device))
    return device


def set_tf32(allowed: bool) -> None:
    """Let GPUs round the factors of fp32 matrix products and convolutions to TF32, or not."""
    rounding = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = rounding
    torch.backends.cudnn.conv.fp32_precision = rounding  # type: ignore[attr-defined]  # only there at run time


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the host's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _model_name() or platform.processor() or platform.machine()


def _model_name() -> str | None:
    """The processor's, as Linux tells it on most machines; Python's own is that of its kind, as x86_64."""
    with suppress(OSError):
        for line in PROCESSORS.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name":
                return name.strip()
    return None
