"""Ranks that start wait for each other, but not for ever, nor for one that has failed."""

from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from fslsage_rpc.errors import ConnectionLost
from fslsage_rpc.job.roll_call import await_all, claim_failure
from fslsage_rpc.job.rpc_world import RpcWorld

KEYS = ["here/0", "here/1", "here/2"]
AN_HOUR = timedelta(hours=1)


def store(*present: str) -> HashStore:
    store = HashStore()
    for key in present:
        store.set(key, "")
    return store


def test_all_are_there() -> None:
    await_all(store(*KEYS), KEYS, timedelta(0))


def test_those_that_do_not_start_are_named() -> None:
    with pytest.raises(ConnectionLost, match=r"ranks 0, 2 did not start within 0\.2 s"):
        await_all(store("here/1"), KEYS, timedelta(seconds=0.2))


@pytest.mark.timeout(10)
def test_when_one_has_failed_the_others_wait_no_longer() -> None:
    """And leave the word to it, though their own time-out has yet to come."""
    half = store("here/1")
    assert claim_failure(half, 0)
    with pytest.raises(ConnectionLost, match="another rank has failed"):
        await_all(half, KEYS, AN_HOUR)
    assert not claim_failure(half, 1)


def test_on_one_host_the_store_is_found_whatever_name_it_is_told_by(monkeypatch: pytest.MonkeyPatch) -> None:
    launchers = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "nosuchhost.invalid"}
    variables |= {"MASTER_PORT": str(launchers.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    rank = RpcWorld.__new__(RpcWorld)
    rank._hosts_store = False
    rank._find_store(timedelta(seconds=5)).set("here", "")
    assert launchers.check(["fslsage_rpc/0/here"])
