"""What a rank lets in never waits for what it keeps out, however its clients' requests fall."""

import random
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from fslsage_rpc.parties import turns
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.mailbox import Mailbox
from fslsage_rpc.parties.requests import BeginStep, ClientRound, Exchange, Push, Request
from fslsage_rpc.parties.scheduler import Scheduler

Plan = dict[int, tuple[bool, ...]]
"""per step, for each of its requests: does its client wait for the answer?"""

PLANS = st.dictionaries(
    st.integers(0, 5), st.sampled_from([(False,), (True,), (False, True)]), max_size=4
).map(lambda steps: dict(sorted(steps.items())))


def client_round(plan: Plan) -> ClientRound:
    for step, requests in plan.items():
        yield BeginStep(step)
        for waits in requests:
            yield (Exchange if waits else Push)(torch.zeros(1), torch.zeros(1))


class Replies:
    """In place of the scheduler's queue: who waits has the server answer its next request; there must be
    one.
    """

    def __init__(self, mailbox: Mailbox, draw: random.Random):
        self.mailbox, self.draw = mailbox, draw
        self.released: deque[Request] = deque()
        self.on_answer: dict[tuple[int, int], Callable[[Callable[[], Any]], None]] = {}
        self.there: deque[Any] = deque()

    def send(self, request: Request, on_answer: Callable[[Callable[[], Any]], None]) -> None:
        self.on_answer[request.client, request.number] = on_answer
        self.released += self.mailbox.deliver(request)
        while self.released and self.draw.random() < 0.3:
            self.answer()

    def answer(self) -> None:
        assert self.released, f"the server waits for {self.mailbox.next_turns()}, which wait for others"
        request = self.released.popleft()
        self.on_answer[request.client, request.number](lambda: None)

    def put(self, reply: Any) -> None:
        self.there.append(reply)

    def empty(self) -> bool:
        return not self.there

    def get(self) -> Any:
        if self.empty():
            self.answer()
        return self.there.popleft()


@given(
    plans=st.lists(PLANS, min_size=1, max_size=6),
    order=st.sampled_from(["round_robin", "client_major", "arrival"]),
    window=st.integers(1, 3),
    most_open=st.integers(1, 4),
    draw=st.randoms(use_true_random=False),
)
def test_every_round_ends(
    plans: list[Plan], order: str, window: int, most_open: int, draw: random.Random
) -> None:
    clients = list(range(len(plans)))
    ranking = clients if order == "client_major" else draw.sample(clients, len(clients))
    mailbox = Mailbox(order)
    steps = {client: [step for step, kinds in plans[client].items() for _ in kinds] for client in clients}
    mailbox.announce(steps, ranking)
    replies = Replies(mailbox, draw)
    with patch.object(turns, "MOST_OPEN_STEPS", most_open):
        scheduler = Scheduler(replies.send, window, order == "client_major", Context())
    with patch.object(scheduler, "_replies", replies):
        scheduler.run({client: client_round(plans[client]) for client in ranking})
    assert mailbox.finished
