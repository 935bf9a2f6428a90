"""Algorithms whose requests depend on values: they are not rehearsed, and clients announce their end."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fslsage_rpc
from fslsage_rpc.cli import main
from fslsage_rpc.runs.checkpoint_files import complete_folders
from support.commands import said
from support.elastic_job import ElasticJob, assert_equals_one_process, gone_on_with_after_the_servers_death
from support.equality import assert_identical, assert_same, assert_same_bits, assert_whole
from support.rank_program import Outcome, run_on_ranks, train_locally, train_on_ranks
from support.run_folders import finished
from support.trees import Tree, merged, tree
from support.user_input import mistake

HERE = Path("nowhere")  # trainings without a run folder
ARRIVAL: Tree = {"server": {"order": "arrival"}}
TIGHT: Tree = {"clients": {"participation": 0.5}, "comm": {"upload_window": 1}}
FOUR: Tree = {"clients": {"count": 4}, "data": {"train_limit": 120}}
END_SECONDS = 45
"""from the death of a rank until the others are gone"""


def by(kind: str, *changes: Tree, output: Path = HERE, **keys: Any) -> Tree:
    """A training by an algorithm of `value_algorithms.py`."""
    name = {"algorithm": {"name": f"support.value_algorithms:{kind}", "average_auxiliary": "never"}}
    return tree(output, name, ARRIVAL, *changes, **keys)


def averaging(when: str) -> Tree:
    return {"algorithm": {"average_auxiliary": when}}


def counts(line: dict[str, Any]) -> dict[str, int]:
    """The requests of a round, by kind."""
    return {kind: times["count"] for kind, times in line["requests"].items()}


def model_bytes(outcome: Outcome, name: str) -> int:
    """|C| or |A| of the paper ledger; 0 where there is no such model."""
    tensors = [outcome.tensors[f"{name}/{part}"] for part in ("floats", "integers") if _has(outcome, name)]
    return sum(tensor.nbytes for tensor in tensors)


def _has(outcome: Outcome, name: str) -> bool:
    return f"{name}/floats" in outcome.tensors


def assert_ledgers_agree(outcome: Outcome, keys: Tree) -> None:
    """In every round the paper ledger is of averaged models, and of the requests' tensors on the wire."""
    kind, when = keys["algorithm"]["name"].partition(":")[2], keys["algorithm"]["average_auxiliary"]
    total = 0
    for line in outcome.lines:
        wire = line["wire_bytes"]
        averaged = when == "round" or (when == "alignment" and line["alignment"] is not None)
        averaged = averaged or not kind.startswith("AlignsOnNeed") or line["round"] == 1
        models = model_bytes(outcome, "client 0") + averaged * model_bytes(outcome, "client 0 auxiliary")
        asked = wire["smashed_up"] + wire["gradient_down"] + wire["auxiliary_down"]
        assert line["paper_bytes"] == 2 * models * len(line["participants"]) + asked, line["round"]
        total += line["paper_bytes"]
        assert line["paper_bytes_total"] == total
        assert line["requests"].get("end", {"count": 0})["count"] == (
            0 if kind == "LeavesOut" else len(line["participants"])
        )


def assert_clients_agree(outcome: Outcome, keys: Tree) -> None:
    """After averaging all ranks' clients hold the same; the server has each client's auxiliary model."""
    needy = "AlignsOnNeed" in keys["algorithm"]["name"]  # whose auxiliary models may differ
    for client in range(keys["clients"]["count"]):
        for name, tensor in outcome.tensors.items():
            if name.startswith("client 0") and not ("auxiliary" in name and needy):
                assert torch.equal(tensor, outcome.tensors[name.replace("0", str(client), 1)]), name
        aligned = outcome.tensors.get(f"server's auxiliary of {client}/floats")
        if aligned is not None:  # where ranks average it, sums are in another order
            own = outcome.tensors[f"client {client} auxiliary/floats"]
            torch.testing.assert_close(aligned, own, rtol=1e-10, atol=1e-12)


# In one process


@pytest.mark.parametrize("change", [{}, TIGHT], ids=["all", "half"])
def test_a_threshold_of_zero_is_cse_fsl(change: Tree) -> None:
    cse = {"algorithm": {"name": "cse_fsl", "upload_every": 1}}
    expected = train_locally(tree(HERE, cse, ARRIVAL, change))
    found = train_locally(by("UploadsAll", change))
    assert_same_bits(expected, found)
    for one, other in zip(expected.lines, found.lines, strict=True):
        assert one["paper_bytes"] == other["paper_bytes"]
        assert one["paper_bytes_total"] == other["paper_bytes_total"]
        assert counts(other) == {**counts(one), "end": len(one["participants"])}


def test_an_infinite_threshold_uploads_nothing() -> None:
    one, two = (train_locally(by("UploadsNone", rounds=rounds)) for rounds in (1, 3))
    for outcome in (one, two):
        for line in outcome.lines:
            assert counts(line) == {"end": 3}
            assert line["wire_bytes"]["smashed_up"] == line["wire_bytes"]["labels_up"] == 0
            assert line["train_loss"] is None
            assert "diverged" not in line
        assert_ledgers_agree(outcome, by("UploadsNone"))
    assert torch.equal(one.tensors["server of 0/floats"], two.tensors["server of 0/floats"])
    assert not torch.equal(one.tensors["client 0/floats"], two.tensors["client 0/floats"])


@pytest.mark.parametrize("change", [{}, TIGHT], ids=["all", "half"])
@pytest.mark.parametrize("kind", ["Picky", "Sparing"])
def test_in_between_both_ledgers_count_what_was_asked(kind: str, change: Tree) -> None:
    keys = by(kind, change)
    outcome = train_locally(keys)
    assert_ledgers_agree(outcome, keys)
    made = [sum(counts(line).values()) - len(line["participants"]) for line in outcome.lines]
    batches = train_locally(by("UploadsAll", change)).lines
    assert 0 < sum(made) < sum(counts(line)["push"] for line in batches)
    assert len(set(made)) > 1


@pytest.mark.parametrize("when", ["never", "alignment", "round"])
@pytest.mark.parametrize("kind", ["AlignsOnNeed", "AlignsOnNeedApart"])
def test_clients_train_their_auxiliary_models_and_are_then_aligned_on_need(kind: str, when: str) -> None:
    keys = by(kind, averaging(when))
    first, outcome = (train_locally({**keys, "rounds": rounds}) for rounds in (1, 6))
    cse = {"algorithm": {"name": "cse_fsl", "upload_every": 1}}
    if kind == "AlignsOnNeed":  # its first round is one of CSE-FSL
        expected = train_locally(tree(HERE, cse, ARRIVAL, rounds=1))
        for name, tensor in expected.tensors.items():
            assert torch.equal(first.tensors[name], tensor), name
    for client in range(3):  # what the clients have trained is handed over, averaged
        handed_over = first.tensors[f"server's auxiliary of {client}/floats"]
        assert torch.equal(handed_over, first.tensors["client 0 auxiliary/floats"])
    assert_ledgers_agree(outcome, keys)
    assert_clients_agree(outcome, keys)
    aligned = [counts(line).get("align", 0) for line in outcome.lines]
    assert aligned[:2] == [0, 3]
    assert aligned[-1] == 0  # the estimates have become small
    assert any(0 < count < 3 for count in aligned) == (when != "never")
    assert [line["alignment"] is not None for line in outcome.lines] == [count > 0 for count in aligned]
    for line, count in zip(outcome.lines, aligned, strict=True):
        assert line["wire_bytes"]["auxiliary_down"] == count * model_bytes(outcome, "client 0 auxiliary")
    # The server's auxiliary models say nothing of those that clients train.
    assert [line["drift"] is not None for line in outcome.lines] == [False] + 5 * [True]
    same = torch.equal(
        outcome.tensors["client 0 auxiliary/floats"], outcome.tensors["client 1 auxiliary/floats"]
    )
    assert same == (when != "never")


def test_a_class_that_asks_nothing_may_read_values_in_any_order() -> None:
    outcome = train_locally(by("LeavesOut"))
    assert_same_bits(outcome, train_locally(merged(by("LeavesOut"), {"server": {"order": "round_robin"}})))
    assert [counts(line) for line in outcome.lines] == 6 * [{}]
    whole = {name: t for name, t in outcome.tensors.items() if name.startswith("client 0/")}
    assert outcome.lines[0]["paper_bytes"] == 2 * 3 * sum(tensor.nbytes for tensor in whole.values())
    assert outcome.lines[-1]["train_loss"] < outcome.lines[0]["train_loss"]


def test_traces_and_many_clients_of_one_process(tmp_path: Path) -> None:
    """More clients than steps may be open at once."""
    keys = by("Sparing", TIGHT, output=tmp_path, rounds=2, trace=True)
    run = fslsage_rpc.train(merged(keys, {"clients": {"count": 40, "participation": 1.0}}))
    assert [counts(line)["end"] for line in run.rounds] == [40, 40]
    events = json.loads((run.folder / "trace.json").read_text())["traceEvents"]
    executed = {event["id"] for event in events if event["ph"] == "f"}
    assert executed <= {event["id"] for event in events if event["ph"] == "s"}
    assert len(executed) == sum(counts(line)["exchange"] for line in run.rounds)


def test_three_rounds_and_three_more_are_six(tmp_path: Path) -> None:
    for kind in ("Sparing", "AlignsOnNeed"):
        keys = by(kind, averaging("alignment"), {"evaluation": {"every": 1}}, output=tmp_path)
        whole = fslsage_rpc.train({**keys, "name": f"whole-{kind}"})
        for rounds in (1, 3, 6):
            run = fslsage_rpc.train({**keys, "name": f"parts-{kind}", "rounds": rounds})
        assert_identical(whole, run)
        assert_whole(run)


def between(lines: list[dict[str, Any]], t: int) -> float:
    """A paper ledger in GiB that is passed in this round, from 1."""
    return (lines[t - 2]["paper_bytes_total"] + lines[t - 1]["paper_bytes_total"]) / 2**31


def test_the_paper_ledger_ends_a_run_in_the_round_that_passes_its_limit(tmp_path: Path) -> None:
    lines = train_locally(by("Picky")).lines
    keys = by("Picky", output=tmp_path)
    for round in (3, 5):  # the second goes on from the first
        run = fslsage_rpc.train(merged(keys, {"stop": {"paper_gib": between(lines, round)}}))
        assert [line["paper_bytes_total"] for line in run.rounds] == [
            line["paper_bytes_total"] for line in lines[:round]
        ]
        assert_whole(run)


# On ranks


FOUR_CLIENTS: dict[str, Tree] = {
    "Sparing": by("Sparing", FOUR),
    "Sparing, half": by("Sparing", FOUR, TIGHT),
    "never": by("AlignsOnNeedApart", FOUR),
    "alignment": by("AlignsOnNeedApart", FOUR, TIGHT, averaging("alignment")),
    "round": by("AlignsOnNeedApart", FOUR, averaging("round")),
    "LeavesOut": by("LeavesOut", FOUR),
}
"""the order in which requests arrive changes nothing"""
BY_ORDER: dict[str, Tree] = {
    "Picky": by("Picky", FOUR, {"comm": {"upload_window": 1}}),
    "AlignsOnNeed": by("AlignsOnNeed", FOUR, averaging("alignment")),
    "AlignsOnNeed, half": by("AlignsOnNeed", FOUR, TIGHT),
}
ONE_CLIENT: dict[str, Tree] = {
    kind: by(kind, averaging("round"), {"clients": {"count": 1}, "data": {"train_limit": 60}})
    for kind in ("Picky", "AlignsOnNeed")
}


def on_ranks(ranks: int, trees: dict[str, Tree], folder: Path) -> dict[str, Outcome]:
    over_rpc = [{**keys, "transport": "rpc"} for keys in trees.values()]
    return dict(zip(trees, train_on_ranks(ranks, over_rpc, folder), strict=True))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """With all clients on one."""
    trees = {**FOUR_CLIENTS, **{f"one client, {name}": keys for name, keys in ONE_CLIENT.items()}}
    return on_ranks(2, trees, tmp_path_factory.mktemp("jobs") / "2")


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return on_ranks(3, {**FOUR_CLIENTS, **BY_ORDER}, tmp_path_factory.mktemp("jobs") / "3")


@pytest.mark.gate
@pytest.mark.parametrize("case", FOUR_CLIENTS)
def test_rpc_equals_local_where_the_order_of_arrival_changes_nothing(
    case: str, two_ranks: dict[str, Outcome], three_ranks: dict[str, Outcome]
) -> None:
    local = train_locally(FOUR_CLIENTS[case])
    assert_same(local, two_ranks[case])
    assert_same(local, three_ranks[case])
    assert [counts(line) for line in three_ranks[case].lines] == [counts(line) for line in local.lines]
    assert_clients_agree(three_ranks[case], FOUR_CLIENTS[case])


@pytest.mark.nightly
@pytest.mark.parametrize("seed", ["1", "2"])
def test_delays_that_change_the_order_of_arrival_change_nothing(
    seed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANDOM_DELAYS", seed)
    outcomes = on_ranks(3, FOUR_CLIENTS, tmp_path / "job")
    monkeypatch.delenv("RANDOM_DELAYS")
    for case, keys in FOUR_CLIENTS.items():
        assert_same(train_locally(keys), outcomes[case])


@pytest.mark.gate
@pytest.mark.parametrize("kind", ONE_CLIENT)
def test_rpc_equals_local_where_one_client_asks(kind: str, two_ranks: dict[str, Outcome]) -> None:
    assert_same(train_locally(ONE_CLIENT[kind]), two_ranks[f"one client, {kind}"])


@pytest.mark.gate
@pytest.mark.parametrize("case", BY_ORDER)
def test_in_any_order_ledgers_agree_and_all_ranks_have_the_same(
    case: str, three_ranks: dict[str, Outcome]
) -> None:
    keys, outcome = BY_ORDER[case], three_ranks[case]
    assert [line["round"] for line in outcome.lines] == [1, 2, 3, 4, 5, 6]
    assert_ledgers_agree(outcome, keys)
    assert_clients_agree(outcome, keys)
    if case == "Picky":  # nothing comes back from the server, so the order matters to it alone
        local = train_locally(keys)
        for name, expected in local.tensors.items():
            if name.startswith("client "):
                torch.testing.assert_close(outcome.tensors[name], expected, rtol=1e-10, atol=1e-12)
        assert [counts(line) for line in outcome.lines] == [counts(line) for line in local.lines]
    else:
        assert sum(counts(line).get("align", 0) for line in outcome.lines) > 0
        assert [line["drift"] is not None for line in outcome.lines] == [False] + 5 * [True]


@pytest.mark.gate
def test_the_paper_ledger_ends_all_ranks_also_of_a_run_that_goes_on(tmp_path: Path) -> None:
    lines = train_locally(FOUR_CLIENTS["Sparing"]).lines
    keys = {**FOUR_CLIENTS["Sparing"], "output": str(tmp_path), "transport": "rpc"}
    for round in (3, 5):
        run_on_ranks(3, [{**keys, "stop": {"paper_gib": between(lines, round)}}], tmp_path, timeout=100)
        run = finished(tmp_path / "run")
        assert [line["paper_bytes_total"] for line in run.rounds] == [
            line["paper_bytes_total"] for line in lines[:round]
        ]
        assert_whole(run)


# Ranks that die


FAIL: Tree = {"clients": {"on_loss": "fail"}}
SGD: Tree = {"optimizer": {party: {"name": "sgd", "lr": 0.05} for party in ("client", "auxiliary")}}


def keys_of(tmp_path: Path, kind: str, *changes: Tree, **keys: Any) -> Tree:
    return by(kind, FOUR, averaging("alignment"), *changes, output=tmp_path / "oracle", **keys)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kind", "fault", "change"),
    [
        pytest.param("Sparing", "2:2:step:kill", TIGHT, marks=pytest.mark.gate),
        pytest.param("AlignsOnNeedApart", "1:1:step:kill", {}, marks=pytest.mark.nightly),
        pytest.param("Sparing", "0:3:server:kill", TIGHT, marks=pytest.mark.nightly),
    ],
)
def test_a_killed_rank_ends_the_job_which_then_goes_on(
    kind: str, fault: str, change: Tree, tmp_path: Path
) -> None:
    keys = keys_of(tmp_path, kind, FAIL, change)
    killed, round, _, _ = fault.split(":")
    with ElasticJob(3, keys, tmp_path).start(fault) as job:
        job.wait_until("fault now")
        began = time.monotonic()
        statuses = job.wait(0, 1, 2)
        assert time.monotonic() - began < END_SECONDS
        assert statuses == [-signal.SIGKILL if rank == int(killed) else 1 for rank in range(3)], job.said
        (message,) = [line for line in job.said.splitlines() if line.startswith("fslsage_rpc: ")]
        lost = rf"rank {killed} \({'clients' if int(killed) else 'server'}, host .*\) was lost in .*"
        assert re.fullmatch(f"fslsage_rpc: {lost}: its process has ended", message)
        done = complete_folders(job.folder / "checkpoints")[0].name
        assert done in (f"round-{int(round):06d}", f"round-{int(round) - 1:06d}")
        job.start()
        assert job.wait(0, 1, 2) == [0, 0, 0], job.said
    assert f"goes on from round {int(done[-6:])} " in job.said
    assert_equals_one_process(job, keys)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "fault", "change"),
    [
        pytest.param("Sparing", "1:2:step:kill", TIGHT, marks=pytest.mark.gate),
        pytest.param("AlignsOnNeedApart", "2:1:step:kill", {}, marks=pytest.mark.nightly),
        pytest.param("AlignsOnNeedApart", "2:0:step:kill", TIGHT, marks=pytest.mark.nightly),
        pytest.param("AlignsOnNeedApart", "1:0:closing:kill", {}, marks=pytest.mark.nightly),
        pytest.param("Sparing", "1:3:averaging:kill", TIGHT, marks=pytest.mark.nightly),
        pytest.param("Sparing", "2:2:step:raise", {}, marks=pytest.mark.nightly),
    ],
)
def test_the_ranks_that_are_left_go_on(kind: str, fault: str, change: Tree, tmp_path: Path) -> None:
    keys = keys_of(tmp_path, kind, change)
    lost = int(fault.split(":")[0])
    with ElasticJob(3, keys, tmp_path).start(fault) as job:
        assert job.wait(0, 3 - lost) == [0, 0], job.said
    (event,) = job.events
    assert event["clients"] == [lost - 1, lost + 1]
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", ["Picky", "AlignsOnNeed"])
def test_the_ranks_that_are_left_go_on_in_any_order(case: str, tmp_path: Path) -> None:
    keys = merged(BY_ORDER[case], {"output": str(tmp_path / "oracle")})
    with ElasticJob(3, keys, tmp_path).start("1:2:step:kill") as job:
        assert job.wait(0, 2) == [0, 0], job.said
    assert [line["participants"] for line in job.rounds] == 2 * [[0, 1, 2, 3]] + 4 * [[1, 3]]
    assert [counts(line)["end"] for line in job.rounds] == 2 * [4] + 4 * [2]
    assert_whole(finished_but_for_events(job))


def finished_but_for_events(job: ElasticJob) -> Any:
    return fslsage_rpc.notebook.Run(
        job.folder, job.rounds, json.loads((job.folder / "summary.json").read_text())
    )


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["Sparing", "AlignsOnNeedApart"])
def test_a_replacement_is_let_in(kind: str, tmp_path: Path) -> None:
    """Without optimizer state at the clients, what is back is exactly what would have been there."""
    keys = keys_of(tmp_path, kind, SGD, rounds=60)
    with ElasticJob(3, keys, tmp_path, PACE="0.5").start("2:2:step:kill") as job:
        job.wait_until("is lost")
        job.start(ranks=iter([2]))
        assert job.wait(0, 1, 2) == [0, 0, 0], job.said
    loss, joined = job.events
    assert (loss["clients"], joined["clients"]) == ([1, 3], [1, 3])
    assert joined["event"] == "joined"
    assert_equals_one_process(job, keys)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_servers_death_ends_a_run_that_others_would_outlive(tmp_path: Path) -> None:
    keys = keys_of(tmp_path, "Sparing", rounds=5)
    job = gone_on_with_after_the_servers_death(keys, tmp_path)
    assert_equals_one_process(job, keys)


# What is refused, and what cannot be known


def test_another_order_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = by("Picky", {"server": {"order": "client_major"}}, output=tmp_path)
    expected = (
        "server.order: got 'client_major', expected arrival: the requests of support.value_algorithms:Picky "
        "depend on values"
    )
    assert mistake(fslsage_rpc.train, keys) == expected
    config = tmp_path / "run.yaml"
    for command, named in (("train", ""), ("check", ""), ("bench", "bench.variants.picky: ")):
        variants = {"picky": [], "splitfed_v1": ["algorithm.name=splitfed_v1"]}
        config.write_text(yaml.safe_dump({**keys, "bench": {"variants": variants}}))
        done = said(capsys, command, config)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"fslsage_rpc: {named}{expected}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["Picky", "Sparing", "AlignsOnNeed", "LeavesOut"])
def test_check_calls_unknown_what_depends_on_values(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(by(kind, output=tmp_path)))
    done = said(capsys, "check", config)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line for line in done.stdout.splitlines() if f"{kind} (configured)" in line]
    assert [len(re.findall(r"\bunknown\b", row)) for row in rows] == [0 if kind == "LeavesOut" else 2]
    assert len(re.findall(r"\bunknown\b", done.stdout)) == (0 if kind == "LeavesOut" else 2)
    assert ("though others may ask for more" in done.stdout) == (kind != "LeavesOut")


def test_a_benchmark_has_the_bounds_of_what_was_asked(tmp_path: Path) -> None:
    variants = {
        "picky": [],
        "sparing": ["algorithm.name=support.value_algorithms:Sparing"],
        "needy": ["algorithm.name=support.value_algorithms:AlignsOnNeed", "algorithm.align_every=1"],
        "splitfed_v1": ["algorithm.name=splitfed_v1"],
    }
    keys = by("Picky", {"bench": {"variants": variants, "repeats": 1}}, output=tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    assert main(["bench", str(tmp_path / "run.yaml")]) == 0
    records = json.loads((tmp_path / "run" / "bench.json").read_text())["variants"]
    assert records.keys() == variants.keys()
    for record in records.values():
        assert 0 < record["bound_seconds"] <= 1.05 * record["round_seconds"]["median"]
        assert record["diverged"] is None
    uploaded = {name: record["wire_bytes"]["smashed_up"] for name, record in records.items()}
    assert 0 < uploaded["picky"] < uploaded["sparing"] < uploaded["splitfed_v1"] == uploaded["needy"]


def test_an_alignment_on_nothing_is_refused(tmp_path: Path) -> None:
    message = mistake(fslsage_rpc.train, by("AlignsTooSoon", output=tmp_path))
    assert message == (
        "algorithm.name: got one that aligns client 0 when it has uploaded nothing, expected a Push before "
        "the first alignment"
    )


@pytest.mark.nightly
def test_an_alignment_on_nothing_is_one_line_on_ranks_too(tmp_path: Path) -> None:
    with ElasticJob(3, keys_of(tmp_path, "AlignsTooSoon", FAIL), tmp_path).start() as job:
        assert 2 in job.wait(0, 1, 2), job.said
    (message,) = [line for line in job.said.splitlines() if not line.startswith("warning: ")]
    assert message.startswith("fslsage_rpc: algorithm.name: got one that aligns client ")
