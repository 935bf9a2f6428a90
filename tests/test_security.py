"""What a run opens, reads and writes: loopback sockets, data that is never code, and its own folder only."""

import contextlib
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

import fslsage_rpc
from fslsage_rpc.config.loading import from_tree, load
from fslsage_rpc.config.schema import Data
from fslsage_rpc.data import datasets
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.sockets import listeners
from fslsage_rpc.runs.checkpoint_files import (
    Damaged,
    Manifest,
    Part,
    extent_of,
    part_path,
)
from fslsage_rpc.runs.run_folder import RunFolder
from fslsage_rpc.training.evaluation import evaluate_run
from support.image_files import write_mnist
from support.trees import tree
from support.user_input import mistake, write

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")


# Sockets


@contextmanager
def job(tmp_path: Path, *launcher: str, **variables: str) -> Iterator[dict[str, list[int]]]:
    """A job of three ranks that has trained a round, as its process ids by role; killed at the end."""
    command = [*launcher, "train", QUICKSTART, f"output={tmp_path}", "rounds=100000", "ranks=3"]
    keys = ["comm.transports=[uv]", "device=cpu", "checkpoint.every=null", "evaluation.every=1000"]
    environment = {**os.environ, **variables, "PYTHON": sys.executable}
    process = subprocess.Popen(
        [*command, *keys], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    metrics = tmp_path / "quickstart" / "metrics.jsonl"
    others: set[int] = set()
    try:
        deadline = time.monotonic() + 90
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        others = descendants(process.pid)
        ranks = [
            each for each in others if b"fslsage_rpc\0train" in command_line(each) and not children(each)
        ]
        yield {"launchers": [process.pid, *others.difference(ranks)], "ranks": ranks}
    finally:
        for each in (process.pid, *(others or descendants(process.pid))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        process.wait()


def descendants(process: int) -> set[int]:
    """The processes that this one has started, and those that they have."""
    found = set(children(process))
    return found.union(*map(descendants, found))


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def children(process: int) -> list[int]:
    """The processes that this one has started."""
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for thread in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def reachable(processes: list[int]) -> list[str]:
    """Where these processes take connections from other hosts; they take some from their own."""
    found = [each for process in processes for each in listeners(process)]
    assert found
    return [f"{each.address}:{each.port}" for each in found if not each.address.is_loopback]


linux = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")


LOCAL = str(Path(__file__).parent.parent / "launch" / "local.sh")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
TORCHRUN += ("--nproc_per_node=3", "-m")


@linux
@pytest.mark.nightly
@pytest.mark.parametrize(
    "launcher", [(sys.executable, "-m", "fslsage_rpc"), (LOCAL, "--elastic")], ids=["ours", "elastic"]
)
def test_a_job_without_torchrun_listens_on_loopback_only(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    with job(tmp_path, *launcher) as processes:
        assert len(processes["ranks"]) == 3
        assert reachable(processes["launchers"] + processes["ranks"]) == []


@linux
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ((*TORCHRUN, "fslsage_rpc"), {}),
        ((*TORCHRUN, "fslsage_rpc"), {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
        ((LOCAL,), {}),
    ],
    ids=["torchrun", "torchrun that can restart", "local.sh"],
)
def test_under_torchrun_only_torchruns_own_stores_listen_on_all_interfaces(
    tmp_path: Path, launcher: tuple[str, ...], variables: dict[str, str]
) -> None:
    with job(tmp_path, *launcher, **variables) as processes:
        assert len(processes["ranks"]) == 3
        assert reachable(processes["ranks"]) == []
        assert 1 <= len(reachable(processes["launchers"])) <= 2


# Nothing that is read is run


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """What a bomb makes; it must not be there in the end."""
    path = tmp_path / "run by unpickling"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()  # the bomb works
    path.unlink()
    yield path
    assert not path.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pickled_archives_are_not_opened_before_their_checksum_is_right(
    tmp_path: Path, trace: Path, name: Any
) -> None:
    kind = datasets.TORCHVISION[name]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for file in (*(file for file, _ in (*kind.train_list, *kind.test_list)), kind.meta["filename"]):
        (folder / file).write_bytes(pickle.dumps(Bomb(trace)))
    for train in (True, False):
        keys = Data(name=name, root=str(tmp_path), download=False)
        assert "missing or damaged" in mistake(datasets.load, keys, train)


def test_a_pickled_archive_with_one_altered_file_is_not_opened_at_all(
    tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / torchvision.datasets.CIFAR10.base_folder
    archive.mkdir()
    sound = pickle.dumps({"data": [], "labels": []})
    digest = hashlib.md5(sound).hexdigest()

    class Small(torchvision.datasets.CIFAR10):
        train_list = [["first", digest], ["second", digest]]  # noqa: RUF012
        test_list: list[list[str]] = []  # noqa: RUF012

    monkeypatch.setitem(datasets.TORCHVISION, "cifar10", Small)
    (archive / "first").write_bytes(sound)
    (archive / "second").write_bytes(pickle.dumps(Bomb(trace)))
    assert "missing or damaged" in mistake(datasets.load, Data(name="cifar10", root=str(tmp_path)), True)


def test_files_that_older_torchvisions_left_are_not_unpickled(tmp_path: Path, trace: Path) -> None:
    write_mnist(tmp_path)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(Bomb(trace), processed / name)
    assert "missing or damaged" in mistake(datasets.load, Data(name="mnist", root=str(tmp_path)), True)


def test_a_models_file_is_not_unpickled(tmp_path: Path, trace: Path) -> None:
    run = fslsage_rpc.train(config_file(tmp_path), "rounds=1")
    for content in (Bomb(trace), {"weights": Bomb(trace)}):
        torch.save(content, run.folder / "model.pt")
        assert "model.pt: cannot be read" in mistake(evaluate_run, run.folder)


def test_a_checkpoint_is_not_unpickled_even_with_a_manifest_that_fits(tmp_path: Path, trace: Path) -> None:
    part = part_path(tmp_path, 0)
    torch.save(Bomb(trace), part)
    extent = extent_of(part.read_bytes())
    manifest = Manifest(tmp_path, 1, [Part(extent, [0])], extent)
    manifest.check()
    with pytest.raises(Damaged, match=r"rank-0\.pt: cannot be read"):
        manifest.read([0], server=True)


def test_yaml_makes_plain_values_only(tmp_path: Path, trace: Path) -> None:
    code = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trace}']]"
    assert "not valid YAML" in mistake(load, write(tmp_path, f"name: {code}"))
    assert mistake(load, write(tmp_path, "seed: 1"), [f"name={code}"]).startswith("name: got ")


# Run folders


def config_file(tmp_path: Path, **keys: Any) -> str:
    path = tmp_path / "config.json"  # which is YAML
    path.write_text(json.dumps(tree(tmp_path / "runs", **keys)))
    return str(path)


@given(
    st.text(max_size=30)
    | st.text(alphabet="./\\a~$ \0\n-", max_size=12)
    | st.sampled_from(["CON", "a" * 300])
)
def test_any_name_that_is_accepted_is_one_folder_of_output(name: str) -> None:
    try:
        config = from_tree({"name": name})
    except InputError:
        return
    folder = Path(config.output) / config.name
    assert folder.name == name
    assert folder.parent == Path(config.output)
    assert os.path.normpath(folder) == str(folder)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": ".."}, "name: got '..', expected a folder name"),
        ({"name": "/etc"}, "name: got '/etc', expected a folder name"),
        ({"name": "a/../../b"}, "name: got 'a/../../b', expected a folder name"),
        ({"name": "a\0b"}, "name: got 'a\\x00b', expected a text"),
        ({"output": "runs\0"}, "output: got 'runs\\x00', expected a text"),
        ({"output": "\ud800"}, "output: got '\\ud800', expected a text"),
        ({"name": "a" * 300}, "255 at most"),
        ({"output": "o" * 5000}, "cannot be written (File name too long)"),
    ],
)
def test_a_hostile_name_is_refused_in_one_line(tmp_path: Path, keys: dict[str, str], said: str) -> None:
    before = sorted(tmp_path.iterdir())
    message = mistake(lambda: RunFolder(from_tree({"output": str(tmp_path), **keys}), print))
    assert said in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_that_leads_out_of_output_is_refused(tmp_path: Path) -> None:
    outside, output = tmp_path / "outside", tmp_path / "runs"
    outside.mkdir()
    output.mkdir()
    (outside / "summary.json").write_text("{}")
    for name, target in (("link", outside), ("up", tmp_path / "runs" / ".."), ("nowhere", tmp_path / "x")):
        (output / name).symlink_to(target)
        message = mistake(
            lambda name=name: RunFolder(from_tree({"output": str(output), "name": name}), print)
        )
        assert message.startswith(f"name: got {name!r}, where {output / name} is a link")
    assert [path.name for path in outside.iterdir()] == ["summary.json"]
    assert not (tmp_path / "x").exists()


def test_output_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    run = fslsage_rpc.train(config_file(tmp_path), "rounds=1")
    assert (tmp_path / "scratch" / run.folder.name / "summary.json").exists()
