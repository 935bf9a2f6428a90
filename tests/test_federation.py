"""The federation: participants, shares and steps that every rank knows without a message."""

import numpy as np
import pytest

from fslsage_rpc.data.participation import Federation


def federation(samples: list[int], participation: float = 1.0, seed: int = 0) -> Federation:
    return Federation(samples, participation, batch_size=4, local_epochs=2, seed=seed)


@pytest.mark.parametrize(
    ("participation", "clients", "expected"),
    [
        (0.1, 30, 3),  # 0.1 * 30 is 3.0000000000000004
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (0.29, 100, 29),
        (0.5, 5, 3),
        (0.34, 3, 2),
        (0.01, 3, 1),
        (1e-12, 4, 1),
        (1.0, 1, 1),
        (1.0, 7, 7),
        (0.999, 7, 7),
    ],
)
def test_participants_are_the_share_of_the_clients_rounded_up(
    participation: float, clients: int, expected: int
) -> None:
    participants = federation([1] * clients, participation).participants(0)
    assert len(participants) == expected
    assert participants == sorted(set(participants))
    assert set(participants) <= set(range(clients))


def test_participants_follow_from_seed_and_round_alone() -> None:
    samples = [1] * 20
    rounds = [federation(samples, 0.3).participants(round) for round in range(30)]
    again = federation(samples, 0.3)
    np.random.seed(1)  # noqa: NPY002
    assert [again.participants(round) for round in reversed(range(30))] == rounds[::-1]
    assert len({tuple(clients) for clients in rounds}) > 20
    assert set().union(*rounds) == set(range(20))
    assert [federation(samples, 0.3, seed=1).participants(round) for round in range(30)] != rounds


def test_shares_are_the_sample_shares_of_the_participants_and_add_to_one() -> None:
    samples = [3, 10, 1, 7, 29, 5, 13]
    partial = federation(samples, 0.5)
    for round in range(10):
        shares = partial.shares(round)
        assert list(shares) == partial.participants(round)
        total = sum(samples[client] for client in shares)
        assert shares == {client: samples[client] / total for client in shares}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-12)


def test_steps_are_the_batches_of_all_epochs() -> None:
    clients = federation([1, 4, 5, 12])
    assert clients.samples == [1, 4, 5, 12]
    assert clients.batch_sizes == [[1, 1], [4, 4], [4, 1, 4, 1], [4, 4, 4, 4, 4, 4]]
    assert [clients.steps(client) for client in range(4)] == [2, 2, 4, 6]


def test_clients_that_are_away_take_no_part_and_the_others_weigh_more() -> None:
    some = federation([10, 20, 30, 40], 0.5)
    before = [some.participants(round) for round in range(6)]
    loss = {"event": "loss", "round": 3, "clients": [1, 3]}
    back = {"event": "joined", "round": 5, "clients": [1, 3]}
    some.follow([loss, back])
    assert [some.present(round) for round in (1, 2, 3, 4)] == [[0, 1, 2, 3], [0, 2], [0, 2], [0, 1, 2, 3]]
    after = [some.participants(round) for round in range(6)]
    assert after[:2] + after[4:] == before[:2] + before[4:]
    assert all(len(drawn) == 1 and set(drawn) <= {0, 2} for drawn in after[2:4])
    some.follow([{**loss, "clients": [3]}])
    assert len(some.participants(2)) == 2  # half of the three that are there, rounded up
    all_of_them = federation([10, 20, 30, 40])
    all_of_them.follow([loss])
    assert all_of_them.shares(2) == {0: 0.25, 2: 0.75}
