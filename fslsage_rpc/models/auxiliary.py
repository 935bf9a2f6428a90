"""The auxiliary model: what stands in for the server half when a client estimates its cut-layer gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from fslsage_rpc.config.own import checked_arguments, first_line, import_own, is_own, refuse_arguments
from fslsage_rpc.config.schema import Auxiliary
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.cuts import cut_nodes, refusal
from fslsage_rpc.models.flat import trainable
from fslsage_rpc.models.narrowing import narrow
from fslsage_rpc.models.segment import Segment, keep_input
from fslsage_rpc.models.tracing import (
    PROBE_BATCHES,
    Uncuttable,
    ancestors,
    opening,
    probe_inputs,
    segment,
    trace,
)
from fslsage_rpc.models.zoo import ModelEntry


class AuxiliaryModel(Segment):
    """Smashed data z `[B, *smashed_shape]` to logits `[B, classes]`: the first layers of a server half (or
    none), the mean over positions, and a linear layer, with a hidden one before it where it is an mlp. Of
    texts (`[B, T, classes]`) the same at every position, or those layers and the model's own head.

    Args:
        pools: take the mean over positions: of `[B, N, D]` over N, of images over height and width.
        channels_last: images are `[B, H, W, C]`.
        every_position: what reaches the classifier is `[B, T, features]`, and so it stays.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: dict[bool, fx.Graph],
        pools: bool = False,
        channels_last: bool = False,
        every_position: bool = False,
    ):
        super().__init__(model, graphs)
        self._pools, self._channels_last, self._every_position = pools, channels_last, every_position
        self._head: tuple[str, ...] = ()

    def _pass_on(self, x: Tensor) -> Tensor:
        if self._head:
            h = super()._pass_on(x)
            for name in self._head:
                h = self.get_submodule(name)(h)
            return h
        features = self.classifier_input(x)
        hidden = self.get_submodule("hidden")(features).relu() if "hidden" in self._modules else features
        logits: Tensor = self.get_submodule("fc")(hidden)
        return logits

    def classifier_input(self, z: Tensor) -> Tensor:
        """What the classifier takes `[B, features]`, or `[B, T, features]`."""
        h = super()._pass_on(z)
        if self._every_position:
            return h
        if self._pools and h.dim() == 4 and not self._channels_last:
            h = F.adaptive_avg_pool2d(h, 1)
        elif self._pools and h.dim() > 2:
            h = h.flatten(1, -2).mean(1)
        return h.flatten(1)

    def adopt_head(self, model: nn.Module, names: tuple[str, ...]) -> None:
        """End with these modules of the model that the layers are from."""
        self._head = names
        for name in names:
            self._adopt(model, name)

    def add_head(self, features: int, width: int | None, classes: int) -> None:
        """Add the classifier, with a hidden layer where `width` says how wide it is."""
        for name in ("hidden", "fc"):
            if name in self._modules:
                raise Uncuttable(f"the copy has a module {name!r}, which is the auxiliary classifier's name")
        if width is not None:
            self.hidden = nn.Linear(features, width)
        self.fc = nn.Linear(width or features, classes)


def build_auxiliary(
    keys: Auxiliary,
    cut: str,
    entry: ModelEntry,
    model: nn.Module,
    fresh: Callable[[], nn.Module],
    sample_shape: Sequence[int],
    classes: int,
) -> Segment:
    """The auxiliary model that the keys describe.

    Args:
        model: the whole model.
        fresh: makes it anew, with other weights.

    Raises:
        InputError: there is no such auxiliary model.
    """
    until = _last_of_copy(keys, entry.auxiliary(cut))
    if is_own(keys.kind):
        traces = trace(model, opening(cut), sample_shape)
        smashed_shape = traces[False].shape(cut_nodes(model, traces, cut)[False])
        outputs_shape = traces[False].shape(traces[False].output)
        assert smashed_shape is not None
        assert outputs_shape is not None
        return _users_own(keys.kind, keys.arguments, model, smashed_shape, outputs_shape, classes)
    own = "the model has its own head"
    if entry.head and keys.kind == "mlp":
        raise InputError(f"model.auxiliary.kind: got 'mlp', expected copy or linear: {own}")
    if entry.head and keys.width_multiplier is not None:
        got = keys.width_multiplier
        raise InputError(f"model.auxiliary.width_multiplier: got {got}, expected null: {own}")
    if until is not None or entry.head:
        model = fresh()
    traces = trace(model, opening(cut, until or cut), sample_shape)
    start = cut_nodes(model, traces, cut)
    try:
        end = start if until is None else cut_nodes(model, traces, until)
        if not all(start[t] in ancestors(end[t]) for t in traces) or until == cut:
            raise InputError(f"model.auxiliary.until: got {until!r}, expected a module behind the cut, {cut}")
        graphs = {t: segment(model, traces[t], start[t], end[t]) for t in traces}
    except Uncuttable as error:
        raise refusal("model.auxiliary.until", until or cut, model, sample_shape, error) from None
    smashed_shape = traces[False].shape(start[False])
    assert smashed_shape is not None
    keep_input(model, graphs, smashed_shape)
    if entry.head:
        auxiliary = AuxiliaryModel(model, graphs)
        auxiliary.adopt_head(model, entry.head)
        if not trainable(auxiliary):
            wrong = "model.auxiliary.kind: got 'linear', the model's head, whose weights are frozen"
            raise InputError(f"{wrong}; expected copy")
        entry.for_alignment(auxiliary)
        return auxiliary
    images = Segment(model, {t: segment(model, traces[t], traces[t].input, end[t]) for t in traces})
    outputs_shape = traces[False].shape(traces[False].output)
    auxiliary = AuxiliaryModel(
        model,
        graphs,
        entry.pools,
        channels_last=entry.pools and _channels_last(images, sample_shape),
        every_position=outputs_shape is not None and len(outputs_shape) == 2,
    )
    z = probe_inputs(model, smashed_shape, PROBE_BATCHES[0])
    if keys.width_multiplier is not None:
        narrow(auxiliary, auxiliary.classifier_input, z, keys.width_multiplier)
    with torch.no_grad():
        features = auxiliary.eval().classifier_input(z).shape[-1]
    auxiliary.add_head(features, keys.width, classes)
    _make_alignable(auxiliary)
    return auxiliary


def _users_own(
    kind: str,
    arguments: dict[str, Any],
    model: nn.Module,
    smashed_shape: Sequence[int],
    outputs_shape: Sequence[int],
    classes: int,
) -> Segment:
    """What the user's function makes of `smashed_shape`, `num_classes` and the arguments.

    Args:
        model: the whole model, which gives `outputs_shape` for a sample.

    Raises:
        InputError: it fails, or gives something else than a model from smashed data to what the whole model
            gives.
    """
    wrong = f"model.auxiliary.kind: got {kind!r}, which"
    function = import_own("model.auxiliary.kind", kind, "a function that returns a model")
    given = {"smashed_shape": tuple(smashed_shape), "num_classes": classes}
    more = checked_arguments("model.auxiliary.arguments", kind, function, arguments, given=given)
    try:
        with torch.device("cpu"):  # also where only sizes are asked for: it may read what it makes
            own = function(**given, **more)
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        shape = "x".join(map(str, smashed_shape))
        raise InputError(f"{wrong} fails for smashed data of {shape} ({first_line(error)})") from None
    if not isinstance(own, nn.Module):
        raise InputError(f"{wrong} returns {type(own).__name__}, expected a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in own.parameters()):
        raise InputError(f"{wrong} returns a model without weights that train")
    holder = nn.Module()
    holder.own = own.to(next(model.parameters()).dtype)
    graph = fx.Graph()
    graph.output(graph.call_module("own", (graph.placeholder("input"),)))
    graphs = {True: graph, False: graph}
    z = probe_inputs(own, smashed_shape, PROBE_BATCHES[0])
    expected = [PROBE_BATCHES[0], *outputs_shape]
    try:
        auxiliary = Segment(holder, graphs)
        _make_alignable(auxiliary)
        keep_input(holder, graphs, smashed_shape)
        with torch.no_grad():
            outputs = auxiliary(z)
    except Exception as error:  # so may its model
        raise InputError(f"{wrong} fails on smashed data {list(z.shape)} ({first_line(error)})") from None
    if not isinstance(outputs, Tensor) or list(outputs.shape) != expected:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"{wrong} gives {got} for smashed data {list(z.shape)}, expected {expected}")
    return auxiliary


def _make_alignable(auxiliary: nn.Module) -> None:
    """Auxiliary models are always in train mode: running statistics are never read, so never written. And
    alignment differentiates twice.
    """
    for module in auxiliary.train().modules():
        if isinstance(module, _NormBase):
            module.track_running_stats = False
    _make_twice_differentiable(auxiliary)


def _last_of_copy(keys: Auxiliary, default_until: str | None) -> str | None:
    """The last module of a copy; None for no copy."""
    kind = keys.kind or ("copy" if keys.until or default_until else "linear")
    if not is_own(kind):
        refuse_arguments("model.auxiliary.arguments", kind, keys.arguments)
    until = keys.until or default_until
    if kind == "copy" and until is None:
        raise InputError("model.auxiliary.until: got null, expected a module behind the cut, as kind is copy")
    if kind != "copy" and keys.until is not None:
        raise InputError(
            f"model.auxiliary.until: got {keys.until!r}, expected null, as model.auxiliary.kind is {kind}"
        )
    if (kind == "mlp") != (keys.width is not None):
        expected = "the width of the hidden layer" if kind == "mlp" else "null"
        got = "null" if keys.width is None else keys.width
        raise InputError(f"model.auxiliary.width: got {got}, expected {expected}, as kind is {kind}")
    if kind != "copy" and keys.width_multiplier is not None:
        raise InputError(
            f"model.auxiliary.width_multiplier: got {keys.width_multiplier}, expected null, as kind is {kind}"
        )
    return until if kind == "copy" else None


def _channels_last(images: Segment, sample_shape: Sequence[int]) -> bool:
    """Does a part of a model give `[B, H, W, C]`? Positions are what grows with the images; a model that
    takes images of one size only counts as one with channels first.
    """
    if len(sample_shape) != 3:
        return False
    channels, height, width = sample_shape
    sizes = []
    for times in (1, 2):
        try:
            with torch.no_grad():
                inputs = probe_inputs(images, (channels, times * height, times * width), PROBE_BATCHES[0])
                sizes.append(images.eval()(inputs).shape)
        except Exception:  # its own way to refuse a size
            return False
        finally:
            images.train()
    small, large = sizes
    return len(small) == 4 and small[3] == large[3] and small[1:3] != large[1:3]


class HardSigmoid(nn.Module):
    """nn.Hardsigmoid, of operations that can be differentiated twice."""

    def forward(self, x: Tensor) -> Tensor:
        """relu6(x + 3) / 6, of x's shape."""
        return F.relu6(x + 3) / 6


def _make_twice_differentiable(auxiliary: nn.Module) -> None:
    """Alignment differentiates twice, for which torch has no formula for two of its layers."""
    for module in list(auxiliary.modules()):
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(_in_single_steps, with_kwargs=True)
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                module._modules[name] = HardSigmoid()


def _in_single_steps(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """With its weights asked for, attention is not one fused operation."""
    return args, {**kwargs, "need_weights": True}
