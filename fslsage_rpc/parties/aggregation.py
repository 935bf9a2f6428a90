"""Aggregation: the weighted mean of what the participants have trained, and the next global weights by it.

The rules are the server optimizers of Reddi et al. (arXiv 2003.00295). They take steps on the
pseudo-gradient: the last global parameters less the mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from torch import Tensor

from fslsage_rpc.config.own import checked_arguments, first_line, import_class, is_own, refuse_arguments
from fslsage_rpc.config.schema import AggregationKeys, Bounds, Positive
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.flat import Weights, check_shares

Decay = Annotated[float, Bounds(minimum=0, maximum=0.9999)]
"""of a moment: the share that a round leaves of it"""
State = dict[str, Tensor]


class Aggregation(ABC):
    """How the next global parameters follow from the last ones and the weighted mean.

    A rule acts on parameters; buffers and auxiliary models always take the mean. One object serves the client
    models and SplitFedV1's replicas, and each rank has its own: it remembers nothing but in `state`.
    """

    @abstractmethod
    def next(self, x: Tensor, mean: Tensor, state: State) -> Tensor:
        """The next global parameters `[n]`: of x's type, and the same on all ranks for the same arguments.

        Args:
            x: the last ones `[n]`.
            mean: the participants' weighted mean `[n]`.
            state: what the rule keeps from round to round. It is empty at first, and in checkpoints; a run
                that goes on has it back on the device of x.
        """


class Momentum(Aggregation):
    """FedAvgM: v <- momentum v + (x - mean), x <- x - lr v."""

    def __init__(self, lr: Positive = 1.0, momentum: Decay = 0.9):
        self.lr, self.momentum = lr, momentum

    def next(self, x: Tensor, mean: Tensor, state: State) -> Tensor:
        state["v"] = self.momentum * state.get("v", 0.0) + (x - mean)
        return x - self.lr * state["v"]


class Adam(Aggregation):
    """FedAdam: with g = x - mean, m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, and
    x <- x - lr m / (sqrt(v) + tau).

    Without correction of bias; v begins at tau^2.
    """

    def __init__(self, lr: Positive = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Positive = 1e-3):
        self.lr, self.beta1, self.beta2, self.tau = lr, beta1, beta2, tau

    def next(self, x: Tensor, mean: Tensor, state: State) -> Tensor:
        gradient = x - mean
        m = self.beta1 * state.get("m", 0.0) + (1 - self.beta1) * gradient
        v = self.second_moment(state.get("v", self.tau**2), gradient.square())
        state.update(m=m, v=v)
        return x - self.lr * m / (v.sqrt() + self.tau)

    def second_moment(self, v: Tensor | float, square: Tensor) -> Tensor:
        """The next v `[n]`, by the last one and g^2 `[n]`."""
        return self.beta2 * v + (1 - self.beta2) * square


class Yogi(Adam):
    """FedYogi: as FedAdam, but v <- v - (1 - beta2) g^2 sign(v - g^2)."""

    def second_moment(self, v: Tensor | float, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)


RULES: dict[str, type[Aggregation]] = {"momentum": Momentum, "adam": Adam, "yogi": Yogi}


def create(keys: AggregationKeys) -> Aggregation | None:
    """The rule of a configuration; None: the mean itself.

    Raises:
        InputError: there is no such rule, or its arguments are not what it takes.
    """
    if keys.name == "mean":
        refuse_arguments("aggregation.arguments", keys.name, keys.arguments)
        return None
    kind = RULES.get(keys.name) or import_class(
        "aggregation.name", keys.name, Aggregation, "fslsage_rpc.parties.aggregation.Aggregation"
    )
    arguments = checked_arguments("aggregation.arguments", keys.name, kind, keys.arguments)
    try:
        return kind(**arguments)
    except Exception as error:  # the user's class may raise anything
        raise InputError(f"aggregation.name: got {keys.name!r}, which fails ({first_line(error)})") from None


@torch.no_grad()
def try_out(keys: AggregationKeys, parameters: int, dtype: torch.dtype) -> None:
    """Find what can be found wrong with a rule: the user's own makes two rounds, twice, with that many
    parameters on the CPU.

    Raises:
        InputError: see `create`; or its `next` fails, or gives something else the second time.
    """
    rule = create(keys)
    if rule is None or not is_own(keys.name) or not parameters:
        return
    start = torch.linspace(-1, 1, parameters, dtype=dtype)

    def two_rounds() -> Tensor:
        x, state = start.clone(), State()
        for _ in range(2):
            x = _checked_next(keys, rule, x, start / 2, state)
        return x

    if not torch.equal(two_rounds().nan_to_num(), two_rounds().nan_to_num()):
        raise _refusal(
            keys, "gives something else for the same arguments: what it remembers belongs in `state`"
        )


class Aggregator:
    """Gives models the next global weights by the weighted mean over those that took part in a round.

    The models are a rank's clients', or SplitFedV1's replicas; all are equal between rounds. Those of absent
    clients take the result, too. Floating-point numbers are averaged by weight, integers by maximum.

    Args:
        keys: which rule, with its arguments.
        members: by client.
        parameters: how many of their `floats`, the first ones, are parameters.

    Attributes:
        state: the rule's; what a checkpoint keeps.
    """

    def __init__(self, keys: AggregationKeys, members: Mapping[int, Weights], parameters: int):
        self.state: State = {}
        self._keys, self._members, self._parameters = keys, members, parameters
        self._rule = create(keys) if parameters else None
        self._last = self._parameters_of_all()

    def load_state(self, state: State) -> None:
        """Go on from such a state, from any device, and from the weights that the members have."""
        device = next(iter(self._members.values())).floats.device
        self.state = {name: tensor.to(device, copy=True) for name, tensor in state.items()}
        self._last = self._parameters_of_all()

    @torch.no_grad()
    def aggregate(
        self,
        shares: Mapping[int, float],
        all_reduce: Callable[[Weights], None] = lambda sums: None,
        averaged: Mapping[int, Weights] | None = None,
    ) -> None:
        """The end of a round: local participants are summed first, in one buffer for all models.

        Args:
            shares: w_i of the participants (of all ranks), adding up to 1.
            all_reduce: sums the floats and takes the maximum of the integers over the ranks, in place.
            averaged: further models of the same clients, which take the mean.

        Raises:
            ValueError: the shares do not add up to 1.
            InputError: the user's own rule fails.
        """
        check_shares(shares.values())
        groups = [self._members, averaged] if averaged else [self._members]
        like = [next(iter(group.values())) for group in groups]
        sizes = [(model.floats.numel(), model.integers.numel()) for model in like]
        floats, integers = map(list, zip(*sizes, strict=True))
        sums = Weights(like[-1].floats.new_zeros(sum(floats)), like[-1].integers.new_zeros(sum(integers)))
        parts = [
            Weights(*part)
            for part in zip(sums.floats.split(floats), sums.integers.split(integers), strict=True)
        ]
        for group, part in zip(groups, parts, strict=True):
            for client, model in group.items():
                if client in shares:
                    part.floats.add_(model.floats, alpha=shares[client])
                    torch.maximum(part.integers, model.integers, out=part.integers)
        all_reduce(sums)
        parts[0] = self._next(parts[0])
        for group, part in zip(groups, parts, strict=True):
            for model in group.values():
                model.load(part)

    def _next(self, mean: Weights) -> Weights:
        """The next global weights. They share no memory with what the rule has been given, and may keep."""
        if self._rule is None or self._last is None:
            return mean
        parameters, buffers = mean.floats.tensor_split([self._parameters])
        result = _checked_next(self._keys, self._rule, self._last, parameters, self.state)
        floats = torch.cat([result, buffers])
        self._last = floats[: self._parameters]
        return Weights(floats, mean.integers)

    def _parameters_of_all(self) -> Tensor | None:
        """A copy of the global parameters, as they are between rounds, where a rule needs them."""
        if self._rule is None:
            return None
        return next(iter(self._members.values())).floats[: self._parameters].clone()


def _checked_next(keys: AggregationKeys, rule: Aggregation, x: Tensor, mean: Tensor, state: State) -> Tensor:
    """The rule's next global parameters.

    Raises:
        InputError: the user's own fails, or gives or keeps what cannot be.
    """
    if not is_own(keys.name):
        return rule.next(x, mean, state)
    shape, dtype = x.shape, x.dtype
    try:
        result = rule.next(x, mean, state)
    except Exception as error:  # the user's rule may raise anything
        raise _refusal(keys, f"fails ({first_line(error)})") from None
    if not isinstance(result, Tensor):
        raise _refusal(keys, f"gives {type(result).__name__}, expected a tensor")
    if (result.shape, result.dtype) != (shape, dtype):
        given = f"{result.dtype} {list(result.shape)}"
        raise _refusal(keys, f"gives {given}, expected {dtype} {list(shape)} as x")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise _refusal(keys, f"keeps {type(value).__name__} as state[{name!r}], expected a tensor")
    return result


def _refusal(keys: AggregationKeys, wrong: str) -> InputError:
    return InputError(f"aggregation.name: got {keys.name!r}, whose next {wrong}")
