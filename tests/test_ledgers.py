"""The paper ledger gives the published figures; the wire ledger adds up."""

import pytest

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.algorithms.base import Sizes
from fslsage_rpc.comm.ledger import WireLedger, ring_share
from fslsage_rpc.config import AlgorithmKeys, Model
from fslsage_rpc.federation import Federation
from fslsage_rpc.models.flat import module_bytes
from fslsage_rpc.models.splitting import build

ROUNDS = 10  # one alignment interval


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    import torch

    split = build(Model(name="resnet18", cut="layer2"), 10, (3, 32, 32), 0, torch.float32)
    models = (split.client, split.server, split.auxiliary)
    return Sizes(*map(module_bytes, models), smashed=torch.Size(split.smashed_shape).numel() * 4)


def mean_paper_bytes(name: str, sizes: Sizes, **keys: object) -> float:
    """Bytes per round of the paper's CIFAR-10 setting, without training anything."""
    federation = Federation([5000] * 10, 1.0, batch_size=256, local_epochs=1, seed=0)
    algorithm = ALGORITHMS[name](AlgorithmKeys(name=name, upload_every=5, align_every=10, **keys), federation)  # type: ignore[arg-type]
    return sum(algorithm.paper_bytes(sizes, round) for round in range(ROUNDS)) / ROUNDS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedavg", 895_302_560),
        ("splitfed_v1", 874_000_960),
        ("splitfed_v2", 874_000_960),
        ("cse_fsl", 307_075_200),
        ("fsl_sage", 147_106_448),
    ],
)
def test_paper_ledger_check_values(name: str, expected: int, sizes: Sizes) -> None:
    assert mean_paper_bytes(name, sizes, average_auxiliary="never") == expected


def test_averaging_the_auxiliary_models_is_in_the_paper_ledger(sizes: Sizes) -> None:
    never, alignment, every_round = (
        mean_paper_bytes("fsl_sage", sizes, average_auxiliary=when)
        for when in ("never", "alignment", "round")
    )
    assert alignment - never == 10 * 2 * sizes.auxiliary / ROUNDS  # 10 clients, once per interval
    assert every_round - never == 10 * 2 * sizes.auxiliary


def test_ring_shares_add_up_to_what_a_ring_moves() -> None:
    for ranks in (1, 2, 3, 7):
        assert sum(ring_share(1001, ranks, rank) for rank in range(ranks)) == 2 * (ranks - 1) * 1001


def test_wire_ledger_counts_by_kind_and_client_and_starts_again() -> None:
    ledger = WireLedger()
    ledger.count("smashed_up", 3, client=1)
    ledger.count("smashed_up", 4, client=1)
    ledger.count("evaluation", 5)
    taken = ledger.take()
    assert taken[1]["smashed_up"] == 7
    assert sum(sum(kinds.values()) for kinds in taken.values()) == 12
    assert ledger.take() == {}


def test_absent_clients_align_at_their_first_round_back() -> None:
    federation = Federation([10] * 6, 0.5, batch_size=5, local_epochs=1, seed=3)
    algorithm = ALGORITHMS["fsl_sage"](AlgorithmKeys(align_every=4), federation)
    for client in range(6):
        for interval in range(0, 40, 4):
            present = [r for r in range(interval, interval + 4) if client in federation.participants(r)]
            aligned = [r for r in present if algorithm.aligns(client, r)]
            assert aligned == present[:1]
            for round in present:
                steps = algorithm.request_steps(client, round)
                assert steps == ([0, 0] if round in aligned else [0])


def test_alignment_never_means_never() -> None:
    federation = Federation([10] * 2, 1.0, batch_size=5, local_epochs=1, seed=0)
    algorithm = ALGORITHMS["fsl_sage"](AlgorithmKeys(align_every=None), federation)
    assert not any(algorithm.aligns(0, r) or algorithm.averages_auxiliary(r) for r in range(20))
