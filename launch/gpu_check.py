"""Measurements of a machine with a GPU, each a process of its own: nothing that fails costs another one.

    python3 launch/gpu_check.py FOLDER [--stages 1-4]
    python3 launch/gpu_check.py FOLDER --summary

`launch/gpu_check.sh` is the command. This file needs the standard library alone, on Linux.

Every stage has a limit, in which each of its measurements has a share for sure. A measurement that comes to
its limit has all its threads, in all its processes, print their stacks into the log. Then, and whenever one
has ended, all processes that it has left are killed.

FOLDER/results.jsonl gets a line for every start, figure, test and end as it happens; FOLDER/stage-N.log what
processes say. `--summary` prints the summary of what lies there again, as Markdown.

Measuring programs import `note` and `seconds_left`. As a plug-in of pytest this module notes each test.

Exit status:

- 0
- 1 where a measurement did not end well
- 2 where the arguments are wrong, with one line that says so
- 128 + N after signal N
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "results.jsonl"
VARIABLE = "GPU_CHECK"
"""tells a measurement's processes where to note, as what, and when they will be stopped"""
GRACE_SECONDS = 2.0
"""before a measurement's limit, for the stacks"""
LEAST_SECONDS = 8.0
"""with less, a measurement that has no share of its own is skipped"""
LEAVING_SECONDS = 1.0
"""that processes of a measurement that has ended have to end, too"""
MOST_BYTES = 4 * 2**20
"""that a measurement may say"""
LINES, WIDTH, TESTS = 60, 140, 4
"""of a summary, of a failure in it, and failed tests of a measurement"""
BAD = ("failed", "timed out", "killed")
OUTCOMES = ("ok", *BAD, "skipped")
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER: processes whose parents have ended become children of this one"""

Record = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A process: python3 with these arguments, in the repository's root."""

    name: str
    arguments: tuple[str, ...]
    share: float
    """seconds of its stage's limit that earlier ones leave to it; 0: it gets what is left"""
    on_cpu: bool = False
    """it can do something without a GPU"""


@dataclass(frozen=True)
class Stage:
    """Measurements that share a limit in seconds; the most telling come first."""

    number: int
    """0: runs before all others, whichever are asked for"""
    title: str
    limit: float
    measurements: tuple[Measurement, ...]

    @property
    def log(self) -> str:
        """The name of its log; eight files at most come to lie in a folder."""
        return f"stage-{max(self.number, 1)}.log"


def _basics(what: str) -> tuple[str, ...]:
    return "benchmarks/gpu_basics.py", *what.split()


def _speed(way: str, what: str, share: float, on_cpu: bool = False) -> Measurement:
    arguments = ("benchmarks/gpu_speed.py", way, *what.split())
    return Measurement(f"{what} {way}", arguments, share, on_cpu)


def _tests(name: str, share: float, *tests: str) -> Measurement:
    # -s: ranks and time-outs write to the log itself; the project's own settings ask for plug-ins
    keys = ("-o", "addopts=", "-p", "no:cacheprovider", "-p", "launch.gpu_check")
    shown = ("-s", "-vv", "-rap", "--tb=short", "--durations=5")
    return Measurement(name, ("-m", "pytest", *keys, *shown, *tests), share)


_ONE, _RANKS = "tests/test_cuda.py::", "tests/test_cuda_ranks.py::"
STAGES = (
    Stage(0, "machine", 60, (Measurement("machine", _basics("machine"), 0, on_cpu=True),)),
    Stage(
        1,
        "basics",
        45,
        (
            Measurement("host name", _basics("name"), 4, on_cpu=True),
            Measurement("streams and NCCL", _basics("streams"), 13),
            Measurement("echo over uv", _basics("echo uv"), 14, on_cpu=True),
            Measurement("echo over shm", _basics("echo shm"), 14, on_cpu=True),
        ),
    ),
    Stage(
        2,
        "speeds in one process",
        90,
        (
            _speed("local", "fsl_sage bf16 256", 15),
            _speed("local", "fsl_sage fp32 256", 15, on_cpu=True),
            _speed("local", "fsl_sage tf32 256", 15),
            _speed("local", "fsl_sage bf16 50", 15),
            _speed("local", "fsl_sage fp32 50", 15),
            _speed("local", "fsl_sage tf32 50", 15),
            _speed("local", "splitfed_v1 bf16 256", 0),
            _speed("local", "splitfed_v1 fp32 256", 0),
        ),
    ),
    Stage(
        3,
        "one process",
        60,
        (
            _tests("as on a CPU", 18, f"{_ONE}TestEquality"),
            _tests("precision", 20, f"{_ONE}TestResnet18", f"{_ONE}TestPrecision"),
            _tests(
                "streams and graphs",
                22,
                f"{_ONE}test_a_queue_starts_behind_the_place_that_it_is_given",
                f"{_ONE}TestNoWaits",
                f"{_ONE}TestCaptures",
            ),
        ),
    ),
    Stage(
        4,
        "ranks",
        80,
        (
            _tests("device maps", 28, f"{_RANKS}TestDeviceMaps"),
            _tests("host memory", 28, f"{_RANKS}TestHostMemory"),
            _tests("command line", 24, f"{_RANKS}TestCommandLine"),
            _tests("NCCL on one card", 0, f"{_RANKS}TestNccl"),
        ),
    ),
    Stage(
        5,
        "random delays",
        40,
        (
            _tests("device maps, delayed", 20, f"{_RANKS}TestDelaysByDeviceMap"),
            _tests("host memory, delayed", 20, f"{_RANKS}TestDelaysThroughHostMemory"),
            _tests("one process, delayed", 0, f"{_ONE}TestDelays"),
        ),
    ),
    Stage(
        6,
        "ranks with graphs",
        50,
        (
            _tests("device maps, graphs", 25, f"{_RANKS}TestGraphsByDeviceMap"),
            _tests("host memory, graphs", 25, f"{_RANKS}TestGraphsThroughHostMemory"),
        ),
    ),
    Stage(
        7,
        "speeds of ranks",
        60,
        (
            _speed("rpc", "fsl_sage bf16 256", 20),
            _speed("rpc", "fsl_sage fp32 256", 20),
            _speed("rpc", "splitfed_v1 bf16 256", 20),
        ),
    ),
)


# What measurements say.


def note(**figures: Any) -> None:
    """Print figures and, in a measurement, append them to its results at once.

    The summary shows these keys:

    - `machine`: a mapping
    - `fact`: a line
    - `speed`: a mapping with `setting`, `captured`, `turns`, and `rates` in samples per second by way
    """
    print(json.dumps(figures), flush=True)
    if VARIABLE in os.environ:
        told = json.loads(os.environ[VARIABLE])
        append(Path(told["file"]), {"stage": told["stage"], "name": told["name"], **figures})


def seconds_left() -> float:
    """Seconds until this measurement will be stopped; endless outside of one."""
    told = json.loads(os.environ.get(VARIABLE, "{}"))
    return float(told["ends"]) - time.monotonic() if told else float("inf")


def pytest_runtest_logreport(report: Any) -> None:
    """Note a test's outcome, and the first line of why."""
    if report.when != "call" and report.outcome == "passed":
        return
    why = ""
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0]
    elif report.outcome == "skipped":
        why = report.longrepr[-1]
    note(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), why=why)


def pytest_collectreport(report: Any) -> None:
    """Note tests that cannot even be collected."""
    if report.outcome == "failed":
        why = str(report.longrepr).strip().rpartition("\n")[2]
        note(test=report.nodeid, outcome="failed", seconds=0, why=why)


# Results.


def append(file: Path, record: Record) -> None:
    """Add a line of JSON; what cannot be written, as on a full disk, is not worth a measurement."""
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(record) + "\n").encode())  # whole, whoever else writes
        finally:
            os.close(descriptor)


def read(folder: Path) -> list[Record]:
    """The records of a folder, of each measurement those since it was last started; what is none is left
    out.
    """
    records: list[Record] = []
    with contextlib.suppress(OSError):
        for line in (folder / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                this = record["stage"], record["name"]
            except (ValueError, TypeError, KeyError):
                continue
            if "started" in record:
                records = [r for r in records if (r["stage"], r["name"]) != this]
            records.append(record)
    return records


# One measurement.


_signals: list[int] = []
"""that have asked for the end"""


def measure(folder: Path, stage: Stage, measurement: Measurement, limit: float) -> Record:
    """Run one to its end, or to its limit in seconds; nothing of it is left. The record of its end."""
    started = time.monotonic()
    this = {"stage": stage.number, "name": measurement.name}
    told = {**this, "file": str(folder / RESULTS), "ends": started + limit - GRACE_SECONDS}
    now = time.strftime("%FT%TZ", time.gmtime())
    append(folder / RESULTS, {**this, "started": now, "limit": round(limit, 1)})
    try:
        title = f"{stage.number} {measurement.name}: {' '.join(measurement.arguments)}"
        with Output(folder / stage.log, title) as output:
            process = subprocess.Popen(
                [sys.executable, *measurement.arguments],
                cwd=ROOT,
                env=_environment(told),
                stdin=subprocess.DEVNULL,
                stdout=output.log,
                stderr=output.log,
                start_new_session=True,
            )
            outcome, why = _wait(process, output, started + limit)
            left = _end_all(process, LEAVING_SECONDS if outcome == "ok" else 0.0)
            if left and outcome == "ok":
                why = f"processes that it had left were ended: {left}"
            output.cut()
    except OSError as error:
        outcome, why = "failed", str(error)
    seconds = time.monotonic() - started
    return _end(folder, stage, measurement, outcome, why, seconds, limit)


def _end(
    folder: Path,
    stage: Stage,
    measurement: Measurement,
    outcome: str,
    why: str,
    seconds: float = 0.0,
    limit: float = 0.0,
) -> Record:
    """The record of a measurement's end, which is written down."""
    end = {
        "stage": stage.number,
        "name": measurement.name,
        "outcome": outcome,
        "why": why,
        "seconds": round(seconds, 1),
        "limit": round(limit, 1),
    }
    append(folder / RESULTS, end)
    return end


def _environment(told: Record) -> dict[str, str]:
    """This process's variables, without those of a rank, and what a measurement needs; one GPU."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    mine = {name: value for name, value in os.environ.items() if name not in ranks}
    return {
        "OMP_NUM_THREADS": "1",
        **mine,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), mine.get("PYTHONPATH")))),
        "PYTHONFAULTHANDLER": "1",  # stacks on SIGABRT
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else is installed
        "RES_OPTIONS": "timeout:1 attempts:1",  # a name server that does not answer costs a second
        "CUDA_VISIBLE_DEVICES": mine.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],
        VARIABLE: json.dumps(told),
    }


class Output:
    """Text of a measurement's processes in a log, from now on."""

    ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)\b|fslsage_rpc: ")

    def __init__(self, file: Path, title: str):
        self.log = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.add(f"== {title}\n")
        self._begin = self._size()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self.log)

    def _size(self) -> int:
        return os.fstat(self.log).st_size

    def add(self, text: str) -> None:
        """Write a line of our own, if the disk takes it."""
        with contextlib.suppress(OSError):
            os.write(self.log, text.encode())

    @property
    def bytes(self) -> int:
        """How much it is."""
        return self._size() - self._begin

    def cut(self) -> None:
        """Keep no more of it than is allowed."""
        if self.bytes > MOST_BYTES:
            os.truncate(self.log, self._begin + MOST_BYTES)
            self.add("\n-- cut\n")

    def last_words(self) -> str:
        """The line that says most of an end: the last error's, else the last one before any stacks."""
        text = os.pread(self.log, MOST_BYTES, self._begin).decode(errors="replace")
        before = text.partition("Fatal Python error")[0]
        lines = [line for raw in before.splitlines() if (line := _printable(raw))]
        errors = [line for line in lines if self.ERROR.match(line)]
        return (errors or lines or ["no output"])[-1]


def _printable(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else " " for c in text).strip()


def _wait(process: subprocess.Popen[bytes], output: Output, ends: float) -> tuple[str, str]:
    """Wait for the end of a measurement's first process: outcome and why."""
    while (status := process.poll()) is None:
        if _signals:
            return "killed", "interrupted"
        if output.bytes > MOST_BYTES:
            return "killed", f"said more than {MOST_BYTES >> 20} MiB"
        if time.monotonic() > ends - GRACE_SECONDS:
            said = output.last_words()
            _print_stacks(output, ends)
            return "timed out", said
        time.sleep(0.05)
    if status == 0:
        return "ok", ""
    said = output.last_words()
    if status > 0:
        return "failed", said
    known = -status in set(signal.Signals)
    return "killed", f"by {signal.Signals(-status).name if known else f'signal {-status}'}: {said}"


# Processes: all that come from a measurement are this one's descendants, as it is their subreaper.


def _processes() -> Iterator[tuple[int, str, int]]:
    """Every process: its id, its state and its parent's id."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                yield int(folder.name), state, int(parent)


def _living() -> list[int]:
    """Descendants that have not ended, the youngest generation first."""
    parents = {pid: parent for pid, state, parent in _processes() if state not in "ZX"}
    found: list[int] = []
    generation = [os.getpid()]
    while generation:
        generation = [pid for pid, parent in parents.items() if parent in generation]
        found += generation
    return found[::-1]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _print_stacks(output: Output, until: float) -> None:
    """Have every process print the stacks of its threads, which ends it.

    One by one, all others stopped: none sees another's end, and none writes into another's lines.
    """
    stopped: set[int] = set()
    while (new := [pid for pid in _living() if pid not in stopped]) and time.monotonic() < until:
        for pid in new:
            _signal(pid, signal.SIGSTOP)
        stopped.update(new)
    for pid in _living():
        command = ""
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        output.add(f"\n-- stacks of process {pid}: {_line(command)}\n")
        _signal(pid, signal.SIGABRT)
        _signal(pid, signal.SIGCONT)
        patience = min(until, time.monotonic() + 0.5)
        while pid in _living() and time.monotonic() < patience:
            time.sleep(0.01)


def _end_all(process: subprocess.Popen[bytes], patience: float) -> int:
    """Kill all descendants that have not ended after so many seconds.

    Returns:
        How many there were.
    """
    until = time.monotonic() + patience
    while _reap(process) and time.monotonic() < until:
        time.sleep(0.05)
    killed: set[int] = set()
    until = time.monotonic() + 5  # a process that the kernel holds cannot be killed
    while (left := _reap(process)) and time.monotonic() < until:
        for pid in left:
            _signal(pid, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.02)
    return len(killed)


def _reap(process: subprocess.Popen[bytes]) -> list[int]:
    """Take leave of children that have ended; the descendants that have not."""
    process.poll()
    for pid, state, parent in _processes():
        if state == "Z" and parent == os.getpid() and pid != process.pid:
            os.waitpid(pid, os.WNOHANG)
    return _living()


# All of them.


def run(folder: Path, stages: Sequence[Stage]) -> int:
    """Run all measurements of these stages; the exit status."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _signals.append(number))
    with contextlib.suppress(OSError):
        os.open("/dev/nvidia0", os.O_RDONLY)  # or the driver may leave the card between two processes
    bad = False
    for stage in stages:
        ends = time.monotonic() + stage.limit
        shares = [measurement.share for measurement in stage.measurements]
        for place, measurement in enumerate(stage.measurements):
            limit = ends - time.monotonic() - sum(shares[place + 1 :])
            if reason := _reason_to_skip(folder, measurement, limit):
                append(folder / RESULTS, {"stage": stage.number, "name": measurement.name, "started": None})
                end = _end(folder, stage, measurement, "skipped", reason)
            else:
                end = measure(folder, stage, measurement, limit)
            bad = bad or end["outcome"] in BAD
            say(_progress(end))
    return 128 + _signals[0] if _signals else int(bad)


def _reason_to_skip(folder: Path, measurement: Measurement, limit: float) -> str:
    if _signals:
        return "interrupted"
    if _machine(read(folder)).get("gpu") is False and not measurement.on_cpu:
        return "no GPU"
    # What is ended at a limit takes a moment longer, which the next one need not pay for.
    least = min(LEAST_SECONDS, measurement.share / 2) if measurement.share else LEAST_SECONDS
    return "no time left" if limit < least else ""


def say(text: str) -> None:
    """Print, if anybody still reads."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _progress(end: Record) -> str:
    taken = "" if end["outcome"] == "skipped" else f", {end['seconds']:.0f} of {end['limit']:.0f} s"
    why = f": {end['why']}" if end["why"] else ""
    return f"{end['stage']} {end['name']}: {end['outcome']}{taken}{why}"[:WIDTH]


# The summary.


def _machine(records: Sequence[Record]) -> Record:
    """All that is known of the machine."""
    found: Record = {}
    for record in records:
        found |= record.get("machine", {})
    return found


def summary(records: Sequence[Record], stages: Sequence[Stage] = STAGES) -> str:
    """Markdown of at most `LINES` lines: stages, facts, speeds, and the first line of each failure."""
    lines = ["# GPU check", "", "| machine | |", "|---|---|"]
    machine = {"card": "unknown", **_machine(records)}
    lines += [f"| {name} | {_cell(value)} |" for name, value in machine.items() if name != "gpu"]
    lines += ["", f"| stage | {' | '.join(OUTCOMES)} | tests | seconds |", "|" + "---|" * 8]
    ends = list(_ends(records))
    known = {stage.number: stage for stage in stages}
    for number in sorted({record["stage"] for record in records}):
        lines.append(_stage_row(number, known.get(number), ends, records))
    facts = [(record["stage"], record["fact"]) for record in records if "fact" in record]
    if facts:
        lines += ["", "| stage | fact |", "|---|---|"]
        lines += [f"| {number} | {_cell(fact)} |" for number, fact in facts[:10]]
    lines += _speed_table(records)
    failures = list(_failures(ends, records))
    room = LINES - len(lines) - 5
    if failures:
        lines += ["", "What did not end well:", "", "```"]
        hidden = len(failures) - room + 1
        lines += failures if hidden < 2 else [*failures[: room - 1], f"and {hidden} more"]
        lines += ["```"]
    return "\n".join(lines)


def _ends(records: Sequence[Record]) -> Iterator[Record]:
    """The end of each measurement that was started; a lost one where this program was killed."""
    found: dict[tuple[int, str], Record] = {}
    for record in records:
        if "started" in record or ("outcome" in record and "test" not in record):
            end = {"outcome": "killed", "why": "no end: the check itself was killed", "seconds": 0, **record}
            found[record["stage"], record["name"]] = end
    yield from found.values()


def _stage_row(number: int, stage: Stage | None, ends: Sequence[Record], records: Sequence[Record]) -> str:
    ends = [end for end in ends if end["stage"] == number]
    counts = Counter(end["outcome"] for end in ends)
    reasons = {end["why"] for end in ends if end["outcome"] == "skipped"}
    cells = [str(counts[outcome] or "") for outcome in OUTCOMES]
    if reasons:
        cells[-1] += f": {', '.join(sorted(reasons))}"
    tests = Counter(record["outcome"] for record in records if record["stage"] == number and "test" in record)
    cells.append(", ".join(f"{count} {outcome}" for outcome, count in sorted(tests.items(), reverse=True)))
    seconds = f"{sum(end['seconds'] for end in ends):.0f}"
    cells.append(f"{seconds} of {stage.limit:.0f}" if stage else seconds)
    title = f"{number} {stage.title}" if stage else str(number)
    return f"| {title} | " + " | ".join(cells) + " |"


def _speed_table(records: Sequence[Record]) -> list[str]:
    """Samples per second, a row for each measurement: the last figures that it noted."""
    speeds = {(r["stage"], r["name"]): r["speed"] for r in records if "speed" in r}
    if not speeds:
        return []
    ways = list(dict.fromkeys(way for speed in speeds.values() for way in speed["rates"]))
    head = ["samples per second", *ways, "captured", "turns"]
    lines = ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for speed in list(speeds.values())[:12]:
        rates = [f"{speed['rates'][way]:,.0f}" if way in speed["rates"] else "" for way in ways]
        cells = [speed["setting"], *rates, str(speed["captured"]), str(speed["turns"])]
        lines.append(f"| {' | '.join(cells)} |")
    if any(way.startswith("rpc") for way in ways):
        lines += ["", "Two processes that share a card take turns: without MPS their work never overlaps."]
    return lines


def _failures(ends: Sequence[Record], records: Sequence[Record]) -> Iterator[str]:
    """The first line of each: of a measurement's first failed tests, if it had any, else its own."""
    for end in ends:
        here = f"{end['stage']} {end['name']}"
        this = (end["stage"], end["name"])
        failed = [
            r for r in records if "test" in r and (r["stage"], r["name"], r["outcome"]) == (*this, "failed")
        ]
        for record in failed[:TESTS]:
            yield _line(f"{here}: {record['test'].rpartition('::')[2]}: {record['why']}")
        if len(failed) > TESTS:
            yield _line(f"{here}: {len(failed) - TESTS} more of its tests")
        if end["outcome"] in BAD and not (failed and end["outcome"] == "failed"):
            yield _line(f"{here}: {end['outcome']}: {end['why']}")


def _line(text: str) -> str:
    return _printable(text)[:WIDTH]


def _cell(value: object) -> str:
    return _printable(str(value)).replace("|", "/")[: 2 * WIDTH]


# The command line.


class WrongArguments(Exception):
    """With one line that says what is wrong."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise WrongArguments(message)


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the command line; the exit status is in the module's description."""
    try:
        options = parse(arguments, [stage.number for stage in stages])
    except WrongArguments as error:
        print(f"gpu_check.sh: {_printable(str(error))}", file=sys.stderr)
        return 2
    if options.summary:
        say(summary(read(options.folder), stages))
        return 0
    wanted = [stage for stage in stages if stage.number in (0, *options.stages)]
    status = run(options.folder, wanted)
    say(summary(read(options.folder), stages))
    say(f"\nResults and logs: {options.folder}")
    return status


def parse(arguments: Sequence[str] | None, numbers: Sequence[int]) -> argparse.Namespace:
    """Checked arguments: `folder`, which is there then, `stages` and `summary`.

    Args:
        numbers: of the stages that there are.

    Raises:
        WrongArguments: with one line.
    """
    parser = OneLineParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=lambda word: Path(word).absolute(), help="for results and logs")
    parser.add_argument("--stages", help="as 3, 1-4 or 2,5-7; all if it is not given")
    parser.add_argument("--summary", action="store_true", help="only of what is there")
    options = parser.parse_args(arguments)
    known = [number for number in numbers if number]
    options.stages = known if options.stages is None else _numbers(options.stages, known)
    try:
        if options.summary:
            (options.folder / RESULTS).read_bytes()
        else:
            options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongArguments(f"FOLDER: {error}") from None
    return options


def _numbers(text: str, known: Sequence[int]) -> list[int]:
    """Stages named as in 2,5-7."""
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        chosen = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
        if not chosen or not set(chosen) <= set(known):
            expected = f"numbers from {known[0]} to {known[-1]}, as 3, 1-4 or 2,5-7"
            raise WrongArguments(f"--stages: got {text!r}, expected {expected}")
        found |= set(chosen)
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
