"""Variants of `bench` and `sweep`: what names stand for, and what each is compared with."""

from pathlib import Path
from typing import Any

import pytest

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import bench_variants, combinations, references, sweep_runs
from support.user_input import mistake

CHOICES: dict[str, Any] = {
    "partition": {"iid": ["data.partition=iid"], "skewed": ["data.partition=dirichlet"]},
    "algorithm": {"fsl_sage": [], "splitfed_v1": ["algorithm.name=splitfed_v1"]},
    "interval": {"l2": ["algorithm.align_every=2"], "l7": ["algorithm.align_every=7"]},
}


def sweep(variants: dict[str, Any], **keys: Any) -> Config:
    return from_tree({"name": "study", "sweep": {"variants": variants, **keys}})


def names(variants: dict[str, Any]) -> list[str]:
    return list(combinations(sweep(variants).sweep.variants, "sweep.variants"))


def test_a_list_is_a_variant_and_a_choice_is_none() -> None:
    assert names({"a": ["seed=1"], **CHOICES, "b": []}) == ["a", "b"]


def test_a_product_is_every_combination_with_the_keys_of_all() -> None:
    found = combinations(
        {**CHOICES, "partition x algorithm": [], "skewed x fsl_sage x interval": ["rounds=3"]},
        "sweep.variants",
    )
    assert list(found) == [
        *("iid-fsl_sage", "iid-splitfed_v1", "skewed-fsl_sage", "skewed-splitfed_v1"),
        *("skewed-fsl_sage-l2", "skewed-fsl_sage-l7"),
    ]
    assert found["skewed-fsl_sage-l7"].overrides == [
        "data.partition=dirichlet",
        "algorithm.align_every=7",
        "rounds=3",
    ]


def test_a_variant_that_others_build_on_is_there_itself() -> None:
    assert names({"a": [], "size": {"s": [], "m": []}, "a x size": []}) == ["a", "a-s", "a-m"]


def test_a_variant_is_compared_with_what_has_most_in_common_with_it() -> None:
    found = combinations({**CHOICES, "partition x algorithm": [], "iid x fsl_sage x interval": []}, "")
    assert references(found, "splitfed_v1", "") == {
        "iid-fsl_sage": "iid-splitfed_v1",
        "iid-splitfed_v1": "iid-splitfed_v1",
        "skewed-fsl_sage": "skewed-splitfed_v1",
        "skewed-splitfed_v1": "skewed-splitfed_v1",
        "iid-fsl_sage-l2": "iid-splitfed_v1",
        "iid-fsl_sage-l7": "iid-splitfed_v1",
    }
    assert references(found, "skewed-fsl_sage", "")["iid-splitfed_v1"] == "skewed-fsl_sage"


def test_a_variant_without_anything_to_compare_it_with_is_left_out() -> None:
    found = combinations({**CHOICES, "iid x algorithm": [], "skewed x fsl_sage": []}, "")
    assert "skewed-fsl_sage" not in references(found, "splitfed_v1", "")


def test_a_sweep_trains_seed_by_seed_in_folders_of_its_own() -> None:
    runs = sweep_runs(sweep({"a": ["rounds=3"], "b": ["ranks=2"]}, seeds=[5, 0]))
    assert [run.folder for run in runs] == [
        Path("runs/study") / name for name in ("a-seed5", "b-seed5", "a-seed0", "b-seed0")
    ]
    assert [(run.config.rounds, run.config.ranks, run.config.seed) for run in runs] == [
        (3, 3, 5),
        (20, 2, 5),
        (3, 3, 0),
        (20, 2, 0),
    ]
    assert runs[0].config.sweep == Config().sweep


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variants": {}}, "sweep.variants: got {}, expected variants, as "),
        ({"variants": CHOICES}, "sweep.variants: got choices alone, expected variants of them, as "),
        (
            {"variants": {"a": [], "a x b": []}},
            "sweep.variants: got 'a x b', expected names of a, with ' x '",
        ),
        ({"variants": {"a x b": {"c": []}}}, "sweep.variants: got 'a x b', expected names of letters, "),
        ({"variants": {"a": [], "c": {"a": []}}}, "sweep.variants: got 'a' twice, expected a name for each"),
        (
            {"variants": {"c": {"a": [], "b": []}, "a x b": [], "a-b": []}},
            "sweep.variants: got 'a-b' twice, expected different variants",
        ),
        ({"variants": {"c": {"../x": []}, "c x c": []}}, "sweep.variants: got '../x', expected names of "),
        (
            {"variants": {"a": ["seed=3"]}},
            "sweep.variants.a: got seed=3, expected keys of a run, and not its ",
        ),
        ({"variants": {"a": ["output=x"]}}, "sweep.variants.a: got output=x, expected keys of a run, "),
        ({"variants": {"a": ["sweep.seeds=[1]"]}}, "sweep.variants.a: got sweep.seeds=[1], expected keys "),
        ({"variants": {"a": ["rounds=x"]}}, "sweep.variants.a: rounds: got 'x', expected an integer"),
        (
            {"variants": {"a": []}, "reference": "b"},
            "sweep.reference: got 'b', expected one of the variants a",
        ),
        ({"variants": {"a": []}, "seeds": [1, 1]}, "sweep.seeds: got [1, 1], expected different ones"),
        ({"variants": {"a": []}, "seeds": [-1]}, "sweep.variants.a: seed: got -1, expected an integer >= 0"),
        ({"variants": {"a" * 250: []}}, "sweep.variants: got names of 256 letters, expected 255 at most"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    assert mistake(sweep_runs, sweep(**keys)).startswith(message)


def test_every_variant_of_a_benchmark_has_a_reference() -> None:
    keys = {
        "variants": {**CHOICES, "iid x algorithm": [], "skewed x fsl_sage": []},
        "reference": "splitfed_v1",
    }
    expected = "bench.reference: got 'splitfed_v1', expected one for skewed-fsl_sage, of the variants "
    assert mistake(bench_variants, from_tree({"bench": keys})).startswith(expected)
