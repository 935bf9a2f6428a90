"""A stand-in for CUDA graphs on a CPU: what was captured is computed again when it is replayed.

As with the real ones nothing is computed while capturing, and every replay writes the same tensors.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fslsage_rpc.device import graphs
from fslsage_rpc.training import assembly


class Undone(TorchDispatchMode):
    """Keeps what operations write over, and puts it back at the end."""

    UNDECLARED = ("running_mean", "running_var")  # BatchNorm's schema does not say that it writes these

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        given |= kwargs or {}
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name in self.UNDECLARED:
                for tensor in tree_leaves(given.get(argument.name)):
                    if isinstance(tensor, torch.Tensor):
                        self._before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for tensor, values in self._before.values():
            tensor.data.copy_(values)  # unseen by autograd


class Recorder:
    """Counts what it captures and replays.

    Attributes:
        refuse: raise, when the work is done, instead of capturing.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.refuse = False

    def capture(
        self, work: Callable[[], graphs.Tensors], pool: Any
    ) -> tuple[Callable[[], None], graphs.Tensors]:
        with Undone():
            outputs = work()
        if self.refuse:
            raise RuntimeError("CUDA error: operation not permitted\nsecond line")
        written = tuple(torch.full_like(tensor, float("nan"), requires_grad=False) for tensor in outputs)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for mine, new in zip(written, work(), strict=True):
                mine.copy_(new.detach())

        return replay, written


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Steps are captured on the CPU, by the stand-in, wherever graphs are asked for."""
    recorder = Recorder()
    monkeypatch.setattr(graphs, "capture", recorder.capture)
    monkeypatch.setattr(assembly, "can_capture", lambda device: True)
    return recorder
