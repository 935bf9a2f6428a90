"""A name on the hub is looked up on this machine first, then, if that may be and can be, on the network."""

import socket
from pathlib import Path
from typing import Any

import pytest

from fslsage_rpc.language import hub

constants = pytest.importorskip("huggingface_hub.constants")


class Store:
    """A loader of transformers, with names that are stored here and names that only the network has."""

    def __init__(self) -> None:
        self.asked_network = 0

    def __call__(self, name: str, local_files_only: bool = False, **keys: Any) -> str:
        if name == "stored" or not local_files_only:
            self.asked_network += not local_files_only
            return name
        raise ValueError("not stored")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub can be reached."""
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "_reach", lambda address: None)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the hub's address."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def test_what_is_stored_here_needs_no_network(unreachable: None) -> None:
    store = Store()
    assert hub.load(store, "stored") == "stored"
    assert store.asked_network == 0


def test_what_is_not_is_asked_for(answering: None) -> None:
    store = Store()
    assert hub.load(store, "somebody/model") == "somebody/model"
    assert store.asked_network == 1


def test_an_unreachable_hub_is_not_asked_again_and_again(unreachable: None) -> None:
    store = Store()
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:\d+ cannot be reached .*refused"):
        hub.load(store, "somebody/model")
    assert store.asked_network == 0


def test_without_download_or_in_a_folder_the_network_is_not_asked(answering: None, tmp_path: Path) -> None:
    store = Store()
    for name, download in (("somebody/model", False), (str(tmp_path), True)):
        with pytest.raises(ValueError, match="not stored"):
            hub.load(store, name, download)
    assert store.asked_network == 0
