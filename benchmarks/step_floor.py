"""How far a round is from its bare arithmetic: ResNet-18 on CIFAR-10 shapes, 4 clients, batches of 128.

    python benchmarks/step_floor.py [key=value ...]

Starts a server rank and two client ranks.
In turn they run real rounds, over RPC, and each client rank alone the arithmetic of its clients' rounds.

That arithmetic takes nothing of the program.
Its modules are torchvision's, its optimizers torch's.
An alignment is the true gradients and then the passes of the fit.
A part's weights and images lie in memory as usual or `channels_last`, as is faster in its kind of pass.
That is found by timing.
There is no transport, order, data preparation or averaging, and nothing is recorded.

The floor is the CPU seconds of the arithmetic over the cores.
A round would take that long if nothing else cost anything and no core ever waited.
One sample of FSL-SAGE is an alignment interval of two rounds.
Takes four to ten minutes on 2 cores.

Prints the medians, and last, one a line, the medians of the paired ratios floor / round.
"""

import copy
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from rank_job import overrides_on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Config, OptimizerKeys
from fslsage_rpc.device.clock import clock, cpu_clock, synchronise
from fslsage_rpc.device.cores import usable_cores
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.job.world import World
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.trainer import Trainer

RANKS = 3
PAIRS = 6
BATCHES = 5
"""of each client in a round"""
CLASSES = 10
ORDERS = (torch.contiguous_format, torch.channels_last)
TRIALS = 5
"""of each order"""
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def configuration(algorithm: str, overrides: list[str]) -> Config:
    """Synthetic images are as good as any: nothing here looks at what is learnt."""
    batch = 128
    tree = {
        "ranks": RANKS,
        "device": "cpu",
        "rounds": 2 * (PAIRS + 1),
        "clients": {"count": 4, "batch_size": batch},
        "data": {"name": "synthetic", "partition": "iid", "train_limit": 4 * BATCHES * batch},
        "model": {"name": "resnet18"},
        "algorithm": {
            "name": algorithm,
            "align_every": 2,
            "start": "paper",  # rounds 1, 3, ... align
            "alignment": {"epochs": 5, "batch_size": batch, "buffer_size": 2 * batch},
            "measure_drift": False,
        },
    }
    return from_tree(tree, overrides)


class Part:
    """A part of the model in one order of memory, and its optimizer.

    Args:
        autocast: what its layers compute in where autocast finds that safe; None: in fp32.
    """

    def __init__(
        self, model: nn.Module, order: torch.memory_format, keys: OptimizerKeys, autocast: torch.dtype | None
    ):
        self.model = copy.deepcopy(model).to(memory_format=order)
        self._order, self._autocast = order, autocast
        make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[keys.name]
        self._optimizer = make(
            self.model.parameters(), lr=keys.lr, weight_decay=keys.weight_decay, fused=True
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The output for an input `[B, C, H, W]`."""
        with torch.autocast(x.device.type, self._autocast, enabled=self._autocast is not None):
            output: Tensor = self.model(x.contiguous(memory_format=self._order))
        return output

    def gradient(self, z: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
        """The gradient of the loss with respect to z alone."""
        z = z.detach().requires_grad_()
        loss = F.cross_entropy(self(z).float(), y)
        (gradient,) = torch.autograd.grad(loss, z, create_graph=create_graph)
        return gradient

    def train(self, z: Tensor, y: Tensor, answers: bool) -> Tensor | None:
        """A step on the loss, and where it answers, the gradient with respect to z."""
        z = z.detach().requires_grad_(answers)
        F.cross_entropy(self(z).float(), y).backward()
        self.step()
        return z.grad

    def train_by(self, x: Tensor, gradient_of: Callable[[Tensor], Tensor]) -> None:
        """A step by a gradient with respect to the output."""
        z = self(x)
        z.backward(gradient_of(z.detach()))
        self.step()

    def fit(self, z: Tensor, y: Tensor, true: Tensor) -> None:
        """A step on the squared error of the estimate."""
        estimate = self.gradient(z, y, create_graph=True)
        (estimate.float() - true.float()).square().sum().backward(inputs=list(self.model.parameters()))
        self.step()

    def step(self) -> None:
        """The optimizer's."""
        self._optimizer.step()
        self._optimizer.zero_grad()


def resnet18_cut_at_layer2() -> tuple[nn.Module, nn.Module, nn.Module]:
    """The client half, the server half and the auxiliary model."""
    whole = torchvision.models.resnet18(num_classes=CLASSES)
    client = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool, whole.layer1, whole.layer2)
    server = nn.Sequential(whole.layer3, whole.layer4, whole.avgpool, nn.Flatten(), whole.fc)
    layer3 = torchvision.models.resnet18().layer3
    return client, server, nn.Sequential(layer3, whole.avgpool, nn.Flatten(), nn.Linear(256, CLASSES))


def track_statistics(model: nn.Module, tracks: bool) -> None:
    """From here on passes of a model move its running statistics, or leave them as they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = tracks


class Arithmetic:
    """The passes and steps of clients, and of the server for them, in rounds of FSL-SAGE or SplitFedV1.

    Args:
        clients: how many; of none there is no arithmetic.
    """

    def __init__(self, config: Config, clients: int, device: torch.device):
        self._keys, self._clients = config.algorithm, range(clients)
        self._aligns = config.algorithm.name == "fsl_sage"
        self._autocast = torch.bfloat16 if config.precision == "bf16" else None
        self._device = device
        if clients:
            self._prepare(config)

    def _prepare(self, config: Config) -> None:
        batch, samples, keys = config.clients.batch_size, config.data.train_limit, config.optimizer
        assert samples is not None
        batches = samples // config.clients.count // batch
        images = torch.randn(batches, batch, 3, 32, 32, device=self._device)
        labels = torch.randint(CLASSES, (batches, batch), device=self._device)
        self._batches = list(zip(images, labels, strict=True))
        client, server, auxiliary = (part.to(self._device) for part in resnet18_cut_at_layer2())
        x, y = self._batches[0]
        z = Part(client, ORDERS[0], keys.client, self._autocast)(x).detach()
        some = torch.randn_like(z)
        parts = len(self._clients)
        self._halves = self._faster(client, keys.client, parts, lambda part: part.train_by(x, lambda _: some))
        answers, lanes = not self._aligns, 1 if self._aligns else parts
        replicas = self._faster(server, keys.server, lanes, lambda part: part.train(z, y, answers))
        self._lanes = replicas * (parts // lanes)
        if self._aligns:
            track_statistics(auxiliary, False)
            self._fits = self._faster(auxiliary, keys.auxiliary, parts, lambda part: part.fit(z, y, some))
            self._estimators = self._faster(
                auxiliary.requires_grad_(False), keys.auxiliary, parts, lambda part: part.gradient(z, y)
            )
            kept = config.algorithm.alignment.buffer_size // batch
            self._buffers = [deque[tuple[Tensor, Tensor]](maxlen=kept) for _ in self._clients]

    def cpu_seconds(self, rounds: range) -> float:
        """CPU seconds of this process for the arithmetic of these rounds."""
        started = time.process_time()
        self.run(rounds)
        return time.process_time() - started

    def run(self, rounds: range) -> None:
        """The arithmetic of these rounds; on a GPU it is queued on return."""
        for t in rounds:
            for client in self._clients:
                for step, (x, y) in enumerate(self._batches):
                    by = self._estimate if self._aligns else self._exchange
                    self._halves[client].train_by(x, partial(by, client, t, step, y))

    def _exchange(self, client: int, t: int, step: int, y: Tensor, z: Tensor) -> Tensor:
        """The true gradient, of a step of the client's replica."""
        gradient = self._lanes[client].train(z, y, answers=True)
        assert gradient is not None
        return gradient

    def _estimate(self, client: int, t: int, step: int, y: Tensor, z: Tensor) -> Tensor:
        """The estimate, after what an upload and an alignment come to."""
        if step % self._keys.upload_every == 0:
            self._lanes[client].train(z, y, answers=False)
            self._buffers[client].append((z, y))
        if step == 0 and self._keys.align_every and t % self._keys.align_every == 0:
            self._align(client)
        return self._estimators[client].gradient(z, y)

    def _align(self, client: int) -> None:
        """The true gradients of the buffer, then the passes of the fit, then the weights to the client."""
        lane, fit, estimator = self._lanes[client], self._fits[client], self._estimators[client]
        track_statistics(lane.model, False)
        targets = [(z, y, lane.gradient(z, y)) for z, y in self._buffers[client]]
        track_statistics(lane.model, True)
        for _ in range(self._keys.alignment.epochs):
            for target in targets:
                fit.fit(*target)
        estimator.model.load_state_dict(fit.model.state_dict())

    def _faster(
        self, model: nn.Module, keys: OptimizerKeys, count: int, work: Callable[[Part], object]
    ) -> list[Part]:
        """So many copies of a part in the order in which this work is done faster."""
        seconds: dict[torch.memory_format, list[float]] = {order: [] for order in ORDERS}
        trials = {order: Part(model, order, keys, self._autocast) for order in ORDERS}
        told = cpu_clock if self._device.type == "cpu" else clock  # as the floor is
        for _ in range(TRIALS + 1):
            for order, part in trials.items():
                synchronise(self._device)
                started = told()
                work(part)
                synchronise(self._device)
                seconds[order].append(told() - started)
        order = min(ORDERS, key=lambda order: statistics.median(seconds[order][1:]))  # the first one warms up
        return [Part(model, order, keys, self._autocast) for _ in range(count)]


def compare(config: Config, world: World) -> tuple[list[float], list[float]]:
    """Floors and seconds of real rounds, pair by pair, per round; on the server's rank."""
    trainer = Trainer(Experiment.prepare(config), world)
    arithmetic = Arithmetic(config, len(trainer.clients), world.device)
    interval = trainer.experiment.algorithm.interval
    floors, seconds = [], []
    for pair in range(PAIRS + 1):
        rounds = range(pair * interval, (pair + 1) * interval)
        measured = sum(trainer.train_round(round) for round in rounds)
        world.transport.barrier()
        spent = world.transport.gather(arithmetic.cpu_seconds(rounds))
        if spent and pair:  # the first one warms up
            floors.append(sum(spent) / len(usable_cores()) / interval)
            seconds.append(measured / interval)
    trainer.close()
    return floors, seconds


def main() -> None:
    """As one rank of a job; without one, start it."""
    overrides = overrides_on_ranks(__file__, __doc__, RANKS)
    world: World | None = None
    ratios = {}
    for algorithm in ("fsl_sage", "splitfed_v1"):
        config = configuration(algorithm, overrides)
        world = world or open_world(config)
        floors, seconds = compare(config, world)
        if world.hosts_server:
            print(
                f"{algorithm}: floor {statistics.median(floors):.3f} s, round "
                f"{statistics.median(seconds):.3f} s, {PAIRS} pairs, {len(usable_cores())} cores, "
                f"{torch.get_num_threads()} thread per rank",
                flush=True,
            )
            ratios[algorithm] = statistics.median(f / s for f, s in zip(floors, seconds, strict=True))
    assert world is not None
    for algorithm, ratio in ratios.items():
        print(f"{algorithm} floor / round {ratio:.3f}", flush=True)
    world.close()


if __name__ == "__main__":
    main()
