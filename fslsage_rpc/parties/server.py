"""The server: lanes that train the server model, and the alignment of each client's auxiliary model."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.measure.clock import clock, synchronise
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.measure.trace import Arrow
from fslsage_rpc.models.flat import Weights, flatten, weighted_sum
from fslsage_rpc.parties.alignment import Agreement, AuxiliaryFit, cut_layer_gradient
from fslsage_rpc.parties.losses import LossSum
from fslsage_rpc.parties.mailbox import Mailbox
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.requests import Align, Answer, Exchange, Push, Request

Reply = Callable[[Answer], None]


class Lane:
    """One server-model instance; it executes one request at a time, in the order of its mailbox."""

    def __init__(self, model: nn.Module, optimizer: ScheduledOptimizer, order: str, timeline: Timeline):
        self.model = model
        self.weights = flatten(model)
        self.optimizer = optimizer
        self.mailbox = Mailbox(order)
        self.released: deque[Request] = deque()
        self.busy = False
        self.timeline = timeline
        self.losses = LossSum()

    def train(self, z: Tensor, y: Tensor, gradient: bool) -> Tensor | None:
        """One optimizer step on smashed data z `[B, ...]` and labels y `[B]`.

        Returns:
            The true cut-layer gradient g = dL/dz `[B, ...]` at the weights before the step, if asked for.
        """
        z = z.detach().requires_grad_(gradient)
        loss = F.cross_entropy(self.model(z), y)
        loss.backward()
        self.optimizer.step()
        self.losses.add(loss, len(y))
        return z.grad


@dataclass
class ServerReport:
    """What the server has to say of one round; `phases` are mean seconds per lane."""

    loss_sum: float
    samples: int
    phases: dict[str, float]
    alignments: list[dict[str, float]] = field(default_factory=list)
    drifts: list[dict[str, float]] = field(default_factory=list)


class Server:
    """Owns the server model and the alignment routine; an object that transports call into, from any thread.

    Args:
        initial: the client and (where the algorithm has one) auxiliary weights that every client starts from.
        averaged: the client model in which the averaged client weights are evaluated.
        lanes: per client the lane that takes its requests; clients may share one.
        fits: per client its auxiliary model, where the server aligns them.
        measure_drift: compare estimate and true gradient on every upload; may change between rounds.
        start: runs a piece of work; on a thread pool (real transport) or at once (local).
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
        start: Callable[[Callable[[], None]], Any],
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
        self._arrived: dict[tuple[int, int], tuple[float, Reply]] = {}
        self._changed = threading.Condition()  # guards mailboxes, arrivals and the lanes' queues
        self._timeline = timeline
        self._failure: BaseException | None = None
        self._plans: dict[int, Sequence[int]] = {}
        self._alignments: dict[int, dict[str, float]] = {}
        self._drifts: dict[int, Agreement] = {}

    def announce(self, plans: Mapping[int, Sequence[int]], ranking: Sequence[int]) -> None:
        """Some participants say at which steps they will make requests; the round opens when all have.

        Args:
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
                self._plans = {}

    def submit(self, request: Request, reply: Reply) -> None:
        """Take in a request; `reply` is called with its answer, from some thread, once its turn is over."""
        try:
            with self._changed:
                lane = self.lanes[request.client]
                self._arrived[request.client, request.number] = clock(), reply
                lane.released += lane.mailbox.deliver(request)
                idle = bool(lane.released) and not lane.busy
                lane.busy = lane.busy or idle
        except BaseException as error:
            self._fail(error)
            raise
        if idle:
            self._start(lambda: self._work(lane))

    def wait(self) -> None:
        """Return when every announced request of the round has been executed.

        Raises:
            Exception: what a request raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or all(self._idle(lane) for lane in self._distinct))
            if self._failure:
                raise self._failure

    def average(self, shares: Mapping[int, float], auxiliaries: bool) -> None:
        """Replace replicas (and, if asked, auxiliary models) by their weighted means over the participants.

        Everyone, absent or not, goes on from the mean.
        """
        with self._timeline.phase("averaging"):
            if len(self._distinct) > 1:
                _average({client: lane.weights for client, lane in self.lanes.items()}, shares)
            if auxiliaries and self.fits:
                _average({client: fit.weights for client, fit in self.fits.items()}, shares)
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

    def report(self, round_seconds: float) -> ServerReport:
        """The round that has just ended; the next one starts with empty counts."""
        lanes = [(lane.timeline.take(), *lane.losses.take()) for lane in self._distinct]
        phases = {
            name: sum(seconds.get(name, 0.0) for seconds, _, _ in lanes) / max(len(lanes), 1)
            for name in ("step", "alignment", "drift")
        }
        phases["averaging"] = self._timeline.take().get("averaging", 0.0)
        phases["idle"] = round_seconds - sum(phases.values())
        drifts = [self._drifts[client].read() for client in sorted(self._drifts)]
        report = ServerReport(
            loss_sum=sum(loss for _, loss, _ in lanes),
            samples=sum(samples for _, _, samples in lanes),
            phases=phases,
            alignments=[self._alignments[client] for client in sorted(self._alignments)],
            drifts=[drift for drift in drifts if drift],
        )
        self._alignments, self._drifts = {}, {}
        return report

    def _execute(self, lane: Lane, request: Request) -> Any:
        """What the request asks for; on the lane's turn, on one thread at a time per lane."""
        body = request.body.to(self._device)
        arrow = Arrow("execution", request.client, request.number)
        match body:
            case Align():
                with lane.timeline.phase("alignment", arrow=arrow):
                    weights, record = self.fits[request.client].align(lane.model)
                    synchronise(self._device)
                if record:
                    self._alignments[request.client] = record
                return weights
            case Exchange():
                with lane.timeline.phase("step", arrow=arrow):
                    gradient = lane.train(body.z, body.y, gradient=True)
                    synchronise(self._device)
                return gradient
            case Push():
                fit = self.fits.get(request.client)
                with lane.timeline.phase("step", arrow=arrow):
                    gradient = lane.train(body.z, body.y, gradient=fit is not None and self.measure_drift)
                    if fit is not None:
                        fit.buffer.add(body.z, body.y)
                    synchronise(self._device)
                if gradient is not None and fit is not None:
                    with lane.timeline.phase("drift"):
                        estimate = cut_layer_gradient(fit.model, body.z, body.y)
                        self._drifts.setdefault(request.client, Agreement()).add(estimate, gradient)
                return None

    def _idle(self, lane: Lane) -> bool:
        return lane.mailbox.finished and not lane.busy

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _work(self, lane: Lane) -> None:
        """Execute what the lane's mailbox has released, until there is no more of it."""
        try:
            while True:
                with self._changed:
                    if not lane.released:
                        lane.busy = False
                        self._changed.notify_all()
                        return
                    request = lane.released.popleft()
                    arrived, reply = self._arrived.pop((request.client, request.number))
                started = clock()
                value = self._execute(lane, request)
                reply(Answer(value, started - arrived, clock() - started))
        except BaseException as error:
            self._fail(error)
            raise


def _average(models: Mapping[int, Weights], shares: Mapping[int, float]) -> None:
    """Give all models the weighted mean of those that have a share."""
    members = [models[client] for client in shares]
    mean = weighted_sum(members, list(shares.values()), like=members[0])
    for weights in models.values():
        weights.load(mean)
