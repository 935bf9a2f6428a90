"""precision: bf16 is autocast around forward passes: fp32 weights, bf16 smashed data and its gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Model
from fslsage_rpc.models.splitting import PRECISIONS, SplitModel, build
from fslsage_rpc.notebook import train
from fslsage_rpc.parties.auxiliary_fit import cut_layer_gradient
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.training.evaluation import evaluate_run
from fslsage_rpc.training.experiment import Experiment
from support.rank_program import train_locally
from support.trees import ALGORITHM

BF16 = PRECISIONS["bf16"]


def make(name: str, precision: str = "bf16") -> SplitModel:
    formats = PRECISIONS[precision]
    return build(Model(name=name), 10, (3, 32, 32), 0, formats.weights, formats.autocast)


def tree(algorithm: str, precision: str) -> dict[str, Any]:
    return {
        "rounds": 3,
        "device": "cpu",
        "precision": precision,
        "clients": {"count": 2, "batch_size": 16},
        "data": {"train_limit": 64, "test_limit": 60, "partition": "iid"},
        "algorithm": {
            "name": algorithm,
            **ALGORITHM,
            "alignment": {"epochs": 4, "batch_size": 25, "buffer_size": 40},
        },
    }


@pytest.mark.parametrize("name", ["simple_conv", "resnet18"])
def test_what_leaves_each_part_has_one_type(name: str) -> None:
    split = make(name)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    z = split.client(x)
    assert z.dtype == torch.bfloat16
    assert split.server(z).dtype == split.auxiliary(z).dtype == split.whole()(x).dtype == torch.float32
    assert {p.dtype for p in split.whole().parameters()} == {torch.float32}
    gradient = cut_layer_gradient(split.server, z, y)
    assert gradient.dtype == torch.bfloat16
    z.backward(gradient)
    assert {p.grad.dtype for p in split.client.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in split.client.parameters())


@pytest.mark.parametrize("name", ["simple_conv", "resnet18"])
def test_an_alignment_step_differentiates_twice(name: str) -> None:
    wide, narrow = make(name, "fp32"), make(name)
    z, y = torch.randn(8, *wide.smashed_shape), torch.arange(8)
    gradients = []
    for split, sent in ((wide, z), (narrow, z.bfloat16())):
        estimate = cut_layer_gradient(split.auxiliary, sent, y, create_graph=True)
        estimate.float().square().sum().backward(inputs=list(split.auxiliary.parameters()))
        gradients.append(torch.cat([p.grad.flatten() for p in split.auxiliary.parameters()]))  # type: ignore[union-attr]
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.98


def test_names_and_weights_are_those_of_fp32() -> None:
    wide, narrow = make("resnet18", "fp32").whole().state_dict(), make("resnet18").whole().state_dict()
    assert wide.keys() == narrow.keys()
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)


@pytest.mark.parametrize("algorithm", ["fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg"])
def test_every_algorithm_trains_like_fp32_with_half_the_smashed_bytes(algorithm: str) -> None:
    wide, narrow = train_locally(tree(algorithm, "fp32")), train_locally(tree(algorithm, "bf16"))
    for before, line in zip(wide.lines, narrow.lines, strict=True):
        assert line["train_loss"] == pytest.approx(before["train_loss"], rel=0.05)
        for kind in ("smashed_up", "gradient_down"):
            assert 2 * line["wire_bytes"][kind] == before["wire_bytes"][kind]
        for kind in ("labels_up", "auxiliary_down"):
            assert line["wire_bytes"][kind] == before["wire_bytes"][kind]
    assert {t.dtype for name, t in narrow.tensors.items() if name.endswith("floats")} == {torch.float32}


def test_the_plan_and_the_paper_ledger_count_two_bytes_for_each_number_of_smashed_data() -> None:
    for precision, bytes in (("fp32", 4), ("bf16", 2)):
        config = from_tree(tree("fsl_sage", precision))
        sizes = Experiment.prepare(config).sizes()
        assert sizes.smashed == 64 * 2 * 2 * bytes
        link = Scenario(config, link=None, client_ranks=1)  # type: ignore[arg-type]
        assert link.sizes == sizes


def test_a_finished_model_is_evaluated_again_with_the_same_score(tmp_path: Path) -> None:
    run = train({**tree("splitfed_v2", "bf16"), "output": str(tmp_path), "name": "narrow"})
    score = evaluate_run(run.folder)
    assert score.accuracy == run.summary["test_accuracy"]["last"]
    assert score.loss == pytest.approx(run.summary["test_loss"], rel=1e-6)
