"""A model as the graph of its modules (torch.fx), and the segments that it can be cut into."""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fslsage_rpc.config.own import first_line

PROBE_BATCHES = (2, 3)
"""values are taken at both batch sizes: what differs between them is a size of the batch"""


class Uncuttable(Exception):
    """A model cannot be traced, or not be cut there; the message says why.

    Args:
        module: the kind of the module inside the model that cannot be traced.
    """

    def __init__(self, reason: str, module: type[nn.Module] | None = None):
        super().__init__(reason)
        self.module = module


@dataclass
class Trace:
    """What a model computes in one mode, train or eval.

    `outputs` has for each module that was called the node of its output, None where that is no single value;
    `calls` how often it was called.
    """

    graph: fx.Graph
    outputs: dict[str, fx.Node | None]
    calls: dict[str, int]
    values: dict[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    """what each node gave at the probe batches; of tensors, their shape"""

    @property
    def input(self) -> fx.Node:
        """The model's input."""
        node: fx.Node = next(node for node in self.graph.nodes if node.op == "placeholder")
        return node

    @property
    def output(self) -> fx.Node:
        """The node that gives the model's output.

        Raises:
            Uncuttable: the model returns something other than one tensor.
        """
        (returned,) = next(node for node in self.graph.nodes if node.op == "output").args
        if not isinstance(returned, fx.Node) or self.shape(returned) is None:
            raise Uncuttable("it returns something other than one tensor")
        return returned

    def shape(self, node: fx.Node) -> torch.Size | None:
        """The shape of one sample of what a node gives, without the batch; None if it is not a tensor with
        the batch in front.
        """
        values = self.values.get(node, ())
        if not values or not all(isinstance(value, _Shaped) for value in values):
            return None
        shapes = [value.shape for value in values]
        whole_batches = all(len(s) > 1 and s[0] == b for s, b in zip(shapes, PROBE_BATCHES, strict=True))
        return shapes[0][1:] if whole_batches and shapes[0][1:] == shapes[1][1:] else None


@dataclass(frozen=True)
class _Shaped:
    """Stands for a tensor of this shape."""

    shape: torch.Size


class _Tracer(fx.Tracer):
    """Looks into the modules that `opens` names; all others stay what they are, one node each."""

    def __init__(self, opens: Callable[[str, nn.Module], bool]):
        super().__init__()
        self._opens = opens
        self.outputs: dict[str, fx.Node | None] = {}
        self.calls: dict[str, int] = {}
        self.failed: type[nn.Module] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._opens(module_qualified_name, m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or type(m)  # the innermost
            raise
        self.calls[name] = self.calls.get(name, 0) + 1
        self.outputs[name] = result.node if isinstance(result, fx.Proxy) else None
        return result

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]


def trace(
    model: nn.Module, opens: Callable[[str, nn.Module], bool], sample_shape: Iterable[int]
) -> dict[bool, Trace]:
    """Trace a model in train mode (True) and eval mode (False); the model is left in train mode.

    Args:
        opens: whether to look into a module of that name; one that is not opened is not traced at all, so
            that it may be anything.
        sample_shape: of one input, without the batch.

    Raises:
        Uncuttable: an opened module cannot be traced.
        Exception: whatever the model raises on such inputs.
    """
    traces = {training: _trace(model.train(training), opens) for training in (False, True)}
    if str(traces[True].graph) == str(traces[False].graph):
        traces[True] = traces[False]
    for batch in PROBE_BATCHES:
        for each in {id(each): each for each in traces.values()}.values():
            with torch.no_grad():  # in eval mode, which leaves the model as it is, whatever the graph's
                _Recorder(model.eval(), each).run(probe_inputs(model, sample_shape, batch))
    model.train()
    return traces


def opening(*names: str) -> Callable[[str, nn.Module], bool]:
    """Opens the modules that modules of these names are inside."""
    return lambda name, module: any(inside.startswith(f"{name}.") for inside in names)


def _trace(model: nn.Module, opens: Callable[[str, nn.Module], bool]) -> Trace:
    tracer = _Tracer(opens)
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the user's forward makes of a symbolic tensor
        raise Uncuttable(f"it cannot be traced ({first_line(error)})", tracer.failed) from None
    return Trace(graph, tracer.outputs, tracer.calls)


def trace_inside(model: nn.Module, sample_shape: Iterable[int]) -> dict[bool, Trace]:
    """Trace a model down to torch's own layers; modules that cannot be traced stay whole.

    Raises:
        Uncuttable: the model's own forward cannot be traced.
        Exception: whatever the model raises on such inputs.
    """
    closed: set[type[nn.Module]] = set()

    def opens(name: str, module: nn.Module) -> bool:
        layer = module.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
        return not layer and type(module) not in closed

    while True:
        try:
            return trace(model, opens, sample_shape)
        except Uncuttable as error:
            if error.module is None:
                raise
            closed.add(error.module)


class TokenShape(tuple[int, ...]):
    """The shape of one sample, without the batch, that consists of the numbers of tokens."""


def probe_inputs(model: nn.Module, sample_shape: Iterable[int], batch: int) -> Tensor:
    """Zeros `[batch, *sample_shape]` where the model's weights are: in their type, or int64 for tokens."""
    weight = next(model.parameters(), torch.empty(0))
    dtype = torch.int64 if isinstance(sample_shape, TokenShape) else weight.dtype
    return torch.zeros(batch, *sample_shape, device=weight.device, dtype=dtype)


class _Recorder(fx.Interpreter):
    """Adds what each node gives to the values of a trace."""

    def __init__(self, model: nn.Module, trace: Trace):
        super().__init__(model, graph=trace.graph)
        self._values = trace.values

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._values[n] = (*self._values.get(n, ()), _described(result))
        return result


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Shaped(value.shape)
    if isinstance(value, tuple | list):
        return tuple(_described(member) for member in value)
    return value


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, open = {node}, [node]
    while open:
        for source in open.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                open.append(source)
    return found


def segment(model: nn.Module, trace: Trace, start: fx.Node, end: fx.Node) -> fx.Graph:
    """The graph that computes `end` from `start`.

    Raises:
        Uncuttable: it needs more tensors than that one.
    """
    new, made, needed = begin_segment(model, trace, start, end)
    for node in trace.graph.nodes:
        if node in needed:
            made[node] = new.node_copy(node, lambda source: made[source])
    new.output(made[end])
    return new


def begin_segment(
    model: nn.Module, trace: Trace, start: fx.Node, end: fx.Node
) -> tuple[fx.Graph, dict[fx.Node, Any], set[fx.Node]]:
    """What `segment` makes first: the new graph, in it what comes from before and at `start`, and the nodes
    that are still to be copied.

    Raises:
        Uncuttable: it needs more tensors than `start`.
    """
    before, behind = ancestors(start), _descendants(trace.graph, start)
    new = fx.Graph()
    made: dict[fx.Node, Any] = {start: new.placeholder("input")}
    crossing = _Crossing(model, trace, new, made[start])
    needed: set[fx.Node] = set()
    open = [end]
    while open:
        node = open.pop()
        if node in made or node in needed:
            continue
        if node in before or (node not in behind and crossing.is_size(node)):
            made[node] = crossing.carry(node)
        else:
            needed.add(node)
            open += node.all_input_nodes
    return new, made, needed


def _descendants(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    found = {start}
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


class _Crossing:
    """What a segment needs from before its start but need not be sent: sizes, and constants of the model."""

    def __init__(self, model: nn.Module, trace: Trace, new: fx.Graph, start: fx.Node):
        self._model, self._trace, self._new, self._input = model, trace, new, start

    def is_size(self, node: fx.Node) -> bool:
        """Is what a node gives no tensor, nor has tensors in it?"""
        return node.op != "get_attr" and not any(map(_has_tensor, self._trace.values[node]))

    def carry(self, node: fx.Node) -> Any:
        """The value of a node, made from the segment's input."""
        if node.op == "get_attr":
            if isinstance(_attribute(self._model, str(node.target)), nn.Parameter):
                raise Uncuttable(f"the weight {node.target} is used on both sides")
            return self._new.node_copy(node)
        return self._made(*self._trace.values[node])

    def _made(self, small: Any, large: Any) -> Any:
        if isinstance(small, _Shaped):
            raise Uncuttable("more than one tensor crosses")
        if isinstance(small, tuple):
            return tuple(self._made(*pair) for pair in zip(small, large, strict=True))
        if isinstance(small, torch.device | torch.dtype):
            return self._new.call_function(getattr, (self._input, type(small).__name__))
        if small == large:
            return small
        if isinstance(small, int) and small * PROBE_BATCHES[1] == large * PROBE_BATCHES[0]:
            batch = self._new.call_method("size", (self._input, 0))
            times = small // PROBE_BATCHES[0]
            return batch if times == 1 else self._new.call_function(operator.mul, (batch, times))
        raise Uncuttable("a number that is no size of the batch crosses")


def _has_tensor(value: Any) -> bool:
    return any(map(_has_tensor, value)) if isinstance(value, tuple) else isinstance(value, _Shaped)


def _attribute(model: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)
