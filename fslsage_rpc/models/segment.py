"""A part of a model, as a module of its own."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, fx, nn

from fslsage_rpc.models.tracing import PROBE_BATCHES, probe_inputs

_twice: ContextVar[bool] = ContextVar("twice", default=False)


@contextmanager
def differentiated_twice(twice: bool = True) -> Iterator[None]:
    """Forward passes inside are, or are not, for a gradient that is differentiated in its turn."""
    token = _twice.set(twice)
    try:
        yield
    finally:
        _twice.reset(token)


class Segment(nn.Module):
    """A part of a model, from one tensor to another, that shares its modules and their names.

    Its train-mode and eval-mode forward passes are those of the model.

    Args:
        model: what the graphs were traced from.
        graphs: for train mode (True) and eval mode (False).
    """

    def __init__(self, model: nn.Module, graphs: dict[bool, fx.Graph]):
        super().__init__()
        self._computes: torch.dtype | None = None
        self._gives = torch.float32
        self._reorders = {False: False, True: False}  # by whether it is differentiated twice
        self.calls_before: dict[str, int] = {}  # see `Masks`
        for graph in (graphs[True], graphs[False]):
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    self._adopt(model, str(node.target))
        # The forward functions that fx writes; plain functions of (module, input), shared by all copies.
        self._modes = {mode: type(fx.GraphModule(model, graph)).forward for mode, graph in graphs.items()}

    def compute_in(self, computes: torch.dtype, gives: torch.dtype) -> None:
        """From here on compute under autocast; the weights stay as they are.

        Only the forward pass is inside: autograd computes every gradient, and the gradient of a gradient, in
        the type of the forward operation that it belongs to.

        Args:
            computes: the type that autocast chooses where it can.
            gives: the type of the output.
        """
        self._computes, self._gives = computes, gives

    def reorder_images(self, once: bool, twice: bool) -> None:
        """From here on have the channels of each pixel together in memory (`channels_last`) where it has
        convolutions; input and output stay in torch's usual order.

        Every pass then reorders the weights too: see `docs/performance.md`.

        Args:
            once: in passes that are differentiated at most once.
            twice: in those that are differentiated twice.
        """
        convolves = self.has_convolutions
        self._reorders = {False: once and convolves, True: twice and convolves}

    @property
    def has_convolutions(self) -> bool:
        """Of images."""
        return any(isinstance(module, nn.Conv2d) for module in self.modules())

    def forward(self, x: Tensor) -> Tensor:
        """The output `[B, ...]` for an input `[B, ...]`."""
        if self.reorders(x):
            return self._compute(x.contiguous(memory_format=torch.channels_last)).contiguous()
        return self._compute(x)

    def reorders(self, x: Tensor) -> bool:
        """Is such an input reordered?"""
        return self._reorders[_twice.get()] and x.dim() == 4

    def _compute(self, x: Tensor) -> Tensor:
        """The output in its type."""
        if self._computes is None:
            return self._pass_on(x)
        # The cache of cast weights is one for all threads, and here each weight is used once in a pass.
        with torch.autocast(x.device.type, self._computes, cache_enabled=False):
            output = self._pass_on(x)
        return output.to(self._gives)

    def _pass_on(self, x: Tensor) -> Tensor:
        """The output in whatever type the model gives."""
        output: Tensor = self._modes[self.training](self, x)
        return output

    def _adopt(self, model: nn.Module, path: str) -> None:
        """Hold a module, parameter or constant of the model under its own name."""
        *owners, name = path.split(".")
        here: nn.Module = self
        there = model
        for owner in owners:
            there = there.get_submodule(owner)
            if owner not in here._modules:
                here.add_module(owner, nn.Module())
            here = here.get_submodule(owner)
        value = getattr(there, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            persistent = name in there._buffers and name not in there._non_persistent_buffers_set
            here.register_buffer(name, value, persistent=persistent)
        else:
            setattr(here, name, value)


def keep_input(model: nn.Module, graphs: dict[bool, fx.Graph], sample_shape: Iterable[int]) -> None:
    """See that a segment does not write to its input: what was sent stays, and a leaf may not be changed."""
    input = probe_inputs(model, sample_shape, PROBE_BATCHES[0])
    with torch.no_grad():
        Segment(model, graphs).eval()(input)
    if input._version:
        for graph in {id(graph): graph for graph in graphs.values()}.values():
            placeholder = next(iter(graph.nodes))
            with graph.inserting_after(placeholder):
                own = graph.call_method("clone", (placeholder,))
            placeholder.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
    model.train()
