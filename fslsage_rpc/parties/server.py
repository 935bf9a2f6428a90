"""The server: lanes that train the server model, and the alignment of each client's auxiliary model."""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fslsage_rpc.device.clock import clock, cpu_clock, synchronise
from fslsage_rpc.device.memory import give_back_free_pages
from fslsage_rpc.device.streams import Place, current_place
from fslsage_rpc.errors import InputError
from fslsage_rpc.measure.activity import Activity
from fslsage_rpc.measure.phases import OF_LANES, Phase
from fslsage_rpc.measure.requests import ByClient, DeviceLog
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.measure.trace import Arrow
from fslsage_rpc.models.flat import Weights, flatten, load_mean
from fslsage_rpc.parties.alignment import Agreement, AuxiliaryFit, FitRecord, Target, cut_layer_gradient
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.requests import Align, Announced, Answer, End, Exchange, Push, Request, SmashedData
from fslsage_rpc.randomness import LocalStep

Reply = Callable[[Answer], None]

FITS_BETWEEN = 16
"""fits of auxiliary models, after which memory that they leave free is given back: each takes large blocks
for a while, and leaves small ones among them
"""


@dataclass
class Arrival:
    """When a request came, by the clock and as a place in a stream, and who is to have its answer."""

    seconds: float
    place: Place
    reply: Reply


@dataclass
class ServerReport:
    """What the server has to say of one round; `phases` are mean seconds per lane, and `alignment` those in
    which nothing but fits of auxiliary models ran.

    Likewise `cpu_seconds`, of its threads; of `alignment` the sum over all fits, which overlap. Of a GPU,
    empty on a CPU: `device_seconds`, as `cpu_seconds`; `requests`, their queue and compute seconds.
    """

    loss_sum: float
    samples: int
    phases: dict[str, float]
    alignments: list[dict[str, float]] = field(default_factory=list)
    drifts: list[dict[str, float]] = field(default_factory=list)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    device_seconds: dict[str, float] = field(default_factory=dict)
    requests: ByClient = field(default_factory=dict)


class Server:
    """Owns the server model and the alignment routine; an object that transports call into, from any thread.

    Args:
        initial: the client and (where the algorithm has one) auxiliary weights that every client starts from.
        averaged: the client model in which the averaged client weights are evaluated.
        lanes: per client the lane that takes its requests; clients may share one.
        fits: per client its auxiliary model, where the server aligns them.
        measure_drift: compare estimate and true gradient on every upload; may change between rounds.
        start: runs a piece of work, given its kind and the number of the lane or fit that it is of: see
            `World.start`.
        timeline: of the main thread, which averages.
    """

    def __init__(
        self,
        initial: tuple[Weights, Weights | None],
        averaged: nn.Module,
        lanes: Mapping[int, Lane],
        fits: Mapping[int, AuxiliaryFit],
        measure_drift: bool,
        device: torch.device,
        start: Callable[[str, int, Callable[[], None]], Any],
        timeline: Timeline,
    ):
        self.initial = initial
        self.averaged = averaged
        self.averaged_weights = flatten(averaged)
        self.lanes = lanes
        self.fits = fits
        self._distinct = list({id(lane): lane for lane in lanes.values()}.values())
        self.measure_drift = measure_drift
        self._device = device
        self._start = start
        self._arrived: dict[tuple[int, int], Arrival] = {}
        self._changed = threading.Condition()  # guards mailboxes, arrivals and the lanes' queues
        self._timeline = timeline
        self._failure: BaseException | None = None
        self._unfitted: set[int] = set()  # clients that are being aligned, from their turn on
        self._fits_made = itertools.count(1)
        self._activity = Activity()
        self._on_device = DeviceLog()
        self._round = 0
        self._plans: dict[int, Announced] = {}  # of participants, until all have announced theirs
        self._alignments: dict[int, FitRecord] = {}
        self._drifts: dict[int, Agreement] = {}

    def announce(self, round: int, plans: Mapping[int, Announced], ranking: Sequence[int]) -> None:
        """Some participants announce their requests; the round opens when all have.

        Args:
            round: its number, of which masks follow.
            ranking: all participants, in the order that the server takes them in within a step.
        """
        with self._changed:
            self._plans |= plans
            if len(self._plans) == len(ranking):
                for lane in self._distinct:
                    mine = {
                        client: steps for client, steps in self._plans.items() if self.lanes[client] is lane
                    }
                    lane.mailbox.announce(mine, ranking)
                self._round, self._plans = round, {}

    def submit(self, request: Request, reply: Reply) -> None:
        """Take in a request; `reply` is called with its answer, from some thread, once its turn is over."""
        try:
            with self._changed:
                lane = self.lanes[request.client]
                arrival = Arrival(clock(), current_place(self._device), reply)
                self._arrived[request.client, request.number] = arrival
                lane.released += lane.mailbox.deliver(request)
                idle = bool(lane.released) and not lane.busy
                lane.busy = lane.busy or idle
        except BaseException as error:
            self.fail(error)
            raise
        if idle:
            self._run("lane", lane.number, lambda: self._work(lane))

    def wait(self) -> None:
        """Return when every announced request of the round has been executed, on a GPU by the device.

        Raises:
            Exception: what a request raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._idle())
            if self._failure:
                raise self._failure
        synchronise(self._device)

    def average(self, shares: Mapping[int, float], auxiliaries: bool) -> None:
        """Replace replicas (and, if asked, auxiliary models) by their weighted means over the participants.

        Everyone, absent or not, goes on from the mean.
        """
        with self._timeline.phase(Phase.AVERAGING):
            if len(self._distinct) > 1:
                load_mean({client: lane.weights for client, lane in self.lanes.items()}, shares)
            if auxiliaries and self.fits:
                load_mean({client: fit.weights for client, fit in self.fits.items()}, shares)
            synchronise(self._device)

    def take_auxiliary(self, weights: Weights) -> None:
        """Every client's auxiliary model is fitted from these weights on."""
        for fit in self.fits.values():
            fit.weights.load(weights)

    def end_round(self) -> None:
        """Learning rates that follow the rounds move on."""
        for lane in self._distinct:
            lane.optimizer.end_round()
        for fit in self.fits.values():
            fit.optimizer.end_round()

    def halves(self) -> list[nn.Module]:
        """The whole model of the federation: the averaged client model and the (averaged) server model."""
        return [self.averaged, *(lane.model for lane in self._distinct[:1])]

    def finite(self) -> bool:
        """Are all weights of the server model finite? After averaging replicas are the same."""
        return all(lane.weights.finite() for lane in self._distinct[:1])

    def report(self, round_seconds: float) -> ServerReport:
        """The round that has just ended; the next one starts with empty counts."""
        lanes = [(lane.timeline.take(), *lane.losses.take()) for lane in self._distinct]
        phases = {
            name: sum(seconds.get(name, 0.0) for seconds, _, _ in lanes) / max(len(lanes), 1)
            for name in OF_LANES
        }
        phases[Phase.ALIGNMENT] = self._activity.take_fitting_alone()
        phases[Phase.AVERAGING] = self._timeline.take().get(Phase.AVERAGING, 0.0)
        phases["idle"] = round_seconds - sum(phases.values())
        drifts = [self._drifts[client].read() for client in sorted(self._drifts)]
        alignments = [self._alignments[client].read() for client in sorted(self._alignments)]
        report = ServerReport(
            loss_sum=sum(loss for _, loss, _ in lanes),
            samples=sum(samples for _, _, samples in lanes),
            phases=phases,
            alignments=[alignment for alignment in alignments if alignment],
            drifts=[drift for drift in drifts if drift],
            cpu_seconds=self._take_by_phase(Timeline.take_cpu_seconds),
            device_seconds=self._take_by_phase(Timeline.take_device_seconds),
            requests=self._on_device.take(),
        )
        self._alignments, self._drifts = {}, {}
        return report

    def state(self) -> dict[str, Any]:
        """Everything that stays from round to round; asked for between two of them."""
        return {
            "averaged": self.averaged_weights.state(),
            "lanes": [lane.state() for lane in self._distinct],
            "fits": {client: fit.state() for client, fit in self.fits.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.averaged_weights.load_state(state["averaged"])
        for lane, saved in zip(self._distinct, state["lanes"], strict=True):
            lane.load_state(saved)
        for client, fit in self.fits.items():
            with self.lanes[client].queue.after(current_place(self._device)):  # where its buffer grows
                fit.load_state(state["fits"][client])

    def _take_by_phase(self, take: Callable[[Timeline], dict[str, float]]) -> dict[str, float]:
        """Seconds of all timelines: of lanes their mean, of fits and of averaging their sum."""
        lanes = [take(lane.timeline) for lane in self._distinct]
        seconds = {
            name: sum(taken.get(name, 0.0) for taken in lanes) / len(lanes) for name in OF_LANES if any(lanes)
        }
        for timeline in (self._timeline, *(fit.timeline for fit in self.fits.values())):
            for name, taken in take(timeline).items():
                seconds[name] = seconds.get(name, 0.0) + taken
        return seconds

    def _execute(self, lane: Lane, request: Request) -> Any:
        """What the request asks for, or how to get at an alignment's targets; on the lane's turn, on one
        thread at a time per lane. On a GPU it is queued, not done, on return.
        """
        body = request.body.to(self._device)
        if isinstance(body, SmashedData):
            lane.queue.keep(body.z, body.y)
        arrow = Arrow("execution", request.client, request.number)
        at = self._local_step(request)
        fit = self.fits.get(request.client)
        match body:
            case Align():
                assert fit is not None, "the algorithm aligns nothing"
                if not len(fit.buffer):
                    raise InputError(
                        f"algorithm.name: got one that aligns client {request.client} when it has uploaded "
                        "nothing, expected a Push before the first Align"
                    )
                with lane.timeline.phase(Phase.TARGETS, arrow=arrow):
                    return self._targets(lane, fit, at)
            case Exchange():
                with lane.timeline.phase(Phase.STEP, arrow=arrow):
                    return lane.train(body.z, body.y, gradient=True, at=at)
            case Push():
                with lane.timeline.phase(Phase.STEP, arrow=arrow):
                    wanted = fit is not None and self.measure_drift
                    gradient = lane.train(body.z, body.y, gradient=wanted, at=at)
                    if fit is not None:
                        fit.buffer.add(body.z, body.y)
                if gradient is not None and fit is not None:
                    # The last fit of this client has been answered, so the device is through with it.
                    with lane.timeline.phase(Phase.DRIFT):
                        fit.masks.begin(at)
                        estimate = cut_layer_gradient(fit.model, body.z, body.y, fit.loss)
                        self._drifts.setdefault(request.client, Agreement()).add(estimate, gradient)
                return None
            case End():
                return None

    def _targets(self, lane: Lane, fit: AuxiliaryFit, at: LocalStep) -> Callable[[], list[Target]]:
        """An alignment's true gradients by the lane's model as it is now: computed on its snapshot when they
        are asked for, or else here and now.
        """
        snapshot = lane.snapshot
        if snapshot is None or not snapshot.take(lane.weights):
            targets = fit.targets(lane.model, at)
            return lambda: targets

        def compute() -> list[Target]:
            try:
                return fit.targets(snapshot.model, at)
            finally:
                snapshot.give_back()

        return compute

    def _fit(self, at: LocalStep, targets: Callable[[], list[Target]]) -> Weights:
        """The rest of an alignment, on a thread of its own: the lane goes on and clients are fitted side by
        side.
        """
        fit = self.fits[at.client]
        with fit.timeline.phase(Phase.ALIGNMENT):
            computed = targets()
            fit.queue.keep(*(tensor for target in computed for tensor in target))
            weights, self._alignments[at.client] = fit.fit(computed, at)
        return weights

    def _local_step(self, request: Request) -> LocalStep:
        """The local step that a request belongs to."""
        return LocalStep(self._round, request.client, request.step)

    def _idle(self) -> bool:
        return not self._unfitted and all(lane.mailbox.finished and not lane.busy for lane in self._distinct)

    def fail(self, error: BaseException) -> None:
        """End the round under way: `wait` raises this error, and no more requests are executed."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _run(self, kind: str, number: int, work: Callable[[], None]) -> None:
        """Start a piece of work whose failure ends the round."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.fail(error)
                raise

        self._start(kind, number, guarded)

    def _work(self, lane: Lane) -> None:
        """Execute what the lane's mailbox has released, until there is no more of it."""
        while True:
            with self._changed:
                if not lane.released or self._failure:
                    lane.busy = False
                    self._changed.notify_all()
                    return
                request = lane.released.popleft()
                arrival = self._arrived.pop((request.client, request.number))
            with lane.queue.after(arrival.place):
                started, cpu_started, began = clock(), cpu_clock(), current_place(self._device)
                with self._activity.of("lane"):
                    value = self._execute(lane, request)
                ended = current_place(self._device)
                self._on_device.add(request.client, request.body.kind, arrival.place, began, ended)
                answer = Answer(
                    value, started - arrival.seconds, clock() - started, cpu_clock() - cpu_started
                )
                match request.body:
                    case Align():
                        self._begin_fit(self._local_step(request), answer, ended, arrival.reply)
                    case Push() | End():  # frees an upload's place in the window
                        self._answer_once_done("lane", lane.number, lane.queue.end(), answer, arrival.reply)
                    case Exchange():
                        arrival.reply(answer)

    def _answer_once_done(self, kind: str, number: int, end: Place, answer: Answer, reply: Reply) -> None:
        """Answer when the device, too, has come to the end of the work: nothing waits for it before."""
        if end is None:
            reply(answer)
            return
        queued = clock()

        def work() -> None:
            end.synchronize()
            reply(replace(answer, compute_seconds=answer.compute_seconds + clock() - queued))

        self._run(f"answers of a {kind}", number, work)

    def _begin_fit(self, at: LocalStep, targets: Answer, place: Place, reply: Reply) -> None:
        """Have the client's model fitted behind its turn's place, and answered, by another thread."""
        waiting, client, fit = clock(), at.client, self.fits[at.client]

        def work() -> None:
            started, cpu_started = clock(), cpu_clock()
            with fit.queue.after(place):
                began = current_place(self._device)
                with self._activity.of("fit"):
                    weights = self._fit(at, targets.value)
                self._on_device.add(client, Align.kind, place, began, current_place(self._device))
                answer = Answer(
                    weights,
                    targets.queue_seconds + started - waiting,
                    targets.compute_seconds + clock() - started,
                    targets.cpu_seconds + cpu_clock() - cpu_started,
                )
                self._answer_once_done("fit", client, fit.queue.end(), answer, reply)
            if next(self._fits_made) % FITS_BETWEEN == 0:
                give_back_free_pages()
            with self._changed:
                self._unfitted.remove(client)
                self._changed.notify_all()

        with self._changed:
            self._unfitted.add(client)
        self._run("fit", client, work)
