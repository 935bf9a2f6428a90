"""What makes an alignment cheaper: the same fits by several ways, side by side.

    python benchmarks/alignment.py [ways | stopping] [--device cpu]

ways: for each kind of auxiliary model (a copy of ResNet-18's `layer3`, an mlp, a linear layer), every way
makes the same passes over the same targets for the same clients, in turn: one client after the other with one
thread per operation (the reference), and with all cores for each; clients side by side on threads, as the
server does (beside the reference, and beside all cores); clients stacked by `torch.func.vmap`, so that one
call fits all of them (convolutions become grouped ones, linear layers one batched product); and one client
after the other with the gradient compiled by `torch.compile`. Prints seconds per pass and client, the median
of the paired ratios to what it is beside, and how far the fitted weights are from that one's at fp64, over
the largest weight.

stopping: what an early stop and L-BFGS do: passes, and what is left of the objective.

Without a word both; about nine minutes on 2 cores.
"""

import argparse
import copy
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from fslsage_rpc.config.schema import AlignmentKeys, Auxiliary, Model, OptimizerKeys
from fslsage_rpc.device.clock import clock, synchronise
from fslsage_rpc.models.segment import Segment
from fslsage_rpc.models.splitting import SplitModel, build
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit, Target
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.optimizers import ScheduledOptimizer

CLIENTS = 4
BATCH = 50
BATCHES = 5
PAIRS = 5
CASES = [  # model, auxiliary model, samples of a batch, batches, passes of one sample
    ("resnet18", Auxiliary(), BATCH, BATCHES, 2),
    ("resnet18", Auxiliary(kind="mlp", width=128), BATCH, BATCHES, 40),
    ("resnet18", Auxiliary(kind="linear"), BATCH, BATCHES, 40),
    ("simple_conv", Auxiliary(kind="mlp", width=128), BATCH, BATCHES, 20),
    ("simple_conv", Auxiliary(kind="linear"), BATCH, BATCHES, 20),
    ("simple_conv", Auxiliary(kind="linear"), 1000, 1, 20),
]
"""the last one as `algorithm.alignment` is by default"""
Way = Callable[[list[AuxiliaryFit], list[list[Target]]], list[Tensor]]
"""fits in place; returns each client's weights"""


def make_fits(
    split: SplitModel,
    device: torch.device,
    epochs: int,
    batch: int = BATCH,
    batches: int = BATCHES,
    **keys: Any,
) -> list[AuxiliaryFit]:
    """One for each client, all from the same weights, with data of its own in its buffer."""
    fits = []
    for client in range(CLIENTS):
        model = copy.deepcopy(split.auxiliary).to(device)
        drawn = torch.Generator().manual_seed(client)
        of_alignment = AlignmentKeys(epochs=epochs, batch_size=batch, buffer_size=batch * batches, **keys)
        optimizer = ScheduledOptimizer(OptimizerKeys(), model.parameters())
        fit = AuxiliaryFit(model, optimizer, of_alignment, Context(device))
        for _ in range(batches):
            z = torch.randn(batch, *split.smashed_shape, generator=drawn, dtype=torch.float64)
            y = torch.randint(10, (batch,), generator=drawn)
            fit.buffer.add(z.to(device, fit.weights.floats.dtype), y.to(device))
        fits.append(fit)
    return fits


def parameters_of(fits: list[AuxiliaryFit]) -> list[Tensor]:
    """Each client's; running statistics, which nothing reads in train mode, are left out."""
    return [torch.cat([p.detach().flatten() for p in fit.model.parameters()]) for fit in fits]


def in_turn(fits: list[AuxiliaryFit], targets: list[list[Target]]) -> list[Tensor]:
    """The program's fit, one client after the other."""
    for fit, mine in zip(fits, targets, strict=True):
        fit.fit(mine)
    return parameters_of(fits)


def on_threads(fits: list[AuxiliaryFit], targets: list[list[Target]]) -> list[Tensor]:
    """The program's fit on as many threads as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda fit, mine: fit.fit(mine), fits, targets))
    return parameters_of(fits)


def on_all_cores(fits: list[AuxiliaryFit], targets: list[list[Target]]) -> list[Tensor]:
    """The program's fit, one client after the other, each operation on as many threads as there are cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        return in_turn(fits, targets)
    finally:
        torch.set_num_threads(1)


def objective_of(model: nn.Module) -> Callable[..., Tensor]:
    """||ĝ - g||^2 on a batch as a function of the model's parameters, for torch.func."""

    def loss(z: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (parameters, buffers), (z,)), y)

    def objective(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], z: Tensor, y: Tensor, true: Tensor
    ) -> Tensor:
        return (grad(loss)(z, parameters, buffers, y) - true).square().sum()

    return objective


def stacked(fits: list[AuxiliaryFit], targets: list[list[Target]]) -> list[Tensor]:
    """All clients in one call, their weights stacked; Adam works element by element, so it is the same."""
    parameters, buffers = stack_module_state([fit.model for fit in fits])
    model = copy.deepcopy(fits[0].model).to("meta")
    if isinstance(model, Segment):
        model.reorder_images(once=False, twice=False)  # which vmap refuses
    step = vmap(grad(objective_of(model)))
    optimizer = ScheduledOptimizer(OptimizerKeys(), parameters.values())
    batches = [
        tuple(torch.stack(parts) for parts in zip(*same, strict=True)) for same in zip(*targets, strict=True)
    ]
    for _ in range(fits[0].keys.epochs):
        for z, y, true in batches:
            for name, gradient in step(parameters, buffers, z, y, true).items():
                parameters[name].grad = gradient.contiguous()  # as its weight is
            optimizer.step()
    for client, fit in enumerate(fits):
        for name, parameter in fit.model.named_parameters():
            parameter.data.copy_(parameters[name][client].detach())
    return parameters_of(fits)


class Compiled:
    """The gradient of the objective compiled once, for all clients and pairs."""

    def __init__(self, model: nn.Module):
        self._step = torch.compile(grad(objective_of(copy.deepcopy(model).to("meta"))))

    def __call__(self, fits: list[AuxiliaryFit], targets: list[list[Target]]) -> list[Tensor]:
        for fit, mine in zip(fits, targets, strict=True):
            parameters = dict(fit.model.named_parameters())
            values = {name: parameter.detach() for name, parameter in parameters.items()}
            buffers = dict(fit.model.named_buffers())
            for _ in range(fit.keys.epochs):
                for z, y, true in mine:
                    for name, gradient in self._step(values, buffers, z, y, true).items():
                        parameters[name].grad = gradient.contiguous()  # as its weight is
                    fit.optimizer.step()
        return parameters_of(fits)


def run(
    way: Way, split: SplitModel, device: torch.device, epochs: int, batch: int, batches: int
) -> tuple[float, list[Tensor]]:
    """Seconds of all clients' fits, targets excluded, and the weights that come of them."""
    fits = make_fits(split, device, epochs, batch, batches)
    server = copy.deepcopy(split.server).to(device)
    targets = [fit.targets(server) for fit in fits]
    synchronise(device)
    started = clock()
    weights = way(fits, targets)
    synchronise(device)
    return clock() - started, weights


def distance(weights: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest difference, over the largest weight."""
    pairs = zip(weights, reference, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def compare(
    model: str, auxiliary: Auxiliary, batch: int, batches: int, epochs: int, device: torch.device
) -> None:
    """Each way beside the reference, in pairs."""
    keys = Model(name=model, auxiliary=auxiliary)
    fp32, fp64 = (build(keys, 10, (3, 32, 32), 0, dtype) for dtype in (torch.float32, torch.float64))
    ways: dict[str, tuple[Callable[[SplitModel], Way], Way]] = {
        "all cores": (lambda split: on_all_cores, in_turn),
        "threads": (lambda split: on_threads, in_turn),
        "threads, beside all cores": (lambda split: on_threads, on_all_cores),
        "stacked": (lambda split: stacked, in_turn),
        "compiled": (lambda split: Compiled(split.auxiliary), in_turn),
    }
    name = f"{model}, {auxiliary.kind or 'copy'} auxiliary model, {batches} x {batch} samples"
    for way_name, (make, reference_way) in ways.items():
        try:
            mine, reference = (run(way, fp64, device, 1, batch, batches)[1] for way in (make(fp64), in_turn))
            off = distance(mine, reference)
            way, ratios, seconds = make(fp32), [], []
            for pair in range(PAIRS + 1):
                took, beside = (
                    run(each, fp32, device, epochs, batch, batches)[0] for each in (way, reference_way)
                )
                if pair:  # the first one compiles and warms up
                    ratios.append(took / beside)
                    seconds.append(took / epochs / CLIENTS)
        except Exception as error:  # torch.compile needs a compiler
            if way_name != "compiled":
                raise
            print(f"{name}, {way_name}: not here ({type(error).__name__}: {str(error).splitlines()[0]})")
            continue
        print(
            f"{name}, {way_name}: {1000 * statistics.median(seconds):.1f} ms per pass and client, "
            f"{statistics.median(ratios):.2f} of what it is beside, weights {off:.0e} off at fp64",
            flush=True,
        )


def stopping(model: str, auxiliary: Auxiliary, settings: dict[str, dict[str, Any]]) -> None:
    """Passes made and objective left, of one client, by setting."""
    split = build(Model(name=model, auxiliary=auxiliary), 10, (3, 32, 32), 0, torch.float32)
    for name, keys in settings.items():
        fit = make_fits(split, torch.device("cpu"), 100, **keys)[0]
        started = clock()
        record = fit.fit(fit.targets(copy.deepcopy(split.server))).read()
        print(
            f"{model}, {auxiliary.kind or 'copy'} auxiliary model, {name}: {record['passes']} passes, "
            f"{clock() - started:.1f} s, nmse {record['nmse_before']:.2f} -> {record['nmse_after']:.4f}",
            flush=True,
        )


def main() -> None:
    """All comparisons, or those asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["ways", "stopping"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part in (None, "ways"):
        for case in CASES:
            compare(*case, torch.device(options.device))
    if options.part in (None, "stopping"):
        early = {
            "all passes": {},
            "tolerance 0.01": {"tolerance": 0.01},
            "tolerance 0.05": {"tolerance": 0.05},
        }
        stopping("resnet18", Auxiliary(), early)
        stopping("resnet18", Auxiliary(kind="linear"), {**early, "lbfgs": {"solver": "lbfgs"}})


if __name__ == "__main__":
    main()
