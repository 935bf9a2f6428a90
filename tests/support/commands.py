"""The command line, run as tests need it: as a process, in this one, or on the ranks of a job."""

import configparser
import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fslsage_rpc.cli import main
from support.forked_ranks import run_ranks
from support.job_processes import outer_environment

GROUP = "fslsage_rpc.commands"


def entries_of(setup: str) -> dict[str, str]:
    """The entry points of commands in the text of a setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read_string(setup)
    lines = parser["options.entry_points"][GROUP].strip().splitlines()
    return dict(line.split(" = ") for line in lines)


def offer_commands(monkeypatch: pytest.MonkeyPatch, **others: str) -> None:
    """Have the entry points of commands be those of setup.cfg and these others, whatever is installed."""
    own = entries_of((Path(__file__).parents[2] / "setup.cfg").read_text())
    offered = [EntryPoint(name, value, GROUP) for name, value in {**own, **others}.items()]
    installed = importlib.metadata.entry_points

    def entry_points(**keys: Any) -> Any:
        return offered if keys == {"group": GROUP} else installed(**keys)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def fslsage(
    *arguments: str | Path, seconds: float = 150, **environment: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as at a user's prompt: without torchrun's variables."""
    return subprocess.run(
        [sys.executable, "-m", "fslsage_rpc", *map(str, arguments)],
        env={**outer_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In this process, which has imported torch already: of a command that needs no ranks of its own."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())


def fslsage_on_ranks(ranks: int, folder: Path, *arguments: str | Path, seconds: float = 150) -> str:
    """On the ranks of a job, which must end well; what they say."""
    return run_ranks(ranks, _main, [str(argument) for argument in arguments], folder, seconds)


def _main(*arguments: str) -> None:
    sys.exit(main(arguments))
