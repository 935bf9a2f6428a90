"""Where a model can be cut: at the output of every module across which exactly one tensor goes."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fslsage_rpc.config.schema import Model
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.tracing import (
    PROBE_BATCHES,
    Trace,
    Uncuttable,
    ancestors,
    begin_segment,
    probe_inputs,
    trace_inside,
)
from fslsage_rpc.models.zoo import make, refuse_samples

LISTED = "fslsage check CONFIG --cuts lists all"


@dataclass(frozen=True)
class Cut:
    """One possible cut and what it means for one sample."""

    name: str
    """the module whose output is the smashed data"""
    smashed_shape: tuple[int, ...]
    client_parameters: int
    server_parameters: int
    client_multiply_adds: int
    """of a forward pass, in convolutions, matrix products and attention"""
    server_multiply_adds: int

    @property
    def smashed_elements(self) -> int:
        """The numbers that one sample sends."""
        return torch.Size(self.smashed_shape).numel()


def cut_nodes(
    model: nn.Module, traces: dict[bool, Trace], name: str, trains: bool = False
) -> dict[bool, fx.Node]:
    """The output of a module in the train graph (True) and in the eval graph, where the model can be cut.

    Args:
        trains: there must be weights on both sides that are not frozen.

    Raises:
        Uncuttable: it cannot be cut there.
    """
    nodes = {}
    for training, trace in traces.items():
        calls, node = trace.calls.get(name, 0), trace.outputs.get(name)
        if calls != 1:
            raise Uncuttable(f"it is called {calls} times" if calls else "it is never called")
        if node is None or trace.shape(node) is None:
            raise Uncuttable("its output is not one tensor with the batch in front")
        _, _, behind = begin_segment(model, trace, node, trace.output)
        before = ancestors(node)
        sides = (set(_weights(model, before)), set(_weights(model, behind)))
        for side, where in zip(sides, ("before", "behind"), strict=True):
            if not side:
                raise Uncuttable(f"no weights are {where} it")
            if trains and not any(weight.requires_grad for weight in side):
                raise Uncuttable(f"all weights {where} it are frozen")
        if sides[0] & sides[1]:
            raise Uncuttable("the same weights are before and behind it")
        nodes[training] = node
    if traces[True].shape(nodes[True]) != traces[False].shape(nodes[False]):
        raise Uncuttable("its output has another shape in train mode than in eval mode")
    return nodes


def _weights(model: nn.Module, nodes: Iterable[fx.Node]) -> Iterator[nn.Parameter]:
    for node in nodes:
        if node.op == "call_module":
            yield from model.get_submodule(str(node.target)).parameters()
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(model.get_submodule(owner), name)
            if isinstance(value, nn.Parameter):
                yield value


def _possible(model: nn.Module, traces: dict[bool, Trace]) -> dict[str, fx.Node]:
    """All cuts, in the order of the computation, each with its node in the eval graph; of modules with the
    same output the outermost.
    """
    possible: dict[fx.Node, str] = {}
    order = {node: place for place, node in enumerate(traces[False].graph.nodes)}
    for name in sorted(traces[False].outputs, key=lambda name: name.count(".")):
        try:
            node = cut_nodes(model, traces, name, trains=True)[False]
        except Uncuttable:
            continue
        possible.setdefault(node, name)
    return {possible[node]: node for node in sorted(possible, key=order.__getitem__)}


def refusal(
    key: str, name: str, model: nn.Module, sample_shape: Sequence[int], reason: Uncuttable
) -> InputError:
    """Why a model cannot be cut at a module, and the nearest cuts that work."""
    try:
        traces = trace_inside(model, sample_shape)
    except Uncuttable:
        return InputError(f"{key}: got {name!r}, but {reason}")
    possible = _possible(model, traces)
    if name not in dict(model.named_modules()):
        outermost = [cut for cut in possible if "." not in cut] or list(possible)
        near = difflib.get_close_matches(name, possible, n=4) or outermost[:8]
        return InputError(
            f"{key}: got {name!r}, expected a module of the model, as {', '.join(near)} ({LISTED})"
        )
    order = {node: place for place, node in enumerate(traces[False].graph.nodes)}
    here = order.get(traces[False].outputs.get(name), 0)
    before = [cut for cut, node in possible.items() if order[node] <= here]
    behind = [cut for cut, node in possible.items() if order[node] > here]
    near = before[-2:] + behind[:2]
    return InputError(
        f"{key}: got {name!r}, where {reason}; nearest that work: {', '.join(near) or 'none'} ({LISTED})"
    )


def list_cuts(keys: Model, classes: int, sample_shape: Sequence[int]) -> list[Cut]:
    """All cuts of a model, in the order of its computation.

    Raises:
        InputError: there is no such model, or it cannot take such images, or it cannot be traced.
    """
    model = make(keys, classes, sample_shape)
    try:
        traces = trace_inside(model, sample_shape)
    except Uncuttable as error:
        raise InputError(f"model.name: got {keys.name!r}, but {error}") from None
    except Exception as error:
        raise refuse_samples(keys, sample_shape, error) from None
    possible = _possible(model, traces)
    trace = traces[False]
    counter = _Counter(model.eval(), trace.graph)
    with torch.no_grad():
        counter.run(probe_inputs(model, sample_shape, PROBE_BATCHES[0]))

    def side(nodes: set[fx.Node]) -> tuple[int, int]:
        weights = sum(weight.numel() for weight in set(_weights(model, nodes)))
        return weights, sum(counter.flops[node] for node in nodes) // (2 * PROBE_BATCHES[0])

    cuts = []
    for name, node in possible.items():
        shape = trace.shape(node)
        assert shape is not None
        client = side(ancestors(node))
        server = side(ancestors(trace.output) - ancestors(node))
        cuts.append(Cut(name, tuple(shape), client[0], server[0], client[1], server[1]))
    return cuts


class _Counter(fx.Interpreter):
    """Counts the floating-point operations of each node."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        super().__init__(model, graph=graph)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counted:
            result = super().run_node(n)
        self.flops[n] = counted.get_total_flops()
        return result
