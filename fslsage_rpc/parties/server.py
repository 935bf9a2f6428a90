"""The server: lanes that train the server model, and the alignment of each client's auxiliary model."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from fslsage_rpc.config.schema import AggregationKeys
from fslsage_rpc.device.clock import synchronise_stream
from fslsage_rpc.device.streams import current_place
from fslsage_rpc.errors import InputError
from fslsage_rpc.measure.phases import OF_LANES, Phase
from fslsage_rpc.measure.request_times import ByClient
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.aggregation import Aggregator
from fslsage_rpc.parties.alignment import Alignment, AlignmentBehind
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.coding import Coded
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.crew import Crew, Execution, Reply, Start
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.requests import (
    Align,
    Announced,
    Answer,
    BeginAlignment,
    Collect,
    End,
    Exchange,
    Push,
    Request,
)
from fslsage_rpc.randomness import LocalStep


@dataclass
class ServerReport:
    """What the server has to say of one round; `phases` are mean seconds per lane, and `alignment` those in
    which nothing but fits of auxiliary models ran.

    Likewise `cpu_seconds`, of its threads; of `alignment`, and of codecs in fits, sums over all fits, which
    overlap. Of a GPU, empty on a CPU: `device_seconds`, as `cpu_seconds`; `requests`, their queue and compute
    seconds.
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
        start: see `World.start`.
        context: whose timeline is that of the main thread, which averages.
        replicas: of the lanes' models, where each client has its own.
    """

    def __init__(
        self,
        initial: tuple[Weights, Weights | None],
        averaged: nn.Module,
        lanes: Mapping[int, Lane],
        fits: Mapping[int, AuxiliaryFit],
        measure_drift: bool,
        start: Start,
        context: Context,
        replicas: Aggregator | None = None,
    ):
        self.initial = initial
        self.averaged = averaged
        self.averaged_weights = flatten(averaged)
        self.lanes = lanes
        self.fits = fits
        self._replicas = replicas
        self.measure_drift = measure_drift
        self._distinct = list({id(lane): lane for lane in lanes.values()}.values())
        self._device, self._timeline, self._codings = context.device, context.timeline, context.codings
        self._crew = Crew(start, context.device)
        self._arrived: dict[tuple[int, int], Execution] = {}
        self._round = 0
        self._plans: dict[int, Announced] = {}  # of participants, until all have announced theirs
        self._behind: dict[int, AlignmentBehind] = {}  # by client, from their turn until they are taken up
        self._to_resume: list[AlignmentBehind] = []  # of a checkpoint
        self._collecting: set[int] = set()  # clients that have yet to collect in this round
        self._handed_out: dict[int, int] = {}  # by client: from its request of this number on it is in use

    def announce(
        self,
        t: int,
        plans: Mapping[int, Announced],
        ranking: Sequence[int],
        collecting: Collection[int] = (),
    ) -> None:
        """Some participants announce their requests; the round opens when all have.

        Args:
            t: its number, of which masks follow.
            ranking: all participants, in the order that the server takes them in within a step.
            collecting: those of them that will collect a fitted auxiliary model.
        """
        with self._crew.changed:
            self._collecting |= set(collecting)
            self._plans |= plans
            if len(self._plans) == len(ranking):
                for lane in self._distinct:
                    mine = {
                        client: steps for client, steps in self._plans.items() if self.lanes[client] is lane
                    }
                    lane.mailbox.announce(mine, ranking)
                self._round, self._plans = t, {}

    def submit(self, request: Request, reply: Reply) -> None:
        """Take in a request; `reply` is called with its answer, from some thread, once its turn is over."""
        if isinstance(request.body, Collect):
            self._collect(request, reply)
            return
        try:
            with self._crew.changed:
                lane = self.lanes[request.client]
                at = LocalStep(self._round, request.client, request.step)
                self._arrived[request.client, request.number] = Execution(request, at, reply, self._crew)
                lane.released += lane.mailbox.deliver(request)
                idle = bool(lane.released) and not lane.busy
                lane.busy = lane.busy or idle
        except BaseException as error:
            self.fail(error)
            raise
        if idle:
            self._crew.run("lane", lane.number, lambda: self._work(lane))

    def wait(self) -> None:
        """Return when every announced request of the round has been executed, on a GPU by the device.

        Raises:
            Exception: what a request raised.
        """
        with self._crew.changed:
            self._crew.changed.wait_for(lambda: self._crew.failure or self._idle())
            if self._crew.failure:
                raise self._crew.failure
        for lane in self._distinct:
            lane.context.queue.wait()
        for client in list(self._handed_out):
            self._take_up(client)

    def rest(self) -> None:
        """Between two rounds no fit computes: what is done off the clock has nothing beside it, and a fit
        gains nothing by it. On return none does.
        """
        self._crew.activity.rest()

    def go_on(self) -> None:
        """A round begins: fits go on, those too that a checkpoint was made in the middle of."""
        self._crew.activity.go_on()
        while self._to_resume:
            self._to_resume.pop(0).run()

    def close(self) -> None:
        """No more rounds: fits that nobody will collect are abandoned."""
        self._crew.activity.end()

    def average(self, shares: Mapping[int, float], auxiliaries: bool) -> None:
        """Aggregate replicas, and replace auxiliary models, if asked, by their weighted mean over the
        participants.
        """
        with self._crew.activity.of("lane"), self._timeline.phase(Phase.AVERAGING):
            if self._replicas:
                self._replicas.aggregate(shares)
            if auxiliaries and self.fits:
                weights = {client: fit.weights for client, fit in self.fits.items()}
                Aggregator(AggregationKeys(), weights, 0).aggregate(shares)
            synchronise_stream(self._device)

    def take_auxiliary(self, weights: Weights) -> None:
        """Every client's auxiliary model is fitted from these weights on."""
        for fit in self.fits.values():
            fit.weights.load(weights)

    def end_round(self) -> None:
        """Learning rates that follow the rounds move on."""
        for lane in self._distinct:
            lane.optimizer.end_round()
        for fit in self.fits.values():
            fit.end_round()

    def halves(self) -> list[nn.Module]:
        """The whole model of the federation: the averaged client model and the (averaged) server model."""
        return [self.averaged, *(lane.model for lane in self._distinct[:1])]

    def finite(self) -> bool:
        """Are all weights of the server model finite? After averaging replicas are the same."""
        return all(lane.weights.finite() for lane in self._distinct[:1])

    def report(self, round_seconds: float) -> ServerReport:
        """The round that has just ended; the next one starts with empty counts."""
        lanes = [(lane.context.timeline.take(), *lane.losses.take()) for lane in self._distinct]
        phases = {
            name: sum(seconds.get(name, 0.0) for seconds, _, _ in lanes) / max(len(lanes), 1)
            for name in OF_LANES
        }
        phases[Phase.ALIGNMENT] = self._crew.activity.take_fitting_alone()
        phases[Phase.AVERAGING] = self._timeline.take().get(Phase.AVERAGING, 0.0)
        phases["idle"] = round_seconds - sum(phases.values())
        records = [self.fits[client].take_records() for client in sorted(self.fits)]
        return ServerReport(
            loss_sum=sum(loss for _, loss, _ in lanes),
            samples=sum(samples for _, _, samples in lanes),
            phases=phases,
            alignments=[alignment for alignment, _ in records if alignment],
            drifts=[drift for _, drift in records if drift],
            cpu_seconds=self._take_by_phase(Timeline.take_cpu_seconds),
            device_seconds=self._take_by_phase(Timeline.take_device_seconds),
            requests=self._crew.on_device.take(),
        )

    def state(self) -> dict[str, Any]:
        """Everything that stays from round to round; asked for between two of them."""
        state = {
            "averaged": self.averaged_weights.state(),
            "lanes": [lane.state() for lane in self._distinct],
            "fits": {client: fit.state() for client, fit in self.fits.items()},
        }
        kept = self._replicas.state if self._replicas else {}
        return state | ({"replicas": kept} if kept else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.averaged_weights.load_state(state["averaged"])
        for lane, saved in zip(self._distinct, state["lanes"], strict=True):
            lane.load_state(saved)
        if self._replicas:
            self._replicas.load_state(state.get("replicas", {}))  # not there: the rule keeps nothing
        for client, fit in self.fits.items():
            queue = self.lanes[client].context.queue  # where its buffer grows
            with queue.after(current_place(self._device)):
                fit.load_state(state["fits"][client])
            if fit.inputs is not None:
                self.resume(client)

    def resume(self, client: int) -> None:
        """The alignment whose inputs this client's fit has is made when a round begins."""
        self._behind[client] = AlignmentBehind(client, self.fits[client], self._crew)
        self._to_resume.append(self._behind[client])

    def _take_by_phase(self, take: Callable[[Timeline], dict[str, float]]) -> dict[str, float]:
        """Seconds of all timelines: of lanes their mean, of fits and of averaging their sum."""
        lanes = [take(lane.context.timeline) for lane in self._distinct]
        seconds = {
            name: sum(taken.get(name, 0.0) for taken in lanes) / len(lanes) for name in OF_LANES if any(lanes)
        }
        for timeline in (self._timeline, *(fit.context.timeline for fit in self.fits.values())):
            for name, taken in take(timeline).items():
                seconds[name] = seconds.get(name, 0.0) + taken
        return seconds

    def fail(self, error: BaseException) -> None:
        """End the round under way: `wait` raises this error, and no more requests are executed."""
        self._crew.fail(error)

    def _idle(self) -> bool:
        lanes_are = all(lane.mailbox.finished and not lane.busy for lane in self._distinct)
        return self._crew.idle and lanes_are and not self._collecting

    def _collect(self, request: Request, reply: Reply) -> None:
        """The client waits for the alignment that it has begun, in no lane's order."""
        client = request.client
        try:
            with self._crew.changed:
                behind = self._behind.get(client)
                if behind is None or client in self._handed_out:
                    raise InputError(
                        f"algorithm.name: got one that collects for client {client}, which has begun no "
                        "alignment"
                    )
                at = LocalStep(self._round, client, request.step)
            behind.collect(Execution(request, at, partial(self._collected, request, reply), self._crew))
        except BaseException as error:
            self.fail(error)
            raise

    def _collected(self, request: Request, reply: Reply, answer: Answer) -> None:
        """What the client does after its answer is by what it gets: so is the drift of its next uploads."""
        with self._crew.changed:
            self._handed_out[request.client] = request.number
            self._collecting.discard(request.client)
            self._crew.changed.notify_all()
        reply(answer)

    def _take_up(self, client: int) -> None:
        self.fits[client].take_up()
        del self._handed_out[client], self._behind[client]

    def _work(self, lane: Lane) -> None:
        """Execute what the lane's mailbox has released, until there is no more of it."""
        while True:
            with self._crew.changed:
                if not lane.released or self._crew.failure:
                    lane.busy = False
                    return
                request = lane.released.popleft()
                execution = self._arrived.pop((request.client, request.number))
            with lane.context.queue.after(execution.place):
                self._execute(lane, execution)

    def _execute(self, lane: Lane, execution: Execution) -> None:
        """On the request's turn, on one thread at a time per lane."""
        request = execution.request
        body, fit = request.body, self.fits.get(request.client)
        if request.number >= self._handed_out.get(request.client, math.inf):
            self._take_up(request.client)
        if isinstance(body, Align | BeginAlignment):
            assert fit is not None, "the algorithm aligns nothing"
            if request.client in self._behind:
                raise InputError(
                    f"algorithm.name: got one that aligns client {request.client}, which has yet to collect"
                )
            if isinstance(body, Align):
                Alignment(execution, lane, fit, self._crew).run()
                return
            self._behind[request.client] = AlignmentBehind(request.client, fit, self._crew)
            self._behind[request.client].begin(execution, lane)
            return
        assert not isinstance(body, Collect), "it is in no lane's order"
        with execution.part("lane"):
            gradient = None if isinstance(body, End) else self._train(lane, body, fit, execution)
        if isinstance(body, Exchange):
            execution.answer(gradient)
        else:  # frees an upload's place in the window
            execution.answer_once_done(None, lane.context.queue, "lane", lane.number)

    def _train(
        self, lane: Lane, body: Exchange | Push, fit: AuxiliaryFit | None, execution: Execution
    ) -> Tensor | Coded | None:
        """One step of the lane, on decoded smashed data. An upload is kept for an alignment, and the estimate
        compared on it.

        Returns:
            The cut-layer gradient `[B, ...]` as it travels, for an exchange.
        """
        body = body.to(self._device)
        z, y, at = body.z, body.y, execution.at
        lane.context.queue.keep(*(z.parts if isinstance(z, Coded) else (z,)), y)
        if isinstance(z, Coded):
            with lane.phase(Phase.DECODE):
                z = self._codings.smashed.decode(z)
        uploads = isinstance(body, Push) and fit is not None
        compared = uploads and self.measure_drift
        gradient_wanted = isinstance(body, Exchange) or compared
        with lane.phase(Phase.STEP, execution.arrow):
            gradient = lane.train(z, y, gradient_wanted, at)
            if fit is not None and uploads:
                fit.buffer.add(z, y)
        if gradient is not None and isinstance(body, Exchange) and self._codings.gradient:
            with lane.phase(Phase.ENCODE):
                return self._codings.gradient.encode(gradient, at.round, at.client, execution.request.number)
        if fit is not None and uploads and gradient is not None:
            # A fit meanwhile is of another copy, or has been answered, so the device is through with it.
            with lane.phase(Phase.DRIFT):
                fit.compare(z, y, gradient, at)
        return gradient
