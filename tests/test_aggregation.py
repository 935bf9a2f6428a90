"""Averaging gives the mean of the participants' weights, or the next weights by a rule."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fslsage_rpc
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.own import source_hash
from fslsage_rpc.config.schema import AggregationKeys
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.flat import Weights, flatten
from fslsage_rpc.parties.aggregation import Adam, Aggregation, Aggregator, create
from fslsage_rpc.runs.checkpoint_files import Manifest, RankState, extent_of, write_part
from fslsage_rpc.training.experiment import check
from fslsage_rpc.training.sameness import own_sources
from support.batch_norm_model import CUT
from support.equality import assert_same
from support.rank_program import Outcome, train_locally, train_on_ranks
from support.run_folders import everything
from support.trees import merged, tree
from support.user_input import mistake

HERE = "test_aggregation"
MEAN = AggregationKeys()
Models = dict[int, Weights]


def numbers(*floats: float, counter: int = 0) -> Weights:
    return Weights(torch.tensor(floats, dtype=torch.float64), torch.tensor([counter]))


def plain(weights: Weights) -> tuple[list[float], list[int]]:
    return weights.floats.tolist(), weights.integers.tolist()


# The mean


def test_the_mean_is_by_weight_counters_by_maximum_and_absent_ones_take_both() -> None:
    models = {c: numbers(*f, counter=n) for c, f, n in ((0, (1, -8), 3), (1, (3, 0), 11), (2, (-4, 16), 99))}
    Aggregator(MEAN, models, 1).aggregate({0: 0.5, 1: 0.5})
    assert [plain(model) for model in models.values()] == [([2.0, -4.0], [11])] * 3


def test_the_mean_is_a_sum_in_the_clients_order_to_the_last_bit() -> None:
    drawn = torch.Generator().manual_seed(0)
    models = {c: Weights(torch.randn(1003, generator=drawn), torch.tensor([c])) for c in range(5)}
    others = {c: Weights(torch.randn(77, generator=drawn), torch.empty(0).long()) for c in range(5)}
    shares = {4: 7 / 23, 1: 3 / 23, 2: 13 / 23}
    expected = []
    for group in (models, others):
        total = torch.zeros_like(group[0].floats)
        for client in (1, 2, 4):
            total.add_(group[client].floats, alpha=shares[client])
        expected.append(total)
    average = Aggregator(MEAN, models, 1000)
    average.aggregate(shares, averaged=others)
    for group, total in zip((models, others), expected, strict=True):
        assert all(torch.equal(model.floats, total) for model in group.values())
    assert average.state == {}


def test_all_models_travel_in_one_all_reduce() -> None:
    models, others = ({c: numbers(*range(n), counter=c) for c in range(3)} for n in (4, 6))
    seen: list[Weights] = []
    Aggregator(MEAN, models, 4).aggregate(dict.fromkeys(range(3), 1 / 3), seen.append, others)
    (joint,) = seen
    assert (joint.floats.numel(), joint.integers.tolist()) == (10, [2, 2])


def test_a_client_half_without_weights_is_averaged_beside_its_auxiliary_model() -> None:
    models = {c: flatten(nn.ReLU()) for c in range(2)}
    others = {0: numbers(1.0), 1: numbers(2.0)}
    Aggregator(AggregationKeys(name="adam"), models, 0).aggregate({0: 0.25, 1: 0.75}, averaged=others)
    assert plain(others[0]) == ([1.75], [0])


def over_ranks(
    keys: AggregationKeys, ranks: list[Models], rounds: list[dict[int, float]], parameters: int
) -> None:
    """Trained and aggregated for some rounds, with an all-reduce that adds up what all ranks bring."""
    aggregators = [Aggregator(keys, models, parameters) for models in ranks]
    brought: list[Weights] = []

    def all_reduce(sums: Weights) -> None:
        sums.floats.copy_(torch.stack([other.floats for other in brought]).sum(0))
        sums.integers.copy_(torch.stack([other.integers for other in brought]).amax(0))

    for t, shares in enumerate(rounds):
        brought.clear()
        for models in ranks:
            for client, model in models.items():
                model.floats.add_(torch.linspace(-1, 2, model.floats.numel()) * (client + 1 + t) / 100)
                model.integers.add_(client)
            copies = {client: model.clone() for client, model in models.items()}
            Aggregator(MEAN, copies, 0).aggregate(shares, lambda sums: brought.append(sums.clone()))
        for aggregator in aggregators:
            aggregator.aggregate(shares, all_reduce)


@pytest.mark.parametrize("name", ["mean", "momentum", "adam", "yogi"])
def test_ranks_get_the_same_bits_and_what_one_rank_gets(name: str) -> None:
    """The participants differ from round to round; in the second a rank has none."""
    samples = [3, 10, 1, 7, 29]
    rounds = []
    for participants in ((0, 2, 4), (0, 1), (0, 1, 2, 3, 4), (3,)):
        total = sum(samples[client] for client in participants)
        rounds.append({client: samples[client] / total for client in participants})

    def models() -> Models:
        return {c: numbers(*torch.linspace(-2, 1, 9).tolist()) for c in range(5)}

    one, other = models(), models()
    over_ranks(AggregationKeys(name=name), [one], rounds, parameters=7)
    parted = [{c: other[c] for c in clients} for clients in ((0, 1), (2, 3, 4))]
    over_ranks(AggregationKeys(name=name), parted, rounds, parameters=7)
    for client in range(5):
        assert torch.equal(other[client].floats, other[0].floats)
        torch.testing.assert_close(other[client].floats, one[0].floats, rtol=1e-12, atol=1e-13)
        assert other[client].integers.tolist() == one[0].integers.tolist()


# The rules, by hand


def by_momentum(lr: float = 1.0, momentum: float = 0.9) -> Callable[[float, float], float]:
    v = 0.0

    def following(x: float, mean: float) -> float:
        nonlocal v
        v = momentum * v + (x - mean)
        return x - lr * v

    return following


def by_adam(
    yogi: bool, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Callable[[float, float], float]:
    m, v = 0.0, tau**2

    def following(x: float, mean: float) -> float:
        nonlocal m, v
        g = x - mean
        m = beta1 * m + (1 - beta1) * g
        if yogi:
            v -= (1 - beta2) * g**2 * ((v > g**2) - (v < g**2))
        else:
            v = beta2 * v + (1 - beta2) * g**2
        return x - lr * m / (math.sqrt(v) + tau)

    return following


OTHERS = {"lr": 0.5, "beta1": 0.5, "beta2": 0.25, "tau": 0.5}
RULES: list[tuple[str, dict[str, float], Callable[[], Callable[[float, float], float]]]] = [
    ("momentum", {}, by_momentum),
    ("momentum", {"lr": 0.25, "momentum": 0.5}, lambda: by_momentum(0.25, 0.5)),
    ("adam", {}, lambda: by_adam(yogi=False)),
    ("adam", OTHERS, lambda: by_adam(yogi=False, **OTHERS)),
    ("yogi", {}, lambda: by_adam(yogi=True)),
    ("yogi", OTHERS, lambda: by_adam(yogi=True, **OTHERS)),
]


@pytest.mark.parametrize(("name", "arguments", "rule"), RULES)
def test_a_rule_by_hand_over_four_rounds(
    name: str, arguments: dict[str, float], rule: Callable[[], Callable[[float, float], float]]
) -> None:
    """Two parameters, each with moments of its own, and a buffer, which takes the mean."""
    models = {0: numbers(1.0, -2.0, 5.0), 1: numbers(1.0, -2.0, 5.0)}
    aggregator = Aggregator(AggregationKeys(name=name, arguments=arguments), models, 2)
    x, rules = [1.0, -2.0], (rule(), rule())
    for trained in ((0.5, -1.0, 6.0), (0.75, -1.5, 7.0), (0.875, 0.5, 8.0), (0.25, 0.25, 9.0)):
        models[0].floats.copy_(torch.tensor(trained))  # the other one is absent
        aggregator.aggregate({0: 1.0})
        x = [each(*pair) for each, pair in zip(rules, zip(x, trained[:2], strict=True), strict=True)]
        for model in models.values():
            assert model.floats[:2].tolist() == pytest.approx(x, rel=1e-13)
            assert model.floats[2].item() == trained[2]


def test_the_first_steps_have_known_sizes() -> None:
    """After one round v is 1e-6 * 0.99 + 0.01 * 0.25 for adam, and likewise 1e-6 + 0.01 * 0.25 for yogi."""
    for name, v in (("adam", 0.99e-6 + 0.0025), ("yogi", 1e-6 + 0.0025)):
        models = {0: numbers(1.0)}
        aggregator = Aggregator(AggregationKeys(name=name, arguments={"lr": 0.1}), models, 1)
        models[0].floats.fill_(0.5)
        aggregator.aggregate({0: 1.0})
        assert models[0].floats.item() == pytest.approx(1 - 0.1 * 0.05 / (math.sqrt(v) + 1e-3), rel=1e-12)


def test_momentum_without_any_is_the_mean() -> None:
    models = {0: numbers(1.0, 2.0), 1: numbers(1.0, 2.0)}
    aggregator = Aggregator(AggregationKeys(name="momentum", arguments={"momentum": 0.0}), models, 2)
    models[0].floats.fill_(0.25)
    aggregator.aggregate({0: 0.5, 1: 0.5})
    assert models[1].floats.tolist() == [0.625, 1.125]


# States


class Hoarder(Aggregation):
    """Keeps what it was given and what it gave, and works in place."""

    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        before = {name: kept.clone() for name, kept in state.items()}
        if "x" in state:
            assert torch.equal(state["given"], x)
            assert all(torch.equal(state[f"copy of {name}"], before[name]) for name in ("x", "mean", "given"))
        state.update({"x": x, "mean": mean, "given": (x + mean) / 2})
        state.update({f"copy of {name}": state[name].clone() for name in ("x", "mean", "given")})
        return state["given"]


def test_what_a_rule_keeps_is_not_changed_behind_its_back() -> None:
    models = {0: numbers(1.0, 2.0, 3.0)}
    aggregator = Aggregator(AggregationKeys(name=f"{HERE}:Hoarder"), models, 2)
    for _ in range(3):
        models[0].floats.mul_(2)
        aggregator.aggregate({0: 1.0})
    assert models[0].floats.tolist() == [1.5**3, 2 * 1.5**3, 24.0]


def test_a_state_goes_on_and_is_the_aggregators_own() -> None:
    keys = AggregationKeys(name="adam")
    whole, parted = {0: numbers(1.0)}, {0: numbers(0.0)}
    first = Aggregator(keys, whole, 1)
    whole[0].floats.fill_(0.5)
    first.aggregate({0: 1.0})
    second = Aggregator(keys, parted, 1)
    parted[0].load(whole[0])
    saved = {name: tensor.clone() for name, tensor in first.state.items()}
    second.load_state(saved)
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    for trained in (0.75, 0.875):
        for models, aggregator in ((whole, first), (parted, second)):
            models[0].floats.fill_(trained)
            aggregator.aggregate({0: 1.0})
        assert plain(whole[0]) == plain(parted[0])
    assert all(torch.equal(saved[name], kept[name]) for name in ("m", "v"))


def test_a_checkpoint_gives_its_state_to_any_rank_that_reads_clients(tmp_path: Path) -> None:
    """Rank 0 has client 2, which is away, and no state of the rule; the others each have the same one."""
    folder, state = tmp_path / "round-000003", {"m": torch.ones(2)}
    client: dict[str, Any] = {"weights": {}}
    states = [
        RankState(3, {2: client}, {"lanes": []}, {}),
        RankState(3, {0: client}, None, {}, state),
        RankState(3, {1: client}, None, {}, state),
    ]
    parts = [write_part(folder, rank, each) for rank, each in enumerate(states)]
    saved = Manifest(folder, 3, parts, extent_of(b""))
    for clients in ([0], [1], [0, 2], [2, 1], [0, 1, 2]):
        read = saved.read(clients, server=2 in clients)
        assert read.aggregation["m"].tolist() == [1, 1]
        assert sorted(read.clients) == sorted(clients)
    assert saved.read([2], server=True).aggregation == {}


@pytest.mark.parametrize("algorithm", ["fsl_sage", "splitfed_v1"])
def test_with_the_mean_a_checkpoint_has_what_it_always_had(algorithm: str, tmp_path: Path) -> None:
    run = fslsage_rpc.train(tree(tmp_path, algorithm={"name": algorithm}, rounds=1))
    part = run.folder / "checkpoints" / "round-000001" / "rank-0.pt"
    saved = torch.load(part, weights_only=True)
    assert saved.keys() == {"rounds", "clients", "server", "client_bytes"}
    assert saved["server"].keys() == {"averaged", "lanes", "fits"}


def test_a_state_is_kept_once_for_all_clients(tmp_path: Path) -> None:
    keys = {"algorithm": {"name": "splitfed_v1"}, "aggregation": {"name": "adam"}}
    found = everything(fslsage_rpc.train(tree(tmp_path, keys, rounds=2)))
    moments = [name for name in found if name.startswith(("/aggregation", "/server/replicas"))]
    assert moments == ["/server/replicas/m", "/server/replicas/v", "/aggregation/m", "/aggregation/v"]


# In training


def small(algorithm: str, rule: str, **keys: Any) -> dict[str, Any]:
    """Three rounds at fp64, in which two of three clients take part."""
    changes = {
        "rounds": 3,
        "clients": {"participation": 0.5},
        "algorithm": {"name": algorithm},
        "aggregation": {"name": rule},
    }
    return tree(Path("unused"), changes, keys)


@pytest.mark.parametrize("model", ["simple_conv", "support.batch_norm_model:residual"])
@pytest.mark.parametrize("rule", ["momentum", "adam", f"{HERE}:Hoarder"])
def test_splitfed_v1_is_fedavg_by_every_rule(rule: str, model: str) -> None:
    """Parameters go by the rule in both halves, and BatchNorm's statistics by the mean."""
    keys = {"model": {"name": model}, "data": {"partition": "iid", "train_limit": 96}}
    if model != "simple_conv":
        keys = merged(keys, {"model": {"cut": CUT}, "rounds": 2})  # which blows the rounding up
    split, whole = (train_locally(small(name, rule, **keys)) for name in ("splitfed_v1", "fedavg"))
    names = [name for name in split.tensors if name.startswith("final ")]
    assert names == [name for name in whole.tensors if name.startswith("final ")]
    for name in names:
        one, other = (outcome.tensors[name].double() for outcome in (split, whole))
        assert (one - other).norm() <= 1e-9 * other.norm(), name
    mean = train_locally(small("fedavg", "mean", **keys))
    assert any(not torch.allclose(whole.tensors[name], mean.tensors[name]) for name in names)


ALONE = {"clients": {"count": 1, "participation": 1.0}}


def test_a_single_replica_goes_by_the_rule() -> None:
    split, whole = (train_locally(small(name, "adam", **ALONE)) for name in ("splitfed_v1", "fedavg"))
    for name in (name for name in split.tensors if name.startswith("final ")):
        torch.testing.assert_close(split.tensors[name], whole.tensors[name], rtol=1e-9, atol=1e-11)


def test_a_server_model_that_all_clients_share_does_not() -> None:
    """In the first round it has seen the same under both rules."""
    adam, mean = (
        train_locally(merged(small("splitfed_v2", rule, **ALONE), {"rounds": 1})) for rule in ("adam", "mean")
    )
    assert torch.equal(adam.tensors["server of 0/floats"], mean.tensors["server of 0/floats"])
    assert not torch.equal(adam.tensors["client 0/floats"], mean.tensors["client 0/floats"])


@pytest.mark.parametrize("algorithm", ["fsl_sage", "cse_fsl"])
def test_auxiliary_models_take_the_mean(algorithm: str) -> None:
    """The first round is the same under both rules, up to its end."""
    adam, mean = (train_locally(merged(small(algorithm, rule), {"rounds": 1})) for rule in ("adam", "mean"))
    assert not torch.equal(adam.tensors["client 0/floats"], mean.tensors["client 0/floats"])
    assert torch.equal(adam.tensors["client 0 auxiliary/floats"], mean.tensors["client 0 auxiliary/floats"])
    for client in range(3):
        assert torch.equal(adam.tensors[f"client {client}/floats"], adam.tensors["client 0/floats"])


@pytest.mark.parametrize("algorithm", ["fsl_sage", "cse_fsl", "splitfed_v1", "splitfed_v2", "fedavg"])
def test_momentum_without_any_trains_as_the_mean_does(algorithm: str) -> None:
    still = {"aggregation": {"arguments": {"momentum": 0}}}
    assert_same(train_locally(small(algorithm, "mean")), train_locally(small(algorithm, "momentum", **still)))


def test_bf16_keeps_moments_in_the_weights_type(tmp_path: Path) -> None:
    keys = {"precision": "bf16", "aggregation": {"name": "yogi"}, "rounds": 2}
    found = everything(fslsage_rpc.train(tree(tmp_path, keys)))
    assert {found[f"/aggregation/{name}"].dtype for name in ("m", "v")} == {torch.float32}


RANKED = [
    small("fsl_sage", "adam"),
    small("splitfed_v1", "momentum"),
    small("cse_fsl", "yogi"),
    small("fedavg", "adam"),
]


@pytest.mark.gate
@pytest.mark.timeout(300)
def test_any_number_of_ranks_gives_the_same_numbers(tmp_path: Path) -> None:
    outcomes: list[list[Outcome]] = [[train_locally(keys) for keys in RANKED]]
    far = [{**keys, "transport": "rpc"} for keys in RANKED]
    outcomes += [train_on_ranks(ranks, far, tmp_path / str(ranks)) for ranks in (2, 3)]
    for local, two, three in zip(*outcomes, strict=True):
        assert_same(local, two)
        assert_same(local, three)
        for client in range(1, 3):
            assert torch.equal(three.tensors[f"client {client}/floats"], three.tensors["client 0/floats"])


# What is refused


def wrong(name: str, **arguments: Any) -> str:
    keys = {"aggregation": {"name": name, "arguments": arguments}}
    return mistake(check, from_tree(tree(Path("unused"), keys)), 1)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("mean", {"lr": 1.0}, "aggregation.arguments: got {lr: 1.0}, expected {}: mean takes none"),
        ("momentum", {"lr": 0}, "aggregation.arguments.lr: got 0, expected a number > 0"),
        ("adam", {"tau": 0.0}, "aggregation.arguments.tau: got 0.0, expected a number > 0"),
        ("yogi", {"beta2": 1}, "aggregation.arguments.beta2: got 1, expected a number >= 0 and <= 0.9999"),
        (
            "momentum",
            {"beta1": 0.5},
            "aggregation.arguments.beta1: unknown argument of momentum; known arguments: lr, momentum",
        ),
    ],
)
def test_arguments_are_held_to_the_rule(name: str, arguments: dict[str, Any], said: str) -> None:
    assert wrong(name, **arguments) == said


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    said = mistake(from_tree, {"aggregation": {"name": "sgd"}})
    known = "mean, momentum, adam, yogi, or package.module:Class"
    assert said == f"aggregation.name: got 'sgd', expected one of {known}"


class Clipped(Adam):
    """Adam on a clipped pseudo-gradient."""

    def __init__(self, clip: float = 1.0, **more: Any):
        super().__init__(**more)
        self.clip = clip

    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return super().next(x, x - (x - mean).clamp(-self.clip, self.clip), state)


class Half(Aggregation):
    """Lacks its method."""


class Tuned(Aggregation):
    def __init__(self, lr: float):
        self.lr = lr / 0

    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return mean


class Shorter(Aggregation):
    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return mean[1:]


class Wider(Aggregation):
    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return mean.half()


class Silent(Aggregation):
    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Any:
        x.copy_(mean)


class Counting(Aggregation):
    def next(self, x: Tensor, mean: Tensor, state: dict[str, Any]) -> Tensor:
        state["rounds"] = 1
        return mean


class Remembering(Aggregation):
    rounds = 0

    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        self.rounds += 1
        return x + (mean - x) / self.rounds


class Drawing(Aggregation):
    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        return mean + torch.randn_like(mean)


class Late(Aggregation):
    """Fails in the third round, which no trial shows."""

    def next(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> Tensor:
        state["t"] = state.get("t", torch.zeros(())) + 1
        return mean[: -1 if state["t"] > 2 else None]


def no_rule() -> None: ...


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", ", which cannot be imported (AttributeError: module 'test_aggregation' has no attribute"),
        ("no_rule", ", expected a subclass of fslsage_rpc.parties.aggregation.Aggregation"),
        ("Half", ", which lacks next"),
        ("Shorter", "', whose next gives torch.float64 ["),
        ("Wider", "', whose next gives torch.float16 ["),
        ("Silent", ", whose next gives NoneType, expected a tensor"),
        ("Counting", ", whose next keeps int as state['rounds'], expected a tensor"),
        ("Remembering", ", whose next gives something else for the same arguments: what it remembers"),
        ("Drawing", ", whose next gives something else for the same arguments"),
    ],
)
def test_what_is_no_rule_is_refused_before_ranks_meet(name: str, said: str) -> None:
    message = wrong(f"{HERE}:{name}")
    assert message.startswith(f"aggregation.name: got '{HERE}:{name}'")
    assert said in message


def test_arguments_of_the_users_own_are_held_to_its_signature() -> None:
    said = f"aggregation.arguments: got {{}}, expected a value for lr, which {HERE}:Tuned needs"
    assert wrong(f"{HERE}:Tuned") == said
    fails = "which fails (ZeroDivisionError: float division by zero)"
    assert wrong(f"{HERE}:Tuned", lr=1.0) == f"aggregation.name: got '{HERE}:Tuned', {fails}"
    assert "unknown argument" in wrong(f"{HERE}:Clipped", clap=1.0)


def test_ranks_compare_the_source_of_the_users_own() -> None:
    config = from_tree({"aggregation": {"name": f"{HERE}:Hoarder"}})
    assert own_sources(config) == {"aggregation.name": source_hash(f"{HERE}:Hoarder")}
    assert own_sources(config)["aggregation.name"] is not None


def test_a_rule_that_fails_later_ends_the_run_in_one_line() -> None:
    with pytest.raises(InputError, match=f"got '{HERE}:Late', whose next gives"):
        train_locally(small("fsl_sage", f"{HERE}:Late"))


def test_a_subclass_of_a_rule_writes_only_what_differs() -> None:
    keys = AggregationKeys(name=f"{HERE}:Clipped", arguments={"clip": 0.25, "lr": 0.5})
    rule = create(keys)
    assert isinstance(rule, Clipped)
    assert (rule.clip, rule.lr, rule.beta1) == (0.25, 0.5, 0.9)
    x, mean = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    m, v = 0.1 * 0.25, 0.99e-6 + 0.01 * 0.25**2
    assert rule.next(x, mean, {}).item() == pytest.approx(2 - 0.5 * m / (math.sqrt(v) + 1e-3), rel=1e-12)
