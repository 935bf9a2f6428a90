"""What a rank will need of memory, counted from what it will hold; nothing is allocated for it.

An upper estimate: what is held at different moments of a round is added up. Activations are counted in the
tensors that autograd keeps for a few real samples, which grow with the batch.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fslsage_rpc.algorithms import Algorithm
from fslsage_rpc.config.schema import Config
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient
from fslsage_rpc.parties.requests import Push
from fslsage_rpc.parties.turns import MOST_OPEN_STEPS
from fslsage_rpc.tasks import Samples
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.state_sizes import StateSizes

LIBRARIES_BYTES = 2**25
"""that torch's libraries fill in the first steps on a CPU; measured: 20 to 60 MiB for models of no size"""
CPU = torch.device("cpu")


@dataclass
class Memory:
    """Bytes of one rank, by what they hold."""

    models: int = 0
    optimizers: int = 0
    """their states, and the gradients of those that step at the same time"""
    data: int = 0
    activations: int = 0
    """of the batches in work, or of evaluation where that takes more"""
    requests: int = 0
    """smashed data on its way, and waiting for its turn at the server"""
    alignment: int = 0
    """buffers, true gradients and the graphs of the fits"""
    averaging: int = 0
    libraries: int = 0
    """in the host's memory, as the next"""
    checkpoint: int = 0
    """a copy of all states, and it once more in the form in which it is written"""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))

    @property
    def of_host(self) -> int:
        """What is in the host's memory though the rank computes on a GPU."""
        return self.libraries + self.checkpoint

    def plus(self, other: "Memory") -> "Memory":
        """That of one process that hosts both."""
        sums = {e.name: getattr(self, e.name) + getattr(other, e.name) for e in fields(self)}
        return Memory(**{**sums, "libraries": max(self.libraries, other.libraries)})


@dataclass(frozen=True)
class Activations:
    """Bytes per sample that a computation keeps for its backward pass, and of the largest tensor among
    them.
    """

    kept: int
    largest: int

    @property
    def peak(self) -> int:
        """While it runs backward: what is kept, and the gradients at both ends of its largest layer."""
        return self.kept + 2 * self.largest


class Estimate:
    """Counts the memory of the ranks of an experiment whose training data are still there."""

    def __init__(self, experiment: Experiment):
        assert experiment.prepared
        self.experiment = experiment
        self.config: Config = experiment.config
        self.algorithm: Algorithm = experiment.algorithm
        self.sizes = experiment.sizes()
        self.states = StateSizes(experiment)
        self.participants = len(experiment.federation.participants(0))
        window = self.config.comm.upload_window
        self._most_open = max(MOST_OPEN_STEPS, window)  # steps with requests, on one rank
        asked = experiment.rehearsal.kinds(range(min(self.config.rounds, self.algorithm.interval + 1)))
        self._travels = bool(asked)
        self._window = window if Push.kind in asked else 1
        # Steps that only upload run one after the other; one that waits for an answer keeps its graph.
        self._waiting = self._most_open if asked - {Push.kind} else 1
        self._batch = max(max(sizes) for sizes in experiment.federation.batch_sizes)
        self._sample = self.sizes.smashed + experiment.task.label_bytes
        split, loss = experiment.split, experiment.task.loss
        client, server, auxiliary = (
            copy.deepcopy(half) for half in (split.client, split.server, split.auxiliary)
        )
        whole = nn.Sequential(client, server)
        self._client = self._activations(lambda x, y: client(x))
        self._whole = self._activations(lambda x, y: loss(whole(x), y))
        self._server = self._activations(lambda x, y: loss(server(_cut(client, x)), y))
        self._estimate = self._activations(lambda x, y: loss(auxiliary(_cut(client, x)), y))

        def objective(x: Tensor, y: Tensor) -> Tensor:
            return cut_layer_gradient(auxiliary, _cut(client, x), y, loss, create_graph=True).square().sum()

        self._fit = self._activations(objective)

    def of_clients(self, clients: Sequence[int]) -> Memory:
        """A rank that hosts these clients."""
        if not clients:
            return Memory()
        states = self.states
        training = min(len(clients), self.participants)
        running = min(training, self._waiting) if self._travels else 1  # each holds the graph of its step
        sent = min(training * self._window, self._most_open) if self._travels else 0
        step, kept = (self._client.peak, self._client.kept) if self._travels else (self._whole.peak, 0)
        estimate = self._estimate.peak if states.auxiliary else 0
        gradients = states.model + (states.auxiliary if states.clients_train_auxiliary else 0)
        samples = sum(self.experiment.federation.samples[client] for client in clients)
        return Memory(
            models=len(clients) * (states.model + states.auxiliary),
            optimizers=len(clients) * states.client_moments + gradients,
            data=samples * self._stored_sample(),
            activations=self._batch * ((running - 1) * kept + step + estimate),
            requests=sent * self._batch * self._sample,
            averaging=3 * (states.model + states.auxiliary),
            libraries=LIBRARIES_BYTES,
            checkpoint=self._checkpointed(states.of_clients(clients)),
        )

    def of_server(self, workers: int, client_ranks: int, test: Samples, device: torch.device) -> Memory:
        """The server's rank.

        Args:
            workers: lanes that work at the same time, and fits likewise.
            client_ranks: how many ranks host clients.
            test: what it evaluates on.
            device: where it computes.
        """
        states = self.states
        stepping, fitting = min(states.lanes, workers), min(states.fits, workers)
        buffers = states.buffers
        aligned = min(
            self.config.algorithm.alignment.batch_size,
            max(map(states.buffered, range(states.fits)), default=0),
        )
        graphs = fitting * self._fit.peak + (self._server.peak if states.fits else 0)
        training = stepping * self._batch * self._server.peak
        waiting = min(self.participants * self._window, client_ranks * self._most_open) if states.lanes else 0
        snapshot = self.sizes.server if states.fits and device.type == "cpu" else 0
        evaluating = min(self.config.evaluation.batch_size, len(test.labels)) * 3 * self._whole.largest
        return Memory(
            models=states.model
            + states.auxiliary
            + self._server_models()
            + snapshot,  # first what clients get
            optimizers=states.server_moments + stepping * self.sizes.server + fitting * states.auxiliary,
            data=_held(test),
            activations=max(training, evaluating),
            requests=waiting * self._batch * self._sample,
            alignment=3 * buffers + aligned * graphs,  # the fits have a copy, and true gradients beside it
            averaging=(self.sizes.server if states.lanes > 1 else 0) + states.auxiliary,
            libraries=LIBRARIES_BYTES,
            checkpoint=self._checkpointed(states.of_server()),
        )

    def training_data_bytes(self) -> int:
        """All training samples, which a rank lets go once its clients have theirs."""
        assert self.experiment.prepared
        return _held(self.experiment.prepared[0])

    def _server_models(self) -> int:
        """The averaged client model, and those that it trains."""
        states = self.states
        return states.model + states.lanes * self.sizes.server + states.fits * states.auxiliary

    def _checkpointed(self, states: int) -> int:
        return 0 if self.config.checkpoint.every is None else 2 * states

    def _stored_sample(self) -> int:
        train = self.experiment.prepared[0]
        assert train is not None
        return sum(tensor[0].nbytes for tensor in train.tensors)

    def _activations(self, compute: Callable[[Tensor, Tensor], Tensor]) -> Activations:
        """Counted on a batch and one of twice as many samples: what is the same for both (weights) is not per
        sample.
        """
        samples, few, more = 2, self._kept(compute, 2), self._kept(compute, 4)
        # From some size on images are reordered in memory (`Segment.reorders`).
        while len(few) != len(more) and samples < self._batch:
            samples, few, more = 2 * samples, more, self._kept(compute, 4 * samples)
        if len(few) != len(more):  # a model of the user's own that keeps more tensors of more samples
            return Activations((sum(more) - sum(few)) // samples, max(more) // (2 * samples))
        growth = [(twice - once) // samples for once, twice in zip(few, more, strict=True)]
        return Activations(sum(growth), max(growth))

    def _kept(self, compute: Callable[[Tensor, Tensor], Tensor], samples: int) -> list[int]:
        """The bytes of each tensor that is kept for the backward pass of so many samples."""
        train = self.experiment.prepared[0]
        assert train is not None
        first = train.subset(torch.arange(samples) % len(train.labels))
        ((x, y),) = self.experiment.task.batches(first, samples, CPU).in_order()
        return _saved_by(partial(compute, x, y))


def _held(data: Samples) -> int:
    """A dataset of which only the first samples are used is held whole."""
    return sum(tensor.untyped_storage().nbytes() for tensor in data.tensors)


def _cut(client: nn.Module, x: Tensor) -> Tensor:
    """Smashed data as the server gets it: a leaf."""
    with torch.no_grad():
        z: Tensor = client(x)
    return z.requires_grad_()


def _saved_by(compute: Callable[[], object]) -> list[int]:
    """The bytes of each tensor that autograd keeps for the backward pass of a computation."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return [storage.nbytes() for storage in kept.values()]
