"""Can a run be left alone? Kills that it gets over by itself, memory that stays flat, nothing left behind.

    python benchmarks/soak.py FOLDER [--part kills|memory] [--rounds 300] [--between 30] [--long 1000]
        [--seed 0] [key=value ...]

Trains the quickstart under launch/local.sh, four times, in runs below FOLDER:

- `undisturbed`, 300 rounds;
- `disturbed`, the same, while about every 30 rounds one of the ranks, the server's among them, is killed
  (SIGKILL) at a moment drawn from the seed; it must end with the same weights, parties' states and figures,
  bit for bit;
- `shared-memory`, a fifth of that, killed twice as often, over TensorPipe's `shm` transport;
- `long`, 1,000 rounds, in which the resident memory of each rank is read every second: its medians over the
  rounds from 100 to 200 and from 900 to 1,000 must be within 2 %.

After each one no process, socket, shared-memory file or temporary file of it may be there. Prints a page in
Markdown. Exit status: 0 if all of that holds, else 1. About 15 minutes on 2 idle cores; needs Linux.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from watched_job import RANKS, Job

from fslsage_rpc.config.loading import load
from fslsage_rpc.runs.checkpoint_files import complete_folders, read_manifest
from fslsage_rpc.runs.checkpoints import read_state

SAMPLE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 0.5
"""a kill comes at most so long after a round's line: somewhere in the next round, or the one after"""
CLOCKS = (
    *("round_seconds", "elapsed_seconds", "evaluation_seconds", "cpu_seconds", "host_busy"),
    *("phases", "requests", "peak_memory"),
)
"""what differs in the lines of two equal runs"""
FLAT = 0.02
MIB = 2**20

Check = tuple[str, bool]
"""what must hold, and whether it does"""


@dataclass
class Kill:
    """A rank that was killed, after so many rounds, and how the job went on."""

    rounds: int
    rank: int
    goes_on_from: int | None = None
    seconds: float | None = None
    """until the next round that had not been done yet was"""


@dataclass
class Sample:
    """Bytes in memory of each rank, by rank, after so many rounds: all, and those that are no file's."""

    rounds: int
    resident: dict[int, int]
    anonymous: dict[int, int]


def plan_kills(rounds: int, between: int, seed: int) -> list[tuple[int, int, float]]:
    """After how many rounds which rank is killed, so many seconds after the round's line."""
    drawn = random.Random(f"soak {seed}")
    return [
        (
            about + drawn.randint(-between // 3, between // 3),
            drawn.randrange(RANKS),
            drawn.uniform(0.0, LONGEST_PAUSE_SECONDS),
        )
        for about in range(between, rounds - between // 3, between)
    ]


def disturb(job: Job, plan: Sequence[tuple[int, int, float]]) -> list[Kill]:
    """Watch a job, kill its ranks as planned, and see how it goes on."""
    kills: list[Kill] = []
    killed_at = 0.0

    def look(rounds: int) -> None:
        nonlocal killed_at
        if kills and kills[-1].seconds is None and rounds > kills[-1].rounds:
            kills[-1].seconds = time.monotonic() - killed_at
        if len(kills) == len(plan) or rounds < plan[len(kills)][0]:
            return
        _, rank, pause = plan[len(kills)]
        process = job.ranks().get(rank)
        if process is None or (kills and kills[-1].seconds is None):
            return  # it is being started again
        time.sleep(pause)
        kill = Kill(job.rounds, rank)
        os.kill(process, signal.SIGKILL)
        killed_at = time.monotonic()
        kills.append(kill)

    job.watch(look)
    gone_on = [int(text) for text in re.findall(r"^goes on from round (\d+) \(", job.log.read_text(), re.M)]
    for kill, rounds in zip(kills, gone_on, strict=False):
        kill.goes_on_from = rounds
    return kills


def compare(undisturbed: Path, disturbed: Path) -> list[Check]:
    """What must be the same in two runs."""
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (undisturbed, disturbed)]
    states = [dict(_leaves("", _last_state(folder))) for folder in (undisturbed, disturbed)]
    expected, found = figures(undisturbed), figures(disturbed)
    rounds = [line["round"] for line in found]
    return [
        (f"`model.pt` equal bit for bit ({len(models[0])} tensors)", _equal(*models)),
        (
            f"the parties' states in the last checkpoint equal bit for bit ({len(states[0])} values)",
            _equal(*states),
        ),
        ("`metrics.jsonl` without gap or double line", rounds == list(range(1, len(expected) + 1))),
        ("its figures, but for the clocks, equal in every round", found == expected),
    ]


def _last_state(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(complete_folders(folder / "checkpoints")[0])
    clients = range(load(folder / "config.yaml").clients.count)
    return vars(read_state(manifest, clients, server=True))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}/{key}", below)
    else:
        yield name, value


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        for name, value in a.items()
    )


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def sample_memory(job: Job) -> list[Sample]:
    """Watch a job, and read what its ranks have in memory."""
    samples: list[Sample] = []
    ranks: dict[int, int] = {}
    due = 0.0

    def look(rounds: int) -> None:
        nonlocal due, ranks
        if rounds == 0 or time.monotonic() < due:
            return
        due = time.monotonic() + SAMPLE_SECONDS
        ranks = ranks or job.ranks()
        with suppress(OSError, LookupError):  # one is leaving
            read = {rank: _memory(process) for rank, process in sorted(ranks.items())}
            everything, own = ({rank: bytes[kind] for rank, bytes in read.items()} for kind in (0, 1))
            samples.append(Sample(rounds, everything, own))

    job.watch(look)
    return samples


def _memory(process: int) -> tuple[int, int]:
    """Resident bytes of a process: all, and those that are no file's.

    Raises:
        LookupError: it has ended.
    """
    text = Path(f"/proc/{process}/status").read_text()
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.M))
    return int(found["VmRSS"]) * 1024, int(found["RssAnon"]) * 1024


def memory_table(samples: Sequence[Sample], rounds: int) -> tuple[list[str], Check]:
    """Medians of an early and of a late tenth of the rounds, by rank; and whether they are near."""
    windows = [(rounds // 10, rounds // 5), (rounds - rounds // 10, rounds)]
    names = [f"rounds {first} to {last}, MiB" for first, last in windows]
    table = [
        f"| rank | {names[0]} | {names[1]} | change | of it no file's, MiB |",
        "|---|---|---|---|---|",
    ]
    worst = 0.0
    for rank in range(RANKS):
        early, late, early_own, late_own = (
            statistics.median(getattr(s, kind)[rank] for s in samples if first <= s.rounds <= last) / MIB
            for kind in ("resident", "anonymous")
            for first, last in windows
        )
        change = late / early - 1
        worst = max(worst, abs(change))
        role = "server" if rank == 0 else "clients"
        table.append(
            f"| {rank} ({role}) | {early:.1f} | {late:.1f} | {change:+.2%} "
            f"| {early_own:.1f}, then {late_own:.1f} |"
        )
    return table, (f"resident memory within {FLAT:.0%} in every rank", worst <= FLAT)


def kill_table(kills: Sequence[Kill]) -> list[str]:
    """One line for each."""
    table = [
        "| killed after round | rank | went on from round | rounds done again | s until the next new round |",
        "|---|---|---|---|---|",
    ]
    for kill in kills:
        again = "-" if kill.goes_on_from is None else kill.rounds - kill.goes_on_from
        seconds = "-" if kill.seconds is None else f"{kill.seconds:.1f}"
        table.append(f"| {kill.rounds} | {kill.rank} | {kill.goes_on_from} | {again} | {seconds} |")
    return table


def got_over(kills: Sequence[Kill], planned: int) -> list[Check]:
    """What must hold of the kills."""
    again = [kill.rounds - kill.goes_on_from for kill in kills if kill.goes_on_from is not None]
    return [
        (f"{planned} kills, {planned} times gone on by itself", len(kills) == len(again) == planned),
        ("at most one finished round done again each time", all(0 <= count <= 1 for count in again)),
    ]


def section(title: str, job: Job, checks: Sequence[Check], tables: Sequence[str] = ()) -> bool:
    """Show what came of a job.

    Returns:
        Does everything hold?
    """
    left = job.left()
    checks = [*checks, ("no process, socket, shared-memory or temporary file left", left.nothing)]
    print(f"\n### {title}\n")
    if tables:
        print(*tables, "", sep="\n")
    for text, holds in checks:
        print(f"- {'yes' if holds else '**NO**'}: {text}")
    for kind, things in left.things.items():
        if things:
            print(f"  - {kind}: {', '.join(things[:8])}")
    sys.stdout.flush()
    return all(holds for _, holds in checks)


def with_kills(output: Path, rounds: int, between: int, seed: int, overrides: Sequence[str]) -> bool:
    """The jobs that are killed, and the one that is not."""
    undisturbed = Job(output, "undisturbed", [*overrides, f"rounds={rounds}"])
    seconds = undisturbed.watch(lambda rounds: None)
    holds = section(f"{rounds} rounds undisturbed: {seconds:.0f} s", undisturbed, [])

    plan = plan_kills(rounds, between, seed)
    disturbed = Job(output, "disturbed", [*overrides, f"rounds={rounds}"], restarts=len(plan))
    kills = disturb(disturbed, plan)
    checks = [*got_over(kills, len(plan)), *compare(undisturbed.folder, disturbed.folder)]
    holds &= section(f"{rounds} rounds with {len(kills)} kills", disturbed, checks, kill_table(kills))

    few = rounds // 5
    plan = plan_kills(few, between // 2, seed)
    shm = [*overrides, f"rounds={few}", "comm.transports=[shm,uv]"]
    shared_memory = Job(output, "shared-memory", shm, restarts=len(plan))
    kills = disturb(shared_memory, plan)
    same = figures(shared_memory.folder) == figures(undisturbed.folder)[:few]
    checks = [*got_over(kills, len(plan)), ("figures equal to those of the undisturbed run", same)]
    return section(f"{few} rounds over shared memory", shared_memory, checks, kill_table(kills)) and holds


def over_time(output: Path, rounds: int, overrides: Sequence[str]) -> bool:
    """The job whose memory is read."""
    long = Job(output, "long", [*overrides, f"rounds={rounds}"])
    table, flat = memory_table(sample_memory(long), rounds)
    return section(f"{rounds} rounds undisturbed", long, [flat], table)


def machine(run: Path) -> str:
    """What a run was made on."""
    environment = json.loads((run / "environment.json").read_text())
    versions = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    here = f"{os.cpu_count()} cores ({os.uname().machine}), Linux {os.uname().release}"
    return f"{RANKS} ranks, {here}; {', '.join(versions)}"


def main() -> int:
    """The jobs, one after the other."""
    parser = argparse.ArgumentParser(description="Trains, kills and counts what is left.")
    parser.add_argument("folder", type=Path, help="for the runs; a new one")
    parser.add_argument("--part", choices=["all", "kills", "memory"], default="all")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--between", type=int, default=30, help="rounds between two kills, about")
    parser.add_argument("--long", type=int, default=1000, help="rounds over which memory is read")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all of the runs")
    options = parser.parse_args()
    if options.part != "memory" and not plan_kills(options.rounds, options.between, options.seed):
        parser.error("--rounds: so few that no rank would be killed; more, or less --between")
    output, overrides = options.folder.absolute(), options.overrides
    holds = True
    if options.part in ("all", "kills"):
        holds &= with_kills(output, options.rounds, options.between, options.seed, overrides)
    if options.part in ("all", "memory"):
        holds &= over_time(output, options.long, overrides)
    print(f"\n{machine(output / ('undisturbed' if options.part == 'kills' else 'long'))}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
