"""Checkpoints on a file system of their own that is full, or becomes read-only: a small tmpfs. Needs root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fslsage_rpc
from fslsage_rpc.notebook import Run
from fslsage_rpc.runs.checkpoint_files import complete_folders
from support.equality import assert_identical
from support.run_folders import copied
from support.trees import tree
from support.user_input import mistake

pytestmark = pytest.mark.nightly  # needs root
MIB = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fslsage_rpc.train(tree(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fslsage_rpc.train(tree(tmp_path_factory.mktemp("half"), rounds=3))


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def fill(disk: Path, but: int) -> None:
    """Leave only so many bytes of it."""
    free = shutil.disk_usage(disk).free
    with (disk / "filler").open("wb") as file:
        file.write(bytes(free - but))


def test_on_a_full_disk_the_training_goes_on_and_the_last_good_checkpoint_stays(
    disk: Path, half: Run, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(half, disk)
    for name in ("summary.json", "model.pt"):
        (folder / name).unlink()  # as when it was cut off
    keys = tree(disk, name=folder.name)
    fill(disk, but=MIB // 8)
    capsys.readouterr()
    message = mistake(fslsage_rpc.train, keys)
    assert message == f"output: got '{disk}', where {folder} cannot be written (No space left on device)"
    parts = {number: f"{folder}/checkpoints/round-00000{number}/rank-0.pt" for number in (4, 5, 6)}
    assert warnings(capsys) == [
        f"warning: no checkpoint after round {number} (rank 0: {part}: No space left on device); "
        f"the last one is {folder}/checkpoints/round-000003; the run goes on"
        for number, part in parts.items()
    ]
    assert list(folder.rglob("*.tmp")) == []
    assert rounds_kept(folder / "checkpoints") == ["round-000003", "round-000002"]
    (disk / "filler").unlink()
    assert_identical(whole, fslsage_rpc.train(keys))  # once there is room


def test_a_disk_that_becomes_read_only_costs_checkpoints(
    disk: Path, half: Run, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(half, tmp_path)
    shutil.move(folder / "checkpoints", disk / "checkpoints")
    (folder / "checkpoints").symlink_to(disk / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    capsys.readouterr()
    run = fslsage_rpc.train(tree(tmp_path, name=folder.name))
    said = warnings(capsys)
    assert len(said) == 3
    for line in said:
        assert "Read-only file system" in line
        assert line.endswith(f"; the last one is {folder}/checkpoints/round-000003; the run goes on")
    for mine, its in zip(whole.rounds, run.rounds, strict=True):
        assert mine["train_loss"] == its["train_loss"]
    assert rounds_kept(disk / "checkpoints") == ["round-000003", "round-000002"]


def rounds_kept(root: Path) -> list[str]:
    return [path.name for path in complete_folders(root)]
