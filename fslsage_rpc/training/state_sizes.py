"""The bytes of what the parties keep from round to round, counted before anything is allocated for it."""

from collections.abc import Sequence

from fslsage_rpc.job.world import job_ranks
from fslsage_rpc.models.flat import module_bytes
from fslsage_rpc.training.experiment import Experiment

MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0}
"""what each optimizer keeps of a parameter, in its size"""


class StateSizes:
    """Counts the states of an experiment's parties once all clients have taken part: an upper bound.

    Attributes:
        model: bytes of a client's model.
        auxiliary: bytes of an auxiliary model; 0 where the algorithm has none.
        fits: how many of those the server aligns.
        lanes: how many server models are trained.
        clients_train_auxiliary: do clients have optimizers for them?
    """

    def __init__(self, experiment: Experiment):
        self._config, self._experiment = experiment.config, experiment
        algorithm, sizes = experiment.algorithm, experiment.sizes()
        kind, clients = algorithm.auxiliary, len(experiment.parts)
        self._server = sizes.server
        self._sample = sizes.smashed + experiment.task.label_bytes
        self.model = module_bytes(experiment.client_model())
        self.auxiliary = 0 if kind == "none" else sizes.auxiliary
        course = experiment.rehearsal.course(0)
        self.clients_train_auxiliary = course.trains_auxiliary if course else kind != "none"
        self.fits = clients if kind == "aligned" else 0
        self.lanes = 0 if algorithm.client_holds_whole_model else 1
        if algorithm.server_replicas:
            self.lanes = clients

    @property
    def client_moments(self) -> int:
        """The state of one client's optimizers."""
        keys = self._config.optimizer
        auxiliary = MOMENTS[keys.auxiliary.name] * self.auxiliary if self.clients_train_auxiliary else 0
        return MOMENTS[keys.client.name] * self.model + auxiliary

    @property
    def server_moments(self) -> int:
        """The states of all optimizers of the server."""
        keys = self._config.optimizer
        lanes = self.lanes * MOMENTS[keys.server.name] * self._server
        return lanes + self.fits * MOMENTS[keys.auxiliary.name] * self.auxiliary

    @property
    def buffers(self) -> int:
        """The samples in all alignment buffers."""
        return sum(map(self.buffered, range(self.fits))) * self._sample

    def buffered(self, client: int) -> int:
        """Samples of a client in its alignment buffer at the most: if each round uploads as much as one."""
        algorithm, size = self._experiment.algorithm, self._config.algorithm.alignment.buffer_size
        if algorithm.requests_depend_on_values:
            return size
        samples = 0
        for round in range(min(self._config.rounds, algorithm.interval + 1)):
            if samples >= size:
                break  # the usual case, in the first round
            uploaded = self._experiment.rehearsal.client(client, round).uploaded
            samples = max(samples, self._config.rounds * uploaded)
        return min(samples, size)

    def of_clients(self, clients: Sequence[int]) -> int:
        """The part of a rank that hosts these: models that averaging has made equal are kept once."""
        auxiliaries = len(clients) if self.fits else min(len(clients), 1)
        models = min(len(clients), 1) * self.model + auxiliaries * self.auxiliary
        return models + len(clients) * self.client_moments

    def of_server(self) -> int:
        """The part of the server's rank: replicas that averaging has made equal are kept once."""
        models = self.model + min(self.lanes, 1) * self._server + self.fits * self.auxiliary
        return models + self.server_moments + self.buffers

    def checkpoint(self) -> int:
        """One checkpoint, of all ranks of the job; in one process clients and server share their models."""
        clients, client_ranks = range(len(self._experiment.parts)), job_ranks(self._config) - 1
        if client_ranks > 0:
            parts = [self.of_clients(clients[rank::client_ranks]) for rank in range(client_ranks)]
            return self.of_server() + sum(parts)
        own = 0 if self.fits else self.auxiliary
        return self.of_server() + own + len(clients) * self.client_moments
