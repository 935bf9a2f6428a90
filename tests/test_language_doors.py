"""Language models come in as a user's own do: by names in a configuration, and by an entry point."""

import re
from pathlib import Path

import pytest

from fslsage_rpc import commands
from support.commands import fslsage, offer_commands, said

PACKAGE = Path(commands.__file__).parent
LANGUAGE = re.compile(r"(from|import) +fslsage_rpc(\.language\b| import .*\blanguage\b)")
HELLO = """
def add(commands):
    hello = commands.add_parser("hello", help="greet")
    hello.add_argument("name")
    hello.set_defaults(command=greet)


def greet(options, arguments):
    print(f"Hello {options.name}, {arguments}")
    return 3


def fail(commands):
    raise RuntimeError("not today")


def add_again(commands):
    commands.add_parser("train")
"""


@pytest.fixture
def greetings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greetings.py").write_text(HELLO)
    monkeypatch.syspath_prepend(tmp_path)


def test_nobody_imports_language_models() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "language" not in path.parents]
    assert len(others) > 100
    assert not [str(path) for path in others if LANGUAGE.search(path.read_text())]
    generation = (PACKAGE / "language" / "generation.py").read_text()
    assert LANGUAGE.search(generation)  # which shows that the expression finds any


def test_a_command_of_another_package(
    greetings: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer_commands(monkeypatch, greetings="greetings:add")
    done = said(capsys, "hello", "Ada")
    assert (done.returncode, done.stdout, done.stderr) == (3, "Hello Ada, ['hello', 'Ada']\n", "")
    done = said(capsys, "hello")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    with pytest.raises(SystemExit):
        said(capsys, "--help")
    listed = capsys.readouterr().out
    assert re.search(r"\bhello +greet\n", listed)
    assert re.search(r"\bgenerate +write texts", listed)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("greetings:fail", "RuntimeError: not today"),
        ("greetings:nothing", "AttributeError: module 'greetings' has no attribute 'nothing'"),
        ("no_such_module:add", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("greetings:add_again", "ArgumentError: argument COMMAND: conflicting subparser: train"),
    ],
)
def test_a_broken_entry_point_is_left_out_in_one_line(
    greetings: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
    reason: str,
) -> None:
    offer_commands(monkeypatch, broken=broken, greetings="greetings:add")
    done = said(capsys, "hello", "Ada")
    assert (done.returncode, done.stdout.count("Hello")) == (3, 1)
    place = f"the entry point broken: {broken} of fslsage_rpc.commands"
    assert done.stderr == f"fslsage_rpc: {place} is left out ({reason})\n"
    done = said(capsys, "evaluate", "nowhere")  # for which no entry point is looked at
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere" in done.stderr


@pytest.mark.gate
def test_the_installed_package_has_its_own_commands() -> None:
    listed = fslsage("--help").stdout
    assert re.search(r"\bgenerate +write texts", listed)
    assert re.search(r"\bbleu +score", listed)
