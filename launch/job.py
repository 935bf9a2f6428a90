"""What the launchers must know of a job, as shell assignments; wrong input is found before any rank starts.

    python launch/job.py train|bench|check CONFIG [key=value ...]

prints

    folder=runs/quickstart   the run folder
    ranks=3                  how many ranks: as `ranks=` on the command line says, else one for each GPU here
                             (without GPUs: each core but one) to host clients, and one for the server; never
                             more hosts than clients, and with `clients.on_loss: drop` two at least; 1 with
                             `transport: local`
    on_loss=fail             the key clients.on_loss
    free_port=43021          a TCP port of this machine that nobody listens on

Exit status: 0; 2 where the input is wrong, with one line that says so.
"""

import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from fslsage_rpc.bench.run import checked_variants, open_folder
from fslsage_rpc.config.loading import load
from fslsage_rpc.config.schema import Config
from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.device.placement import gpu_count
from fslsage_rpc.errors import InputError
from fslsage_rpc.runs.places import writing
from fslsage_rpc.training.run import prepare

COMMANDS = ("train", "bench", "check")


def main(arguments: Sequence[str]) -> int:
    """Print the assignments; the exit status is in the module's description."""
    try:
        with redirect_stdout(sys.stderr):  # of the user's own code
            found = describe(arguments)
    except InputError as error:
        print(f"fslsage_rpc: {error}", file=sys.stderr, flush=True)
        return 2
    print(found)
    return 0


def describe(arguments: Sequence[str]) -> str:
    """The assignments for a command and its arguments.

    Raises:
        InputError: it is no command that runs on ranks, or its configuration cannot run here.
    """
    if len(arguments) < 2 or arguments[0] not in COMMANDS:
        got = " ".join(arguments)
        raise InputError(f"command: got {got!r}, expected {', '.join(COMMANDS)} and CONFIG [key=value ...]")
    command, path, *overrides = arguments
    config = load(path, overrides)
    chosen = any(word.startswith("ranks=") for word in overrides)
    ranks = config.ranks if chosen else suitable_ranks(config, gpu_count(config.device), len(usable_cores()))
    if config.transport == "local":
        ranks = 1
    folder = Path(config.output) / config.name
    # What ranks find wrong torchrun takes for a fault: it starts them again.
    if command == "bench":
        checked_variants(config, ranks)
        with writing(config.output, folder):
            open_folder(folder).release()
    else:
        warn = (lambda line: None) if command == "train" else None  # rank 0 shows it
        if run_folder := prepare(config, ranks, warn)[1]:
            run_folder.release()
    found = {
        "folder": folder,
        "ranks": ranks,
        "on_loss": config.clients.on_loss,
        "free_port": free_port(),
    }
    return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in found.items())


def suitable_ranks(config: Config, gpus: int, cores: int) -> int:
    """One rank for each GPU, or core, to host clients, and one for the server, which needs a core too.

    Where clients may be lost there are two hosts at least: the loss of the only one would end the run.
    """
    least = 2 if config.clients.on_loss == "drop" else 1
    hosts = max(gpus or cores - 1, least)
    return min(hosts, config.clients.count) + 1


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
