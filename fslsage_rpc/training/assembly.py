"""Builds the server and the clients of an experiment on the ranks that host them."""

import warnings
from functools import partial

from torch import nn

from fslsage_rpc.device.streams import STREAMS, WorkQueue, can_capture
from fslsage_rpc.job.world import World
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.measure.trace import Tracer
from fslsage_rpc.models.flat import copy_of, flatten, trainable
from fslsage_rpc.parties.alignment import AlignmentBuffer, AuxiliaryFit
from fslsage_rpc.parties.client import Client, TrainingKeys
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
    graphs = uses_graphs(experiment, world)
    most = STREAMS - 2  # the main thread and a lane that clients share have streams, too
    if graphs and world.works_beside and len(clients) > most:
        # One would capture what another lane, or fit, queues in the same stream.
        warnings.warn(f"graphs: for at most {most} clients: the server's steps run without", stacklevel=2)
        graphs = False

    def fresh(model: nn.Module) -> nn.Module:
        return copy_of(model, world.device)

    def queue() -> WorkQueue:
        return WorkQueue.beside_others(world.device) if world.works_beside else WorkQueue()

    def lane(row: str, number: int = 0) -> Lane:
        model = fresh(split.server)
        optimizer = ScheduledOptimizer(config.optimizer.server, trainable(model))
        timeline = Timeline(row, tracer, world.device)
        return Lane(
            model,
            optimizer,
            config.server.order,
            timeline,
            queue(),
            graphs,
            loss=experiment.task.loss,
            seed=config.seed,
            # On a GPU the lane's queue is as good a place: whatever runs beside it shares the card.
            snapshot=Snapshot(model, world.device) if aligns and world.device.type == "cpu" else None,
            number=number,
        )

    def fit(client: int) -> AuxiliaryFit:
        keys = config.algorithm.alignment
        model = fresh(split.auxiliary)
        return AuxiliaryFit(
            model=model,
            weights=flatten(model),
            optimizer=ScheduledOptimizer(config.optimizer.auxiliary, trainable(model)),
            buffer=AlignmentBuffer(keys.buffer_size),
            keys=keys,
            timeline=Timeline(f"alignment of client {client}", tracer, world.device),
            queue=queue(),
            graphs=graphs,
            loss=experiment.task.loss,
            seed=config.seed,
        )

    if algorithm.client_holds_whole_model:
        lanes: dict[int, Lane] = {}
    elif algorithm.server_replicas:
        lanes = {client: lane(f"lane of client {client}", client) for client in clients}
    else:
        lanes = dict.fromkeys(clients, lane("lane"))
    auxiliary = None if algorithm.auxiliary == "none" else flatten(fresh(split.auxiliary))
    server = Server(
        initial=(flatten(fresh(experiment.client_model())), auxiliary),
        averaged=fresh(experiment.client_model()),
        lanes=lanes,
        fits={client: fit(client) for client in clients} if aligns else {},
        measure_drift=config.algorithm.measure_drift,
        device=world.device,
        start=world.start,
        timeline=Timeline("averaging", tracer, world.device),
    )
    if saved is not None:
        assert saved.server is not None
        server.load_state(saved.server)
    return server


def uses_graphs(experiment: Experiment, world: World) -> bool:
    """Are the steps of this rank's parties captured?"""
    return experiment.config.graphs == "auto" and can_capture(world.device)


def hosted_clients(experiment: Experiment, world: World) -> range:
    """The ids of the clients that this rank hosts."""
    return range(0) if world.home is None else dealt_out(experiment, world, world.home)


def dealt_out(experiment: Experiment, world: World, home: int) -> range:
    """The ids of the clients of one of the client ranks, by its place among those of the job's start."""
    return range(home, len(experiment.parts), world.homes)


def build_clients(
    experiment: Experiment, world: World, link: ServerLink, timeline: Timeline, saved: RankState | None
) -> dict[int, Client]:
    """The clients that this rank hosts, by id, as they were saved or starting from the server's weights."""
    config = experiment.config
    task = experiment.task
    train = task.load(train=True) if experiment.train is None else experiment.train
    keys = TrainingKeys(config.seed, config.clients.local_epochs, config.data.augment)
    clients = {}
    for id in hosted_clients(experiment, world):
        model = copy_of(experiment.client_model(), world.device)
        kind = experiment.algorithm.auxiliary
        auxiliary = None if kind == "none" else copy_of(experiment.split.auxiliary, world.device)
        samples = train.subset(experiment.parts[id])
        client = Client(
            id=id,
            model=model,
            optimizer=ScheduledOptimizer(config.optimizer.client, trainable(model)),
            auxiliary=auxiliary,
            make_auxiliary_optimizer=partial(ScheduledOptimizer, config.optimizer.auxiliary),
            data=task.batches(samples, config.clients.batch_size, world.device),
            keys=keys,
            timeline=timeline,
            graphs=uses_graphs(experiment, world),
            loss=task.loss,
        )
        if kind == "trained":
            client.own_auxiliary()
        if saved is not None:
            client.load_state(saved.clients[id])
        else:
            weights, auxiliary_weights = link.initial_weights(id)
            client.weights.load(weights)
            if auxiliary_weights is not None:
                client.auxiliary_weights.load(auxiliary_weights)
        clients[id] = client
    return clients
