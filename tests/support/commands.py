"""The command line, run as tests need it: as a process, in this one, or on the ranks of a job."""

import subprocess
import sys
from pathlib import Path

import pytest

from fslsage_rpc.cli import main
from support.forked_ranks import run_ranks
from support.job_processes import outer_environment


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
