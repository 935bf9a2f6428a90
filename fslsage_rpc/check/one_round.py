"""One round of a configuration, trained on the ranks as they are, and what it takes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fslsage_rpc.device.memory import status_bytes
from fslsage_rpc.device.placement import forget_peak, peak_device_bytes
from fslsage_rpc.device.streams import current_place
from fslsage_rpc.job.world import World
from fslsage_rpc.parties.requests import ALIGNING, BeginAlignment
from fslsage_rpc.randomness import START
from fslsage_rpc.runs.checkpoint_files import serialised
from fslsage_rpc.runs.checkpoints import snapshot
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer


@dataclass(frozen=True)
class Use:
    """Bytes that a round has taken of one rank's machine."""

    peak: int | None
    """of the host's memory, evaluation included; None: the system does not tell"""
    gpu_peak: int | None
    """of the GPU's; None of a rank on a CPU"""
    checkpoint: int
    """this rank's part of a checkpoint, once all clients have taken part; 0 where none is written"""


def train_one_round(experiment: Experiment, world: World) -> tuple[Use, Mapping[str, Any] | None]:
    """Collective: train and evaluate a round as `train` does, and write nothing.

    Returns:
        What it has taken of this rank's machine; on the server's rank, the round's metrics line.
    """
    number, config = dearest_round(experiment), experiment.config
    lines: list[Mapping[str, Any]] = []
    if world.hosts_server:
        clients = experiment.federation.participants(number)
        steps = sum(map(experiment.federation.steps, clients))
        what = f"round {number + 1} of {config.rounds}, {steps} local steps of {len(clients)} clients"
        print(f"Trains and evaluates {what}, to measure it ...", flush=True)
    forget_peak(world.device)
    trainer = Trainer(experiment, world)
    fill_buffers(trainer, number)
    for client, samples in begun(experiment, number).items():
        begin_fit(trainer, client, samples)
    trainer.complete_round(number, lambda line, _: lines.append(line), evaluate=True)
    trainer.close()
    peaks = status_bytes("VmHWM"), peak_device_bytes(world.device)
    checkpoint = 0 if config.checkpoint.every is None else _checkpoint_bytes(trainer)
    return Use(*peaks, checkpoint), lines[0] if lines else None


def dearest_round(experiment: Experiment) -> int:
    """The round, from 0, with most alignments of the run's last interval: later ones have fuller buffers. The
    first round where nothing is aligned, or nobody knows when.
    """
    rounds, algorithm = experiment.config.rounds, experiment.algorithm
    if algorithm.auxiliary != "aligned" or algorithm.requests_depend_on_values:
        return 0

    def alignments(number: int) -> int:
        clients = experiment.rehearsal.clients(number).values()
        return sum(ask.kind in ALIGNING for client in clients for ask in client.asks)

    return max(range(max(0, rounds - algorithm.interval), rounds), key=alignments)


def fill_buffers(trainer: Trainer, number: int) -> None:
    """Give every client's alignment buffer as many samples as it has at the beginning of that round; all that
    it holds where nobody knows.

    They are noise: what an alignment takes depends on their number, which is small in the first round.
    """
    experiment, device = trainer.experiment, trainer.world.device
    task, shape = experiment.task, experiment.split.smashed_shape
    unknown = number > 0 and experiment.algorithm.requests_depend_on_values
    if (server := trainer.server) is None:
        return
    for client, fit in server.fits.items():
        wanted = fit.buffer.size if unknown else experiment.rehearsal.buffered(client, number)
        missing = max(0, wanted - len(fit.buffer))
        with server.lanes[client].context.queue.after(current_place(device)):  # where the buffer grows
            z = torch.randn(missing, *shape, dtype=task.precision.smashed, device=device)
            fit.buffer.add(z, torch.zeros(missing, *task.label_shape, dtype=task.label_dtype, device=device))


def begun(experiment: Experiment, number: int) -> dict[int, int]:
    """By client, the samples of the alignment that it has yet to collect at the beginning of a round."""
    if not _begins_alignments(experiment):
        return {}
    clients, rehearsal = range(len(experiment.parts)), experiment.rehearsal
    return {client: samples for client in clients if (samples := rehearsal.begun(client, number))}


def _begins_alignments(experiment: Experiment) -> bool:
    """Are there alignments behind the training? Where requests depend on values nobody knows: no."""
    algorithm, rounds = experiment.algorithm, experiment.config.rounds
    if algorithm.auxiliary != "aligned" or algorithm.requests_depend_on_values:
        return False
    return experiment.rehearsal.asks_for({BeginAlignment.kind}, range(min(rounds, algorithm.interval + 1)))


def begin_fit(trainer: Trainer, client: int, samples: int) -> None:
    """Have an alignment of so many samples under way, on the server's rank; again they are noise."""
    if (server := trainer.server) is None:
        return
    fit, smashed = server.fits[client], trainer.experiment.split.smashed_shape
    task, device = trainer.experiment.task, trainer.world.device
    z = torch.randn(samples, *smashed, dtype=task.precision.smashed, device=device)
    y = torch.zeros(samples, *task.label_shape, dtype=task.label_dtype, device=device)
    batches = zip(*(each.split(fit.keys.batch_size) for each in (z, y)), strict=True)
    fit.begin(START).targets = [(z, y, torch.randn_like(z)) for z, y in batches]
    server.resume(client)


def _most_begun(experiment: Experiment) -> dict[int, int]:
    """The alignments under way in the run's checkpoint that has most of them: see `begun`."""
    rounds, every = experiment.config.rounds, experiment.config.checkpoint.every
    assert every is not None
    written = [*range(every, rounds + 1, every), rounds]
    last = {number % experiment.algorithm.interval: number for number in written}
    return max((begun(experiment, number) for number in last.values()), key=len)


def _set_auxiliaries_apart(trainer: Trainer) -> None:
    """Give each client's auxiliary model weights of its own: equal ones are written once."""
    weights = [(id, client.auxiliary_weights) for id, client in trainer.clients.items()]
    weights += [(id, fit.weights) for id, fit in (trainer.server.fits if trainer.server else {}).items()]
    for client, each in weights:
        each.floats += client + 1


def _checkpoint_bytes(trainer: Trainer) -> int:
    """The size of this rank's file, by writing it to memory. The parties cannot be used any more."""
    experiment = trainer.experiment
    clients = trainer.clients.values()
    optimizers = [client.optimizer for client in clients]
    optimizers += [own for client in clients if client.owns_auxiliary and (own := client.auxiliary.optimizer)]
    if server := trainer.server:
        optimizers += [lane.optimizer for lane in server.lanes.values()]
        optimizers += [fit.optimizer for fit in server.fits.values()]
        for fit in server.fits.values():
            fit.inputs = None  # those of the round that was trained
            if fit.context.codings.auxiliary:
                fit.left_out = torch.rand_like(fit.weights.floats)
    for optimizer in optimizers:
        optimizer.stepped = True  # else it has nothing to be written
    fill_buffers(trainer, experiment.config.rounds)
    if _begins_alignments(experiment) and experiment.algorithm.average_auxiliary == "never":
        _set_auxiliaries_apart(trainer)  # as they are once they were collected
    for client, samples in _most_begun(experiment).items():
        begin_fit(trainer, client, samples)
    return len(serialised(vars(snapshot(trainer.state(1)))))
