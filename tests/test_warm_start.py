"""The warm start: round 0 is one of CSE-FSL; then FSL-SAGE goes on from what it trained."""

from typing import Any

import torch

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.training.experiment import Experiment
from support.rank_program import train_locally


def tree(name: str, rounds: int, **keys: Any) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "precision": "fp64",
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 16},
        "data": {"train_limit": 150, "test_limit": 60, "partition": "iid"},
        "algorithm": {"name": name, "upload_every": 2, "align_every": 2, "alignment": {"epochs": 2}, **keys},
    }


def test_the_first_round_is_one_of_cse_fsl() -> None:
    sage = train_locally(tree("fsl_sage", 1, start="warm_start"))
    cse = train_locally(tree("cse_fsl", 1))
    for name, tensor in cse.tensors.items():
        assert torch.equal(sage.tensors[name], tensor), name
    for client in range(3):  # and the server goes on from the averaged auxiliary model
        assert torch.equal(
            sage.tensors[f"server's auxiliary of {client}/floats"], cse.tensors["client 0 auxiliary/floats"]
        )
    (line,), (expected,) = sage.lines, cse.lines
    assert line["alignment"] is line["drift"] is None
    assert line["paper_bytes"] == expected["paper_bytes"]
    auxiliary = sage.tensors["client 0 auxiliary/floats"].numel() * 8
    assert line["wire_bytes"] == {**expected["wire_bytes"], "weights_allreduce": auxiliary}


def test_then_alignment_and_its_interval_begin() -> None:
    outcome = train_locally(tree("fsl_sage", 6, start="warm_start", average_auxiliary="never"))
    assert [line["alignment"] is not None for line in outcome.lines] == [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert [line["drift"] is not None for line in outcome.lines] == [False] + 5 * [True]
    assert [line["wire_bytes"]["auxiliary_down"] > 0 for line in outcome.lines] == 3 * [False, True]


def test_a_client_that_was_absent_in_the_warm_start_aligns_when_it_first_takes_part() -> None:
    keys = tree("fsl_sage", 8, start="warm_start")
    keys["clients"]["participation"] = 0.3
    experiment = Experiment.prepare(from_tree(keys))
    seen: set[int] = set()
    for round in range(1, 8):
        if round % 2:
            seen = set()
        for client in experiment.federation.participants(round):
            aligned = experiment.rehearsal.aligned(client, round)
            assert len(aligned) == (client not in seen)
            seen.add(client)
