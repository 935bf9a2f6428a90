"""What was chosen in a step, against its alternative, by turns in one process with one thread.

    python benchmarks/step_choices.py

- ĝ by a backward pass of its own through the auxiliary model and then one through the client model, as the
  program does it, against a single call of autograd through both (the same gradients, to the last bit);
- fused optimizers against torch's `foreach` ones.

Prints medians, and the median of the paired ratios alternative / chosen: above 1 the choice was right. About
three minutes on 2 cores.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.config.schema import Model
from fslsage_rpc.models.splitting import SplitModel, build
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient

CASES = [("resnet18", 8), ("resnet18", 32), ("resnet18", 128), ("simple_conv", 64), ("resnet56", 32)]
PAIRS = 7


def compare(what: str, chosen: Callable[[], object], alternative: Callable[[], object]) -> None:
    """In pairs, after one that warms up."""
    pairs = [(seconds(chosen), seconds(alternative)) for _ in range(PAIRS + 1)][1:]
    ratio = statistics.median(other / mine for mine, other in pairs)
    milliseconds = 1000 * statistics.median(mine for mine, _ in pairs)
    print(f"{what}: chosen {milliseconds:.1f} ms, alternative / chosen {ratio:.3f}", flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def gradients(model: nn.Module) -> list[Tensor]:
    """The model's, which then has none."""
    taken = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [gradient for gradient in taken if gradient is not None]


def client_step(split: SplitModel, x: Tensor, y: Tensor) -> list[Tensor]:
    """As in the program: the estimate, and then its way back."""
    z = split.client(x)
    z.backward(cut_layer_gradient(split.auxiliary, z, y))
    return gradients(split.client)


def joint_client_step(split: SplitModel, x: Tensor, y: Tensor) -> list[Tensor]:
    """By one call."""
    F.cross_entropy(split.auxiliary(split.client(x)), y).backward()
    return gradients(split.client)


def optimizer_step(model: nn.Module, fused: bool) -> Callable[[], object]:
    """Adam's, on gradients that are there."""
    mine = copy.deepcopy(model)
    for parameter in mine.parameters():
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.Adam(mine.parameters(), fused=fused, foreach=not fused).step


def main() -> None:
    """All comparisons."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, batch in CASES:
        usual = build(Model(name=name), 10, (3, 32, 32), 0, torch.float32)
        case = f"{name}, batches of {batch}"
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        fitted = copy.deepcopy(usual)
        usual.auxiliary.requires_grad_(False)
        for mine, other in zip(client_step(usual, x, y), joint_client_step(usual, x, y), strict=True):
            assert torch.equal(mine, other)
        compare(
            f"{case}: client step, a single backward call",
            lambda usual=usual, x=x, y=y: client_step(usual, x, y),
            lambda usual=usual, x=x, y=y: joint_client_step(usual, x, y),
        )
        for party in ("client", "server", "auxiliary"):
            model = getattr(fitted, party)
            compare(
                f"{case}: foreach Adam, {party}", optimizer_step(model, True), optimizer_step(model, False)
            )


if __name__ == "__main__":
    main()
