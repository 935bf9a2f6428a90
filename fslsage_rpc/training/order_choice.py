"""Which order of memory images have inside a model (`model.memory_format: auto`), by timing both.

On one processor a pixel's channels together (`channels_last`) speed a part of a model up, on another they
slow it down. So each part is timed at the start of a run, in each kind of pass that the algorithm makes.
Ranks with the same processor take the same order.
"""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fslsage_rpc.config.schema import Auxiliary
from fslsage_rpc.device.clock import clock, cpu_clock
from fslsage_rpc.device.placement import CPU, device_name
from fslsage_rpc.job.world import World
from fslsage_rpc.models.draws import left_as_they_were
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.models.flat import trainable
from fslsage_rpc.models.segment import Segment
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient
from fslsage_rpc.parties.losses import Loss
from fslsage_rpc.randomness import START
from fslsage_rpc.tasks import Task
from fslsage_rpc.training.experiment import Experiment
from fslsage_rpc.training.sameness import own_sources
from fslsage_rpc.transport.base import Transport

SECONDS = 5.0
"""that all timing of a rank takes at most, up to the end of a pass"""
LARGEST_BATCH = 128
FEWEST_SAMPLES = 2
"""of the first pass, by which the batch is cut further where passes are long"""
MOST_PAIRS = 5
PASSES = 9
"""of a batch that should fit into a share of the time: to come to that batch, to warm up, and three pairs"""
GROWTH = 4
"""by which the batch grows at most from one trial to the next"""
MARGIN = 0.03
"""by which `channels_last` must be faster: what two equal times may differ by"""
UNLIKE = 0.25
"""the relative difference of outputs that no rounding makes, at any precision"""
USUAL, REORDERED = "contiguous", "channels_last"
Clock = Callable[[], float]
"""in seconds"""

_remembered: dict[str, str] = {}  # of this process, so that its trainings of one model take the same orders


class Timed(Protocol):
    """A pass that can be made in either order."""

    @property
    def batch(self) -> int:
        """The samples of a batch."""
        ...

    def run(self, samples: int, reordered: bool) -> None:
        """Make it on so many samples."""

    def same_numbers(self) -> bool:
        """Does the part compute the same in either order, but for rounding?"""


def choose(
    passes: Mapping[str, Timed],
    seconds: float = SECONDS,
    wall: Clock = clock,
    own: Clock | None = None,
) -> dict[str, str]:
    """The faster order of each pass, by its name.

    Each gets an equal share of the time that is left. It stays contiguous where it gets none, where
    `channels_last` does not win by the margin, or where it fails in that order.

    Args:
        seconds: for all of it.
        wall: the clock that tells how many are left.
        own: the clock that passes are compared by. By default that is CPU time of this thread, which others
            disturb less, and the wall clock where torch has more threads.
    """
    own = own or (cpu_clock if torch.get_num_threads() == 1 else wall)
    ends = wall() + seconds
    chosen = dict.fromkeys(passes, USUAL)
    for number, (name, each) in enumerate(passes.items()):
        share = (ends - wall()) / (len(passes) - number)
        try:
            if share > 0 and each.same_numbers() and _gains(each, share, wall, own):
                chosen[name] = REORDERED
        except Exception:  # whatever the user's forward raises; in the usual order training raises it again
            continue
    return chosen


def _gains(each: Timed, seconds: float, wall: Clock, own: Clock) -> bool:
    """Is a pass faster with its images reordered? Both orders take turns, and who begins does, too."""

    def timed(by: Clock, *orders: bool) -> list[float]:
        times = [by()]
        for reordered in orders:
            each.run(samples, reordered)
            times.append(by())
        return [later - earlier for earlier, later in pairwise(times)]

    ends, limit = wall() + seconds, seconds / PASSES
    samples = min(FEWEST_SAMPLES, each.batch)
    _, took = timed(wall, False, False)
    affordable = 2.0 * samples if took <= limit else 0.0
    while (larger := int(min(GROWTH * samples, affordable, each.batch))) >= 1.5 * samples:
        fewer, before, samples = samples, took, larger
        (took,) = timed(wall, False)
        for_one = max((took - before) / (samples - fewer), 1e-9)  # seconds that one sample more takes
        affordable = samples + (limit - took) / for_one
    if wall() + took > ends:
        return False
    began, ratios = wall(), list[float]()
    timed(own, True)  # warms up
    pair = took + wall() - began
    while len(ratios) < MOST_PAIRS and wall() + pair <= ends:
        began = wall()
        if len(ratios) % 2 == 0:
            usual, reordered = timed(own, False, True)
        else:
            reordered, usual = timed(own, True, False)
        ratios.append(reordered / usual)
        pair = wall() - began
    return bool(ratios) and statistics.median(ratios) < 1 - MARGIN


@dataclass(frozen=True)
class ImagePass:
    """A kind of pass of a part of a model, forward and backward, on random numbers.

    Args:
        kind: what it is called.
        shape: of one sample of the input, `[C, H, W]`.
        batch: the samples of the largest batch, cut to `LARGEST_BATCH`.
        twice: whether it is differentiated twice: a pass of a fit.
    """

    kind: str
    part: Segment
    shape: tuple[int, ...]
    batch: int
    task: Task
    dtype: torch.dtype
    twice: bool = False

    @property
    def name(self) -> str:
        """With the shape of its input."""
        return f"{self.kind} on {[self.batch, *self.shape]}"

    def run(self, samples: int, reordered: bool) -> None:
        """Keeps no gradient of a parameter."""
        self.part.reorder_images(reordered, reordered)
        Masks(self.part, seed=0).begin(START)
        x, y = self._batch(samples)
        PASSES_BY_KIND[self.kind](self.part, x, y, self.task.loss)

    def same_numbers(self) -> bool:
        """Compares the outputs of two samples in eval mode, which is not timed."""
        x, _ = self._batch(FEWEST_SAMPLES)
        outputs = []
        training = self.part.training
        self.part.eval()
        try:
            for reordered in (False, True):
                self.part.reorder_images(reordered, reordered)
                with torch.no_grad():
                    outputs.append(self.part(x).double())
        finally:
            self.part.train(training)
        usual, other = outputs
        return bool((other - usual).norm() <= UNLIKE * usual.norm())

    def _batch(self, samples: int) -> tuple[Tensor, Tensor]:
        """Inputs `[samples, C, H, W]` and labels; always the same."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, *self.shape, generator=generator).to(self.dtype)
        return x, torch.zeros(samples, *self.task.label_shape, dtype=self.task.label_dtype)


def _client_step(part: Segment, x: Tensor, y: Tensor, loss: Loss) -> None:
    """Some gradient of the smashed data goes back to the weights."""
    z = part(x)
    torch.autograd.grad(z, trainable(part), torch.ones_like(z), allow_unused=True)


def _whole_model_step(part: Segment, x: Tensor, y: Tensor, loss: Loss) -> None:
    torch.autograd.grad(loss(part(x), y), trainable(part), allow_unused=True)


def _step_with_gradient(part: Segment, z: Tensor, y: Tensor, loss: Loss) -> None:
    """To the weights and to the smashed data."""
    z.requires_grad_()
    torch.autograd.grad(loss(part(z), y), [z, *trainable(part)], allow_unused=True)


def _estimate(part: Segment, z: Tensor, y: Tensor, loss: Loss) -> None:
    cut_layer_gradient(part, z, y, loss)


def _fit(part: Segment, z: Tensor, y: Tensor, loss: Loss) -> None:
    """The objective of a batch, towards a true gradient of zeros, and its gradient."""
    estimate = cut_layer_gradient(part, z, y, loss, create_graph=True)
    torch.autograd.grad(estimate.square().sum(), trainable(part), allow_unused=True)


PASSES_BY_KIND = {
    "whole-model step": _whole_model_step,
    "estimate": _estimate,
    "auxiliary step": _step_with_gradient,
    "client step": _client_step,
    "server step": _step_with_gradient,
    "fit": _fit,
}


def image_passes(experiment: Experiment) -> Iterator[ImagePass]:
    """The passes that an algorithm makes, of parts that convolve images; cheap ones first, as they leave of
    their time to the others.
    """
    config, task, split = experiment.config, experiment.task, experiment.split
    algorithm, precision = experiment.algorithm, task.precision
    batch = max((size for sizes in experiment.federation.batch_sizes for size in sizes), default=1)
    keys = config.algorithm.alignment
    images = (task.sample_shape, batch, precision.weights)
    smashed = (split.smashed_shape, batch, precision.smashed)
    fitted = (split.smashed_shape, min(keys.batch_size, keys.buffer_size), precision.smashed)
    if algorithm.client_holds_whole_model:
        made: list[tuple[str, Any, tuple[Any, ...]]] = [("whole-model step", split.whole(), images)]
    else:
        made = [("client step", split.client, images), ("server step", split.server, smashed)]
    if algorithm.auxiliary == "trained":
        made.insert(0, ("auxiliary step", split.auxiliary, smashed))
    elif algorithm.auxiliary == "aligned":
        made = [("estimate", split.auxiliary, smashed), *made, ("fit", split.auxiliary, fitted)]
    for kind, part, (shape, samples, dtype) in made:
        if isinstance(part, Segment) and part.has_convolutions and len(shape) == 3:
            each = min(samples, LARGEST_BATCH)
            yield ImagePass(kind, part, tuple(shape), each, task, dtype, twice=kind == "fit")


def measure(experiment: Experiment, passes: Mapping[str, ImagePass]) -> dict[str, str]:
    """The faster orders of these passes; models, gradients and random numbers are left as they were.

    What this process has chosen before for the same parts of the same model, it chooses again.
    """
    config = experiment.config
    halves = replace(config.model, auxiliary=Auxiliary())  # which are the same beside any auxiliary model
    keys = {
        name: repr((name, config.model if each.part is experiment.split.auxiliary else halves))
        + repr((config.data.name, config.data.arguments, config.precision, own_sources(config)))
        for name, each in passes.items()
    }
    asked = {name: each for name, each in passes.items() if keys[name] not in _remembered}
    with left_as_they_were(each.part for each in asked.values()):
        found = choose(asked)
    _remembered.update({keys[name]: order for name, order in found.items()})
    return {name: _remembered[key] for name, key in keys.items()}


def agree(
    transport: Transport,
    processor: str,
    names: Collection[str],
    known: Mapping[str, Mapping[str, str]],
    measured: Callable[[list[str]], dict[str, str]],
) -> dict[str, dict[str, str]]:
    """Collective: the orders of passes, by processor and by name, the same on all ranks.

    The first rank with a processor measures what is not known for it, while the others wait.

    Args:
        processor: of this rank.
        names: of the passes that are made there.
        known: before; only rank 0's counts.
        measured: orders of passes, by timing them.
    """
    ranks = transport.broadcast(transport.gather((processor if names else None, known)))
    processors = [name for name, _ in ranks]
    before = ranks[0][1]
    missing = [name for name in names if name not in before.get(processor, {})]
    mine = measured(missing) if missing and processors.index(processor) == transport.rank else {}
    orders = {name: dict(found) for name, found in before.items()}
    for name, found in zip(processors, transport.broadcast(transport.gather(mine)), strict=True):
        if found:
            orders[name] = orders.get(name, {}) | found
    return orders


def order_images(experiment: Experiment, world: World) -> None:
    """Collective: have images in the faster order, where the configuration leaves it open and ranks compute
    on a CPU.

    Orders that are known from before are in `experiment.image_orders`, where all are afterwards.
    """
    if experiment.config.model.memory_format != "auto":
        return
    of_cpu = world.device.type == "cpu"
    passes = {each.name: each for each in image_passes(experiment)} if of_cpu else {}
    processor = device_name(CPU)

    def measured(names: list[str]) -> dict[str, str]:
        return measure(experiment, {name: passes[name] for name in names})

    orders = agree(world.transport, processor, passes, experiment.image_orders, measured)
    experiment.image_orders.update(orders)
    reordered = {
        (each.part, each.twice) for name, each in passes.items() if orders[processor][name] == REORDERED
    }
    for part in {each.part for each in passes.values()}:
        part.reorder_images(once=(part, False) in reordered, twice=(part, True) in reordered)
