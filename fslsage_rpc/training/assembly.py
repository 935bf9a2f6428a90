"""Builds the server and the clients of an experiment on the ranks that host them."""

import copy

from torch import nn

from fslsage_rpc.comm.link import ServerLink
from fslsage_rpc.comm.world import World
from fslsage_rpc.data.batches import ImageBatches
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.flat import flatten
from fslsage_rpc.parties.alignment import AlignmentBuffer, AuxiliaryFit
from fslsage_rpc.parties.client import Client, TrainingKeys
from fslsage_rpc.parties.optimizers import make_optimizer
from fslsage_rpc.parties.server import Lane, Server
from fslsage_rpc.training.experiment import Experiment


def build_server(experiment: Experiment, world: World) -> Server:
    """The server with its lanes and, where it aligns them, every client's auxiliary model."""
    config, algorithm, split = experiment.config, experiment.algorithm, experiment.split
    clients = range(len(experiment.parts))

    def fresh(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(world.device)

    def lane() -> Lane:
        model = fresh(split.server)
        return Lane(model, make_optimizer(config.optimizer.server, model.parameters()), config.server.order)

    def fit() -> AuxiliaryFit:
        keys = config.algorithm.alignment
        model = fresh(split.auxiliary)
        return AuxiliaryFit(
            model=model,
            weights=flatten(model),
            optimizer=make_optimizer(config.optimizer.auxiliary, model.parameters()),
            buffer=AlignmentBuffer(keys.buffer_size),
            epochs=keys.epochs,
            batch_size=keys.batch_size,
        )

    lanes = (
        {client: lane() for client in clients}
        if algorithm.server_replicas
        else dict.fromkeys(clients, lane())
    )
    auxiliary = None if algorithm.auxiliary == "none" else flatten(fresh(split.auxiliary))
    return Server(
        initial=(flatten(fresh(split.client)), auxiliary),
        averaged=fresh(split.client),
        lanes=lanes,
        fits={client: fit() for client in clients} if algorithm.auxiliary == "aligned" else {},
        measure_drift=config.algorithm.measure_drift,
        device=world.device,
        start=world.start_work,
    )


def build_clients(
    experiment: Experiment, world: World, link: ServerLink, timeline: Timeline
) -> dict[int, Client]:
    """The clients that this rank hosts, by id, starting from the server's weights."""
    assert world.client_rank is not None
    assert experiment.train is not None
    config, split = experiment.config, experiment.split
    keys = TrainingKeys(config.seed, config.clients.local_epochs, config.data.augment)
    clients = {}
    for id in range(world.client_rank, len(experiment.parts), world.client_ranks):
        model = copy.deepcopy(split.client).to(world.device)
        has_auxiliary = experiment.algorithm.auxiliary != "none"
        auxiliary = copy.deepcopy(split.auxiliary).to(world.device) if has_auxiliary else None
        data = ImageBatches(
            experiment.train.subset(experiment.parts[id]),
            experiment.spec,
            config.clients.batch_size,
            world.device,
            experiment.dtype,
        )
        optimizer = make_optimizer(config.optimizer.client, model.parameters())
        client = Client(id, model, auxiliary, optimizer, data, keys, timeline)
        weights, auxiliary_weights = link.initial_weights(id)
        client.weights.load(weights)
        if auxiliary_weights is not None:
            client.auxiliary_weights.load(auxiliary_weights)
        clients[id] = client
    return clients
