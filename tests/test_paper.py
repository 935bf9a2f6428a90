"""The sweeps of configs/paper are every experiment of the paper, each exactly what its name says."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from fslsage_rpc.algorithms import ALGORITHMS
from fslsage_rpc.algorithms.bound import NO_LINK
from fslsage_rpc.config.loading import changed_keys, from_tree, load, to_tree
from fslsage_rpc.config.schema import Sweep
from fslsage_rpc.config.variants import combinations, references, sweep_runs
from fslsage_rpc.plan.scenario import Scenario

PAPER = Path(__file__).parent.parent / "configs" / "paper"
MODELS = {
    "resnet18": {"name": "resnet18", "cut": "layer2", "auxiliary": {"until": "layer3"}},
    "resnet56": {
        "name": "resnet56",
        "cut": "layer1",
        "arguments": {"width": 16},
        "auxiliary": {"until": "layer2"},
    },
}
PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {"partition": "iid"},
    "dirichlet0.1": {"partition": "dirichlet", "alpha": 0.1},
    "dirichlet1": {"partition": "dirichlet", "alpha": 1},
    "dirichlet10": {"partition": "dirichlet", "alpha": 10},
}
AUXILIARY_SIZES = {"linear": {"kind": "linear"}, "half": {"until": "layer3.0"}, "full": {"until": "layer4"}}


def experiments() -> dict[str, dict[str, Any]]:
    """The file and variant of every experiment, and the keys that they stand for."""
    trees = {}
    for data, model, algorithm, partition in itertools.product(
        ("cifar10", "cifar100"), MODELS, ALGORITHMS, PARTITIONS
    ):
        trees[f"{data}_{model}/{partition}-{algorithm}"] = {
            "data": {"name": data, **PARTITIONS[partition]},
            "model": MODELS[model],
            "algorithm": {"name": algorithm},
        }
    for data in ("cifar10", "cifar100"):
        iid = {"data": {"name": data, "partition": "iid"}, "model": MODELS["resnet18"]}
        for interval in (2, 3, 5, 20, 30, 40, 50):
            keys = {"name": "fsl_sage", "align_every": interval}
            trees[f"{data}_resnet18/iid-fsl_sage-l{interval}"] = {**iid, "algorithm": keys}
        for algorithm, (size, auxiliary) in itertools.product(
            ("fsl_sage", "cse_fsl"), AUXILIARY_SIZES.items()
        ):
            trees[f"{data}_resnet18/iid-{algorithm}-auxiliary_{size}"] = {
                **iid,
                "model": {**MODELS["resnet18"], "auxiliary": auxiliary},
                "algorithm": {"name": algorithm},
            }
    return trees


FILES = [path for path in sorted(PAPER.rglob("*.yaml")) if not path.stem.startswith("base")]
RUNS = {f"{path.stem}/{run.variant}": run for path in FILES for run in sweep_runs(load(path))}


def test_there_is_one_run_for_each_experiment() -> None:
    assert RUNS.keys() == experiments().keys()
    assert len({run.folder for run in RUNS.values()}) == len(RUNS) == 106


def test_the_base_is_the_papers_setting() -> None:
    config = load(PAPER / "base.yaml")
    clients, keys, alignment = config.clients, config.algorithm, config.algorithm.alignment
    assert (clients.count, clients.participation, clients.local_epochs, clients.batch_size) == (10, 1, 1, 256)
    assert (keys.upload_every, keys.align_every, keys.average_auxiliary) == (5, 10, "never")
    assert (alignment.epochs, alignment.batch_size, alignment.buffer_size) == (100, 1000, 1000)
    for optimizer, decay in zip(vars(config.optimizer).values(), (1e-4, 1e-4, 0), strict=True):
        assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adam", 1e-3, decay)
    assert (config.rounds, config.stop.paper_gib) == (200, 200)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_base_and_what_its_name_says(name: str) -> None:
    base = to_tree(load(PAPER / "base.yaml"))
    file, variant = name.split("/")
    own = {"name": f"{variant}-seed0", "output": f"runs/paper/{file}", "sweep": dataclasses.asdict(Sweep())}
    stated = {key: {**base[key], **keys} for key, keys in experiments()[name].items()}
    expected = to_tree(from_tree({**base, **stated, **own}))
    assert changed_keys(expected, to_tree(RUNS[name].config)) == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_is_compared_with_splitfed_v1_on_the_same_partition(path: Path) -> None:
    keys = load(path).sweep
    assert keys.reference == "splitfed_v1"
    found = combinations(keys.variants, "sweep.variants")
    compared = references(found, keys.reference, "sweep.reference")
    assert compared == {name: f"{made.parts[0]}-splitfed_v1" for name, made in found.items()}


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("fedavg", 895_302_560),
        ("splitfed_v1", 874_000_960),
        ("splitfed_v2", 874_000_960),
        ("cse_fsl", 307_075_200),
        ("fsl_sage", 147_106_448),
    ],
)
def test_the_runs_have_the_papers_communication_load(algorithm: str, expected: int) -> None:
    planned = Scenario(RUNS[f"cifar10_resnet18/iid-{algorithm}"].config, NO_LINK, client_ranks=1)
    assert sum(planned.round(round).paper_bytes for round in range(10)) / 10 == expected
