"""`fslsage check`: the machines, their links, and one round of a run, of which nothing is written."""

import os
import platform
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from fslsage_rpc.check.findings import Findings, Outlook, Rank
from fslsage_rpc.check.links import measure_averaging, measure_links
from fslsage_rpc.check.machine import Disk, Machine, existing_folder
from fslsage_rpc.check.one_round import train_one_round
from fslsage_rpc.config.schema import Config
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.job.sockets import hostname_address, interface_addresses
from fslsage_rpc.job.world import World, is_first_rank, job_ranks
from fslsage_rpc.measure.host_load import CoreTimes
from fslsage_rpc.runs.places import check_place
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.run import unused_keys
from fslsage_rpc.training.sameness import wrong_ranks
from fslsage_rpc.transport.choices import interfaces, on_one_host

WAIT_SECONDS = 0.5


def examine(config: Config, configured: bool) -> Findings | None:
    """Look at all ranks, as one of them or (`transport: local`) alone.

    Args:
        configured: there is a configuration to say something about; else only the machines are looked at.

    Returns:
        On the server's rank, what was found.

    Raises:
        InputError: the configuration cannot run here; found before ranks meet.
    """
    experiment = None
    if configured:
        if is_first_rank(config):
            with suppress(OSError):  # a problem of the disk, which is said below
                check_place(Path(config.output) / config.name)
        check(config, job_ranks(config))
        experiment = Experiment.prepare(config)
    for warning in [*unreachable(config), *risky(config)]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    world = open_world(config)
    try:
        findings = _examine(config, experiment, world)
        world.close()
    except BaseException as error:
        world.fail(error)
    return findings


def _examine(config: Config, experiment: Experiment | None, world: World) -> Findings | None:
    machine, idle = Machine.here(world.device), _wait(world)
    disk = Disk.of(config.output)
    seen = _sees_output(config, world, disk)
    wrong = world.transport.broadcast(wrong_ranks(experiment, world)) if experiment else {}
    # Where ranks are wrong, training would end here.
    use, line = train_one_round(experiment, world) if experiment and not wrong else (None, None)
    links, averaging = measure_links(world), measure_averaging(world)
    ranks = world.transport.gather(Rank(machine, disk, seen, use, idle))
    if ranks is None:
        return None
    outlook = Outlook.of(experiment, line) if experiment else None
    unused = unused_keys(config.algorithm, experiment.algorithm.reads()) if experiment else []
    warnings = [*experiment.warnings, *wrong.values()] if experiment else []
    return Findings(config, ranks, world.transport.describe(), links, averaging, outlook, unused, warnings)


def _wait(world: World) -> CoreTimes:
    """Collective: half a second in which no rank does anything, to see what others do."""
    world.transport.barrier()
    began = CoreTimes.now()
    time.sleep(WAIT_SECONDS)
    return CoreTimes.now().since(began)


def unreachable(config: Config) -> list[str]:
    """A warning where other hosts cannot reach this one; before the ranks meet, as then they may never do."""
    if config.transport == "local" or on_one_host() or int(os.environ.get("LOCAL_RANK", 0)) != 0:
        return []
    interface = config.comm.interface or os.environ.get("TP_SOCKET_IFNAME")
    address, why = hostname_address(), "which its name resolves to"
    if interface is not None:
        found = [address for address, name in interface_addresses().items() if name == interface]
        address, why = next(iter(found), None), f"that of interface {interface}"
    if address is None or not address.is_loopback:
        return []
    return [
        f"{platform.node()}: ranks listen on {address}, {why}, and no other host can reach it; set "
        "comm.interface to one of " + ", ".join(interfaces())
    ]


def risky(config: Config) -> list[str]:
    """A warning of what may end the ranks while they meet."""
    asked = config.transport == "rpc" and "cuda_gdr" in (config.comm.channels or ())
    warning = "comm.channels: cuda_gdr ends ranks on some hosts as they meet (pytorch issue 130513)"
    return [warning] if asked and is_first_rank(config) else []


def _sees_output(config: Config, world: World, disk: Disk) -> bool:
    """Collective: does this rank see a file that rank 0 has put beside the run folder, for a moment?"""
    puts, folder = world.hosts_server and disk.problem is None, existing_folder(config.output)
    with NamedTemporaryFile(prefix=".fslsage-check-", dir=folder) if puts else nullcontext() as file:
        token: Path | None = world.transport.broadcast(file and Path(disk.folder) / Path(file.name).name)
        seen = token is not None and token.exists()
        world.transport.barrier()
    return seen
