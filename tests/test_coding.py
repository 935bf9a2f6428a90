"""Codecs in training: who computes with what, what is counted, and what stays."""

from typing import Any

import pytest
import torch
from torch import nn

from fslsage_rpc.algorithms.bound import NO_LINK
from fslsage_rpc.check.findings import Outlook
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import AlignmentKeys, CodecKeys, CodecsKeys, OptimizerKeys
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.flat import Weights
from fslsage_rpc.parties.auxiliary_fit import AuxiliaryFit
from fslsage_rpc.parties.coding import CodedWeights, Codings
from fslsage_rpc.parties.context import Context
from fslsage_rpc.parties.optimizers import ScheduledOptimizer
from fslsage_rpc.plan.scenario import Scenario
from fslsage_rpc.randomness import LocalStep
from fslsage_rpc.training.experiment import Experiment
from support.equality import assert_same_bits
from support.rank_program import Outcome, train_locally
from support.trees import ALGORITHM

OWN = "support.own_codecs"
SAMPLES, BATCH = 48, 16
SMASHED = 64 * 2 * 2


def tree(name: str, rounds: int = 2, **codecs: Any) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "device": "cpu",
        "clients": {"count": 3, "batch_size": BATCH},
        "data": {"train_limit": 3 * SAMPLES, "test_limit": 60, "partition": "iid"},
        "algorithm": {
            "name": name,
            **ALGORITHM,
            "alignment": {"epochs": 2},
        },
        "comm": {"codec": codecs},
    }


@pytest.mark.parametrize("name", ["fsl_sage", "cse_fsl", "splitfed_v1", "splitfed_v2"])
def test_a_codec_that_leaves_all_as_it_is_changes_nothing(name: str) -> None:
    raw = train_locally(tree(name, smashed=f"{OWN}:Raw", gradient=f"{OWN}:Raw"))
    assert_same_bits(train_locally(tree(name)), raw)


@pytest.mark.parametrize(
    ("name", "uploads", "returned"),
    [("fsl_sage", 2, 0), ("cse_fsl", 2, 0), ("splitfed_v1", 3, 3), ("splitfed_v2", 3, 3)],
)
def test_both_ledgers_count_coded_sizes(name: str, uploads: int, returned: int) -> None:
    codecs = Codings(CodecsKeys(smashed=CodecKeys(name="int8"), gradient=CodecKeys(name="topk")))
    shape = torch.Size([BATCH, 64, 2, 2])
    up, down = (each.nbytes(shape, torch.float32) for each in (codecs.smashed, codecs.gradient))
    assert up is not None
    assert down is not None
    plain = train_locally(tree(name))
    coded = train_locally(tree(name, smashed="int8", gradient="topk"))
    for line, before in zip(coded.lines, plain.lines, strict=True):
        wire = line["wire_bytes"]
        assert (wire["smashed_up"], wire["gradient_down"]) == (3 * uploads * up, 3 * returned * down)
        saved = sum(before["wire_bytes"].values()) - sum(wire.values())
        assert before["paper_bytes"] - line["paper_bytes"] == saved > 0
        assert line["paper_bytes_uncoded"] == before["paper_bytes"]
        assert "paper_bytes_uncoded" not in before


def test_the_auxiliary_model_s_way_is_counted_and_averages_are_not_coded() -> None:
    plain, coded = train_locally(tree("fsl_sage")), train_locally(tree("fsl_sage", auxiliary="bf16"))
    floats = coded.tensors["client 0 auxiliary/floats"].numel()
    wires = [[line["wire_bytes"] for line in each.lines] for each in (plain, coded)]
    assert [wire["auxiliary_down"] for wire in wires[0]] == [3 * 4 * floats, 0]
    assert [wire["auxiliary_down"] for wire in wires[1]] == [3 * 2 * floats, 0]
    first, before = coded.lines[0], plain.lines[0]
    assert before["paper_bytes"] - first["paper_bytes"] == 3 * 2 * floats


def test_bytes_that_depend_on_values_are_counted_as_they_are_sent() -> None:
    plain = train_locally(tree("splitfed_v1"))
    codecs = {"smashed": f"{OWN}:NonZero", "gradient": f"{OWN}:NonZero"}
    coded = train_locally(tree("splitfed_v1", **codecs))
    for name, tensor in plain.tensors.items():
        assert torch.equal(tensor, coded.tensors[name]), name  # it loses nothing
    for line, before in zip(coded.lines, plain.lines, strict=True):
        wire = line["wire_bytes"]
        assert wire["smashed_up"] < before["wire_bytes"]["smashed_up"]  # behind a ReLU many are 0
        averaged = before["paper_bytes"] - sum(
            before["wire_bytes"][kind] for kind in ("smashed_up", "gradient_down")
        )
        assert line["paper_bytes"] == averaged + wire["smashed_up"] + wire["gradient_down"]


def test_encoding_and_decoding_have_phases_of_their_own() -> None:
    def phases(outcome: Outcome) -> dict[str, set[str]]:
        found = outcome.lines[0]["phases"]
        return {party: {name for name in ("encode", "decode") if found[party][name] > 0} for party in found}

    both = {"encode", "decode"}
    assert phases(train_locally(tree("fsl_sage", smashed="int8"))) == {
        "client": {"encode"},
        "server": {"decode"},
    }
    assert phases(train_locally(tree("splitfed_v1", smashed="int8", gradient="int8"))) == {
        "client": both,
        "server": both,
    }
    assert phases(train_locally(tree("fsl_sage"))) == {"client": set(), "server": set()}


def test_the_client_gets_the_auxiliary_model_that_the_server_has_in_use() -> None:
    keys = tree("fsl_sage", rounds=3, auxiliary={"name": "topk", "arguments": {"share": 0.2}})
    keys["algorithm"]["average_auxiliary"] = "never"
    outcome = train_locally(keys)
    for client in range(3):
        mine = outcome.tensors[f"client {client} auxiliary/floats"]
        assert torch.equal(mine, outcome.tensors[f"server's auxiliary of {client}/floats"])


def fit(**codecs: Any) -> AuxiliaryFit:
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    context = Context(codings=Codings(CodecsKeys(**codecs)))
    optimizer = ScheduledOptimizer(OptimizerKeys(), model.parameters())
    return AuxiliaryFit(model, optimizer, AlignmentKeys(), context)


def test_what_a_codec_leaves_out_of_the_auxiliary_model_comes_with_a_later_one() -> None:
    one = fit(auxiliary=CodecKeys(name="topk", arguments={"share": 0.25}))

    def hand_out(*fitted: float) -> CodedWeights:
        integers = torch.empty(0, dtype=torch.int64)
        one.fitted.load(Weights(torch.tensor(fitted), integers))
        coded = one.hand_out(LocalStep(), 0)
        one.take_up()
        assert isinstance(coded, CodedWeights)
        return coded

    one.start()
    coded = hand_out(1.0, 3.0, 0.0, 0.0)
    assert [part.tolist() for part in coded.change.parts] == [[[3.0]], [[1]]]
    assert coded.nbytes == 4 + 1
    assert one.weights.floats.tolist() == [0.0, 3.0, 0.0, 0.0]  # in use
    assert one.left_out is not None
    assert one.left_out.tolist() == [1.0, 0.0, 0.0, 0.0]
    one.weights.load(Weights(torch.tensor([0.5, 2.5, 0.0, 0.0]), one.weights.integers))  # they are averaged
    one.start()
    assert one.fitted.floats.tolist() == [1.5, 2.5, 0.0, 0.0]  # the next fit's start
    hand_out(1.5, 2.5, 0.0, 0.25)  # moves the last number only
    assert one.weights.floats.tolist() == [1.5, 2.5, 0.0, 0.0]
    assert one.left_out.tolist() == [0.0, 0.0, 0.0, 0.25]
    fresh = fit(auxiliary=CodecKeys(name="topk", arguments={"share": 0.25}))
    fresh.load_state(one.state())
    assert fresh.left_out is not None
    assert fresh.left_out.tolist() == [0.0, 0.0, 0.0, 0.25]


def test_draws_follow_from_seed_round_client_and_request() -> None:
    stochastic = CodecsKeys(smashed=CodecKeys(name="int8", arguments={"stochastic": True}))
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)

    def written(seed: int, *place: int) -> torch.Tensor:
        coding = Codings(stochastic, seed).smashed
        return coding.decode(coding.encode(x, *place))

    assert torch.equal(written(0, 1, 2, 3), written(0, 1, 2, 3))
    for other in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 1, 3), (0, 1, 2, 2)):
        assert not torch.equal(written(0, 1, 2, 3), written(*other))


@pytest.mark.parametrize(
    ("name", "codecs", "unused"),
    [
        ("fsl_sage", {"gradient": "int8"}, ["gradient"]),
        ("fsl_sage", {"smashed": "int8", "auxiliary": "topk"}, []),
        ("cse_fsl", {"auxiliary": "int8"}, ["auxiliary"]),
        ("splitfed_v1", {"smashed": "int8", "gradient": "int8", "auxiliary": "int8"}, ["auxiliary"]),
        ("fedavg", {"smashed": "int8"}, ["smashed"]),
    ],
)
def test_codecs_of_what_is_not_sent_are_named(name: str, codecs: dict[str, Any], unused: list[str]) -> None:
    warnings = Experiment.prepare(from_tree(tree(name, **codecs))).warnings
    assert warnings == [f"comm.codec.{kind} is not used by {name}" for kind in unused]


def test_nobody_knows_beforehand_the_bytes_that_depend_on_values() -> None:
    config = from_tree(tree("fsl_sage", smashed=f"{OWN}:NonZero"))
    foreseen = Outlook.of(Experiment.prepare(config), None).paper_bytes
    assert {name for name, size in foreseen.items() if size is not None} == {"fedavg"}
    with pytest.raises(InputError, match="depend on values"):
        Scenario(config, NO_LINK, client_ranks=1).round(0)


def test_two_requests_in_one_step_draw_and_count_by_themselves() -> None:
    plain = train_locally(tree(f"{OWN}:Twice"))
    lossless = {"smashed": f"{OWN}:NonZero", "gradient": f"{OWN}:NonZero"}
    counted = train_locally(tree(f"{OWN}:Twice", **lossless))
    for line, before in zip(counted.lines, plain.lines, strict=True):
        wire, without = line["wire_bytes"], before["wire_bytes"]
        moved = wire["smashed_up"] + wire["gradient_down"]
        uncoded = without["smashed_up"] + without["gradient_down"]
        assert line["paper_bytes"] - moved == before["paper_bytes"] - uncoded
        assert line["paper_bytes_uncoded"] == before["paper_bytes"]
        assert line["train_loss"] == before["train_loss"]


def test_a_codec_that_has_said_another_size_is_refused_when_it_is_seen() -> None:
    keys = {**tree("cse_fsl", smashed=f"{OWN}:Miscounted"), "precision": "bf16"}
    with pytest.raises(InputError) as refused:
        train_locally(keys)
    assert str(refused.value) == (
        f"comm.codec.smashed: got '{OWN}:Miscounted', whose nbytes is 16384 for torch.bfloat16 "
        "[16, 64, 2, 2], where the parts have 8192 bytes"
    )


def test_a_change_of_a_model_that_the_client_has_trained_is_refused() -> None:
    with pytest.raises(InputError, match=r"yields Align for an auxiliary model that the client has trained"):
        train_locally(tree(f"{OWN}:TrainedThenAligned", auxiliary="bf16"))
