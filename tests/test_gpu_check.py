"""Nothing that one measurement of `launch/gpu_check.sh` does costs another, on made-up ones without a GPU."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launch.gpu_check import LINES, RESULTS, ROOT, STAGES, append, main, parse, read, summary
from support.forked_ranks import run_ranks
from support.job_processes import outer_environment, survivors

MOST_CHARACTERS = 10_000


class TestArguments:
    @pytest.mark.parametrize(
        ("text", "stages"),
        [(None, [1, 2, 3, 4, 5, 6, 7]), ("3", [3]), ("1-4", [1, 2, 3, 4]), ("7,2-3", [2, 3, 7])],
    )
    def test_stages(self, text: str | None, stages: list[int], tmp_path: Path) -> None:
        arguments = [str(tmp_path / "new"), *(["--stages", text] if text else [])]
        assert parse(arguments, range(8)).stages == stages
        assert (tmp_path / "new").is_dir()

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ([], "folder"),
            (["OUT", "--stages", "0"], "--stages: got '0', expected numbers from 1 to 7"),
            (["OUT", "--stages", "4-1"], "--stages"),
            (["OUT", "--stages", "1-8"], "--stages"),
            (["OUT", "--stages", "one"], "--stages"),
            (["OUT", "--summary"], "FOLDER"),
            (["/dev/null/OUT"], "FOLDER"),
            (["OUT", "--what"], "--what"),
        ],
    )
    def test_wrong_ones_are_named_in_one_line(
        self, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        arguments = [str(tmp_path) if word == "OUT" else word for word in arguments]
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("gpu_check.sh: ")
        assert named in said
        assert said.count("\n") == 1


class TestTheTable:
    def test_every_test_for_gpus_is_in_one_measurement(self) -> None:
        files = ("tests/test_cuda.py", "tests/test_cuda_ranks.py")
        there = [
            f"{file}::{node.name}"
            for file in files
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if getattr(node, "name", "").lower().startswith("test")
        ]
        measured = [
            word
            for stage in STAGES
            for measurement in stage.measurements
            for word in measurement.arguments
            if "::" in word
        ]
        assert Counter(measured) == Counter(there)

    def test_shares_fit_into_limits_and_results_into_eight_files(self) -> None:
        for stage in STAGES:
            assert sum(measurement.share for measurement in stage.measurements) <= stage.limit
        assert len({stage.log for stage in STAGES}) + 1 <= 8
        names = [(stage.number, measurement.name) for stage in STAGES for measurement in stage.measurements]
        assert len(set(names)) == len(names)


def fill(folder: Path, *records: dict[str, Any]) -> str:
    """The summary of these records."""
    for record in records:
        append(folder / RESULTS, record)
    return summary(read(folder))


class TestSummary:
    def test_it_stays_short_however_much_fails(self, tmp_path: Path) -> None:
        records: list[dict[str, Any]] = []
        for stage in STAGES:
            for measurement in stage.measurements:
                this = {"stage": stage.number, "name": measurement.name}
                speed = {"setting": "a setting " * 3, "rates": dict.fromkeys("abcdef", 1e6)}
                records += [
                    {**this, "started": "now"},
                    {**this, "fact": "a fact " * 100},
                    {**this, "speed": {**speed, "captured": 9, "turns": 5}},
                ]
                failed = {"outcome": "failed", "seconds": 1, "why": "E | " * 200}
                records += [{**this, "test": f"file::test[{n}]", **failed} for n in range(20)]
                records.append({**this, **failed, "limit": 1})
        records.append({"stage": 0, "name": "machine", "machine": {"card": "a card"}})
        text = fill(tmp_path, *records)
        assert len(text.splitlines()) <= LINES
        assert len(text) < MOST_CHARACTERS
        assert "| card | a card |" in text
        assert all(f"| {stage.number} {stage.title} |" in text for stage in STAGES)
        assert "more\n```" in text

    def test_it_tells_how_each_stage_went_how_fast_and_why_not(self, tmp_path: Path) -> None:
        this = {"stage": 3, "name": "as on a CPU"}
        local = {"setting": "fsl_sage bf16 256", "rates": {"eager": 1234.5}, "captured": 0, "turns": 3}
        text = fill(
            tmp_path,
            {"stage": 2, "name": "a", "started": "now"},
            {"stage": 2, "name": "a", "speed": {**local, "rates": {"eager": 1.0}}},
            {"stage": 2, "name": "a", "speed": local},
            {"stage": 2, "name": "a", "outcome": "timed out", "why": "the last line", "seconds": 12},
            {**this, "started": "now"},
            {**this, "test": "f.py::C::test_x[a]", "outcome": "failed", "seconds": 1, "why": "E: 1 | 2"},
            {**this, "test": "f.py::C::test_x[b]", "outcome": "passed", "seconds": 1, "why": ""},
            {**this, "outcome": "failed", "why": "1 failed, 1 passed", "seconds": 20},
        )
        assert "| 2 speeds in one process |  |  | 1 |  |  |  | 12 of 90 |" in text
        assert "| 3 one process |  | 1 |  |  |  | 1 passed, 1 failed | 20 of 60 |" in text
        assert "| fsl_sage bf16 256 | 1,234 | 0 | 3 |" in text
        assert "\n2 a: timed out: the last line\n3 as on a CPU: test_x[a]: E: 1 | 2\n```" in text

    def test_of_a_measurement_only_the_last_start_counts(self, tmp_path: Path) -> None:
        this = {"stage": 1, "name": "host name"}
        append(tmp_path / RESULTS, {**this, "started": "once"})
        append(tmp_path / RESULTS, {**this, "outcome": "failed", "why": "of old", "seconds": 1})
        with (tmp_path / RESULTS).open("a") as file:
            file.write('{"stage": 1\nno record\n7\n\n{"stage": 1}\n')
        assert "of old" in summary(read(tmp_path))
        assert "of old" not in fill(tmp_path, {**this, "started": "again"})
        assert "killed: no end" in summary(read(tmp_path))  # so far
        assert "host name" not in fill(tmp_path, {**this, "outcome": "ok", "why": "", "seconds": 1})

    def test_it_is_made_again_from_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = fill(tmp_path, {"stage": 1, "name": "echo over uv", "fact": "fast"})
        assert main([str(tmp_path), "--summary"]) == 0
        assert capsys.readouterr().out == f"{text}\n"
        assert "| 1 | fast |" in text


PROGRAMS = {
    "machine": "from launch.gpu_check import note\nnote(machine={'gpu': False, 'card': 'none'})",
    "fails": "print('before')\nraise RuntimeError('wrong\\nsecond line')",
    "fine": "from launch.gpu_check import note\nnote(fact='all is well')\nprint('{half a line', end='')",
    "leaves": """
import subprocess, sys
subprocess.Popen([sys.executable, __file__.replace("leaves", "sleeps")], start_new_session=True)
""",
    "sleeps": "import time\ntime.sleep(1000)",
    "hangs": """
import subprocess, sys, threading, time
def waits_in_a_thread():
    time.sleep(1000)
def waits_in_main():
    subprocess.run([sys.executable, __file__.replace("hangs", "inner")], start_new_session=True)
threading.Thread(target=waits_in_a_thread, daemon=True).start()
print("about to hang", flush=True)
waits_in_main()
""",
    "inner": """
import threading, time
def inner_thread_waits():
    time.sleep(1000)
threading.Thread(target=inner_thread_waits, daemon=True).start()
def inner_main_waits():
    time.sleep(1000)
inner_main_waits()
""",
    "dies": "import os, signal\nprint('before dying', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)",
    "babbles": "import os\nwhile True: os.write(1, bytes(range(255, 0, -1)) * 100)",
    "test_ends": """
import pytest
from support.forked_ranks import run_ranks
def test_passes(): pass
def test_fails(): assert [1] == [2], "other\\nsecond line"
def test_is_skipped(): pytest.skip("no reason")
def rank_hangs():
    import time
    time.sleep(1000)
def test_ranks(tmp_path):
    run_ranks(1, rank_hangs, [], tmp_path, timeout=1000)
""",
    "stages": """
import sys
from pathlib import Path
from launch.gpu_check import Measurement, Stage, main
here = Path(__file__).parent
def of(name, share, on_cpu=True):
    return Measurement(name, (str(here / f"{name}.py"),), share, on_cpu)
pytest = ("-m", "pytest", "-c", "pyproject.toml", "-o", "addopts=", "-p", "no:cacheprovider")
tests = Measurement("tests", (*pytest, "-p", "launch.gpu_check", "-s", str(here / "test_ends.py")), 20, True)
ALL = (
    Stage(0, "machine", 20, (of("machine", 0),)),
    Stage(1, "ends", 56, (tests, of("fails", 9), of("leaves", 9), of("dies", 9), of("gpu", 9, False))),
    Stage(2, "no ends", 36, (of("hangs", 8), of("babbles", 14), of("fine", 14), of("fails", 0))),
    Stage(3, "empty", 2, (of("fine", 0),)),
)
sys.exit(main(sys.argv[1:], ALL))
""",
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for name, text in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def start(programs: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(programs / "stages.py"), str(programs / "out"), *arguments],
        env={**outer_environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def ends(folder: Path) -> dict[str, tuple[str, str]]:
    """Outcome and reason by stage and name."""
    return {
        f"{record['stage']} {record['name']}": (record["outcome"], record["why"])
        for record in read(folder)
        if "outcome" in record and "test" not in record
    }


@pytest.mark.gate
def test_nothing_that_a_measurement_does_costs_another(programs: Path) -> None:
    process = start(programs)
    try:
        said, _ = process.communicate(timeout=150)  # its limits are 114 s
    finally:
        process.kill()
    assert process.returncode == 1
    assert survivors(str(programs)) == []
    out = programs / "out"
    assert ends(out) == {
        "0 machine": ("ok", ""),
        "1 fails": ("failed", "RuntimeError: wrong"),
        "1 leaves": ("ok", "processes that it had left were ended: 1"),
        "1 dies": ("killed", "by SIGSEGV: before dying"),
        "1 gpu": ("skipped", "no GPU"),
        "1 tests": ("timed out", ends(out)["1 tests"][1]),
        "2 hangs": ("timed out", "about to hang"),
        "2 babbles": ("killed", "said more than 4 MiB"),
        "2 fine": ("ok", ""),
        "2 fails": ("failed", "RuntimeError: wrong"),
        "3 fine": ("skipped", "no time left"),
    }
    tests = {r["test"].rpartition("::")[2]: (r["outcome"], r["why"]) for r in read(out) if "test" in r}
    assert tests == {
        "test_passes": ("passed", ""),
        "test_fails": ("failed", "AssertionError: other"),
        "test_is_skipped": ("skipped", "Skipped: no reason"),
    }
    first, second = ((out / f"stage-{number}.log").read_text(errors="replace") for number in (1, 2))
    assert "rank_hangs" in first
    for function in ("waits_in_a_thread", "waits_in_main", "inner_thread_waits", "inner_main_waits"):
        assert f" in {function}\n" in second
    assert len(second) < 2 * 4 * 2**20
    assert sorted(file.name for file in out.iterdir()) == ["results.jsonl", "stage-1.log", "stage-2.log"]
    table = said[said.index("# GPU check") :]
    assert len(table.splitlines()) <= LINES
    assert len(said) < MOST_CHARACTERS
    for row in (
        "| 2 no ends | 1 | 1 | 1 | 1 |  |",
        "| 2 | all is well |",
        "2 hangs: timed out: about to hang",
    ):
        assert row in table


@pytest.mark.gate
def test_ranks_that_do_not_end_in_time_are_asked_for_their_stacks(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit statuses \[-6\]: after 1 s"):
        run_ranks(1, time.sleep, [1000], tmp_path, timeout=1)  # type: ignore[list-item]  # seconds


@pytest.mark.gate
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes_and_the_summary_is_still_printed(
    number: signal.Signals, programs: Path
) -> None:
    process = start(programs, "--stages", "2")
    try:
        deadline = time.monotonic() + 60
        while not survivors(str(programs / "inner.py")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert survivors(str(programs)) == []
    assert ends(programs / "out") == {
        "0 machine": ("ok", ""),
        "2 hangs": ("killed", "interrupted"),
        "2 babbles": ("skipped", "interrupted"),
        "2 fine": ("skipped", "interrupted"),
        "2 fails": ("skipped", "interrupted"),
    }
    assert "\n2 hangs: killed: interrupted\n" in said[said.index("# GPU check") :]
    assert all(json.loads(line) for line in (programs / "out" / RESULTS).read_text().splitlines())
