"""The paper ledger gives the published figures; the wire ledger adds up."""

from typing import Any

import pytest

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.algorithms.bound import NO_LINK
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.transport.wire_ledger import WireLedger, ring_share
from support.rank_program import train_locally
from support.trees import ALGORITHM

ROUNDS = 10  # one alignment interval
PAPER = {  # its CIFAR-10 setting
    "clients": {"count": 10, "batch_size": 256},
    "data": {"name": "cifar10", "partition": "iid"},
    "model": {"name": "resnet18", "cut": "layer2"},
}


def scenario(name: str, **keys: Any) -> Scenario:
    algorithm = {"name": name, "upload_every": 5, "align_every": 10, "start": "paper", **keys}
    return Scenario(from_tree({**PAPER, "algorithm": algorithm}), NO_LINK, client_ranks=1)


def mean_paper_bytes(name: str, **keys: Any) -> float:
    """Bytes per round of the paper's setting, without training anything."""
    planned = scenario(name, **keys)
    return sum(planned.round(round).paper_bytes for round in range(ROUNDS)) / ROUNDS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedavg", 895_302_560),
        ("splitfed_v1", 874_000_960),
        ("splitfed_v2", 874_000_960),
        ("cse_fsl", 307_075_200),
        ("fsl_sage", 147_106_448),
    ],
)
def test_paper_ledger_check_values(name: str, expected: int) -> None:
    assert mean_paper_bytes(name, average_auxiliary="never") == expected


def test_averaging_the_auxiliary_models_is_in_the_paper_ledger() -> None:
    never, alignment, every_round = (
        mean_paper_bytes("fsl_sage", average_auxiliary=when) for when in ("never", "alignment", "round")
    )
    auxiliary = scenario("fsl_sage").sizes.auxiliary
    assert alignment - never == 10 * 2 * auxiliary / ROUNDS  # 10 clients, once per interval
    assert every_round - never == 10 * 2 * auxiliary


def by_the_rule(planned: Scenario, t: int) -> int:
    """ALGORITHM.md's words, worked out by hand for each algorithm."""
    keys, sizes = planned.config.algorithm, planned.sizes
    participants = planned.federation.participants(t)
    m, batches = len(participants), [planned.federation.batch_sizes[client] for client in participants]
    every, uploaded = sum(map(sum, batches)), sum(sum(each[:: keys.upload_every]) for each in batches)
    match keys.name:
        case "fedavg":
            return 2 * (sizes.client + sizes.server) * m
        case "splitfed_v1" | "splitfed_v2":
            return 2 * sizes.client * m + 2 * sizes.smashed * every
        case "cse_fsl":
            return 2 * (sizes.client + sizes.auxiliary) * m + sizes.smashed * uploaded
    fitted = sum(t in taken_up(planned, client, t + 1) for client in participants)
    averaged = keys.average_auxiliary == "round" or (keys.average_auxiliary == "alignment" and fitted > 0)
    averaged = averaged or (keys.start == "warm_start" and t == 0)
    auxiliary = sizes.auxiliary * (fitted + 2 * m * averaged)
    return 2 * sizes.client * m + auxiliary + sizes.smashed * uploaded


def taken_up(planned: Scenario, client: int, rounds: int) -> list[int]:
    """The rounds in which the client takes a fitted model up."""
    lag, found, begun = planned.config.algorithm.alignment.lag, [], None
    for t in range(rounds):
        if client in planned.federation.participants(t):
            due = aligns(planned, client, t)
            if begun is not None and (t >= begun + lag or due):
                found.append(t)
                begun = None
            if due:
                begun = t
            if due and not lag:
                found.append(t)
                begun = None
    return found


def aligns(planned: Scenario, client: int, t: int) -> bool:
    """In the first of the rounds from the last due one on in which the client takes part."""
    first, every = int(planned.config.algorithm.start != "paper"), planned.config.algorithm.align_every
    if every is None or t < first:
        return False
    due = first + (t - first) // every * every
    return not any(client in planned.federation.participants(past) for past in range(due, t))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("participation", [0.4, 1.0])
@pytest.mark.parametrize("when", ["never", "alignment", "round"])
@pytest.mark.parametrize(
    ("every", "lag", "start"),
    [
        (3, 0, "paper"),
        (1, 0, "warm_start"),
        (4, 0, "warm_start"),
        (None, 0, "paper"),
        (4, 2, "paper"),
        (3, 1, "warm_start"),
        (5, 4, "warm_start"),
    ],
)
def test_the_ledger_follows_the_rule(
    name: str, participation: float, when: str, every: int | None, lag: int, start: str
) -> None:
    if lag and when == "round":
        return  # which is refused
    tree = {
        "clients": {"count": 5, "participation": participation, "batch_size": 20, "local_epochs": 2},
        "data": {"train_limit": 330},
        "algorithm": {
            "name": name,
            "upload_every": 2,
            "align_every": every,
            "average_auxiliary": when,
            "alignment": {"lag": lag},
            "start": start,
        },
    }
    planned = Scenario(from_tree(tree), NO_LINK, client_ranks=1)
    for round in range(9):
        assert planned.round(round).paper_bytes == by_the_rule(planned, round)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_both_ledgers_count_the_same_requests(name: str) -> None:
    tree: dict[str, Any] = {
        "rounds": 3,
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"train_limit": 150, "test_limit": 20},
        "algorithm": {
            "name": name,
            **ALGORITHM,
            "alignment": {"epochs": 1},
        },
    }
    planned = Scenario(from_tree({**tree, "data": {**tree["data"], "partition": "iid"}}), NO_LINK, 1)
    for round, line in enumerate(train_locally(tree).lines):
        wire = sum(line["wire_bytes"][kind] for kind in ("smashed_up", "gradient_down", "auxiliary_down"))
        assert line["paper_bytes"] == wire + 2 * 3 * planned.round(round).averaged_bytes


def test_ring_shares_add_up_to_what_a_ring_moves() -> None:
    for ranks in (1, 2, 3, 7):
        assert sum(ring_share(1001, ranks, rank) for rank in range(ranks)) == 2 * (ranks - 1) * 1001


def test_wire_ledger_counts_by_kind_and_client_and_starts_again() -> None:
    ledger = WireLedger()
    ledger.count("smashed_up", 3, client=1)
    ledger.count("smashed_up", 4, client=1)
    ledger.count("evaluation", 5)
    taken = ledger.take()
    assert taken[1]["smashed_up"] == 7
    assert sum(sum(kinds.values()) for kinds in taken.values()) == 12
    assert ledger.take() == {}


def test_absent_clients_align_at_their_first_round_back() -> None:
    keys = {"clients": {"count": 6, "participation": 0.5}, "seed": 3}
    keys["algorithm"] = {"align_every": 4, "start": "paper"}
    planned = Scenario(from_tree(keys), NO_LINK, client_ranks=1)
    for client in range(6):
        for interval in range(0, 40, 4):
            rounds = range(interval, interval + 4)
            present = [r for r in rounds if client in planned.federation.participants(r)]
            aligned = [r for r in present if client in planned.round(r).aligned]
            assert aligned == present[:1]
            for round in present:
                kinds = [ask.kind for ask in planned.round(round).clients[client].asks]
                assert kinds == (["push", "align"] if round in aligned else ["push"])


def test_alignment_never_means_never() -> None:
    keys = {"align_every": None, "start": "paper"}
    planned = Scenario(from_tree({"algorithm": keys}), NO_LINK, client_ranks=1)
    never = planned.sizes.client
    assert not any(planned.round(r).aligned or planned.round(r).averaged_bytes > never for r in range(20))
