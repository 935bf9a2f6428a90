"""Runs a job with every rank on a machine of its own, emulated on this one, behind a link of a given speed.

    sudo python launch/wan.py --clients 4 --up 20mbit --down 100mbit --rtt 40ms -- train CONFIG [key=value]

Every rank gets a network namespace; a router joins them; nothing leads out of the machine. The links are
measured first, and what was asked and measured is in environment.json and links.json of the run folder. Exit
status: the job's (0 done, 2 wrong input, 75 stopped after a checkpoint, 1 anything else), or 128 and the
number of the signal that stopped it. docs/emulated-networks.md says more.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from emulation import delaying, leftovers, measuring, quota, system
from emulation.links import Link, common_link, count_clients, read_links, read_stragglers
from emulation.network import Network
from emulation.ranks import Ranks, rank_environment
from emulation.stopping import Stopped, StopRequests
from emulation.traffic import Ledger, compare, summary

from fslsage_rpc.config.loading import load
from fslsage_rpc.errors import InputError

COMMANDS = ("train", "bench")
WRONG_INPUT = 2


@dataclass(frozen=True)
class Job:
    """A network and what is to run in it."""

    links: dict[int, Link]
    """by client rank"""
    speeds: dict[int, float]
    """of the slowed client ranks: share of full speed"""
    arguments: list[str]
    """of `python -m fslsage_rpc`"""
    folder: Path
    """where the results go"""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see wan.py --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job through an emulated network; the exit status is in the module's description."""
    try:
        job = read_job(sys.argv[1:] if arguments is None else arguments)
        system.require_root_and_tools()
        stop = StopRequests()
        for owner in leftovers.remove_dead_owners():
            print(f"wan.py: removed what {owner} had left", file=sys.stderr)
        return run(job, stop)
    except InputError as error:
        print(f"wan.py: {error}", file=sys.stderr, flush=True)
        return WRONG_INPUT
    except system.CommandFailed as error:
        print(f"wan.py: {error}", file=sys.stderr, flush=True)
        return 1
    except Stopped:
        return 128 + stop.signal


def read_job(arguments: Sequence[str]) -> Job:
    """The job that the command line asks for.

    Raises:
        InputError: an option, a file or the job's configuration is wrong.
    """
    own, mark, job = _split(arguments)
    options = _parser().parse_args(own)
    clients = count_clients(options.clients)
    links = read_links(common_link(options.up, options.down, options.rtt), clients, options.per_client)
    speeds = read_stragglers(options.straggler, clients)
    if len(job) < 2 or job[0] not in COMMANDS:
        got = " ".join(job) if mark else "nothing"
        raise InputError(f"--: got {got!r}, expected a job: -- train CONFIG [key=value ...], or bench")
    config = load(job[1], job[2:])
    if config.transport != "rpc":
        raise InputError(
            f"transport: got {config.transport!r}, expected rpc: other transports use no network"
        )
    if config.comm.transports is None:
        # TensorPipe finds TCP between namespaces by itself, but busily waits for peers on this host too.
        job = [*job, "comm.transports=[uv]"]
    return Job(links, speeds, job, Path(config.output) / config.name)


def _split(arguments: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    own, job = list(arguments), []
    if "--" in own:
        place = own.index("--")
        own, job = own[:place], own[place + 1 :]
    return own, "--" in arguments, job


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="wan.py",
        usage="wan.py --clients N [options] -- train CONFIG [key=value ...]",
        description="Run every rank on an emulated machine of its own (root, Linux).",
        allow_abbrev=False,
    )
    parser.add_argument("--clients", required=True, metavar="N", help="client ranks; rank 0 is the server")
    parser.add_argument("--up", metavar="RATE", help="of each client's link, to the router: 20mbit")
    parser.add_argument("--down", metavar="RATE", help="and from it: 100mbit")
    parser.add_argument("--rtt", metavar="TIME", help="round trip between each client and the server: 40ms")
    parser.add_argument("--per-client", metavar="FILE", help="YAML: {2: {up: 5mbit, down: 5mbit, rtt: 90ms}}")
    parser.add_argument(
        "--straggler",
        metavar="RANK:SPEED",
        action="append",
        default=[],
        help="give a client rank so much of its CPU time: 2:0.25",
    )
    return parser


def run(job: Job, stop: StopRequests) -> int:
    """Build the network, measure it, run the job, compare the bytes; whatever happens, remove everything.

    Returns:
        The exit status.

    Raises:
        InputError: this system lacks something that the network needs.
        CommandFailed: a system command or a probe failed, or the delays ended.
        Stopped: a signal came before the job began.
    """
    owner = leftovers.owner_name(os.getpid())
    assert owner is not None
    try:
        network = Network(owner, len(job.links))
        network.build()
        groups = _slow_groups(job, owner)
        with shaped(network, job.links) as delay:
            stop.check()
            measured = measuring.measure(network, job.links, stop.check)
            method = None if not _delayed(job.links) else "nfqueue" if delay else "netem"
            stamp = measuring.describe(job.links, measured, job.speeds, method)
            print(measuring.table(job.links, measured, job.speeds), flush=True)
            return _run_ranks(job, network, groups, stamp, delay, stop)
    finally:
        leftovers.remove(owner)


def _delayed(links: dict[int, Link]) -> bool:
    return any(link.round_trip_seconds for link in links.values())


@contextlib.contextmanager
def shaped(network: Network, links: dict[int, Link]) -> Iterator[subprocess.Popen[bytes] | None]:
    """Shape all links; gives the process that delays packets, None where netem does or none is asked."""
    by_netem = _delayed(links) and network.has_netem()
    for rank, link in links.items():
        network.shape(rank, link, by_netem)
    if _delayed(links) and not by_netem:
        with delaying.delays(network, links) as process:
            yield process
    else:
        yield None


def _slow_groups(job: Job, owner: str) -> dict[int, Path]:
    """A CPU group for each straggler: its share of as many cores as it has threads."""
    threads = int(rank_environment(0, len(job.links) + 1)["OMP_NUM_THREADS"])
    return {
        rank: quota.make_group(f"{owner}-rank{rank}", speed * threads) for rank, speed in job.speeds.items()
    }


def _run_ranks(
    job: Job,
    network: Network,
    groups: dict[int, Path],
    stamp: dict[str, Any],
    delay: subprocess.Popen[bytes] | None,
    stop: StopRequests,
) -> int:
    """Run the job and write links.json."""
    folder = leftovers.FOLDERS / network.owner
    folder.mkdir(mode=0o700)
    (folder / "links.json").write_text(json.dumps(stamp), encoding="utf-8")
    ledger, before = Ledger(job.folder), network.counters()

    def check() -> None:
        if delay is not None and delay.poll() is not None:
            raise system.CommandFailed(
                f"the process that delays packets has ended (status {delay.returncode})"
            )

    ranks = Ranks(network, job.arguments, {"FSLSAGE_LINKS": str(folder / "links.json")})
    try:
        ranks.start(groups)
        status = ranks.wait(stop, check)
    finally:
        ranks.end()
    moved = [now.since(then) for now, then in zip(network.counters(), before, strict=True)]
    traffic = compare(moved, ledger.bytes())
    print(summary(traffic), flush=True)
    if traffic["ledger_bytes"] is not None:
        text = json.dumps({**stamp, "traffic": traffic}, indent=2) + "\n"
        (job.folder / "links.json").write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
