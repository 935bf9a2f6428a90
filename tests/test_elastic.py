"""With `clients.on_loss: drop` the ranks that are left go on: as a run in which the lost clients took no
part.
"""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.errors import InputError
from fslsage_rpc.runs.checkpoint_files import complete_folders
from fslsage_rpc.training.experiment import check
from support.elastic_job import ElasticJob, assert_equals_one_process, gone_on_with_after_the_servers_death
from support.trees import tree

ADAM = {"aggregation": {"name": "adam"}}
SGD = {"optimizer": {"client": {"name": "sgd", "lr": 0.05}, "auxiliary": {"name": "sgd", "lr": 0.05}}}
BEHIND = {"algorithm": {"alignment": {"lag": 1}}}
FOUR = {
    "clients": {"count": 4, "batch_size": 16},
    "data": {"train_limit": 120},
    "model": {"memory_format": "auto"},  # which all ranks agree on, newcomers too
}


def keys_of(tmp_path: Path, *changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return tree(tmp_path / "oracle", FOUR, *changes, **more)


@pytest.mark.gate
@pytest.mark.timeout(300)
def test_a_killed_rank_costs_its_clients_and_the_round_under_way(tmp_path: Path) -> None:
    """Killed between two steps of a round with an alignment."""
    keys = keys_of(tmp_path, rounds=4)
    with ElasticJob(3, keys, tmp_path).start("1:2:step:kill") as job:
        assert job.wait(0, 2) == [0, 0], job.said
    (event,) = job.events
    assert event.pop("seconds") > 0
    reason = "its process has died, or its connection to rank 0"
    assert event == {"event": "loss", "round": 3, "rank": 1, "clients": [0, 2], "reason": reason}
    assert f"rank 1 is lost ({reason}): clients 0, 2 leave; goes on from round 2" in job.said
    assert_equals_one_process(job, keys)


@pytest.mark.parametrize(
    ("changes", "variables", "said"),
    [
        (
            {},
            {"RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
            "clients.on_loss: got 'drop', expected fail: torchrun",
        ),
        ({}, {}, "clients.on_loss: got 'drop', expected fail: torchrun, and fslsage itself"),
        ({"comm": {"transports": ["shm"]}}, {"RANK": "0"}, "comm.transports: got ['shm'], expected null or"),
        ({"comm": {"averaging": "nccl"}}, {"RANK": "0"}, "comm.averaging: got 'nccl', expected auto or gloo"),
        (
            {"clients": {"minimum": 5}},
            {"RANK": "0"},
            "clients.minimum: got 5, expected at most clients.count, 4",
        ),
    ],
)
def test_what_cannot_go_on_is_refused_at_the_start(
    changes: dict[str, Any],
    variables: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    keys = keys_of(tmp_path, {"clients": {"on_loss": "drop"}, "transport": "rpc"}, changes)
    with pytest.raises(InputError, match=re.escape(said)):
        check(from_tree(keys), 3)


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rounds", [2, 3], ids=["begun in the round that is done again", "begun before"])
def test_fits_behind_the_training_outlive_the_loss_of_a_rank(rounds: int, tmp_path: Path) -> None:
    keys = keys_of(tmp_path, BEHIND, rounds=5)
    with ElasticJob(3, keys, tmp_path).start(f"1:{rounds}:step:kill") as job:
        assert job.wait(0, 2) == [0, 0], job.said
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_silent_rank_is_left_behind_and_finds_out(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, {"comm": {"timeout_seconds": 5}}, rounds=4)
    with ElasticJob(3, keys, tmp_path).start("2:2:averaging:stop") as job:
        job.wait_until("rank 2 is lost (no sign of life for 5 s)")
        os.kill(job.processes[2].pid, signal.SIGCONT)
        assert job.wait(0, 1) == [0, 0], job.said
        assert job.wait(2) == [1], job.said
    assert_equals_one_process(job, keys)
    last = [line for line in job.said.splitlines() if line.startswith("fslsage_rpc:")]
    assert len(last) == 1, last


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("more", [{}, BEHIND], ids=["", "behind"])
def test_a_replacement_is_let_in_between_two_rounds(more: dict[str, Any], tmp_path: Path) -> None:
    """Without optimizer state at the clients, what is back is exactly what would have been there."""
    keys = keys_of(tmp_path, SGD, ADAM, more, rounds=60)
    with ElasticJob(3, keys, tmp_path, PACE="0.5").start("2:2:step:kill") as job:
        job.wait_until("is lost")
        job.start(ranks=iter([2]))
        assert job.wait(0, 1, 2) == [0, 0, 0], job.said
    loss, joined = job.events
    assert (joined["event"], joined["clients"]) == ("joined", [1, 3])
    assert joined["round"] > loss["round"]
    assert f"rank 2 has joined: clients 1, 3 are back; goes on from round {joined['round'] - 1}" in job.said
    assert_equals_one_process(job, keys)


def images(root: str, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Fewer where the variable says so."""
    count = int(os.environ.get("SAMPLES", "120")) if train else 60
    return torch.arange(count * 64).view(count, 1, 8, 8).to(torch.uint8), torch.arange(count) % 4


@pytest.mark.gate
@pytest.mark.timeout(300)
def test_a_replacement_with_other_samples_is_refused_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(tmp_path, {"data": {"name": "test_elastic:images", "partition": "iid"}}, rounds=30)
    keys["data"] |= {"train_limit": None, "test_limit": None}
    with ElasticJob(3, keys, tmp_path, PACE="0.5").start("2:2:step:kill") as job:
        job.wait_until("rank 2 is lost")
        monkeypatch.setenv("SAMPLES", "117")
        job.start(ranks=iter([2]))
        assert job.wait(2, 0, 1) == [2, 0, 0], job.said
    said = "data.name: got 117 training samples, expected 120 as on rank 0"
    assert re.search(rf"^fslsage_rpc: rank 2 \(host .*\): {said}$", job.said, re.MULTILINE)
    assert [event["event"] for event in job.events] == ["loss", "joined", "loss"]
    assert said in job.events[-1]["reason"]
    monkeypatch.delenv("SAMPLES")
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_below_the_minimum_the_run_gives_up_and_all_ranks_go_on_from_its_checkpoint(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, SGD, ADAM, {"clients": {"minimum": 2}}, rounds=6)
    with ElasticJob(3, keys, tmp_path) as job:
        job.start("2:2:step:kill", iter([2]))
        job.start("1:4:step:kill", iter([0, 1]))
        assert job.wait(0) == [1], job.said
        assert (
            "0 clients are left, fewer than clients.minimum (2): the run ends (rank 1 is lost: " in job.said
        )
        assert [line["round"] for line in job.rounds] == [1, 2, 3, 4]
        job.wait(1, 2)
        job.start()
        assert job.wait(0, 1, 2) == [0, 0, 0], job.said
    loss, joined = job.events
    assert (loss["round"], loss["clients"]) == (3, [1, 3])
    assert joined["clients"] == [1, 3]
    assert joined["round"] in (4, 5)
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_servers_death_ends_the_run_at_its_last_checkpoint(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, rounds=5)
    job = gone_on_with_after_the_servers_death(keys, tmp_path)
    assert job.events == []
    assert_equals_one_process(job, keys)


ALGORITHMS: list[dict[str, Any]] = [
    {"algorithm": {"name": "splitfed_v1"}},
    {"algorithm": {"name": "splitfed_v2"}},
    {"algorithm": {"name": "cse_fsl"}},
    {"algorithm": {"name": "fedavg"}},
    {"algorithm": {"name": "splitfed_v1"}, **ADAM},
]
FAULTS = [
    ("2:0:step:kill", 1.0),
    ("1:3:averaging:kill", 0.5),
    ("2:2:closing:kill", 1.0),
    ("1:2:step:raise", 0.5),
]


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("fault", "participation"), FAULTS)
def test_wherever_a_rank_is_lost(fault: str, participation: float, tmp_path: Path) -> None:
    rank, round, _, kind = fault.split(":")
    keys = keys_of(tmp_path, {"clients": {"participation": participation}}, rounds=5)
    with ElasticJob(3, keys, tmp_path).start(fault) as job:
        assert job.wait(0, 3 - int(rank)) == [0, 0], job.said
    (event,) = job.events
    assert event["seconds"] < 5
    assert (event["rank"], event["round"]) == (int(rank), int(round) + 1)
    assert (event["reason"] == "ZeroDivisionError: a fault for the test") == (kind == "raise")
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_rank_is_lost_while_the_server_fits_for_another(tmp_path: Path) -> None:
    """The fit ends when the generation that wanted it is over: not the first, whose RPC agent torch keeps."""
    keys = keys_of(tmp_path, rounds=4)
    with ElasticJob(4, keys, tmp_path, SLOW_FIT="1") as job:
        job.start("3:1:step:kill", iter([3]))
        job.start("1:2:step:kill", iter([0, 1, 2]))
        assert job.wait(0, 2) == [0, 0], job.said
    assert [event["rank"] for event in job.events] == [3, 1]
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("change", ALGORITHMS, ids=lambda change: change["algorithm"]["name"])
def test_each_algorithm_goes_on(change: dict[str, Any], tmp_path: Path) -> None:
    keys = keys_of(tmp_path, change, rounds=4)
    with ElasticJob(3, keys, tmp_path).start("1:2:step:kill") as job:
        assert job.wait(0, 2) == [0, 0], job.said
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_two_ranks_that_die_together_are_one_loss(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, rounds=3)
    with ElasticJob(4, keys, tmp_path) as job:
        for rank in (2, 3):
            job.start(f"{rank}:1:averaging:kill", iter([rank]))
        job.start(ranks=iter([0, 1]))
        assert job.wait(0, 1) == [0, 0], job.said
    assert sorted(event["rank"] for event in job.events) == [2, 3]
    assert {event["reason"] for event in job.events} == {"its process has died, or its connection to rank 0"}
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_rank_that_is_lost_before_the_first_round_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with ElasticJob(3, keys_of(tmp_path), tmp_path).start("2:-1:start:kill") as job:
        assert job.wait(0, 1) == [1, 1], job.said
    messages = [line for line in job.said.splitlines() if line.startswith("fslsage_rpc: ")]
    (message,) = messages
    assert re.fullmatch(r"fslsage_rpc: rank 2 was lost( \(.*\))? in the start: the run ends", message)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_last_checkpoint_waits_for_every_rank_that_has_a_part(tmp_path: Path) -> None:
    with ElasticJob(3, keys_of(tmp_path, rounds=2), tmp_path, SLOW_PART="1").start() as job:
        assert job.wait(0, 1, 2) == [0, 0, 0], job.said
    assert complete_folders(job.folder / "checkpoints")[0].name == "round-000002"
