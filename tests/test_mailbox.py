"""The mailbox releases requests in the configured order, however they arrive."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fslsage_rpc.parties.mailbox import Mailbox
from fslsage_rpc.parties.requests import Align, End, Push, Request

PLANS = {0: [0, 0, 2, 4], 1: [0, 2], 2: []}


def request(client: int, number: int) -> Request:
    return Request(client, number, 0, Align())


def released(
    order: str, arrivals: list[tuple[int, int]], ranking: list[int] | None = None
) -> list[tuple[int, int]]:
    mailbox = Mailbox(order)
    mailbox.announce(PLANS, ranking or [0, 1, 2])
    out = [r for client, number in arrivals for r in mailbox.deliver(request(client, number))]
    assert mailbox.finished
    return [(r.client, r.number) for r in out]


ALL = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


@given(st.permutations(ALL))
def test_round_robin_is_by_step_then_client_whatever_the_arrival(arrivals: list[tuple[int, int]]) -> None:
    assert released("round_robin", arrivals) == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (0, 3)]


@given(st.permutations(ALL))
def test_client_major_is_by_client(arrivals: list[tuple[int, int]]) -> None:
    assert released("client_major", arrivals) == ALL


@given(st.permutations(ALL))
def test_arrival_keeps_only_each_clients_own_order(arrivals: list[tuple[int, int]]) -> None:
    out = released("arrival", arrivals)
    assert sorted(out) == sorted(ALL)
    for client in (0, 1):
        assert [n for c, n in out if c == client] == sorted(n for c, n in ALL if c == client)


def test_arrival_releases_at_once_what_is_next_for_its_client() -> None:
    mailbox = Mailbox("arrival")
    mailbox.announce(PLANS, [0, 1, 2])
    assert [r.client for r in mailbox.deliver(request(1, 0))] == [1]
    assert mailbox.deliver(request(0, 1)) == []
    assert [r.number for r in mailbox.deliver(request(0, 0))] == [0, 1]


def test_the_ranking_orders_the_clients_within_a_step() -> None:
    assert released("round_robin", ALL, [1, 2, 0])[:3] == [(1, 0), (0, 0), (0, 1)]
    assert released("client_major", ALL, [1, 2, 0]) == ALL


@given(st.integers(1, 6), st.integers(0, 2**32), st.sampled_from(["round_robin", "client_major", "arrival"]))
def test_every_announced_request_is_released_once_in_every_round(clients: int, seed: int, order: str) -> None:
    chance = random.Random(seed)
    mailbox = Mailbox(order)
    for _ in range(3):
        plans = {c: sorted(chance.choices(range(5), k=chance.randrange(6))) for c in range(clients)}
        turns = [(c, n) for c in plans for n in range(len(plans[c]))]
        mailbox.announce(plans, list(plans))
        arrivals = chance.sample(turns, len(turns))
        out = [(r.client, r.number) for turn in arrivals for r in mailbox.deliver(request(*turn))]
        assert sorted(out) == turns
        assert mailbox.finished


def test_requests_that_were_not_announced_are_refused() -> None:
    mailbox = Mailbox("round_robin")
    mailbox.announce(PLANS, [0, 1, 2])
    with pytest.raises(RuntimeError, match="client 2 sent request 0"):
        mailbox.deliver(request(2, 0))
    mailbox.deliver(request(0, 3))
    with pytest.raises(RuntimeError, match="client 0 sent request 3"):
        mailbox.deliver(request(0, 3))
    with pytest.raises(RuntimeError, match="announced while"):
        mailbox.announce(PLANS, [0, 1, 2])
    assert mailbox.next_turns() == [(0, 0)]


# Clients that announce no steps, and their end instead


def last(client: int, number: int) -> Request:
    return Request(client, number, 0, End())


def opened(*others: int, order: str = "arrival") -> Mailbox:
    """A round of client 0, which is open, and of others with a request each."""
    mailbox = Mailbox(order)
    mailbox.announce({0: None, **{client: [0] for client in others}}, [0, *others])
    return mailbox


@given(st.data())
def test_open_clients_may_make_any_requests_and_others_what_they_announced(data: st.DataObject) -> None:
    mailbox = Mailbox("arrival")
    for _ in range(2):  # nothing of a round is left for the next
        counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
        is_open = [data.draw(st.booleans()) for _ in counts]
        sent = [request(client, number) for client, count in enumerate(counts) for number in range(count)]
        sent += [last(client, count) for client, count in enumerate(counts) if is_open[client]]
        plans = {client: None if is_open[client] else [0] * count for client, count in enumerate(counts)}
        mailbox.announce(plans, list(plans))
        out: list[Request] = []
        for each in data.draw(st.permutations(sent)):
            assert not mailbox.finished
            out += mailbox.deliver(each)
        assert mailbox.finished
        assert mailbox.next_turns() == []
        for client in plans:
            mine = [each.number for each in out if each.client == client]
            assert mine == list(range(counts[client] + is_open[client]))


def test_an_open_client_is_waited_for_until_its_end_has_its_turn() -> None:
    mailbox = opened()
    assert mailbox.next_turns() == [(0, 0)]
    assert [r.number for r in mailbox.deliver(request(0, 0))] == [0]
    assert not mailbox.finished
    assert mailbox.deliver(last(0, 2)) == []  # it has overtaken the one before
    assert not mailbox.finished
    assert mailbox.next_turns() == [(0, 1)]
    with pytest.raises(RuntimeError, match="announced while"):
        mailbox.announce({0: None}, [0])
    assert [r.number for r in mailbox.deliver(request(0, 1))] == [1, 2]
    assert mailbox.finished


def test_an_open_client_and_one_that_announced_do_not_wait_for_each_other() -> None:
    mailbox = opened(1)
    assert [r.client for r in mailbox.deliver(request(1, 0))] == [1]
    with pytest.raises(RuntimeError, match="client 1 sent request 1"):
        mailbox.deliver(request(1, 1))
    assert [r.client for r in mailbox.deliver(last(0, 0))] == [0]
    assert mailbox.finished


def test_a_request_that_comes_twice_is_refused() -> None:
    mailbox = opened()
    mailbox.deliver(request(0, 1))
    with pytest.raises(RuntimeError, match="client 0 sent request 1"):
        mailbox.deliver(request(0, 1))  # while it waits
    mailbox.deliver(request(0, 0))
    for number in (0, 1):
        with pytest.raises(RuntimeError, match=f"client 0 sent request {number}"):
            mailbox.deliver(request(0, number))  # after its turn
    mailbox.deliver(last(0, 2))
    with pytest.raises(RuntimeError, match="client 0 sent request 2"):
        mailbox.deliver(last(0, 2))


@pytest.mark.parametrize("body", [Align(), End()])
@pytest.mark.parametrize("overtakes", [False, True])
def test_a_request_behind_the_end_is_refused(body: Align | End, overtakes: bool) -> None:
    """Whichever comes first: else the round would wait for a turn that does not come."""
    mailbox = opened()
    arrivals = [last(0, 0), Request(0, 1, 0, body)]
    if overtakes:
        mailbox.deliver(arrivals.pop())
        with pytest.raises(RuntimeError, match="client 0 sent request 1, which is behind its end"):
            mailbox.deliver(arrivals.pop())
    else:
        mailbox.deliver(arrivals[0])
        with pytest.raises(RuntimeError, match="client 0 sent request 1, which it had not announced"):
            mailbox.deliver(arrivals[1])


@pytest.mark.parametrize("order", ["round_robin", "client_major"])
def test_an_open_client_has_no_place_in_an_order_by_step(order: str) -> None:
    with pytest.raises(RuntimeError, match=f"no place in {order}"):
        opened(order=order)


def test_what_travels_is_cut_off_its_graph() -> None:
    z = torch.ones(2, requires_grad=True) * 2
    push = Push(z, torch.zeros(2, dtype=torch.int64))
    assert not push.z.requires_grad
    assert push.z.data_ptr() == z.data_ptr()  # and not copied
