"""Hyperparameters of the user's own: how they arrive, and that none arrives that was not meant so."""

from __future__ import annotations  # annotations are texts, as in many a user's module

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar, Union

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fslsage_rpc
from fslsage_rpc.algorithms import create
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.algorithms.splitfed import SplitFedV1
from fslsage_rpc.config.loading import from_tree, load, to_tree
from fslsage_rpc.config.own import checked_arguments
from fslsage_rpc.config.schema import AlgorithmKeys, Bounds, Config, Count, Data
from fslsage_rpc.config.yaml_files import to_yaml
from fslsage_rpc.data.datasets import load as load_images
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.errors import InputError
from fslsage_rpc.plan.calibration import check_work
from fslsage_rpc.plan.scenario import with_algorithm
from fslsage_rpc.report.series import group
from fslsage_rpc.report.sources import read
from fslsage_rpc.tasks import open_task
from fslsage_rpc.tasks.images import ImageTask
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.run import unused_keys
from support.commands import said
from support.report_folders import write_run
from support.trees import merged, tree
from support.user_input import mistake, one_line, write

if TYPE_CHECKING:
    from somewhere import Unknown

HERE = "test_arguments"
seen: dict[str, Any] = {}
"""what the functions and classes below were given, by what they are"""


class Patient(FslSage):
    def __init__(self, keys: AlgorithmKeys, federation: Federation, patience: int = 3, **more: Any):
        super().__init__(keys, federation, **more)
        seen["algorithm"] = self.patience = patience


class Polite(Patient):
    """Has arguments at two levels."""

    def __init__(self, keys: Unknown, federation: Unknown, *, bows: float, **more: Any):
        super().__init__(keys, federation, **more)
        self.bows = bows


class Mixed(SplitFedV1):
    """Names what it is given in its own way."""

    def __init__(self, *arguments: Any, margin: float = 0.0, **more: Any):
        super().__init__(*arguments, **more)
        self.margin = margin


def net(
    num_classes: int, image_shape: tuple[int, int, int], channels: list[int], bias: bool = True
) -> Unknown:
    seen["model"] = (channels, bias)
    layers = [
        nn.Conv2d(a, b, 3, bias=bias) for a, b in zip([image_shape[0], *channels], channels, strict=False)
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))


def squeeze(smashed_shape: tuple[int, ...], num_classes: int, hidden: Count) -> nn.Module:
    seen["auxiliary"] = hidden
    features = torch.Size(smashed_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.Linear(hidden, num_classes))


def stripes(
    root: str,
    train: bool,
    per_class: int = 8,
    mode: Literal["rows", "columns"] = "rows",
    level: int | None = 255,
) -> Any:
    seen["data"] = (per_class, mode)
    images = torch.zeros(4 * per_class, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(4 * per_class) % 4
    for image, label in zip(images, labels, strict=True):
        (image[0] if mode == "rows" else image[0].T)[label] = level or 128
    return images, labels


class Noisy(ImageTask):
    def __init__(self, config: Config, noise: float, **more: Any):
        digits = {**to_tree(config)["data"], "name": "digits", "arguments": {}}
        super().__init__(from_tree({**to_tree(config), "data": digits}), **more)
        seen["task"] = noise


ALL: dict[str, Any] = {
    "algorithm": {"name": f"{HERE}:Patient", "arguments": {"patience": 7}},
    "model": {
        "name": f"{HERE}:net",
        "arguments": {"channels": [4, 6], "bias": False},
        "cut": "0",
        "auxiliary": {"kind": f"{HERE}:squeeze", "arguments": {"hidden": 5}},
    },
    "data": {
        "name": f"{HERE}:stripes",
        "arguments": {"per_class": 12, "mode": "columns"},
        "partition": "iid",
        "train_limit": None,
        "test_limit": None,
    },
}


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


# How they arrive


def test_all_that_is_the_users_own_trains_with_its_arguments(tmp_path: Path) -> None:
    run = fslsage_rpc.train(tree(tmp_path, ALL, rounds=2))
    assert seen == {"algorithm": 7, "model": ([4, 6], False), "auxiliary": 5, "data": (12, "columns")}
    assert len(run.rounds) == 2
    assert load(run.folder / "config.yaml").model.arguments == {"channels": [4, 6], "bias": False}


def test_defaults_stand_where_nothing_is_given(tmp_path: Path) -> None:
    Experiment.prepare(from_tree(tree(tmp_path, {"algorithm": {"name": f"{HERE}:Patient"}})))
    load_images(Data(name=f"{HERE}:stripes"), train=True)
    assert seen == {"algorithm": 3, "data": (8, "rows")}


def test_a_task_is_given_its_arguments() -> None:
    task = open_task(from_tree({"data": {"name": f"{HERE}:Noisy", "arguments": {"noise": 1}}}))
    assert isinstance(task, Noisy)
    assert seen["task"] == 1.0
    assert type(seen["task"]) is float


def test_an_override_sets_one_and_a_file_replaces_those_of_its_base_file(tmp_path: Path) -> None:
    write(tmp_path, "algorithm: {name: a:A, arguments: {one: 1, two: 2}}", "base.yaml")
    path = write(tmp_path, "base: base.yaml\nalgorithm: {arguments: {three: 3}}")
    assert load(path).algorithm.arguments == {"three": 3}
    overrides = ["algorithm.arguments.patience=5", "algorithm.arguments.rates.first=1e-3"]
    assert load(path, overrides).algorithm.arguments == {"three": 3, "patience": 5, "rates": {"first": 0.001}}
    assert load(path, ["algorithm.arguments={}"]).algorithm.arguments == {}


def test_what_is_handed_over_is_a_copy() -> None:
    def function(first: list[int], second: Any) -> None: ...

    arguments = {"first": [1], "second": {"a": [1]}}
    handed = checked_arguments("k", "m:f", function, arguments)
    assert handed == arguments
    handed["first"].append(2)
    handed["second"]["a"].append(2)
    assert arguments == {"first": [1], "second": {"a": [1]}}


# Texts and numbers


def takes(annotated: str = "", free=None, number: float = 0.0, either: int | str = 0) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize(
    ("written", "annotated", "free", "number"),
    [
        ("1e-3", None, 0.001, 0.001),
        ("'1e-3'", "1e-3", "1e-3", 0.001),
        ("2E+5", None, 2e5, 2e5),
        ("7.e1", None, 70.0, 70.0),
        ("'5'", "5", "5", 5.0),
        ("5", None, 5, 5.0),
        ("1.10", None, 1.1, 1.1),
        ("'1.10'", "1.10", "1.10", 1.1),
        ("''", "", "", None),
        ("nan", "nan", "nan", None),
        ("e5", "e5", "e5", None),
    ],
)
def test_a_number_is_a_number_and_a_text_is_a_text_as_written(
    tmp_path: Path, written: str, annotated: str | None, free: Any, number: float | None
) -> None:
    """Also after the way through the run folder's `config.yaml`."""
    config = load(write(tmp_path, ""), [f"model.arguments.x={written}"])
    again = load(write(tmp_path, to_yaml(to_tree(config)), "config.yaml"))
    for value in (config.model.arguments["x"], again.model.arguments["x"]):
        for name, expected in {
            "annotated": annotated,
            "free": free,
            "either": free,
            "number": number,
        }.items():
            if expected is None:
                mistake(checked_arguments, "k", "m:f", takes, {name: value})
            else:
                got = checked_arguments("k", "m:f", takes, {name: value})[name]
                assert (type(got), got) == (type(expected), expected)


# What is refused


def check_algorithm(arguments: dict[str, Any], name: str = f"{HERE}:Patient") -> None:
    keys = from_tree({"algorithm": {"name": name, "arguments": arguments}}).algorithm
    create(keys, Federation([40, 40], 1.0, 20, 1, 0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"patience": "much"}, ".patience: got 'much', expected an integer"),
        ({"patience": 1.0}, ".patience: got 1.0, expected an integer"),
        ({"patience": None}, ".patience: got null, expected an integer"),
        (
            {"patince": 3},
            f".patince: unknown argument of {HERE}:Patient; did you mean algorithm.arguments.patience?",
        ),
        ({"zzz": 3}, f".zzz: unknown argument of {HERE}:Patient; known arguments: patience"),
        ({"federation": 3}, f".federation: got 3, expected none: {HERE}:Patient is given it anyway"),
    ],
)
def test_arguments_are_held_to_the_signature(arguments: dict[str, Any], said: str) -> None:
    assert mistake(check_algorithm, arguments) == f"algorithm.arguments{said}"


def test_a_known_algorithm_takes_none() -> None:
    unknown = "algorithm.arguments.patience: unknown argument of fsl_sage"
    said = f"{unknown}; it takes none: set algorithm.arguments={{}}"
    assert mistake(check_algorithm, {"patience": 3}, "fsl_sage") == said
    assert (
        mistake(check, from_tree({"transport": "local", "algorithm": {"arguments": {"patience": 3}}}), 1)
        == said
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"model": {"arguments": {"depth": 3}}},
            "model.arguments.depth: unknown argument of simple_conv; it takes none: set model.arguments={}",
        ),
        (
            {"model": {"name": "resnet56", "arguments": {"width": 0}}},
            "model.arguments.width: got 0, expected an integer >= 1 and <= 1000000000",
        ),
        (
            {"model": {"auxiliary": {"arguments": {"hidden": None}}}},
            "model.auxiliary.arguments: got {hidden: null}, expected {}: linear takes none",
        ),
        ({"data": {"arguments": {"x": 1}}}, "data.arguments: got {x: 1}, expected {}: digits takes none"),
        (
            merged(ALL, {"model": {"arguments": {"channels": 4}}}),
            "model.arguments.channels: got 4, expected a list, each an integer",
        ),
        (
            merged(ALL, {"model": {"arguments": {"image_shape": [1, 8, 8]}}}),
            f"model.arguments.image_shape: got [1, 8, 8], expected none: {HERE}:net is given it anyway",
        ),
        (
            merged(ALL, {"model": {"auxiliary": {"arguments": {"hidden": 0}}}}),
            "model.auxiliary.arguments.hidden: got 0, expected an integer >= 1 and <= 1000000000",
        ),
        (
            merged(
                ALL, {"model": {"auxiliary": {"kind": f"{HERE}:squeeze", "arguments": {"num_classes": 3}}}}
            ),
            f"model.auxiliary.arguments.num_classes: got 3, expected none: {HERE}:squeeze is given it anyway",
        ),
        (
            merged(ALL, {"data": {"arguments": {"mode": "row"}}}),
            "data.arguments.mode: got 'row', expected one of 'rows', 'columns'",
        ),
        (
            merged(ALL, {"data": {"arguments": {"train": True}}}),
            f"data.arguments.train: got true, expected none: {HERE}:stripes is given it anyway",
        ),
        (
            {"data": {"name": f"{HERE}:Noisy", "arguments": {"noise": "loud"}}},
            "data.arguments.noise: got 'loud', expected a number",
        ),
        (
            {"data": {"name": f"{HERE}:Noisy", "arguments": {"noise": 1, "config": 2}}},
            f"data.arguments.config: got 2, expected none: {HERE}:Noisy is given it anyway",
        ),
        (
            {"data": {"name": f"{HERE}:Noisy"}},
            f"data.arguments: got {{}}, expected a value for noise, which {HERE}:Noisy needs",
        ),
    ],
)
def test_every_kind_is_checked_before_anything_is_trained(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert mistake(check, from_tree(tree(tmp_path, keys)), 1) == said


def test_one_that_is_needed_is_named() -> None:
    def function(one, two: int, *, three: str = "", four: bool) -> None: ...  # type: ignore[no-untyped-def]

    message = mistake(checked_arguments, "model.arguments", "m:f", function, {"two": 2}, 0, ["one"])
    assert message == "model.arguments: got {two: 2}, expected a value for four, which m:f needs"
    message = mistake(checked_arguments, "model.arguments", "m:f", function, {})
    assert message == "model.arguments: got {}, expected a value for one and two and four, which m:f needs"


def test_what_cannot_be_given_by_name_is_unknown() -> None:
    def function(first: int = 0, /, *rest: int, last: int = 0) -> None: ...

    for name in ("first", "rest"):
        message = mistake(checked_arguments, "k", "m:f", function, {name: 1})
        assert message == f"k.{name}: unknown argument of m:f; did you mean k.last?"
    assert checked_arguments("k", "m:f", function, {"last": 1}) == {"last": 1}


def test_what_fails_in_the_call_is_one_line() -> None:
    keys = merged(ALL, {"model": {"arguments": {"channels": []}}})
    assert "which fails on images of 1x8x8 (IndexError" in mistake(
        check, from_tree({"transport": "local", **keys}), 1
    )


def test_a_function_that_cannot_take_what_it_is_given_says_so_itself() -> None:
    def unnamed(folder: str, train: bool) -> None: ...

    assert checked_arguments("k", "m:f", unnamed, {"x": [1]}, given=["root", "train"]) == {"x": [1]}
    assert checked_arguments("k", "m:f", unnamed, {"x": 1}, first=3) == {"x": 1}
    assert checked_arguments("k", "m:f", type, {"x": 1}) == {"x": 1}  # it has no signature


@pytest.mark.parametrize(
    "value",
    [
        "3",
        "[1]",
        "{1: 2}",
        "{a: 010}",
        "{a: [010]}",
        "{a: .nan}",
        "{a: 2024-02-29}",
        "{a: {1: 2}}",
        "{a: [[[[[1]]]]]}",
    ],
)
def test_what_is_no_value_of_an_argument_is_refused(tmp_path: Path, value: str) -> None:
    expected = "a mapping of names to numbers, texts, true, false, null, and lists and mappings of these"
    for key in ("algorithm", "data", "model", "model.auxiliary"):
        message = mistake(load, write(tmp_path, ""), [f"{key}.arguments={value}"])
        assert message == f"{key}.arguments: got {value}, expected {expected}"


def test_endless_and_strange_arguments_are_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("&a {x: *a}", "{x: &a [*a]}", "{x: 0x" + "f" * 5000 + "}", '{"a\\0b": [{"\\ud800": 1}]}'):
        mistake(load, write(tmp_path, f"algorithm: {{arguments: {text}}}"))
    assert mistake(check_algorithm, {"a\nb": 1}).startswith("algorithm.arguments.a\\nb: unknown argument of ")


# **more


def test_what_a_class_passes_on_is_held_to_the_next_ones_parameters() -> None:
    polite = f"{HERE}:Polite"
    keys = from_tree({"algorithm": {"name": polite, "arguments": {"bows": "1e1", "patience": 9}}}).algorithm
    algorithm = create(keys, Federation([40, 40], 1.0, 20, 1, 0))
    assert isinstance(algorithm, Polite)
    assert (algorithm.bows, algorithm.patience) == (10.0, 9)
    assert mistake(check_algorithm, {"bows": 1, "patience": "much"}, polite) == (
        "algorithm.arguments.patience: got 'much', expected an integer"
    )
    assert mistake(check_algorithm, {"bows": 1, "federation": 2}, polite).endswith("is given it anyway")
    assert mistake(check_algorithm, {"bows": 1, "zzz": 2}, polite) == (
        f"algorithm.arguments.zzz: unknown argument of {polite}; known arguments: patience, bows"
    )
    assert mistake(check_algorithm, {"patience": 1}, polite) == (
        f"algorithm.arguments: got {{patience: 1}}, expected a value for bows, which {polite} needs"
    )


def test_a_class_may_name_what_it_is_given_in_its_own_way() -> None:
    check_algorithm({"margin": 1}, f"{HERE}:Mixed")
    message = mistake(check_algorithm, {"keys": 1}, f"{HERE}:Mixed")
    assert message == f"algorithm.arguments.keys: got 1, expected none: {HERE}:Mixed is given it anyway"


class Needy(nn.Module):
    def __init__(self, num_classes: int, depth: int, **more: Any):
        super().__init__(**more)


class Heir(Needy):
    def __init__(self, num_classes: int, **more: Any):
        super().__init__(num_classes, **more)


def test_one_that_is_needed_further_on_is_named_by_the_call_and_the_last_may_take_any() -> None:
    keys = {"model": {"name": f"{HERE}:Heir", "cut": "0"}, "transport": "local"}
    message = mistake(check, from_tree(keys), 1)
    assert message.startswith(f"model.name: got '{HERE}:Heir', which fails on images")
    assert "'depth'" in message
    arguments = {"depth": 2, "device": "cpu"}  # torch.nn.Module has **kwargs
    assert checked_arguments("k", "m:Heir", Heir, arguments, given=["num_classes"]) == arguments


class Framed(nn.Sequential):
    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], width: int):
        features = torch.Size(image_shape).numel()
        super().__init__(nn.Flatten(), nn.Linear(features, width), nn.Linear(width, num_classes))


class Wide(Framed):
    def __init__(self, num_classes: int, **more: Any):
        super().__init__(num_classes, **more)


def test_a_class_behind_more_gets_the_shape_of_the_images_too() -> None:
    keys = {"model": {"name": f"{HERE}:Wide", "arguments": {"width": 9}, "cut": "1"}}
    assert open_task(from_tree(keys)).build().smashed_shape == (9,)


class Plain:
    pass


class Keeping:
    def __init__(self, **more: Any):
        self.more = more


def test_a_class_without_an_init_takes_none_and_one_that_keeps_the_rest_takes_any() -> None:
    assert mistake(checked_arguments, "k", "m:Plain", Plain, {"x": 1}) == (
        "k.x: unknown argument of m:Plain; it takes none: set k={}"
    )
    assert checked_arguments("k", "m:Keeping", Keeping, {"x": 1}) == {"x": 1}


def wrapped(depth: int = 1) -> None: ...


@functools.wraps(wrapped)
def wrapper(*arguments: Any, **more: Any) -> None: ...


def test_of_wrapped_and_partial_functions_it_is_the_true_signature() -> None:
    def free(depth: int = 1, **more: Any) -> None: ...

    for function in (wrapper, functools.partial(free, depth=2), functools.cache(wrapped), free):
        assert checked_arguments("k", "m:f", function, {"depth": 3}) == {"depth": 3}
        assert mistake(checked_arguments, "k", "m:f", function, {"depth": "x"}).endswith(
            "expected an integer"
        )
    assert "unknown argument" in mistake(checked_arguments, "k", "m:f", wrapper, {"width": 3})
    assert checked_arguments("k", "m:f", free, {"width": "1e3"}) == {"width": "1e3"}
    assert "unknown argument" in mistake(
        checked_arguments, "k", "m:f", functools.partial(wrapped, 2), {"depth": 3}
    )


# Any annotation, any value

T = TypeVar("T")
KNOWN: dict[str, tuple[Any, tuple[type, ...]]] = {
    "int": (int, (int,)),
    "float": (float, (float,)),
    "str": (str, (str,)),
    "bool": (bool, (bool,)),
    "optional": (int | None, (int, type(None))),
    "old optional": (Optional[float], (float, type(None))),  # noqa: UP045
    "bounds": (Annotated[int, "of something", Bounds(minimum=1)], (int,)),
    "optional bounds": (Annotated[float | None, Bounds(above=0)], (float, type(None))),
    "bounds of a text": (Annotated[str, Bounds(minimum=1)], (str,)),
    "bounds of a list": (Annotated[list[int], Bounds(minimum=1)], (list,)),
    "literal": (Literal["a", "1", 1, True], (str, int, bool)),
    "list": (list[float], (list,)),
    "lists": (list[list[str]], (list,)),
    "mapping": (dict[str, Any], (dict,)),
    "mappings": (list[dict[str, Any]], (list,)),
    "text": ("int", (int,)),
    "text of more": ("Annotated[int, Bounds(minimum=0)] | None", (int, type(None))),
}
UNKNOWN: list[Any] = [
    *(Tensor, torch.zeros(2), Callable[..., int], int | str, Union[int, str, None], T, list[T], list, dict),  # noqa: UP007
    *(dict[str, int], dict[int, Any], list[int | None], tuple[int, ...], Literal[None], Literal[b"a"], None),
    *("Unknown", "1 +", "nn.Module", 3, ..., object(), Annotated[T, Bounds()], Optional["int"], type, Any),
]
ANNOTATIONS = [*KNOWN.values(), *((each, ()) for each in UNKNOWN)]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=2)
    | st.dates()
    | st.sampled_from(["1e-3", "nan", "inf", "a", "1", "010", "\0", "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | SCALARS, inner, max_size=3)
    ),
    max_leaves=6,
)


def of_one(annotation: Any) -> Callable[..., None]:
    def function(x): ...  # type: ignore[no-untyped-def]

    function.__annotations__ = {"x": annotation}
    return function


def as_floats(value: Any) -> Any:
    """The numbers that a text, a number or a list of these stands for."""
    return [float(each) for each in value] if isinstance(value, list) else float(value)


@given(st.sampled_from(ANNOTATIONS), VALUES)
def test_any_value_is_handed_over_as_annotated_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, annotated: tuple[Any, tuple[type, ...]], value: Any
) -> None:
    annotation, kinds = annotated
    try:
        config = from_tree({"model": {"arguments": {"x": value}}})
    except InputError as error:
        one_line(error)
        return
    path = write(tmp_path_factory.getbasetemp(), to_yaml(to_tree(config)), "arguments.yaml")
    assert repr(load(path).model.arguments) == repr(config.model.arguments) == repr({"x": value})
    refused = None
    try:
        got = checked_arguments("model.arguments", "m:f", of_one(annotation), config.model.arguments)["x"]
    except InputError as error:
        refused = one_line(error)
    if refused is not None:
        assert kinds
        assert refused.startswith("model.arguments.x: got ")
    elif kinds:
        assert type(got) in kinds
        assert got == value or got == as_floats(value)
    else:
        assert repr(got) == repr(value)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("int", [0, -3], [1.0, "1", True, None, [1]]),
        ("float", [0, 0.5, "5e-1"], [True, "x", "nan", None]),
        ("str", ["", "x"], [1, 0.5, None, True, "a\0"]),
        ("bool", [False, True], [0, "true", None]),
        ("optional", [None, 0], ["x", True]),
        ("old optional", [None, 0], ["x", True]),
        ("bounds", [1, 2], [0, None]),
        ("optional bounds", [None, 0.1, "1e-9"], [0, -1]),
        ("bounds of a text", ["", "x"], [3]),
        ("bounds of a list", [[], [0]], [3, [0.5]]),
        ("literal", ["a", "1", 1, True], ["b", 0, False, 1.0, None]),
        ("list", [[], [0, 0.5, "1e-3"]], [[True], ["x"], 3, None, [None]]),
        ("lists", [[], [[]], [[""], ["x"]]], [["x"], [[1]]]),
        ("mapping", [{}, {"a": None, "b": [1]}], [[], None, 3]),
        ("mappings", [[], [{}], [{"a": 1}]], [{}, [3]]),
        ("text", [3], ["x"]),
        ("text of more", [None, 0], [-1, "x"]),
    ],
)
def test_values_of_the_types_of_the_schema(name: str, good: list[Any], bad: list[Any]) -> None:
    function = of_one(KNOWN[name][0])
    for value in good:
        got = checked_arguments("k", "m:f", function, {"x": value})["x"]
        assert got == value or got == as_floats(value)
    for value in bad:
        assert mistake(checked_arguments, "k", "m:f", function, {"x": value}).startswith("k.x: got ")


def test_a_number_where_a_text_is_expected_is_told_to_be_quoted() -> None:
    message = mistake(checked_arguments, "k", "m:f", of_one(str), {"x": 1.1})
    assert message == "k.x: got 1.1, expected a text in quotes"
    message = mistake(checked_arguments, "k", "m:f", of_one(list[str] | None), {"x": [1]})
    assert message == "k.x: got [1], expected a list, each a text in quotes or null"
    message = mistake(checked_arguments, "k", "m:f", of_one(Literal["1", "2", 3]), {"x": 1})
    assert message == "k.x: got 1, expected one of '1', '2', 3"


def test_every_type_of_the_schema_is_tried() -> None:
    tried = test_values_of_the_types_of_the_schema.pytestmark[0].args[1]
    assert [each[0] for each in tried] == list(KNOWN)


# Where a configuration is compared with another


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        ("algorithm", {"patience": 8}, "algorithm.arguments.patience: got 8, expected 7 as"),
        ("algorithm", {}, "algorithm.arguments: got {}, expected {'patience': 7} as"),
        (
            "data",
            {"per_class": 12, "mode": "columns", "level": None},
            "data.arguments: got {'per_class': 12, 'mode': 'columns', 'level': None}, expected ",
        ),
        ("data", {"per_class": 13, "mode": "columns"}, "data.arguments.per_class: got 13, expected 12 as"),
    ],
)
def test_a_run_goes_on_with_its_arguments_only(
    section: str, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    keys = tree(tmp_path, ALL, rounds=1)
    fslsage_rpc.train(keys)
    assert len(fslsage_rpc.train({**keys, "rounds": 2}).rounds) == 2
    keys[section]["arguments"] = changed
    assert mistake(fslsage_rpc.train, {**keys, "rounds": 3}).startswith(said)


def test_a_benchmark_of_other_arguments_measured_other_work() -> None:
    def other_work(measured: Config, planned: Config) -> str:
        return mistake(check_work, Path("bench"), measured, planned).removeprefix(
            "--calibrate: got bench, which measured "
        )

    measured = with_algorithm(from_tree(ALL), "fsl_sage")
    for section, key in (("data", "per_class"), ("model", "bias")):
        for arguments in ({key: 9}, {}):
            planned = from_tree(merged(to_tree(measured), {}))
            getattr(planned, section).arguments = {**arguments}
            assert other_work(measured, planned).startswith(f"{section}.arguments=")
    more = from_tree(merged(to_tree(measured), {"data": {"arguments": {"per_class": 99}}}))
    assert other_work(measured, more) == "data.arguments.per_class=12, expected 99 as planned"
    mine = from_tree(merged(to_tree(measured), {"algorithm": ALL["algorithm"]}))
    check_work(Path("bench"), measured, with_algorithm(mine, "fsl_sage"))  # which takes no arguments
    theirs = from_tree(merged(to_tree(mine), {"algorithm": {"arguments": {"patience": 99}}}))
    assert other_work(theirs, mine).startswith("algorithm.arguments")


def test_plan_predicts_an_own_algorithm_with_its_arguments_and_the_others_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    keys = tree(tmp_path, {"algorithm": ALL["algorithm"]})
    path = write(tmp_path, to_yaml(keys))
    done = said(capsys, "plan", path, "--bandwidth", "100mbit", "--rtt", "20ms", "--clients", "3")
    assert done.returncode == 0, done.stderr
    assert f"{HERE}:Patient" in done.stdout
    assert "fsl_sage" in done.stdout
    assert "unknown" not in done.stdout


def test_arguments_are_never_unused() -> None:
    keys = from_tree({"algorithm": {**ALL["algorithm"], "upload_every": 3}}).algorithm
    assert unused_keys(keys, frozenset()) == ["upload_every"]


def test_a_report_names_runs_by_them(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / f"{patience}", [0.5], algorithm={"name": "a:A", "arguments": {"patience": patience}}
        )
        for patience in (12, 5)
    ]
    series = group(read([str(folder) for folder in folders])[0])
    assert [one.label for one in series] == [
        "a:A, algorithm.arguments.patience=5",
        "a:A, algorithm.arguments.patience=12",
    ]
