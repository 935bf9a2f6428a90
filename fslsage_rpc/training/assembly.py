"""Builds the server and the clients of an experiment on the ranks that host them."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from fslsage_rpc.data.participation import hosted_by
from fslsage_rpc.device.streams import STREAMS, WorkQueue, can_capture
from fslsage_rpc.job.world import World
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.measure.trace import Tracer
from fslsage_rpc.models.flat import copy_of, flatten, parameter_count, trainable
from fslsage_rpc.parties.aggregation import Aggregator
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.client_auxiliary import ClientAuxiliary
from fslsage_rpc.parties.coding import Codings
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.lane import Lane
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.parties.server import Server
from fslsage_rpc.parties.snapshot import Snapshot
from fslsage_rpc.runs.checkpoint_files import RankState
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.transport.link import ServerLink


def build_server(
    experiment: Experiment, world: World, tracer: Tracer | None, saved: RankState | None
) -> Server:
    """The server with its lanes and, where it aligns them, every client's auxiliary model; as it was saved,
    or at the start.
    """
    config, algorithm, split = experiment.config, experiment.algorithm, experiment.split
    clients = range(len(experiment.parts))
    aligns = algorithm.auxiliary == "aligned"
    shared = shared_context(experiment, world, Timeline("averaging", tracer, world.device))
    graphs = shared.graphs
    most = STREAMS - 2  # the main thread and a lane that clients share have streams, too
    if graphs and world.works_beside and len(clients) > most:
        # One would capture what another lane, or fit, queues in the same stream.
        warnings.warn(f"graphs: for at most {most} clients: the server's steps run without", stacklevel=2)
        graphs = False

    def fresh(model: nn.Module) -> nn.Module:
        return copy_of(model, world.device)

    def context(row: str) -> Context:
        queue = WorkQueue.beside_others(world.device) if world.works_beside else WorkQueue()
        timeline = Timeline(row, tracer, world.device)
        return replace(shared, timeline=timeline, graphs=graphs, queue=queue)

    def lane(row: str, number: int = 0) -> Lane:
        model = fresh(split.server)
        # On a GPU the lane's queue is as good a place: whatever runs beside it shares the card.
        snapshot = Snapshot(model, world.device) if aligns and world.device.type == "cpu" else None
        optimizer = ScheduledOptimizer(config.optimizer.server, trainable(model))
        return Lane(model, optimizer, config.server.order, context(row), snapshot, number)

    def fit(client: int) -> AuxiliaryFit:
        model = fresh(split.auxiliary)
        optimizer = ScheduledOptimizer(config.optimizer.auxiliary, trainable(model))
        keys = config.algorithm.alignment
        return AuxiliaryFit(model, optimizer, keys, context(f"alignment of client {client}"))

    if algorithm.client_holds_whole_model:
        lanes: dict[int, Lane] = {}
    elif algorithm.server_replicas:
        lanes = {client: lane(f"lane of client {client}", client) for client in clients}
    else:
        lanes = dict.fromkeys(clients, lane("lane"))
    replicas = None
    if lanes and algorithm.server_replicas:
        weights = {client: lane.weights for client, lane in lanes.items()}
        replicas = Aggregator(config.aggregation, weights, parameter_count(split.server))
    auxiliary = None if algorithm.auxiliary == "none" else flatten(fresh(split.auxiliary))
    server = Server(
        initial=(flatten(fresh(experiment.client_model())), auxiliary),
        averaged=fresh(experiment.client_model()),
        lanes=lanes,
        fits={client: fit(client) for client in clients} if aligns else {},
        measure_drift=config.algorithm.measure_drift,
        start=world.start,
        context=shared,
        replicas=replicas,
    )
    if saved is not None:
        assert saved.server is not None
        server.load_state(saved.server)
    return server


def shared_context(experiment: Experiment, world: World, timeline: Timeline) -> Context:
    """The context that all parties of this rank share, with a timeline."""
    graphs = experiment.config.graphs == "auto" and can_capture(world.device)
    return Context(
        device=world.device,
        timeline=timeline,
        loss=experiment.task.loss,
        seed=experiment.config.seed,
        graphs=graphs,
        codings=Codings(experiment.config.comm.codec, experiment.config.seed),
    )


def hosted_clients(experiment: Experiment, world: World) -> range:
    """The ids of the clients that this rank hosts."""
    return range(0) if world.home is None else hosted_by(world.home, world.homes, len(experiment.parts))


def build_clients(
    experiment: Experiment, world: World, link: ServerLink, context: Context, saved: RankState | None
) -> dict[int, Client]:
    """The clients that this rank hosts, by id, as they were saved or starting from the server's weights."""
    config, task, kind = experiment.config, experiment.task, experiment.algorithm.auxiliary
    train = experiment.take_training_samples()

    def draw(client_id: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        samples = train.subset(experiment.parts[client_id])
        batches = task.batches(samples, config.clients.batch_size, world.device)
        epochs, augment = config.clients.local_epochs, config.data.augment
        return lambda t: batches.shuffled(config.seed, t, client_id, epochs, augment)

    def build(client_id: int) -> Client:
        model = copy_of(experiment.client_model(), world.device)
        auxiliary = None
        if kind != "none":
            make_optimizer = partial(ScheduledOptimizer, config.optimizer.auxiliary)
            copied = copy_of(experiment.split.auxiliary, world.device)
            auxiliary = ClientAuxiliary(copied, make_optimizer, context)
            if kind == "trained":
                auxiliary.take_over()
        optimizer = ScheduledOptimizer(config.optimizer.client, trainable(model))
        client = Client(client_id, model, optimizer, draw(client_id), context, auxiliary)
        if saved is not None:
            client.load_state(saved.clients[client_id])
            return client
        weights, auxiliary_weights = link.initial_weights(client_id)
        client.weights.load(weights)
        if auxiliary_weights is not None:
            client.auxiliary_weights.load(auxiliary_weights)
        return client

    return {id: build(id) for id in hosted_clients(experiment, world)}


def build_aggregator(
    experiment: Experiment, clients: Mapping[int, Client], saved: RankState | None
) -> Aggregator:
    """It averages the clients of this rank, which are as they were saved or at the start."""
    weights = {id: client.weights for id, client in clients.items()}
    parameters = parameter_count(experiment.client_model())
    aggregator = Aggregator(experiment.config.aggregation, weights, parameters)
    if saved is not None:
        aggregator.load_state(saved.aggregation)
    return aggregator
