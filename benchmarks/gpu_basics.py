"""The things that a program on a GPU rests on, for `launch/gpu_check.sh`.

    python benchmarks/gpu_basics.py machine|name|streams|echo uv|echo shm

- machine: the card and the versions
- name: how long it takes to look up the host's own name, which torchrun may do
- streams: priorities of streams, and NCCL in a group of one
- echo: tensors to another process on the same GPU and back, by torch RPC over this transport

Without a GPU an echo's tensors are on the CPU.
"""

import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

from launch.gpu_check import note, seconds_left

KIB, MIB = 2**10, 2**20
PEERS = ("asking", "answering")


def machine() -> None:
    """The card, the cores and the versions; first, whether there is a GPU, which decides what else runs."""
    import torch

    on_gpu = torch.cuda.is_available()
    note(machine={"gpu": on_gpu, "card": "no GPU", "cores": len(os.sched_getaffinity(0))})
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Linux": platform.release(),
    }
    note(machine={"versions": ", ".join(f"{name} {version}" for name, version in versions.items())})
    if not on_gpu:
        return
    card = torch.cuda.get_device_properties(0)
    note(machine={"card": f"{card.name}, {card.total_memory / 2**30:.0f} GiB"})
    versions["cuDNN"] = str(torch.backends.cudnn.version())
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions["driver"] = subprocess.run(
            query, capture_output=True, text=True, timeout=10, check=True
        ).stdout.split()[0]
    note(machine={"versions": ", ".join(f"{name} {version}" for name, version in versions.items())})
    seconds = [first_kernels(), first_kernels()]
    note(fact=f"first kernels of all libraries: {seconds[0]:.1f} s; again {seconds[1]:.3f} s")


def first_kernels() -> float:
    """Seconds of a small convolution and what is around it, forward and backward, in each precision.

    The first time it reads the libraries from the disk, so that measurements need not wait for that.
    """
    import torch

    started = time.monotonic()
    for precision in (torch.float64, torch.float32, torch.bfloat16):
        layers = (
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.Flatten(),
            torch.nn.Linear(288, 2),
        )
        model = torch.nn.Sequential(*layers).to("cuda", precision)
        model(torch.ones(4, 3, 8, 8, device="cuda", dtype=precision)).square().sum().backward()
        torch.optim.Adam(model.parameters(), fused=True).step()
    torch.cuda.synchronize()
    return time.monotonic() - started


def name() -> None:
    """Look up the host's own name; not to find it is a fact, no failure."""
    host = socket.gethostname()
    started = time.monotonic()
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, 0)})
        said = f"is {', '.join(found)}"
    except OSError as error:
        said = f"is not found ({error})"
    note(fact=f"the host's own name {said}: {1000 * (time.monotonic() - started):.1f} ms")


def streams() -> None:
    """The priorities that streams may have, and the seconds that NCCL takes to start, and to reduce."""
    import torch
    from torch import distributed

    from fslsage_rpc.device.streams import PRIORITY, can_capture

    device = torch.device("cuda", 0)
    lowest, highest = torch.cuda.current_stream(device).priority_range()
    between = can_capture(device)
    note(fact=f"stream priorities: {lowest} to {highest}; {PRIORITY} is {'' if between else 'not '}between")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        started = time.monotonic()
        distributed.init_process_group(
            "nccl", init_method=f"file://{folder}/store", rank=0, world_size=1, timeout=timedelta(seconds=30)
        )
        for _ in range(2):
            values = torch.ones(MIB, device=device)
            distributed.all_reduce(values)
            torch.cuda.synchronize(device)
            seconds.append(time.monotonic() - started)
            started = time.monotonic()
        distributed.destroy_process_group()
    assert values.eq(1).all()
    note(
        fact=f"NCCL {version}, group of one: start and all-reduce {seconds[0]:.2f} s, next {seconds[1]:.4f} s"
    )
    assert between, "graphs need a priority between the lowest and the highest"


def echo(transport: str) -> None:
    """Start the two processes; both end well, or this one does not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "echo", transport, f"{folder}/store"]
        peers = [subprocess.Popen([*command, peer]) for peer in PEERS]
        statuses = statuses_of(peers)
    if any(statuses):
        sys.exit(f"echo over {transport}: exit statuses {statuses}")


def statuses_of(peers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit statuses of processes that need each other: once one has failed, the others are killed."""
    try:
        while any(peer.poll() is None for peer in peers) and not any(peer.poll() for peer in peers):
            time.sleep(0.05)
    finally:
        for peer in peers:
            peer.kill()
    return [peer.wait() for peer in peers]


def be_peer(transport: str, store: str, me: str) -> None:
    """One of the two processes of an echo."""
    for library in ("TP", "GLOO"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    import torch
    from torch.distributed import rpc

    from fslsage_rpc.transport.choices import CPU_CHANNELS, CUDA_CHANNELS

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{store}",
        rpc_timeout=min(60.0, seconds_left()),
        _transports=[transport],
        _channels=[*CPU_CHANNELS, *CUDA_CHANNELS] if on_gpu else None,
    )
    if on_gpu:
        options.set_device_map(PEERS[1 - PEERS.index(me)], {device: device})
    rpc.init_rpc(me, rank=PEERS.index(me), world_size=2, rpc_backend_options=options)
    if me == PEERS[0]:
        place = torch.cuda.get_device_name(device) if on_gpu else "CPU"
        for size, label in ((KIB, "1 KiB"), (16 * MIB, "16 MiB")):
            sent = torch.arange(size // 4, dtype=torch.int32, device=device)

            def there_and_back(sent: torch.Tensor = sent) -> torch.Tensor:
                answer: torch.Tensor = rpc.rpc_sync(PEERS[1], torch.add, args=(sent, 1))
                return answer

            answer = there_and_back()
            assert torch.equal(answer, sent + 1), "the answer is another than was computed"
            assert answer.device == device
            milliseconds = 1000 * median_seconds(there_and_back, torch.cuda.synchronize if on_gpu else None)
            note(fact=f"{label} over {transport} and back, {place}: {milliseconds:.2f} ms")
    rpc.shutdown()


def median_seconds(work: Callable[[], object], wait: Callable[[], object] | None) -> float:
    """The median of 20 times; waited for, it is over when the device is through with it."""
    taken = []
    for _ in range(20):
        started = time.monotonic()
        work()
        if wait is not None:
            wait()
        taken.append(time.monotonic() - started)
    return statistics.median(taken)


def main() -> None:
    """Run one of them."""
    match sys.argv[1:]:
        case ["machine"]:
            machine()
        case ["name"]:
            name()
        case ["streams"]:
            streams()
        case ["echo", "uv" | "shm" as transport]:
            echo(transport)
        case ["echo", transport, store, me]:
            be_peer(transport, store, me)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
