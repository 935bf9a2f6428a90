"""Signs of life, period by period: on a clock that tests advance, with the job's store in memory.

All ranks are in this process. Nobody sleeps; a process that ends raises `Left`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest
from torch.distributed import DistNetworkError, HashStore

import fslsage_rpc
from fslsage_rpc.job.regroup import LEFT_BEHIND, Regroup
from fslsage_rpc.job.roll_call import FAILURE, Presence, claim_failure
from fslsage_rpc.job.signs_of_life import (
    CONNECTING_SECONDS,
    GRACE_SECONDS,
    PERIOD_SECONDS,
    Clock,
    EndTheJob,
    Policy,
    SignsOfLife,
)

Answer = TypeVar("Answer")

TIMEOUT_SECONDS = 5.0
AGES = 1e6
DIED = "its process has died"


class Left(BaseException):
    """A process has ended with this status."""


class NoAnswer(BaseException):
    """A question has not been answered in time."""


class Advanced(Clock):
    """A clock that stands still until it is advanced; alarms then act in their order, on the same thread."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._alarms: list[tuple[float, Callable[[], None]]] = []

    def now(self) -> float:
        return self._now

    def wait(self, seconds: float, happening: threading.Event | threading.Condition | None = None) -> None:
        end = self._now + seconds
        while due := [alarm for alarm in self._alarms if alarm[0] <= end]:
            first = min(due, key=lambda alarm: alarm[0])
            self._alarms.remove(first)
            self._now, act = first
            act()
        self._now = end

    @contextmanager
    def alarm(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        alarm = (self._now + seconds, action)
        self._alarms.append(alarm)
        try:
            yield
        finally:
            with suppress(ValueError):
                self._alarms.remove(alarm)

    def within(self, seconds: float, question: Callable[[], Answer]) -> Answer | None:
        def interrupt() -> None:
            raise NoAnswer

        try:
            with self.alarm(seconds, interrupt):
                return question()
        except (NoAnswer, RuntimeError):
            return None


class MemoryStore(HashStore):
    """A store that may be gone, or silent: then whoever asks it waits."""

    def __init__(self, clock: Clock):
        super().__init__()
        self._clock = clock
        self.gone = self.silent = False

    def _answer(self) -> None:
        if self.gone:
            raise DistNetworkError("Connection reset by peer")
        if self.silent:
            self._clock.wait(AGES)

    def set(self, key: str, value: str) -> None:
        self._answer()
        super().set(key, value)

    def get(self, key: str) -> bytes:
        self._answer()
        return super().get(key)

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return super().check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._answer()
        return super().compare_set(key, expected, desired)


@dataclass(frozen=True)
class Process(Presence):
    """A process that has ended when it is among these."""

    dead: set[int] = field(default_factory=set)

    def has_ended(self, machine: str | None) -> bool:
        return machine == self.machine and self.rank in self.dead


class Job:
    """Ranks with a clock and a store of their own; two clients on one host, the server and a third on
    another.
    """

    def __init__(self) -> None:
        self.clock = Advanced()
        self.store = MemoryStore(self.clock)
        self.dead: set[int] = set()
        self.here = [Process(rank, host, 0, host, "cpu", dead=self.dead) for rank, host in enumerate("abba")]
        self.signs: dict[int, SignsOfLife] = {}

    def add(self, rank: int, policy: Policy) -> None:
        """A process with this number, in place of the one before."""

        def leave(status: int) -> NoReturn:
            raise Left(status)

        self.signs[rank] = SignsOfLife(
            self.store, self.here[rank], TIMEOUT_SECONDS, lambda: "round 3", policy, leave, self.clock
        )

    def beat(self, *ranks: int) -> None:
        """Let these ranks give a sign of life and look around."""
        for rank in ranks:
            self.signs[rank].period()

    def pass_time(self, seconds: float, *ranks: int) -> None:
        """Let these ranks live for so long."""
        end = self.clock.now() + seconds
        while self.clock.now() < end:
            self.beat(*ranks)
            self.clock.wait(self.signs[ranks[0]].policy.period_seconds)

    @property
    def claimed(self) -> bool:
        """Has a rank reported a failure?"""
        return self.store.check([FAILURE])


def assert_claims(signs: SignsOfLife) -> None:
    assert signs.claim()


def fixed_job(launcher_hosts_store: bool = False) -> Job:
    """A job that ends with its first loss, begun."""
    job = Job()
    for rank in range(4):
        job.add(rank, EndTheJob(job.here, launcher_hosts_store))
    job.pass_time(PERIOD_SECONDS, 0, 1, 2, 3)
    return job


@pytest.fixture
def job() -> Job:
    """A job that ends with its first loss, begun."""
    return fixed_job()


Says = Callable[[Callable[[], object]], str]


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Run an action that ends its process, and return the line that it prints."""

    def says(action: Callable[[], object]) -> str:
        with pytest.raises(Left) as left:
            action()
        assert left.value.args == (1,)
        return capsys.readouterr().err.removeprefix("fslsage_rpc: ").removesuffix("\n")

    return says


def test_a_rank_that_is_silent_for_the_timeout_ends_the_job(job: Job, says: Says) -> None:
    job.pass_time(TIMEOUT_SECONDS, 0, 1, 3)
    said = says(lambda: job.pass_time(1.5 * PERIOD_SECONDS, 0, 1, 3))
    assert said == "rank 2 (clients, host b) was lost in round 3: no sign of life for 5 s"
    assert job.store.get(FAILURE) == b"0"
    assert says(job.signs[1].period) == says(job.signs[3].period) == ""


def test_all_watch_the_server_and_only_it(job: Job, says: Says) -> None:
    job.pass_time(3 * TIMEOUT_SECONDS, 0, 1, 2, 3)
    said = says(lambda: job.pass_time(TIMEOUT_SECONDS + 1.5 * PERIOD_SECONDS, 1))
    assert said == "rank 0 (server, host a) was lost in round 3: no sign of life for 5 s"


def test_a_rank_that_is_slow_but_beats_is_left_alone(job: Job) -> None:
    for _ in range(10):
        job.pass_time(TIMEOUT_SECONDS - PERIOD_SECONDS, 0, 1, 3)
        job.signs[2].period()


def test_the_end_of_a_process_is_seen_at_once_by_the_ranks_of_its_host(job: Job, says: Says) -> None:
    job.dead.add(1)
    for rank in (0, 3):
        job.signs[rank].period()
    said = says(job.signs[2].period)
    assert said == "rank 1 (clients, host b) was lost in round 3: its process has ended"
    assert says(job.signs[0].period) == ""


def test_the_first_to_claim_prints_and_no_other(job: Job, says: Says) -> None:
    assert says(lambda: job.signs[2].end("first")) == "first"
    assert says(lambda: job.signs[1].end("second")) == ""
    assert not job.signs[3].claim()


def test_a_claim_ends_the_others_silently(job: Job, says: Says) -> None:
    assert job.signs[1].claim()
    assert says(job.signs[0].period) == says(job.signs[2].period) == ""


def test_a_rank_whose_main_thread_ends_it_gives_signs_of_life_until_then(job: Job) -> None:
    assert job.signs[1].claim()
    before = job.store.get("beat/1")
    job.dead.add(2)
    job.signs[1].period()
    assert job.store.get("beat/1") != before
    job.signs[1].end("too late")


def test_a_rank_that_has_claimed_is_not_taken_for_another_before_it_has_spoken(job: Job) -> None:
    with pytest.raises(Left):
        job.signs[1].end("first")
    job.signs[1].leave_if_claimed()


GONE = "rank 0 (server, host a) was lost in round 3: the job's store, which is there, is gone"


def test_without_a_store_the_first_rank_of_each_host_speaks(job: Job, says: Says) -> None:
    job.store.gone = True
    assert says(job.signs[1].period) == says(job.signs[3].period) == GONE
    assert says(job.signs[2].period) == ""


def test_where_the_store_went_with_the_servers_process_that_is_said(job: Job, says: Says) -> None:
    job.store.gone = True
    job.dead.add(0)
    assert says(job.signs[1].period) == GONE
    assert says(job.signs[3].period) == "rank 0 (server, host a) was lost in round 3: its process has ended"


def test_a_store_in_the_launcher_is_not_the_servers(says: Says) -> None:
    job = fixed_job(launcher_hosts_store=True)
    job.store.gone = True
    said = says(job.signs[1].period)
    assert said == (
        "rank 1 (clients, host b) lost its launcher in round 3: the job's store, which is there, is gone"
    )


def test_a_silent_store_ends_a_rank_whose_thread_waits_in_it(job: Job, says: Says) -> None:
    job.store.silent = True
    begun = job.clock.now()
    said = says(job.signs[1].period)
    assert said == GONE.replace("is gone", "has not answered for 5 s")
    assert job.clock.now() == begun + TIMEOUT_SECONDS + GRACE_SECONDS
    assert says(job.signs[2].period) == ""


def test_a_silent_store_keeps_no_main_thread_from_its_end(job: Job) -> None:
    job.store.silent = True
    begun = job.clock.now()
    assert job.signs[1].claim()
    assert not job.signs[2].claim()
    assert job.clock.now() == begun + 2 * GRACE_SECONDS


def test_ranks_that_do_not_reach_each_other_in_time_end_the_job(job: Job, says: Says) -> None:
    with job.signs[1].expects_connections(CONNECTING_SECONDS / 2):
        job.clock.wait(CONNECTING_SECONDS - 1)
        said = says(lambda: job.clock.wait(1))
    assert said.startswith("rank 1 (clients, host b) could not connect to all other ranks within 30 s: is")
    with job.signs[2].expects_connections(CONNECTING_SECONDS):
        pass
    job.clock.wait(AGES)


def test_a_lost_connection_is_explained_by_a_process_that_has_ended(job: Job) -> None:
    job.dead.add(1)
    said = job.signs[2].policy.explain_loss("eof")
    assert said == "rank 1 (clients, host b) was lost in round 3: its process has ended"


def test_a_lost_connection_is_explained_by_silence(job: Job) -> None:
    with job.clock.alarm(1.0, lambda: job.beat(0, 1, 3)):
        said = job.signs[1].policy.explain_loss("eof")
    assert said == "rank 2 (clients, host b) was lost in round 3: eof; no sign of life for 3 s"


def test_a_lost_connection_between_ranks_that_live_is_the_networks(job: Job) -> None:
    with job.clock.alarm(1.0, lambda: job.beat(0, 1, 2, 3)):
        said = job.signs[1].policy.explain_loss("eof")
    assert said == (
        "rank 1 (clients, host b) lost a connection in round 3: eof; all ranks still give signs of life, "
        "so it is the network between them"
    )


def test_a_lost_connection_is_explained_by_the_rank_at_fault_if_it_can(job: Job, says: Says) -> None:
    with job.clock.alarm(1.0, lambda: assert_claims(job.signs[3])):
        assert says(lambda: job.signs[1].policy.explain_loss("eof")) == ""


def test_a_lost_connection_is_explained_by_a_store_that_is_silent(job: Job) -> None:
    job.store.silent = True
    said = job.signs[2].policy.explain_loss("eof")
    assert said == GONE.replace("is gone", f"has not answered for {TIMEOUT_SECONDS:g} s")


def test_while_one_thread_ends_the_process_no_other_gets_a_word(job: Job) -> None:
    """Rank 0 may host the store: then its process lives on for a while after it has spoken."""
    others: list[bool] = []

    def leave(status: int) -> NoReturn:
        asking = threading.Thread(target=lambda: others.append(job.signs[0]._ends.acquire(blocking=False)))
        asking.start()
        asking.join()
        raise Left(status)

    job.signs[0]._leave = leave
    with pytest.raises(Left):
        job.signs[0].end("first")
    assert others == [False]


def test_a_lost_connection_is_explained_by_a_store_that_is_gone(job: Job) -> None:
    job.store.gone = True
    assert job.signs[2].policy.explain_loss("eof") == GONE


def test_the_thread_ends_before_the_store_does(job: Job) -> None:
    job.signs[1].clock = Clock()
    job.signs[1].start()
    job.signs[1].stop()
    assert job.store.get("beat/1").endswith(b" round 3")
    assert not job.signs[1]._thread.is_alive()


def test_time_as_it_passes() -> None:
    clock, rung = Clock(), threading.Event()
    with clock.alarm(0.0, rung.set):
        assert rung.wait(10)
    with clock.alarm(AGES, rung.clear):
        pass
    assert clock.within(10, lambda: "answer") == "answer"
    forever = threading.Event()
    assert clock.within(0.0, forever.wait) is None
    forever.set()

    def gone() -> str:
        raise DistNetworkError("gone")

    assert clock.within(10, gone) is None


def test_what_only_lost_clients_need_is_imported_in_one_place() -> None:
    package = Path(fslsage_rpc.__file__).parent
    for module, importer in (("regroup", "elastic_world.py"), ("elastic_world", "opening.py")):
        importers = [it for it in package.rglob("*.py") if f"fslsage_rpc.job.{module} " in it.read_text()]
        assert importers == [package / "job" / importer]


class ElasticJob(Job):
    """A job that goes on without the lost, in its first generation; at least two clients make it up."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts = [0] * 4
        self.policies: dict[int, Regroup] = {}
        for number in range(4):
            self.begin(number)
        self.policies[0].first()
        self.pass_time(0.25, 0, 1, 2, 3)
        self.enter()

    def begin(self, number: int) -> None:
        """A process with this number, in place of the one before."""

        def cut() -> None:
            self.cuts[number] += 1

        def too_few(numbers: list[int]) -> str | None:
            return "too few" if len(numbers) < 3 else None

        self.policies[number] = Regroup(4, cut, too_few)
        self.add(number, self.policies[number])

    def enter(self, *numbers: int) -> None:
        """These processes, or all, come to their newest generation."""
        for number in numbers or range(4):
            newest = self.policies[number].await_next(-1)
            assert newest
            self.policies[number].enter(newest)

    def newest(self, number: int) -> tuple[int, list[int]]:
        """The number and members of the generation that this process knows of."""
        generation = self.policies[number].await_next(-1)
        assert generation
        return generation.number, list(generation.members)


@pytest.fixture
def elastic() -> ElasticJob:
    """A job that goes on without the lost, in its first generation."""
    return ElasticJob()


def test_a_reported_loss_begins_a_new_generation_when_it_has_settled(elastic: ElasticJob) -> None:
    server = elastic.policies[0]
    elastic.pass_time(1, 0, 1, 2, 3)
    began = elastic.clock.now()
    server.lose(2, 0, DIED)
    assert elastic.signs[0].wake.is_set()
    elastic.pass_time(0.5, 0, 1, 3)
    assert elastic.newest(0) == elastic.newest(1) == (0, [0, 1, 2, 3])
    elastic.pass_time(0.25, 0, 1, 3)
    assert elastic.newest(0) == elastic.newest(1) == elastic.newest(3) == (1, [0, 1, 3])
    assert server.began == began
    assert server.take_changes() == [(2, DIED)]
    assert server.take_changes() == []
    assert server.is_over(0)
    assert not server.has(2, elastic.policies[2].identity)


def test_losses_within_half_a_second_are_one(elastic: ElasticJob) -> None:
    elastic.policies[0].lose(2, 0, DIED)
    elastic.pass_time(0.25, 0, 1, 3)
    elastic.policies[0].lose(3, 0, DIED)
    elastic.pass_time(2, 0, 1)
    assert elastic.newest(1)[0] == elastic.newest(0)[0] - 1  # too few are left, which rank 0 alone knows
    assert elastic.newest(0) == (1, [0, 1])
    assert elastic.policies[0].take_changes() == [(2, DIED), (3, DIED)]


def test_a_loss_counts_in_its_own_generation_only(elastic: ElasticJob) -> None:
    elastic.policies[0].lose(2, 0, DIED)
    elastic.pass_time(1, 0, 1, 3)
    elastic.policies[0].lose(3, 0, "its connection was cut with the generation")
    elastic.pass_time(1, 0, 1, 3)
    assert elastic.newest(0) == (1, [0, 1, 3])


def test_a_rank_that_has_said_why_it_leaves_is_quoted(elastic: ElasticJob) -> None:
    elastic.store.set("left/2", "ZeroDivisionError")
    elastic.policies[0].lose(2, 0, DIED)
    elastic.pass_time(1, 0, 1, 3)
    assert elastic.policies[0].take_changes() == [(2, "ZeroDivisionError")]


def test_a_silent_rank_is_lost_after_the_timeout(elastic: ElasticJob) -> None:
    elastic.pass_time(TIMEOUT_SECONDS, 0, 1, 3)
    assert elastic.newest(0)[0] == 0
    elastic.pass_time(1.5, 0, 1, 3)
    assert elastic.newest(0) == (1, [0, 1, 3])
    assert elastic.policies[0].take_changes() == [(2, "no sign of life for 5 s")]
    elastic.pass_time(3 * TIMEOUT_SECONDS, 0, 1, 3)
    assert elastic.newest(0)[0] == 1


def test_while_ranks_meet_the_server_is_less_patient_and_the_others_are_not(elastic: ElasticJob) -> None:
    with elastic.policies[0].impatience(2), elastic.policies[1].impatience(2):
        elastic.pass_time(3.5, 0, 1, 3)
        assert elastic.policies[0].take_changes() == [(2, "no sign of life for 2 s")]
        elastic.pass_time(TIMEOUT_SECONDS, 1)
    assert elastic.signs[0].silence_seconds == TIMEOUT_SECONDS


def test_connections_are_cut_until_the_main_thread_has_left_the_generation(elastic: ElasticJob) -> None:
    elastic.pass_time(2, 0, 1, 2, 3)
    before = elastic.cuts.copy()
    elastic.policies[0].lose(2, 0, DIED)
    elastic.pass_time(2, 0, 1, 3)
    cuts = elastic.cuts.copy()
    assert cuts[0] > before[0] + 2
    assert cuts[1] > before[1] + 2
    assert cuts[2] == before[2]
    elastic.enter(0, 1)
    elastic.pass_time(2, 0, 1, 3)
    assert elastic.cuts[:2] == cuts[:2]
    assert elastic.cuts[3] > cuts[3]


def lose_rank_2(elastic: ElasticJob) -> None:
    elastic.policies[0].lose(2, 0, DIED)
    elastic.pass_time(1, 0, 1, 3)
    elastic.policies[0].take_changes()


def test_a_newcomer_is_let_in_while_it_is_alive(elastic: ElasticJob) -> None:
    lose_rank_2(elastic)
    elastic.begin(2)
    done: list[str] = []

    def admit() -> None:
        elastic.policies[0].admit(lambda: done.append("before"))

    elastic.pass_time(1, 0, 1, 3)
    admit()  # it has given no sign of life yet: what is there is its predecessor's
    assert (done, elastic.newest(0)[0]) == ([], 1)
    elastic.pass_time(1, 0, 1, 2, 3)
    elastic.pass_time(4, 0, 1, 3)
    admit()  # its last one is too old
    assert (done, elastic.newest(0)[0]) == ([], 1)
    elastic.pass_time(1, 0, 1, 2, 3)
    admit()
    admit()  # once
    assert (done, elastic.newest(0)) == (["before"], (2, [0, 1, 2, 3]))
    assert elastic.policies[0].take_changes() == [(2, None)]
    elastic.pass_time(2 * TIMEOUT_SECONDS, 0, 1, 2, 3)
    assert elastic.newest(1) == elastic.newest(2) == (2, [0, 1, 2, 3])
    assert elastic.policies[0].has(2, elastic.policies[2].identity)


def test_a_member_that_was_started_again_is_lost_and_a_newcomer(elastic: ElasticJob) -> None:
    elastic.begin(2)
    elastic.pass_time(1, 0, 1, 2, 3)
    assert elastic.newest(0) == (1, [0, 1, 3])
    assert elastic.policies[0].take_changes() == [(2, "another process has taken its place")]
    elastic.policies[0].admit(lambda: None)
    assert elastic.newest(0) == (2, [0, 1, 2, 3])


def test_nobody_is_let_in_while_a_loss_settles(elastic: ElasticJob) -> None:
    lose_rank_2(elastic)
    elastic.begin(2)
    elastic.pass_time(1, 0, 1, 2, 3)
    elastic.policies[0].lose(3, 1, DIED)
    elastic.policies[0].admit(lambda: None)
    assert elastic.newest(0)[0] == 1


def test_a_process_that_was_stopped_and_goes_on_is_told_that_it_was_left_behind(
    elastic: ElasticJob, says: Says
) -> None:
    elastic.pass_time(TIMEOUT_SECONDS + 1.5, 0, 1, 3)
    assert says(elastic.signs[2].period) == f"rank 2: {LEFT_BEHIND}"
    elastic.pass_time(1, 0, 1, 3)
    elastic.policies[0].admit(lambda: None)
    assert elastic.newest(0) == (1, [0, 1, 3])
    assert not elastic.claimed


def test_so_is_one_that_wakes_to_a_late_alarm(elastic: ElasticJob, says: Says) -> None:
    lose_rank_2(elastic)
    assert says(lambda: elastic.signs[2].end("rank 0 has not answered")) == f"rank 2: {LEFT_BEHIND}"
    assert not elastic.claimed
    elastic.signs[2].period()  # its thread, which has woken too, adds nothing


def test_a_newcomers_end_is_nobody_elses(elastic: ElasticJob, says: Says) -> None:
    lose_rank_2(elastic)
    elastic.begin(2)
    elastic.pass_time(1, 0, 1, 2, 3)
    assert says(lambda: elastic.signs[2].end("rank 2: a late alarm")) == "rank 2: a late alarm"
    assert not elastic.claimed


def test_too_few_clients_are_known_to_the_server_which_says_so(elastic: ElasticJob) -> None:
    elastic.policies[0].lose(2, 0, DIED)
    elastic.policies[0].lose(3, 0, "no sign of life")
    elastic.pass_time(1, 0, 1)
    newest = elastic.policies[0].await_next(0)
    assert newest
    assert newest.too_few == f"too few (rank 2 is lost: {DIED}, rank 3 is lost: no sign of life)"
    assert elastic.newest(1)[0] == 0


def test_the_servers_end_is_everybodys(
    elastic: ElasticJob, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    elastic.store.gone = True
    said = "rank 0 is gone, and the job's store with it (DistNetworkError)"
    assert says(elastic.signs[1].period) == f"rank 1: {said}"
    assert says(elastic.signs[2].period) == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert says(elastic.signs[3].period) == f"rank 3: {said}"


def test_so_is_its_silence(elastic: ElasticJob, says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    said = says(lambda: elastic.pass_time(TIMEOUT_SECONDS + 1, 1, 2, 3))
    assert said == "rank 1: rank 0: no sign of life for 5 s"
    assert says(elastic.signs[2].period) == ""


def test_and_the_stores(elastic: ElasticJob, says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    elastic.store.silent = True
    said = says(elastic.signs[1].period)
    assert said == "rank 1: rank 0, with the job's store, has not answered for 5 s"
    assert says(elastic.signs[2].period) == ""


def test_a_claimed_failure_ends_all_generations(elastic: ElasticJob, says: Says) -> None:
    assert claim_failure(elastic.store, 0)
    assert says(elastic.signs[1].period) == says(elastic.signs[2].period) == ""


def test_when_the_run_is_over_nobody_is_lost_by_leaving(elastic: ElasticJob) -> None:
    server = elastic.policies[0]
    server.lose(3, 0, DIED)
    server.end_run()
    server.lose(2, 0, DIED)
    elastic.pass_time(2 * TIMEOUT_SECONDS, 0, 1)
    assert elastic.newest(0)[0] == 0
    assert elastic.policies[1].run_over()
    assert server.await_next(0) is elastic.policies[1].await_next(0) is None


def test_what_is_awaited_may_not_come(elastic: ElasticJob) -> None:
    begun = elastic.clock.now()
    assert elastic.policies[1].await_next(0, 3.0) is None
    assert elastic.clock.now() == begun + 3.0


def test_a_connection_lost_for_good_is_explained_by_who_was_lost(elastic: ElasticJob) -> None:
    server = elastic.policies[0]
    server.lose(2, 0, DIED)
    elastic.pass_time(1, 0, 1, 3)
    assert server.explain_loss("eof") == f"rank 2 was lost ({DIED}) in round 3: the run ends"
    elastic.enter(1)
    assert elastic.policies[1].explain_loss("eof") == (
        "rank 1 (clients, host b) lost a connection in round 3, and no rank that was lost: eof"
    )
