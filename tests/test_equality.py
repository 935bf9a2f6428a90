"""The real transport equals the oracle, on any number of ranks and every time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fslsage_rpc.device.memory import status_bytes
from fslsage_rpc.transport import choices
from support.batch_norm_model import CUT, SMASHED_SAMPLE
from support.equality import OWN_COLLECTIVES, assert_same, without_seconds
from support.rank_program import Outcome, train_and_save, train_locally, train_on_ranks
from support.trees import ALGORITHM, merged

pytestmark = pytest.mark.timeout(600)  # the first test waits for two jobs
BATCH_NORM = "batch_norm"
MODELS = {
    "simple_conv": {"name": "simple_conv"},
    BATCH_NORM: {"name": "support.batch_norm_model:residual", "cut": CUT},
}


def tree(partition_file: Path, algorithm: str, order: str, model: str = "simple_conv") -> dict[str, Any]:
    return {
        # BatchNorm on few pixels, as of digits, amplifies rounding.
        "rounds": 1 if model == BATCH_NORM else 3,
        "precision": "fp64",
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"partition": "file", "partition_file": str(partition_file), "test_limit": 60},
        "model": dict(MODELS[model]),
        "algorithm": {
            "name": algorithm,
            **ALGORITHM,
            "alignment": {"epochs": 4, "batch_size": 25, "buffer_size": 40},
        },
        "optimizer": {party: {"lr": 3e-3} for party in ("client", "server", "auxiliary")},
        "server": {"order": order},
        "comm": {"transports": ["uv"], "upload_window": 1, "timeout_seconds": 60},
        "evaluation": {"every": 2},
    }


def warm(tree: dict[str, Any]) -> dict[str, Any]:
    """FSL-SAGE with a warm start, an auxiliary model of some depth and falling learning rates."""
    for keys, per in zip(tree["optimizer"].values(), ("round", "step", "step"), strict=True):
        keys["scheduler"] = {"name": "CosineAnnealingLR", "arguments": {"T_max": 20}, "per": per}
    tree["algorithm"]["start"] = "warm_start"
    tree["model"] |= {"cut": "norm1", "auxiliary": {"until": "pool2"}}
    return tree


def behind(tree: dict[str, Any]) -> dict[str, Any]:
    """FSL-SAGE whose clients do not wait for fits: the first are taken up in round 2, the last never."""
    tree["algorithm"]["alignment"]["lag"] = 1
    return tree


def in_bf16(tree: dict[str, Any]) -> dict[str, Any]:
    """Autocast; the same numbers only where sums are taken in the same order, so on one client rank."""
    return {**tree, "precision": "bf16"}


def coded(tree: dict[str, Any]) -> dict[str, Any]:
    """Codecs that draw, and one that leaves something out."""
    stochastic = {"name": "int8", "arguments": {"stochastic": True}}
    tree["comm"]["codec"] = {"smashed": stochastic, "gradient": stochastic, "auxiliary": "topk"}
    return tree


def counted(tree: dict[str, Any]) -> dict[str, Any]:
    """A codec whose bytes depend on values."""
    tree["comm"]["codec"] = dict.fromkeys(("smashed", "auxiliary"), "support.own_codecs:NonZero")
    tree["algorithm"]["average_auxiliary"] = "round"
    return tree


def with_noise(tree: dict[str, Any]) -> dict[str, Any]:
    """Noise on smashed data."""
    tree["comm"]["codec"] = {"smashed": {"name": "gaussian", "arguments": {"clip": 1.0, "sigma": 0.1}}}
    return tree


def with_dropout(tree: dict[str, Any], name: str, cut: str, until: str | None) -> dict[str, Any]:
    """A model that draws masks."""
    model = {"name": f"support.random_models:{name}", "cut": cut, "auxiliary": {"until": until}}
    return {**tree, "rounds": 2, "model": model}


CASES = [
    ("fsl_sage", "round_robin", "simple_conv"),
    ("fsl_sage", "client_major", "simple_conv"),
    ("fsl_sage", "round_robin", BATCH_NORM),
    ("splitfed_v1", "round_robin", "simple_conv"),
    ("splitfed_v1", "client_major", "simple_conv"),
    ("splitfed_v1", "round_robin", BATCH_NORM),
    ("splitfed_v2", "round_robin", "simple_conv"),
    ("splitfed_v2", "client_major", "simple_conv"),
    ("cse_fsl", "round_robin", "simple_conv"),
    ("fedavg", "round_robin", "simple_conv"),
]


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("partition") / "partition.json"
    # Clients of unequal size: 5, 3 and 3 steps, and every last batch is short.
    path.write_text(json.dumps([list(range(70)), list(range(70, 115)), list(range(115, 149))]))
    more = [
        behind(tree(path, "fsl_sage", "client_major")),
        behind(coded(warm(tree(path, "fsl_sage", "round_robin")))),
        with_dropout(behind(tree(path, "fsl_sage", "round_robin")), "copied", "1", until="5"),
        with_dropout(tree(path, "fsl_sage", "round_robin"), "copied", "1", until="5"),
        with_dropout(tree(path, "splitfed_v1", "round_robin"), "wet", "between", until=None),
        with_dropout(tree(path, "splitfed_v2", "client_major"), "wet", "between", until=None),
        coded(warm(tree(path, "fsl_sage", "round_robin"))),
        counted(tree(path, "fsl_sage", "round_robin")),
        coded(tree(path, "splitfed_v1", "round_robin")),
        with_noise(tree(path, "splitfed_v2", "client_major")),
        warm(tree(path, "fsl_sage", "round_robin")),
        in_bf16(tree(path, "fsl_sage", "round_robin")),
    ]
    return [tree(path, *case) for case in CASES] + more


@pytest.fixture(scope="module")
def local(trees: list[dict[str, Any]]) -> list[Outcome]:
    return [train_locally(tree) for tree in trees]


@pytest.fixture(scope="module")
def two_ranks(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return train_on_ranks(2, trees, tmp_path_factory.mktemp("jobs") / "2")


@pytest.fixture(scope="module")
def three_ranks(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return train_on_ranks(3, trees[:-1], tmp_path_factory.mktemp("jobs") / "3")


@pytest.fixture(scope="module")
def three_ranks_again(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return train_on_ranks(3, trees[:-2], tmp_path_factory.mktemp("jobs") / "3 again")


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
class TestTransports:
    @pytest.mark.gate
    def test_rpc_equals_local(self, case: int, local: list[Outcome], three_ranks: list[Outcome]) -> None:
        assert_same(local[case], three_ranks[case])

    @pytest.mark.gate
    def test_two_ranks_equal_three(
        self, case: int, two_ranks: list[Outcome], three_ranks: list[Outcome]
    ) -> None:
        assert_same(two_ranks[case], three_ranks[case])

    @pytest.mark.nightly
    def test_two_runs_give_the_same_metrics(
        self, case: int, three_ranks: list[Outcome], three_ranks_again: list[Outcome]
    ) -> None:
        first, second = (
            without_seconds(outcomes[case].lines) for outcomes in (three_ranks, three_ranks_again)
        )
        assert first == second

    def test_what_was_sent_is_what_the_algorithm_sends(self, case: int, local: list[Outcome]) -> None:
        algorithm, _, model = CASES[case]
        every_second_batch = 16 + 16 + 6 + 16 + 13 + 16 + 2  # samples a round
        uploaded = {"fsl_sage": every_second_batch, "cse_fsl": every_second_batch, "fedavg": 0}.get(
            algorithm, 149
        )
        for round, line in enumerate(local[case].lines):
            wire = line["wire_bytes"]
            assert (
                wire["smashed_up"]
                == uploaded * {"simple_conv": 64 * 2 * 2, BATCH_NORM: SMASHED_SAMPLE}[model] * 8
            )
            assert wire["labels_up"] == uploaded * 8
            requests = line["requests"].values()
            assert sum(r["up_bytes"] for r in requests) == wire["smashed_up"] + wire["labels_up"]
            assert sum(r["down_bytes"] for r in requests) == wire["gradient_down"] + wire["auxiliary_down"]
            assert wire["gradient_down"] == (wire["smashed_up"] if algorithm.startswith("splitfed") else 0)
            aligned = algorithm == "fsl_sage" and round % 2 == 0
            assert (line["alignment"] is not None) == aligned
            assert (wire["auxiliary_down"] > 0) == aligned
            assert (line["drift"] is not None) == (algorithm == "fsl_sage")


@pytest.mark.gate
def test_a_warm_start_and_falling_rates_are_the_same_everywhere(
    local: list[Outcome], two_ranks: list[Outcome], three_ranks: list[Outcome]
) -> None:
    assert_same(local[-2], three_ranks[-1])
    assert_same(two_ranks[-2], three_ranks[-1])
    assert [line["alignment"] is not None for line in local[-2].lines] == [False, True, False]


@pytest.mark.gate
def test_bf16_is_the_same_over_rpc_and_halves_the_bytes(
    local: list[Outcome], two_ranks: list[Outcome]
) -> None:
    assert_same(local[-1], two_ranks[-1])
    for half, double in zip(local[-1].lines, local[0].lines, strict=True):
        assert half["wire_bytes"]["smashed_up"] * 4 == double["wire_bytes"]["smashed_up"]  # that one in fp64


@pytest.mark.gate
@pytest.mark.parametrize("case", range(len(CASES), len(CASES) + 10))
def test_masks_and_codecs_draw_the_same_on_every_transport_and_number_of_ranks(
    case: int, local: list[Outcome], two_ranks: list[Outcome], three_ranks: list[Outcome]
) -> None:
    assert_same(local[case], two_ranks[case])
    assert_same(local[case], three_ranks[case])


@pytest.mark.gate
@pytest.mark.parametrize("transports", [["shm"], None], ids=["shm", "null where cores are many"])
def test_shared_memory_carries_the_same_numbers(
    transports: list[str] | None, trees: list[dict[str, Any]], local: list[Outcome], tmp_path: Path
) -> None:
    cases = (0, 3)
    over_it = [merged(trees[case], {"comm": {"transports": transports}}) for case in cases]
    found = train_on_ranks(2, over_it, tmp_path / "job", program=train_where_cores_are_many)
    for case, outcome in zip(cases, found, strict=True):
        assert outcome.tensors.keys() == local[case].tensors.keys()
        for name, expected in local[case].tensors.items():
            assert torch.equal(expected, outcome.tensors[name]), name
        assert_same(local[case], outcome)


def train_where_cores_are_many(configs: str, folder: str) -> None:
    """One rank of a job: TensorPipe's own choice on one host is its transport by shared memory."""
    choices.SHM_CORES_PER_RANK = 0
    assert choices.default_transports() is None
    train_and_save(configs, folder)


@pytest.mark.parametrize("case", [0, 3])
def test_rounds_learn_and_are_evaluated_when_asked(case: int, local: list[Outcome]) -> None:
    lines = local[case].lines
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    evaluated = [line["test_accuracy"] is not None for line in lines]
    assert evaluated == [False, True, True]  # evaluation.every is 2, and the last round always is


@pytest.mark.gate
def test_each_kind_of_rank_has_its_own_peak_memory(local: list[Outcome], three_ranks: list[Outcome]) -> None:
    for outcomes, kinds in ((local, {"server and client"}), (three_ranks, {"server", "client"})):
        for line in outcomes[0].lines:
            assert line["peak_memory"].keys() == kinds
            assert all(figures["device_bytes"] is None for figures in line["peak_memory"].values())
    for kind in ("server", "client"):
        peaks = [line["peak_memory"][kind]["host_bytes"] for line in three_ranks[0].lines]
        known = status_bytes("VmHWM") is not None
        assert peaks == (sorted(peaks) if known else [None] * len(peaks))
        assert not known or peaks[0] > 0


@pytest.mark.gate
def test_the_ledger_counts_what_a_ring_moves(two_ranks: list[Outcome], three_ranks: list[Outcome]) -> None:
    for (algorithm, _, _), two, three in zip(CASES, two_ranks, three_ranks, strict=False):
        reduced = [tensor for name, tensor in three.tensors.items() if name.startswith("client 0/")]
        if three.lines[0]["alignment"] or algorithm == "cse_fsl":  # auxiliary models: in the same all-reduce
            reduced += [
                tensor for name, tensor in three.tensors.items() if name.startswith("client 0 auxiliary/")
            ]
        size = sum(tensor.numel() * 8 for tensor in reduced)
        assert (
            three.lines[0]["wire_bytes"][OWN_COLLECTIVES] == 2 * (2 - 1) * size
        )  # 2 (n-1)/n S on each of n = 2
        assert two.lines[0]["wire_bytes"][OWN_COLLECTIVES] == 0  # one client rank has nobody to reduce with


def test_clients_are_averaged_and_auxiliaries_after_an_alignment(local: list[Outcome]) -> None:
    for (algorithm, _, _), outcome in zip(CASES, local, strict=False):
        tensors = outcome.tensors
        assert torch.equal(tensors["client 0/floats"], tensors["client 2/floats"])
        if algorithm == "fsl_sage":  # the last round had an alignment, and average_auxiliary is `alignment`
            assert torch.equal(tensors["client 0 auxiliary/floats"], tensors["client 2 auxiliary/floats"])
            assert torch.equal(
                tensors["server's auxiliary of 0/floats"], tensors["client 0 auxiliary/floats"]
            )
