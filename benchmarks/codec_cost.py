"""The cost of codecs beside a client's step: CPU milliseconds of encoding and decoding, by turns in one
process with one thread. On an idle machine that is the time they take; on a busy one wall-clock time would
tell more of others.

    python benchmarks/codec_cost.py

The step is a client's in FSL-SAGE: forward, estimate, backward and optimizer, on a batch of 256 images of
32x32. Every repeat times the step and then each codec on the step's own smashed data, its estimated gradient
and the auxiliary model's weights. Prints medians in a table, and the median of the paired shares
(encode + decode) / step. About a minute on one core.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.config.schema import CodecKeys, Model, OptimizerKeys
from fslsage_rpc.models.flat import trainable
from fslsage_rpc.models.splitting import build
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.client_auxiliary import ClientAuxiliary
from fslsage_rpc.parties.codecs import Codec, Kind, create
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.optimizers import ScheduledOptimizer

MODELS = ("resnet18", "simple_conv")
BATCH = 256
REPEATS = 15
CODECS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16", {}),
    ("int8", {}),
    ("int8", {"stochastic": True}),
    ("topk", {}),
    ("gaussian", {"clip": 1.0, "sigma": 0.1}),
)
KINDS: tuple[Kind, ...] = ("smashed", "gradient", "auxiliary")


def client_of(model: str) -> Client:
    """A client with an auxiliary model that the server fits."""
    split, context = build(Model(name=model), 10, (3, 32, 32), 0, torch.float32), Context()
    auxiliary = ClientAuxiliary(split.auxiliary, partial(ScheduledOptimizer, OptimizerKeys()), context)
    optimizer = ScheduledOptimizer(OptimizerKeys(weight_decay=1e-4), trainable(split.client))
    return Client(0, split.client, optimizer, lambda t: iter(()), context, auxiliary)


def client_step(client: Client, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As `FslSage.client_step` without its requests.

    Returns:
        Smashed data and the estimated gradient, both `[B, ...]`.
    """
    z = client.forward(x)
    gradient = client.estimate(z, y)
    client.backward(z, gradient)
    return z.detach(), gradient


def codecs() -> Iterator[tuple[str, Kind, Codec]]:
    """Those that there are for each kind of tensor, with what they are called."""
    for name, arguments in CODECS:
        called = " ".join([name, *arguments]) if name == "int8" else name
        for kind in KINDS if name != "gaussian" else KINDS[:1]:
            codec = create(CodecKeys(name=name, arguments=arguments), kind)
            assert codec is not None
            yield called, kind, codec


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The CPU seconds of one call, and what it gives."""
    started = time.process_time()
    given = work()
    return time.process_time() - started, given


def table(model: str) -> None:
    """A row for each codec and kind of tensor."""
    client, generator, tried = client_of(model), torch.Generator().manual_seed(0), list(codecs())
    x, y = torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(10, (BATCH,))
    steps: list[float] = []
    encodes: list[list[float]] = [[] for _ in tried]
    decodes: list[list[float]] = [[] for _ in tried]
    for repeat in range(REPEATS + 1):  # the first one warms up
        step, (z, gradient) = seconds(lambda: client_step(client, x, y))
        tensors: dict[Kind, Tensor] = {
            "smashed": z,
            "gradient": gradient,
            "auxiliary": client.auxiliary_weights.floats.detach(),
        }
        if repeat:
            steps.append(step)
        for (_, kind, codec), encode, decode in zip(tried, encodes, decodes, strict=True):
            sent = tensors[kind]
            there, parts = seconds(partial(codec.encode, sent, generator))
            back, _ = seconds(partial(codec.decode, parts, sent.shape, sent.dtype))
            if repeat:
                encode.append(there)
                decode.append(back)
    step = statistics.median(steps)
    print(f"\n{model}, batches of {BATCH}: a client's step takes {1000 * step:.0f} ms\n")
    print("| codec | kind | tensor | bytes | of its own | encode, ms | decode, ms | share of a step |")
    print("|---|---|---|---|---|---|---|---|")
    for (called, kind, codec), encode, decode in zip(tried, encodes, decodes, strict=True):
        shape, dtype = tensors[kind].shape, tensors[kind].dtype
        share = statistics.median((a + b) / s for a, b, s in zip(encode, decode, steps, strict=True))
        coded = codec.nbytes(shape, dtype) or 0
        print(
            f"| {called} | {kind} | {'x'.join(map(str, shape))} | {coded:,} "
            f"| {coded / (shape.numel() * dtype.itemsize):.1%} | {1000 * statistics.median(encode):.2f} "
            f"| {1000 * statistics.median(decode):.2f} | {share:.2%} |"
        )


def main() -> None:
    """A table for each model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for model in MODELS:
        table(model)


if __name__ == "__main__":
    main()
