"""One rank's knowledge of the machine that it runs on."""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.device.memory import physical_memory, status_bytes
from fslsage_rpc.device.placement import GpuPlace, gpu_memory
from fslsage_rpc.job.sockets import hostname_address, interface_addresses, listeners
from fslsage_rpc.runs.environment import rank_environment, versions
from fslsage_rpc.units import KIB

NO_LIMIT_BYTES = 2**60
"""limits of cgroups beyond this mean that there is none"""


@dataclass(frozen=True)
class Machine:
    """One rank's host, device, addresses and memory."""

    host: str
    device: str
    device_name: str
    gpu: GpuPlace
    addresses: list[str]
    """that this rank listens on for the others; where that cannot be known, what its host's name means"""
    loopback: bool
    """they are reached from its own host only"""
    interfaces: list[str]
    """the interfaces that these are of"""
    open_ports: list[int]
    """of sockets that listen on all interfaces"""
    core_ids: frozenset[int]
    """the cores that this process may run on"""
    threads: int
    memory_bytes: int | None
    """what the host, or its control group, has left for this rank and others; None: the system does not
    tell"""
    host_bytes: int | None
    """of the host's memory in all"""
    resident_bytes: int | None
    """of this rank, once the data are loaded, the models built and the ranks connected"""
    gpu_bytes: tuple[int, int] | None
    """of its GPU's memory, free and in all; None on a CPU"""
    shares_by_mps: bool
    """NVIDIA's MPS runs here, by which processes that share a GPU overlap"""
    versions: dict[str, str | None]

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        """This process, with this device."""
        names = interface_addresses()
        sockets = listeners()
        bound = {each.address for each in sockets if not each.address.is_unspecified}
        resolved = hostname_address()
        if not bound and resolved:
            bound = {resolved}
        environment = rank_environment(device)
        addresses = sorted(bound, key=str)
        return cls(
            host=environment["host"],
            device=environment["device"],
            device_name=environment["device_name"],
            gpu=GpuPlace.of(device),
            addresses=[str(address) for address in addresses],
            loopback=bool(bound) and all(address.is_loopback for address in bound),
            interfaces=sorted({names[address] for address in addresses if address in names}),
            open_ports=sorted({each.port for each in sockets if each.address.is_unspecified}),
            core_ids=usable_cores(),
            threads=environment["threads"],
            memory_bytes=_available_memory(),
            host_bytes=physical_memory(),
            resident_bytes=status_bytes("VmRSS"),
            gpu_bytes=gpu_memory(device),
            shares_by_mps=_mps_runs(),
            versions=versions(),
        )


@dataclass(frozen=True)
class Disk:
    """The file system of `output`, as one rank sees it; nothing stays on it."""

    folder: str
    """`output`, or the nearest folder above it that exists"""
    free_bytes: int | None
    problem: str | None
    """why nothing can be written there"""

    @classmethod
    def of(cls, output: str) -> "Disk":
        """Try to write there."""
        folder = existing_folder(output)
        if Path(output).exists() and not Path(output).is_dir():
            return cls(output, None, "not a folder")
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"fslsage")
            return cls(str(folder), shutil.disk_usage(folder).free, None)
        except OSError as error:
            return cls(str(folder), None, error.strerror)


def existing_folder(output: str) -> Path:
    """`output`, or the nearest folder above it that exists."""
    folder = Path(output)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _mps_runs() -> bool:
    """Is the control pipe of NVIDIA's Multi-Process Service there?"""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
    return (Path(folder) / "control").exists()


def _available_memory() -> int | None:
    """Bytes that the host can still give, or the control group of this process where that is less."""
    limits = [limit for limit in (_host_memory(), _group_memory()) if limit is not None]
    return min(limits, default=None)


def _host_memory() -> int | None:
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * KIB
    return physical_memory()


def _group_memory() -> int | None:
    """The least that is left in the control groups around this process, of version 1 or 2."""
    root = Path("/sys/fs/cgroup")
    left: list[int] = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            top, names = root, ("memory.max", "memory.current")
            if kinds:
                top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            group = Path(path.lstrip("/"))
            for folder in (top / group, *(top / above for above in group.parents), top):
                with suppress(OSError, ValueError):  # no such file; "max" is no number
                    limit, used = (int((folder / name).read_text()) for name in names)
                    if limit < NO_LIMIT_BYTES:
                        left.append(limit - used)
    return max(0, min(left)) if left else None
