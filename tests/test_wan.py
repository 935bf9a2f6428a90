"""Emulated networks: the command line; with root also real links, their bytes, and what is left over."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fslsage_rpc.errors import InputError
from fslsage_rpc.runs.environment import emulated_links
from support.user_input import mistake, write

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))

import wan
from emulation import leftovers, links, measuring, quota, system
from emulation.network import Counters, Network, queueing
from emulation.ranks import INIT, job_status, rank_environment
from emulation.traffic import HEADER_BYTES, Ledger, compare, summary

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
JOB = ["--", "train", QUICKSTART]
START_SECONDS = 60
END_SECONDS = 40


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("20mbit", links.RATE, 20e6),
        ("512kbit", links.RATE, 512e3),
        ("40ms", links.TIME, 0.04),
        ("1.5s", links.TIME, 1.5),
    ],
)
def test_quantities_are_written_as_tc_writes_them(text: str, units: links.Units, value: float) -> None:
    assert links.quantity("--x", text, units) == pytest.approx(value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (JOB, ["--clients"]),
        (["--clients", "0", *JOB], ["--clients", "'0'", "1 to 250"]),
        (["--clients", "2", "--up", "20", *JOB], ["--up", "'20'", "20mbit"]),
        (["--clients", "2", "--down", "20mb", *JOB], ["--down", "'20mb'", "20mbit"]),
        (["--clients", "2", "--down", "1kbit", *JOB], ["--down", "'1kbit'", "100kbit to 100gbit"]),
        (["--clients", "2", "--rtt", "40", *JOB], ["--rtt", "'40'", "40ms"]),
        (["--clients", "2", "--straggler", "3:0.5", *JOB], ["--straggler", "'3:0.5'", "1 to 2"]),
        (["--clients", "2", "--straggler", "1:2", *JOB], ["--straggler", "'1:2'", "0.01 to 1"]),
        (
            ["--clients", "2", "--straggler", "1:0.5", "--straggler", "1:0.2", *JOB],
            ["--straggler", "'1:0.2'", "0.5 already"],
        ),
        (["--clients", "2", "--per-client", "none.yaml", *JOB], ["--per-client", "none.yaml"]),
        (["--clients", "2"], ["'nothing'", "train CONFIG"]),
        (["--clients", "2", "--", "evaluate", "runs/a"], ["'evaluate runs/a'", "train CONFIG"]),
        (["--clients", "2", "--", "train", "none.yaml"], ["none.yaml", "no such file"]),
        (["--clients", "2", *JOB, "rounds=none"], ["rounds", "'none'"]),
        (["--clients", "2", *JOB, "transport=local"], ["transport", "'local'", "rpc"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert wan.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("wan.py: ")
    assert said.err.count("\n") == 1, said.err
    for word in words:
        assert word in said.err


def test_the_file_goes_over_the_command_line(tmp_path: Path) -> None:
    file = str(write(tmp_path, "2: {up: 5mbit, rtt: 90ms}\n3: {down: null}\n"))
    found = links.read_links(links.common_link("20mbit", "100mbit", "40ms"), 3, file)
    assert found[1] == links.Link(20e6, 100e6, 0.04)
    assert found[2] == links.Link(5e6, 100e6, 0.09)
    assert found[3] == links.Link(20e6, None, 0.04)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4: {up: 5mbit}", ["4", "1 to 3"]),
        ("one: {up: 5mbit}", ["'one'", "1 to 3"]),
        ("1: 5mbit", ["1", "'5mbit'", "a mapping"]),
        ("1: {upp: 5mbit}", ["1.upp", "did you mean up?"]),
        ("1: {up: 5}", ["1.up", "5", "20mbit"]),
        ("1: {rtt: [1]}", ["1.rtt", "[1]", "40ms"]),
        ("1: {", ["not valid YAML"]),
        ("[1, 2]", ["[1, 2]", "a mapping"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    said = mistake(links.read_links, links.Link(), 3, str(write(tmp_path, text)))
    assert said.startswith("--per-client: ")
    for word in words:
        assert word in said


def test_without_root_or_a_tool_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(system.sys, "platform", "linux")
    monkeypatch.setattr(system.os, "geteuid", lambda: 1000, raising=False)
    assert wan.main(["--clients", "2", *JOB]) == 2
    assert capsys.readouterr().err == "wan.py: needs root, to make network namespaces; start it with sudo\n"
    monkeypatch.setattr(system.os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(system.shutil, "which", lambda command: None if command == "tc" else command)
    assert wan.main(["--clients", "2", *JOB]) == 2
    assert capsys.readouterr().err == "wan.py: needs the command tc (Debian: apt-get install iproute2)\n"


def test_a_delay_without_netem_needs_iptables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: None)
    assert "iptables" in mistake(Network("owner", 1).hold_packets, 1)


def test_a_straggler_without_cgroups_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "groups_folder", lambda: None)
    assert mistake(quota.make_group, "group", 0.25).startswith("--straggler: needs the cpu controller")


def test_jobs_that_leave_the_transports_open_get_tcp_alone() -> None:
    assert wan.read_job(["--clients", "2", *JOB]).arguments[-1] == "comm.transports=[uv]"
    chosen = wan.read_job(["--clients", "2", *JOB, "comm.transports=[uv, shm]"])
    assert chosen.arguments[-1] == "comm.transports=[uv, shm]"


def test_bursts_grow_with_the_rate_and_hold_a_few_frames() -> None:
    assert queueing(1e9, None) == ["tbf", "rate", "1000000000bit", "burst", "1250000b", "latency", "200ms"]
    assert queueing(1e6, None)[4] == "4542b"
    assert queueing(None, None) == []


def test_netem_does_delay_and_rate_where_it_can() -> None:
    assert queueing(None, 0.02) == ["netem", "limit", "100000", "delay", "20000us"]
    assert queueing(100e6, 0.02) == ["netem", "limit", "1816", "delay", "20000us", "rate", "100000000bit"]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [([0, 0, 0], 0), ([0, 2, 1], 2), ([75, 75, 75], 75), ([137, 1, 1], 1), ([1, 2], 1)],
)
def test_the_job_ends_as_its_first_failure(statuses: list[int], status: int) -> None:
    assert job_status(statuses) == status


def test_ranks_are_told_of_their_job_and_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    expected = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "10.77.0.1"}
    expected |= {"OMP_NUM_THREADS": "2", "GLOO_SOCKET_IFNAME": "eth0"}
    assert expected.items() <= rank_environment(2, 3).items()


def test_received_bytes_of_all_ranks_stand_beside_the_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.bytes() is None
    line = json.dumps({"wire_bytes": {"smashed_up": 1000, "weights_allreduce": 500}})
    write(tmp_path, f"{line}\n{line}\n", "metrics.jsonl")
    assert ledger.bytes() == 3000
    later = Ledger(tmp_path)
    assert later.bytes() is None  # what an earlier job wrote is not this one's
    write(tmp_path, f"{line}\n" + json.dumps({"wire_bytes": {"smashed_up": 7}}) + "\n", "metrics.jsonl")
    assert later.bytes() == 7  # nor are the rounds that it goes on from

    server, client = Counters(10, 1, 2000 + 2 * HEADER_BYTES, 2), Counters(0, 0, 1060 + HEADER_BYTES, 1)
    traffic = compare([server, client], 3000)
    assert traffic["difference_percent"] == pytest.approx(2.0)
    assert "+2.0 %" in summary(traffic)
    assert "WENT AROUND" in summary(compare([server], 3000))
    assert "no wire ledger" in summary(compare([server], None))


@pytest.mark.nightly
def test_an_owner_is_a_process_and_its_start() -> None:
    name = leftovers.owner_name(os.getpid())
    match = leftovers.OWNER.fullmatch(f"{name}-rank0")
    assert match is not None
    assert match[1] == name
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert leftovers.owner_name(gone.pid) is None


def test_the_environment_has_the_links_of_an_emulated_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FSLSAGE_LINKS", raising=False)
    assert emulated_links() == {}
    monkeypatch.setenv("FSLSAGE_LINKS", str(write(tmp_path, '{"delayed_by": null}', "links.json")))
    assert emulated_links() == {"links": {"delayed_by": None}}
    monkeypatch.setenv("FSLSAGE_LINKS", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="FSLSAGE_LINKS"):
        emulated_links()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("program", "said", "status"),
    [
        ("raise SystemExit(75)", b"", 75),
        ("import time; time.sleep(20)", b"15\n", 128 + signal.SIGTERM),
        ("import os; os.kill(os.getpid(), 9)", b"", 128 + signal.SIGKILL),
    ],
)
def test_the_first_process_passes_signals_on_and_statuses_back(
    program: str, said: bytes, status: int
) -> None:
    command = [sys.executable, str(INIT), sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(said)
        process.stdin.flush()
        assert process.wait(15) == status


def why_not() -> str | None:
    """Why no network can be emulated here; None where one can."""
    try:
        system.require_root_and_tools()
        system.run("ip", "netns", "add", f"fslwan-test-{os.getpid()}")
        system.run("ip", "netns", "delete", f"fslwan-test-{os.getpid()}")
    except (InputError, system.CommandFailed) as error:
        return str(error)
    return None


@pytest.fixture
def machine() -> None:
    """Skips where no network can be emulated."""
    if reason := why_not():
        pytest.skip(reason)


def command(tmp_path: Path, *options: str, rounds: int) -> list[str]:
    """wan.py with two clients and a quickstart of so many rounds, in a folder of the test."""
    keys = [f"output={tmp_path / 'runs'}", f"rounds={rounds}", "device=cpu", "resume=never"]
    return [sys.executable, str(ROOT / "launch" / "wan.py"), "--clients", "2", *options, *JOB, *keys]


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end if it still runs, and what it left with it."""
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    owner = leftovers.owner_name(process.pid)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if owner is not None:
            leftovers.remove(owner)


def wait_until(condition: Callable[[], object], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def processes(tmp_path: Path) -> list[str]:
    """The ranks of a test that still run."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if f"output={tmp_path}" in line]


def left(pid: int) -> list[str]:
    """What a wan.py of this pid has left in the system."""
    places = {leftovers.NAMESPACES, leftovers.FOLDERS, quota.groups_folder() or leftovers.FOLDERS}
    return [str(found) for place in places for found in place.glob(f"fslwan-{pid}-*")]


@pytest.mark.nightly  # needs root; half a minute
@pytest.mark.usefixtures("machine")
def test_a_job_through_shaped_links(tmp_path: Path) -> None:
    host = system.run("tc", "qdisc", "show") + system.run("ip", "-o", "link", "show")
    log = tmp_path / "log"
    with started(command(tmp_path, "--up", "20mbit", "--down", "20mbit", rounds=4), log) as process:
        assert process.wait(START_SECONDS + END_SECONDS) == 0, log.read_text()
    assert left(process.pid) == []
    assert processes(tmp_path) == []
    assert system.run("tc", "qdisc", "show") + system.run("ip", "-o", "link", "show") == host

    folder = tmp_path / "runs" / "quickstart"
    found: dict[str, Any] = json.loads((folder / "links.json").read_text())
    stamped = json.loads((folder / "environment.json").read_text())["links"]
    assert stamped["clients"] == found["clients"]
    assert found["delayed_by"] is None
    for link in found["clients"].values():
        assert link["asked"]["up_bits_per_second"] == 20e6
        assert link["asked"]["round_trip_seconds"] is None
        for direction in ("up_bits_per_second", "down_bits_per_second"):
            assert link["measured"][direction] == pytest.approx(20e6, rel=0.15)
        assert 0 < link["measured"]["round_trip_seconds"] < 0.02

    traffic = found["traffic"]
    wire = json.loads((folder / "summary.json").read_text())["wire_bytes"]
    assert traffic["ledger_bytes"] == sum(wire.values())
    assert 0 < traffic["difference_percent"] < 5
    assert 0 < traffic["header_bytes"] < 0.15 * traffic["ledger_bytes"]
    up = sum(traffic["ranks"][rank]["sent_bytes"] for rank in ("1", "2"))
    assert up > sum(wire[kind] for kind in ("smashed_up", "labels_up", "weights_allreduce", "evaluation"))
    assert "links carried" in log.read_text()


@pytest.mark.nightly  # needs root; a quarter of a minute
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_stops_after_its_round_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with started(command(tmp_path, rounds=1000), log) as process:
        wait_until(lambda: "round 1/" in log.read_text(), START_SECONDS, log)
        process.send_signal(number)
        assert process.wait(END_SECONDS) == 75, log.read_text()
        assert "stopped on request after round" in log.read_text()
        assert left(process.pid) == []
        assert processes(tmp_path) == []


@pytest.mark.nightly  # needs root; half a minute
@pytest.mark.usefixtures("machine")
def test_a_killed_launcher_takes_its_ranks_along_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    log, again = tmp_path / "log", tmp_path / "again"
    with started(command(tmp_path, "--straggler", "1:0.9", rounds=1000), log) as process:
        wait_until(lambda: "round 1/" in log.read_text(), START_SECONDS, log)
        process.kill()
        process.wait()
        wait_until(lambda: not processes(tmp_path), END_SECONDS, log)
        assert len(left(process.pid)) == 6  # a router, three ranks, a folder and a CPU group
        with started(command(tmp_path, rounds=1), again) as next_start:
            assert next_start.wait(START_SECONDS + END_SECONDS) == 0, again.read_text()
        assert f"removed what fslwan-{process.pid}-" in again.read_text()
        assert left(process.pid) == []


@pytest.mark.nightly  # needs root; a quarter of a minute
@pytest.mark.usefixtures("machine")
def test_wrong_input_found_by_the_ranks_is_status_2(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started([*command(tmp_path, rounds=1), "clients.count=1"], log) as process:
        assert process.wait(START_SECONDS + END_SECONDS) == 2, log.read_text()
    assert log.read_text().count("fslsage_rpc: clients.count: got 1") == 1
    assert left(process.pid) == []


@pytest.mark.nightly  # needs root
@pytest.mark.usefixtures("machine")
def test_round_trips_are_as_asked() -> None:
    owner = leftovers.owner_name(os.getpid())
    assert owner is not None
    asked = {1: links.Link(round_trip_seconds=0.04), 2: links.Link(50e6, 50e6, 0.1), 3: links.Link()}
    try:
        network = Network(owner, len(asked))
        network.build()
        with wan.shaped(network, asked):
            measured = measuring.measure(network, asked, lambda: None)
    except InputError as error:
        pytest.skip(str(error))
    finally:
        leftovers.remove(owner)
    assert left(os.getpid()) == []
    assert measured[1]["round_trip_seconds"] == pytest.approx(0.04, rel=0.2)
    assert measured[2]["round_trip_seconds"] == pytest.approx(0.1, rel=0.2)
    assert measured[3]["round_trip_seconds"] < 0.01
    assert measured[2]["up_bits_per_second"] == pytest.approx(50e6, rel=0.2)
    assert measured[2]["down_bits_per_second"] == pytest.approx(50e6, rel=0.2)


@pytest.mark.nightly  # needs root
@pytest.mark.usefixtures("machine")
def test_a_straggler_gets_its_share_of_a_core() -> None:
    owner = leftovers.owner_name(os.getpid())
    assert owner is not None
    burn = "from time import *; end = monotonic() + 3\nwhile monotonic() < end: pass\nprint(process_time())"
    try:
        group = quota.make_group(f"{owner}-rank1", 0.25)
        spent = subprocess.run(
            [sys.executable, "-c", burn],
            preexec_fn=lambda: quota.join(group),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except InputError as error:
        pytest.skip(str(error))
    finally:
        leftovers.remove(owner)
    assert 0.1 < float(spent.stdout) / 3 < 0.5  # what a busy host takes from this machine counts as spent
    assert left(os.getpid()) == []
