"""The round loop. Every rank runs the same lines; each does the part of the parties that it hosts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fslsage_rpc.algorithms import ranked
from fslsage_rpc.algorithms.bound import LinkSpeed
from fslsage_rpc.algorithms.client_round import client_round, refusal
from fslsage_rpc.algorithms.paper_ledger import averages_auxiliary, hands_auxiliary_over, paper_bytes
from fslsage_rpc.algorithms.rehearsal import Course
from fslsage_rpc.device.clock import clock, cpu_clock, synchronise
from fslsage_rpc.device.memory import lasting_blocks, status_bytes
from fslsage_rpc.device.placement import peak_device_bytes
from fslsage_rpc.job.world import World
from fslsage_rpc.measure.host_load import CoreTimes
from fslsage_rpc.measure.phases import Phase
from fslsage_rpc.measure.progress import Progress
from fslsage_rpc.measure.request_times import RequestLog, on_device
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.measure.trace import ClockOffset, TraceFile, Tracer, estimate_offset
from fslsage_rpc.models.flat import check_shares
from fslsage_rpc.parties.requests import Ask
from fslsage_rpc.parties.scheduler import Scheduler
from fslsage_rpc.parties.server import Server
from fslsage_rpc.runs.checkpoint_files import RankState
from fslsage_rpc.runs.checkpoints import Checkpoints
from fslsage_rpc.runs.records import PeakMemory, RankReport, RoundRecorder, is_scored, round_seconds
from fslsage_rpc.tasks import Batches, Score
from fslsage_rpc.training.assembly import build_aggregator, build_clients, build_server, shared_context
from fslsage_rpc.training.evaluation import evaluate
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.order_choice import order_images
from fslsage_rpc.transport.link import ServerLink, connect, measure_links
from fslsage_rpc.transport.wire_ledger import WireLedger
from fslsage_rpc.units import GIB

OnRound = Callable[[dict[str, Any], Sequence[RankReport]], None]


class Trainer:
    """Trains an experiment on a world of ranks.

    Args:
        saved: what this rank's parties go on from; None: the start.
        lines: on the server's rank, the metrics lines of the rounds before.

    Attributes:
        server: the server, on the rank that hosts it; else None.
        clients: the clients that this rank hosts, by id.
        recorder: on the server's rank, the lines of the rounds so far.
        course: of the last round.
        trace: on the server's rank, where the configuration asks for one.
        diverged: on all ranks, the round (from 1) of the divergence by which `stop.diverged` has ended the
            training; else None.
    """

    def __init__(
        self,
        experiment: Experiment,
        world: World,
        saved: RankState | None = None,
        lines: Sequence[dict[str, Any]] = (),
    ):
        order_images(experiment, world)
        self.experiment = experiment
        self.world = world
        self._transport = world.transport
        paid = lines[-1]["paper_bytes_total"] if lines else 0
        self._paper_bytes_total: int = self._transport.broadcast(paid)
        self.recorder = RoundRecorder(experiment.task.metrics, experiment.algorithm.train_loss_of())
        self.diverged: int | None = None
        self._first_round = saved.rounds if saved else 0
        if saved and lines:
            self.recorder.go_on(lines, saved.client_bytes)
        self._config = experiment.config
        self._algorithm = experiment.algorithm
        self._sizes = experiment.sizes()
        self._tracer = Tracer() if experiment.config.trace else None
        self._timeline = Timeline("rank", self._tracer, world.device)
        self._context = shared_context(experiment, world, self._timeline)
        self._ledger = WireLedger()
        with lasting_blocks():
            self.server = build_server(experiment, world, self._tracer, saved) if world.hosts_server else None
            self._log = RequestLog()
            self._link = connect(self._transport, self.server, self._ledger, self._log)
            world.activity = self._progress = Progress(self._timeline, self._first_round)
            self.clients = (
                build_clients(experiment, world, self._link, self._context, saved) if self._link else {}
            )
            self._aggregator = build_aggregator(experiment, self.clients, saved) if self.clients else None
            experiment.prepared.clear()  # a rank keeps only what its clients have taken
            self._test_data = self._load_test_data() if self.server else None
        # On the server's rank: the clients that are away, as a checkpoint had them last.
        self._away = (
            {id: state for id, state in saved.clients.items() if id not in self.clients} if saved else {}
        )
        self.trace = self._open_trace() if self._tracer else None
        # Of the last round:
        self._cores = CoreTimes.now()
        self._main_cpu_seconds = 0.0

    def measure_links(self) -> dict[int, LinkSpeed]:
        """Collective: see `transport.link.measure_links`."""
        return measure_links(self._transport, self._link)

    def train(
        self,
        on_round: OnRound,
        checkpoints: Checkpoints | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train until the configured end, or the end of the round in which a rank is asked to stop.

        Args:
            on_round: on the server's rank, gets each round's metrics line, and the ranks' reports that it was
                made from.
            stop_requested: has this rank been asked to stop?

        Returns:
            Is there more to train?
        """
        if self._first_round:
            ended, self.diverged = self._transport.broadcast(self._had_ended())
            if ended:
                return False
        stops = False
        try:
            for round in range(self._first_round, self._config.rounds):
                self.world.admit(checkpoints.complete if checkpoints else lambda: None)
                seconds = self.train_round(round)
                if checkpoints:
                    checkpoints.complete()  # a lost rank costs one checkpoint at most
                last, stops = self._close_round(round, seconds, on_round, stop_requested())
                if checkpoints and not self.diverged:  # else the last one is of finite weights
                    checkpoints.begin(round + 1, last or stops, self.state)
                if last or stops:
                    break
            if checkpoints:
                checkpoints.complete()
        finally:
            self.close()
        return stops

    def close(self) -> None:
        """After the last round: what the server still fits is abandoned."""
        if self.server:
            self.server.close()

    def complete_round(self, t: int, on_round: OnRound, evaluate: bool = False) -> bool:
        """Train and record one round, as `train` does, for trainings that take turns. Over RPC those with
        `alignment.lag` cannot: fits that rest between two rounds keep the threads that others' need.

        Args:
            evaluate: also where `evaluation.every` does not ask for it.

        Returns:
            Was it the last one?
        """
        seconds = self.train_round(t)
        last, _ = self._close_round(t, seconds, on_round, stop_requested=False, evaluate=evaluate)
        return last

    def train_round(self, t: int) -> float:
        """One round on the training clock: client rounds and server steps, then averaging.

        Returns:
            Seconds from the barrier before the round to the one after averaging.
        """
        self._progress.round = t
        federation, algorithm = self.experiment.federation, self._algorithm
        shares = federation.shares(t)
        course = self.experiment.rehearsal.course(t)
        depth_first = self._config.server.order == "client_major"
        if self.server:
            estimated = course is None or not hands_auxiliary_over(algorithm, course)
            self.server.measure_drift = self._config.algorithm.measure_drift and estimated
        ranking = ranked(algorithm, t)
        order = federation.participants(t) if depth_first else ranking
        mine = [client for client in order if client in self.clients]
        if self._link:
            plans = {id: None if course is None else course.steps(id) for id in mine}
            collecting = [id for id in mine if course is not None and course.collects(id)]
            self._link.announce(t, plans, ranking, collecting)
        made: dict[int, list[Ask]] = {client: [] for client in mine}
        self._transport.barrier()
        cores = CoreTimes.now()
        started, cpu_started = clock(), cpu_clock()
        if self.server:
            self.server.go_on()
        if self._link:
            scheduler = Scheduler(
                self._link.send,
                window=self._config.comm.upload_window,
                depth_first=depth_first,
                context=self._context,
                staged=self._transport.staged,
            )
            rehearsed: Mapping[int, list[Ask]] = {} if course is None else course.asks
            scheduler.run(
                {id: client_round(algorithm, self.clients[id], t, rehearsed.get(id), made[id]) for id in mine}
            )
        if self.server:
            self.server.wait()
        self.course = course if course and course.sized else self._gathered(course, made)
        owns = any(client.owns_auxiliary for client in self.clients.values())
        if owns and algorithm.auxiliary == "aligned" and not self.course.trains_auxiliary:
            raise refusal(algorithm, "trains the auxiliary model, which it did not in its rehearsal")
        averages = averages_auxiliary(algorithm, self.course)
        hands_over = hands_auxiliary_over(algorithm, self.course)
        if self._link:
            with self._timeline.phase(Phase.DRAIN_WAIT):
                synchronise(self.world.device)  # no CUDA call may be in flight when NCCL begins
                self._transport.client_barrier()
            with self._timeline.phase(Phase.AVERAGING):
                self._average_clients(shares, averages)
                if hands_over:
                    self._hand_auxiliary_over(self._link)
                synchronise(self.world.device)
        if self.server:
            self.server.average(shares, averages and not hands_over)
            self.server.end_round()
            self.server.rest()
        for client in self.clients.values():
            client.end_round()
        with self._timeline.phase(Phase.DRAIN_WAIT):
            self._transport.barrier()
        seconds = clock() - started
        self._main_cpu_seconds = cpu_clock() - cpu_started
        self._cores = CoreTimes.now().since(cores)
        return seconds

    def state(self, rounds: int) -> RankState:
        """Everything of the parties that this rank hosts, after so many rounds; on the server's rank, also
        what is left of clients that are away. Random numbers are keyed, so they have no state.
        """
        return RankState(
            rounds=rounds,
            clients={**self._away, **{id: client.state() for id, client in self.clients.items()}},
            server=self.server.state() if self.server else None,
            client_bytes=self.recorder.client_bytes,
            aggregation=self._aggregator.state if self._aggregator else {},
        )

    def final_model(self) -> dict[str, torch.Tensor]:
        """The whole model's state_dict on the CPU, under the uncut model's names; on the server's rank."""
        assert self.server is not None
        return {
            name: t.cpu().clone() for half in self.server.halves() for name, t in half.state_dict().items()
        }

    def _close_round(
        self, t: int, seconds: float, on_round: OnRound, stop_requested: bool, evaluate: bool = False
    ) -> tuple[bool, bool]:
        """Collective: evaluate and record a round that has been trained.

        Returns:
            Was it the last one? If not, has a rank been asked to stop after it?
        """
        paid = paper_bytes(self._algorithm, self.course, self._sizes)
        assert paid.coded is not None
        self._paper_bytes_total += paid.coded
        last = t == self._config.rounds - 1 or self._paper_limit_reached()
        evaluated = evaluate or last or (t + 1) % self._config.evaluation.every == 0
        ended = clock()
        if evaluated and self._link and self._transport.client_rank == 0:
            self._link.deposit_average(next(iter(self.clients.values())).weights)
        phases = self._timeline.take() if self._link else None
        cpu_seconds = self._timeline.take_cpu_seconds()
        losses = [client.losses.take() for client in self.clients.values()]
        report = RankReport(
            seconds=seconds,
            phases=phases,
            cores=self._cores,
            cpu_seconds={**cpu_seconds, "other": self._main_cpu_seconds - sum(cpu_seconds.values())},
            device_seconds=self._timeline.take_device_seconds(),
            loss_sum=sum(loss for loss, _ in losses),
            samples=sum(samples for _, samples in losses),
            wire=self._ledger.take(),
            requests=self._log.take(),
            spans=self._tracer.take() if self._tracer else [],
            peak_memory=self._peak_memory(),
        )
        finite = next(iter(self.clients.values())).weights.finite() if self._link else True
        shares = self.experiment.federation.shares(t)
        share = sum(share for client, share in shares.items() if client in self.clients)
        gathered = self._transport.gather((report, stop_requested, share, finite))
        stops, diverged = False, None
        if self.server and gathered:
            reports, requests, shares_by_rank, finites = zip(*gathered, strict=True)
            check_shares(shares_by_rank)  # each rank knows its own clients' alone
            score = self._evaluate(self.server) if evaluated else None
            reports[0].peak_memory = self._peak_memory()  # this rank's; no other evaluates
            server = self.server.report(round_seconds(reports))
            if hands_auxiliary_over(self._algorithm, self.course):
                server.drifts = []  # of auxiliary models that the clients have not gone by
            for each in reports:
                on_device(each.requests, server.requests)
            line = self.recorder.add(
                t=t,
                reports=reports,
                server=server,
                score=score,
                evaluation_seconds=clock() - ended if evaluated else 0.0,
                paper_bytes=paid,
                participants=self.experiment.federation.participants(t),
                finite=all(finites) and self.server.finite(),
            )
            if self.trace:
                self.trace.add_round(t + 1, [report.spans for report in reports])
            on_round(line, reports)
            diverged = self._ended_by_divergence(line)
            last = last or self._accuracy_reached(line) or diverged is not None
            stops = any(requests) and not last
        last, stops, self.diverged = self._transport.broadcast((last, stops, diverged))
        return last, stops

    def _peak_memory(self) -> PeakMemory:
        """This process's so far; what it hosts is the kind of its rank."""
        hosts = [party for party, here in (("server", self.server), ("client", self._link)) if here]
        peaks = {"host_bytes": status_bytes("VmHWM"), "device_bytes": peak_device_bytes(self.world.device)}
        return {" and ".join(hosts): peaks}

    def _open_trace(self) -> TraceFile | None:
        """Collective: the ranks' clocks are laid on the server's; on its rank, the file to come."""
        offset = ClockOffset(0.0, 0.0)
        if self.server is None and self._link:
            offset = estimate_offset(self._link.server_clock)
        hosts = [hosts for hosts, here in (("server", self.server), ("clients", self._link)) if here]
        places = self._transport.gather((" and ".join(hosts), offset))
        return TraceFile(*zip(*places, strict=True)) if places else None

    def _gathered(self, rehearsed: Course | None, made: dict[int, list[Ask]]) -> Course:
        """Collective: the course of the round that has ended, from what each rank's clients have asked."""
        owns = any(client.owns_auxiliary for client in self.clients.values())
        trained = rehearsed.trains_auxiliary if rehearsed else owns
        with self._timeline.phase(Phase.DRAIN_WAIT):
            parts = self._transport.gather(Course(made, trained))
            course: Course = self._transport.broadcast(parts and Course.joined(parts))
        return course

    def _average_clients(self, shares: dict[int, float], auxiliary: bool) -> None:
        """Give every client of this rank, absent ones too, what comes of those that took part, on all
        ranks.
        """
        assert self._aggregator is not None
        averaged = (
            {id: client.auxiliary_weights for id, client in self.clients.items()} if auxiliary else None
        )
        reduce, count = self._transport.all_reduce, self._ledger.count
        self._aggregator.aggregate(shares, lambda sums: count("weights_allreduce", reduce(sums)), averaged)

    def _hand_auxiliary_over(self, link: ServerLink) -> None:
        """The server goes on from the average of the auxiliary models that the clients have trained."""
        for client in self.clients.values():
            client.auxiliary.freeze()
        if self._transport.client_rank == 0:
            link.deposit_auxiliary(next(iter(self.clients.values())).auxiliary_weights)

    def _evaluate(self, server: Server) -> Score:
        assert self._test_data is not None
        return evaluate(nn.Sequential(*server.halves()), self.experiment.task, self._test_data)

    def _load_test_data(self) -> Batches:
        task = self.experiment.task
        return task.batches(task.load(train=False), self._config.evaluation.batch_size, self.world.device)

    def _paper_limit_reached(self) -> bool:
        limit = self._config.stop.paper_gib
        return limit is not None and self._paper_bytes_total >= limit * GIB

    def _accuracy_reached(self, line: dict[str, Any]) -> bool:
        target, accuracy = self._config.stop.accuracy, line["test_accuracy"]
        return target is not None and accuracy is not None and accuracy >= target

    def _ended_by_divergence(self, line: dict[str, Any]) -> int | None:
        """The first round that has diverged, where a run ends by that of this line's."""
        return self.recorder.diverged if self._config.stop.diverged and line.get("diverged") else None

    def _had_ended(self) -> tuple[bool, int | None]:
        """Was the round before the first one here already the last, and by its divergence? Known on the
        server's rank.
        """
        if self.server is None:
            return False, None
        line = self.recorder.last
        assert line is not None
        diverged = self._ended_by_divergence(line)
        enough = self._first_round == self._config.rounds or self._paper_limit_reached()
        ended = is_scored(line) and (enough or self._accuracy_reached(line))
        return ended or diverged is not None, diverged
