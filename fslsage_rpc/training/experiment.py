"""What a configuration comes to, before any rank talks to another: data, clients, models, algorithm."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fslsage_rpc.algorithms import Algorithm, arguments, create, find
from fslsage_rpc.algorithms.paper_ledger import Sizes
from fslsage_rpc.algorithms.rehearsal import Rehearsal
from fslsage_rpc.config.own import first_line, is_own
from fslsage_rpc.config.schema import Config
from fslsage_rpc.data import partitions
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.device.memory import physical_memory
from fslsage_rpc.device.placement import choose_device
from fslsage_rpc.errors import HostError, InputError
from fslsage_rpc.models.draws import unkeyed_draws
from fslsage_rpc.models.flat import module_bytes, parameter_count, sorted_weights, trainable
from fslsage_rpc.models.image_order import failure_by_order
from fslsage_rpc.models.splitting import Precision, SplitModel, has_batch_norm
from fslsage_rpc.parties import aggregation, codecs
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient
from fslsage_rpc.parties.optimizers import check_scheduler
from fslsage_rpc.parties.requests import TAKING_UP, BeginAlignment, Collect, Exchange, Push
from fslsage_rpc.tasks import Samples, Task, open_task
from fslsage_rpc.tasks.hashes import sample_hashes
from fslsage_rpc.tasks.images import ImageTask
from fslsage_rpc.transport import choices
from fslsage_rpc.units import GIB


def check(config: Config, ranks: int) -> None:
    """Find what can be found wrong before anything slow.

    Args:
        ranks: of the job; 1 for `transport: local`.

    Raises:
        InputError: the configuration cannot run here.
    """
    if config.transport == "rpc":
        _check_ranks(config, ranks)
    arguments(config.algorithm)
    name, order = config.algorithm.name, config.server.order
    algorithm = find(name)
    unknown = algorithm.requests_depend_on_values and not algorithm.client_holds_whole_model
    if unknown and order != "arrival":
        raise InputError(
            f"server.order: got {order!r}, expected arrival: the requests of {name} depend on values"
        )
    task = open_task(config)
    clients = config.clients
    if clients.minimum > clients.count:
        raise InputError(
            f"clients.minimum: got {clients.minimum}, expected at most clients.count, {clients.count}"
        )
    with torch.device("meta"):
        split = task.build()
        _check_weights(config, split)
    client = split.whole() if algorithm.client_holds_whole_model else split.client
    for model in (client, split.server) if algorithm.server_replicas else (client,):
        aggregation.try_out(config.aggregation, parameter_count(model), task.precision.weights)
    smashed = torch.Size([2, *split.smashed_shape]), task.precision.smashed
    fitted = torch.Size([sum(map(torch.numel, sorted_weights(split.auxiliary)[0]))])
    codecs.try_out(config.comm.codec.smashed, "smashed", *smashed)
    codecs.try_out(config.comm.codec.gradient, "gradient", *smashed)
    codecs.try_out(config.comm.codec.auxiliary, "auxiliary", fitted, task.precision.weights)
    for party, keys in vars(config.optimizer).items():
        check_scheduler(keys, party)
    choose_device(config.device, 0)
    task.prepare()


def _check_weights(config: Config, split: SplitModel) -> None:
    """A model's weights are averaged and sent in one buffer each of floats and of integers, and fit here."""
    keys, memory = config.model, physical_memory()
    for key, name, part in (
        ("model.name", keys.name, split.whole()),
        ("model.auxiliary.kind", keys.auxiliary.kind, split.auxiliary),
    ):
        try:
            sorted_weights(part)
        except TypeError as error:
            raise InputError(f"{key}: got {name!r}, where {error}") from None
        size = sum(weights.nbytes for weights in part.parameters())
        if memory is not None and size > memory:
            raise HostError(
                f"{key}: got {name!r}, whose weights are {size / GIB:,.0f} GiB with these keys, expected a "
                f"smaller one: this host's memory is {memory / GIB:,.0f} GiB"
            )


def _check_ranks(config: Config, ranks: int) -> None:
    clients, interface = config.clients.count, config.comm.interface
    if not choices.rpc_available():
        raise InputError("transport: got 'rpc', expected local: this build of torch has no RPC")
    if ranks < 2:
        raise InputError(f"transport: got 'rpc' on {ranks} rank, expected local, or at least 2 ranks")
    if ranks - 1 > clients:
        raise InputError(f"clients.count: got {clients}, expected at least {ranks - 1}, one per client rank")
    if config.clients.on_loss == "drop":
        _check_drop(config)
    if config.comm.averaging == "nccl" and not choices.nccl_available(config.device):
        raise HostError(
            "comm.averaging: got 'nccl', expected auto or gloo: there is no NCCL or GPU to use it on"
        )
    _check_channels(config.comm.channels)
    if interface is not None and interface not in choices.interfaces():
        raise HostError(
            f"comm.interface: got {interface!r}, expected one of {', '.join(choices.interfaces())}"
        )


def _check_channels(names: Sequence[str] | None) -> None:
    """What can be known of them before the ranks meet."""
    for name in names or ():
        if not choices.has_channel(name):
            raise HostError(f"comm.channels: got {name!r}, expected one that this build of torch has")
    if names and not set(choices.CPU_CHANNELS) & set(names):
        raise choices.lacking(names, choices.CPU_CHANNELS)


def _check_drop(config: Config) -> None:
    """Ranks that outlive each other need a launcher that lets them, and connections that can be cut."""
    if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" not in os.environ:
        raise InputError(
            "clients.on_loss: got 'drop', expected fail: torchrun, and fslsage itself, end all ranks when "
            "one is lost; start them by launch/local.sh --elastic or plain srun"
        )
    if config.comm.averaging == "nccl":
        raise InputError("comm.averaging: got 'nccl', expected auto or gloo, as clients.on_loss is 'drop'")
    if config.comm.transports not in (None, ["uv"]):
        raise InputError(
            f"comm.transports: got {config.comm.transports}, expected null or [uv]: clients.on_loss is 'drop'"
        )


@dataclass
class Experiment:
    """A configuration with all that follows from it alone, the same on every rank; for one training."""

    config: Config
    task: Task
    prepared: list[Samples]
    """the training samples, until they are taken"""
    parts: partitions.Partition
    partition_summary: list[dict[str, Any]]
    federation: Federation
    algorithm: Algorithm
    rehearsal: Rehearsal
    split: SplitModel
    warnings: list[str] = field(default_factory=list)
    """one line each, for the screen"""
    image_orders: dict[str, dict[str, str]] = field(default_factory=dict)
    """of passes, by processor and by name, as far as they have been chosen: `training/order_choice.py`"""

    @classmethod
    def prepare(cls, config: Config) -> "Experiment":
        """Load the data, divide it, and build the models.

        Raises:
            InputError: the data are missing, or cannot be divided or trained on as configured.
        """
        task = open_task(config)
        train = task.load(train=True)
        clients = config.clients
        _check_labels(config.data.name, task, train)
        parts = partitions.partition(config.data, train.labels.numpy(), clients.count, config.seed)
        federation = Federation(
            [len(part) for part in parts],
            clients.participation,
            clients.batch_size,
            clients.local_epochs,
            config.seed,
        )
        split = task.build()
        algorithm = create(config.algorithm, federation)
        rehearsal = Rehearsal(create(config.algorithm, federation), task, split)
        _check_memory_format(task, split, algorithm)
        if algorithm.auxiliary == "aligned":
            _check_alignment_derivatives(task, split)
        used = (split.client, split.server, *([] if algorithm.auxiliary == "none" else [split.auxiliary]))
        if any(map(has_batch_norm, used)):
            if algorithm.auxiliary == "aligned" and not algorithm.requests_depend_on_values:
                _check_alignment_batches(config, federation, rehearsal, algorithm.interval)
            alone = [client for client, sizes in enumerate(federation.batch_sizes) if 1 in sizes]
            if alone:
                raise InputError(
                    f"clients.batch_size: got {clients.batch_size}, expected one that leaves no batch of 1 "
                    f"for the BatchNorm of {config.model.name}: client {alone[0]} has {len(parts[alone[0]])} "
                    "samples"
                )
        return cls(
            config=config,
            task=task,
            prepared=[train],
            parts=parts,
            partition_summary=partitions.summary(parts, train.labels.numpy(), task.groups),
            federation=federation,
            algorithm=algorithm,
            rehearsal=rehearsal,
            split=split,
            warnings=[
                *_check_draws(task, split, algorithm),
                *_check_outputs(task, split, train),
                *_unused_codecs(config, rehearsal, algorithm),
                *_unused_lag(config, rehearsal, algorithm),
            ],
        )

    @cached_property
    def training_hashes(self) -> dict[str, Any]:
        """`sample_hashes` of all training samples; first asked for while they are here."""
        return sample_hashes(self.prepared[0])

    @cached_property
    def test_hashes(self) -> dict[str, Any]:
        """`sample_hashes` of the test samples."""
        return sample_hashes(self.task.load(train=False))

    def take_training_samples(self) -> Samples:
        """All of them, for clients to take theirs: a rank keeps no more. Next time they are loaded anew."""
        return self.prepared.pop() if self.prepared else self.task.load(train=True)

    def client_model(self) -> nn.Module:
        """What a client holds: its half of the model, or all of it."""
        return self.split.whole() if self.algorithm.client_holds_whole_model else self.split.client

    def sizes(self) -> Sizes:
        """The sizes that the paper ledger counts with."""
        return model_sizes(self.split, self.task.precision)


def model_sizes(split: SplitModel, precision: Precision) -> Sizes:
    """The sizes of a model that the paper ledger counts with."""
    return Sizes(
        client=module_bytes(split.client),
        server=module_bytes(split.server),
        auxiliary=module_bytes(split.auxiliary),
        smashed=torch.Size(split.smashed_shape).numel() * precision.smashed.itemsize,
    )


def _check_draws(task: Task, split: SplitModel, algorithm: Algorithm) -> list[str]:
    """In the reproducible orders nothing may be drawn that no key determines; else it is a warning."""
    name, order = task.config.model.name, task.config.server.order
    try:
        place = unkeyed_draws(split, task.sample_shape, auxiliary=algorithm.auxiliary != "none")
    except Exception as error:  # whatever the user's forward raises
        raise InputError(
            f"model.name: got {name!r}, whose train-mode forward pass fails ({first_line(error)})"
        ) from None
    if place is None:
        return []
    if order == "arrival":
        return [f"model.name: {name} draws random numbers that no seed determines ({place}): runs differ"]
    raise InputError(
        f"model.name: got {name!r}, which in training draws random numbers that no seed determines "
        f"({place}), expected one whose random layers are nn.Dropout or torchvision's StochasticDepth, or "
        f"server.order: arrival (it is {order})"
    )


def _check_labels(name: str, task: Task, train: Samples) -> None:
    """Labels count histograms and classes: one too large is not for the model to answer for."""
    least, most = int(train.labels.min()), int(train.labels.max())
    if least < 0 or most >= task.groups:
        raise InputError(
            f"data.name: got {name!r}, which gives training labels {least} to {most}, "
            f"expected 0 to {task.groups - 1}"
        )


def _check_outputs(task: Task, split: SplitModel, train: Samples) -> list[str]:
    """A classifier of images needs an output for each class; further ones may be meant. A loss of the user's
    own may take others.
    """
    if not isinstance(task, ImageTask) or type(task).loss is not ImageTask.loss:
        return []
    name, outputs = task.config.model.name, split.outputs_shape
    if len(outputs) != 1 or outputs[0] < task.classes:
        raise InputError(
            f"model.name: got {name!r}, which gives {list(outputs)} for an image, expected [{task.classes}], "
            "one logit for each class"
        )
    labels = len(train.labels.unique())
    if labels == 1:
        one = int(train.labels[0])
        return [
            f"data.name: all {len(train.labels)} training samples have the label {one}: nothing is learnt"
        ]
    if outputs[0] > labels:
        return [
            f"model.name: {name} has {outputs[0]} outputs, where the training samples have {labels} labels"
        ]
    return []


def _unused_codecs(config: Config, rehearsal: Rehearsal, algorithm: Algorithm) -> list[str]:
    """One line for each codec of what this algorithm does not send."""
    rounds = range(min(config.rounds, algorithm.interval))
    sent_by = {
        "smashed": ({Push.kind, Exchange.kind}, rounds),
        "gradient": ({Exchange.kind}, rounds),
        "auxiliary": (TAKING_UP, _rounds_of_alignments(config, algorithm)),
    }
    return [
        f"comm.codec.{kind} is not used by {config.algorithm.name}"
        for kind, keys in vars(config.comm.codec).items()
        if keys.name != "none" and not rehearsal.asks_for(*sent_by[kind])
    ]


def _unused_lag(config: Config, rehearsal: Rehearsal, algorithm: Algorithm) -> list[str]:
    """A line where no alignment goes on behind the training, or none ends in a model that clients take up."""
    key, lag = "algorithm.alignment.lag", config.algorithm.alignment.lag
    if not lag or algorithm.auxiliary != "aligned":  # which is said of all keys of alignments
        return []
    rounds = _rounds_of_alignments(config, algorithm)
    if not rehearsal.asks_for({BeginAlignment.kind}, rounds):
        return [f"{key} is not used by {config.algorithm.name}, which aligns nothing behind the training"]
    if not rehearsal.asks_for({Collect.kind}, rounds):
        return [f"{key}: got {lag}, so that no fitted model is taken up by round {len(rounds)}"]
    return []


def _rounds_of_alignments(config: Config, algorithm: Algorithm) -> range:
    """Those in which a fitted model is taken up if ever one is: clients that are away align later."""
    if algorithm.auxiliary != "aligned":
        return range(0)
    if config.clients.participation < 1:
        return range(config.rounds)
    return range(min(config.rounds, 2 * algorithm.interval + 1))  # a lag is shorter than an interval


def _check_memory_format(task: Task, split: SplitModel, algorithm: Algorithm) -> None:
    """Models of the user's own may `view` what they compute, which needs images in torch's usual order."""
    name, wanted = task.config.model.name, task.config.model.memory_format
    if wanted != "channels_last":
        return
    error = failure_by_order(split, task.sample_shape, auxiliary=algorithm.auxiliary != "none")
    if error:
        raise InputError(
            f"model.memory_format: got {wanted!r}, expected auto or contiguous: {name} fails on images in "
            f"that order ({first_line(error)})"
        )


def _check_alignment_derivatives(task: Task, split: SplitModel) -> None:
    """Alignment differentiates twice, which not all of torch's layers can."""
    z = torch.zeros(2, *split.smashed_shape, dtype=task.precision.smashed)
    y = torch.zeros(2, *task.label_shape, dtype=task.label_dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            estimate = cut_layer_gradient(split.auxiliary, z, y, task.loss, create_graph=True)
            torch.autograd.grad(estimate.square().sum(), trainable(split.auxiliary), allow_unused=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        keys = task.config.model.auxiliary
        key, got = ("kind", keys.kind) if is_own(keys.kind) else ("until", keys.until)
        raise InputError(
            f"model.auxiliary.{key}: got {got!r}, whose layers cannot be differentiated twice, as alignment "
            f"does ({reason}); expected kind linear or mlp"
        ) from None


def _check_alignment_batches(
    config: Config, federation: Federation, rehearsal: Rehearsal, interval: int
) -> None:
    """BatchNorm cannot normalise one sample, so no alignment may leave one over."""
    keys = config.algorithm.alignment
    may_be_absent = config.clients.on_loss == "drop"  # and align when they are back, in whatever round
    for client in range(len(federation.samples)):
        earlier = first = 0  # samples uploaded in the rounds before; in an aligning round before it aligns
        full = 0  # rounds that began with a full buffer
        for round in range(config.rounds):
            if not may_be_absent and client not in federation.participants(round):
                continue
            rehearsed = rehearsal.client(client, round)
            aligned = rehearsed.aligned(earlier, keys.buffer_size)
            if may_be_absent:
                first = min(rehearsed.aligned(0, keys.buffer_size), default=first)
                aligned = [min(before + first, keys.buffer_size) for before in (0, earlier)] if first else []
            for samples in aligned:
                if samples % keys.batch_size == 1:
                    raise InputError(
                        f"algorithm.alignment.batch_size: got {keys.batch_size}, expected one that leaves no "
                        f"batch of 1 to {config.model.name}'s BatchNorm: client {client} aligns on {samples}"
                    )
            full += earlier >= keys.buffer_size
            if keys.buffer_size in aligned or full > interval:
                break
            earlier += rehearsed.uploaded
