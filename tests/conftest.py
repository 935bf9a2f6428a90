"""Shared by all tests."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests must not depend on the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder is looked up nowhere

import pytest
import torch

torch.set_num_threads(1)
platform.processor()  # asks a process, once: before tests may start none
with suppress(ImportError):  # launch/gpu_check.sh does without
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    commit = settings(deadline=None, derandomize=True, suppress_health_check=slow)
    settings.register_profile("commit", commit)
    settings.register_profile("nightly", commit, max_examples=500, derandomize=False, print_blob=True)
    settings.load_profile("commit")
TIERS = ("gate", "nightly")
PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
"""audit events"""
commit_tier = False


def refuse_processes(event: str, arguments: tuple[object, ...]) -> None:
    """Hold tests of the commit tier to one process."""
    by_matplotlib = arguments[:1] == ("fc-list",)  # once on a machine, for its fonts
    if commit_tier and event in PROCESS_EVENTS and not by_matplotlib:
        raise RuntimeError("a test that starts a process needs the marker gate or nightly")


sys.addaudithook(refuse_processes)


@pytest.fixture(autouse=True)
def nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what others do on this host out of sight: other tests run beside these."""
    monkeypatch.setattr("fslsage_rpc.measure.host_load.STAT", Path("/nowhere"))


@pytest.fixture(autouse=True, scope="session")
def images_as_usual() -> None:
    """Keeps `model.memory_format: auto` from timing."""
    from support.usual_order import keep_usual_order

    keep_usual_order()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End a property that hangs with its process: an exception would be one more failure to look into."""
    for item in items:
        if item.get_closest_marker("hypothesis"):
            item.add_marker(pytest.mark.timeout(900, method="thread"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tell the tiers apart, fixtures included."""
    global commit_tier
    commit_tier = not any(item.get_closest_marker(tier) for tier in TIERS)
    try:
        return (yield)
    finally:
        commit_tier = False


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with e2e/ and tokenizer/ of toy_language.py."""
    from support.toy_language import write_data, write_tokenizer

    root = tmp_path_factory.mktemp("toy")
    write_data(root)
    write_tokenizer(root / "tokenizer")
    return root
