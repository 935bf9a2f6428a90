"""Whatever a configuration asks for that its schema lets in, what comes before the first round is done or
refused in one line, soon.
"""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fslsage_rpc.check.findings import Outlook
from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.errors import InputError
from fslsage_rpc.training.experiment import Experiment, check
from support.user_input import mistake, one_line

SECONDS = 60
SMALL = {
    "transport": "local",
    "device": "cpu",
    "data": {"train_limit": 60, "test_limit": 20, "download": False, "root": "nosuch"},
}
NUMBERS = st.integers(1, 40) | st.sampled_from([100, 1_000, 10_000, 100_000, 10**6, 10**9])
WIDTHS = st.integers(1, 40) | st.just(10**9)  # what lies between takes its time and memory, rightly
REALS = st.sampled_from([1e-300, 1e-9, 0.01, 0.1, 0.5, 0.99, 1.0]) | NUMBERS
LANGUAGE, GPT2 = "fslsage_rpc.language.task:LanguageTask", "fslsage_rpc.language.model:gpt2"
NAMES = st.sampled_from(
    ["", "nosuch", "nosuch:nosuch", "os:getcwd", "json:JSONDecoder", "a/b", "torchvision/nosuch"]
)
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "seed": NUMBERS,
    "rounds": NUMBERS,
    "precision": st.sampled_from(["fp32", "bf16", "fp64"]),
    "graphs": st.sampled_from(["never", "auto"]),
    "clients.count": NUMBERS,
    "clients.participation": REALS,
    "clients.local_epochs": NUMBERS,
    "clients.batch_size": NUMBERS,
    "clients.minimum": NUMBERS,
    "data.name": st.sampled_from(["digits", "synthetic", "cifar10", LANGUAGE, "mnist"]) | NAMES,
    "data.partition": st.sampled_from(["iid", "dirichlet", "shards", "file"]),
    "data.alpha": REALS,
    "data.shards": NUMBERS,
    "data.train_limit": NUMBERS | st.none(),
    "data.test_limit": NUMBERS | st.none(),
    "data.arguments": st.fixed_dictionaries({}, optional={"tokens": NUMBERS}),
    "model.name": st.sampled_from(
        [
            "simple_conv",
            "resnet18",
            "resnet56",
            GPT2,
            "torchvision/mobilenet_v3_small",
            "torchvision/alexnet",
        ]
    )
    | NAMES,
    "model.cut": st.sampled_from(["layer1", "layer2.0", "features.3", "nosuch", "", "fc", "relu"]),
    "model.arguments": st.fixed_dictionaries(
        {},
        optional={
            "width": WIDTHS | st.none(),
            "layers": NUMBERS,
            "heads": NUMBERS,
            "dropout": REALS,
            "lora": st.fixed_dictionaries({}, optional={"rank": NUMBERS, "alpha": REALS}),
        },
    ),
    "model.auxiliary.kind": st.sampled_from(["copy", "linear", "mlp"]) | NAMES,
    "model.auxiliary.until": st.sampled_from(["layer3", "layer3.0", "nosuch", "", "conv2"]),
    "model.auxiliary.width": WIDTHS,
    "model.auxiliary.width_multiplier": REALS,
    "algorithm.name": st.sampled_from(["fsl_sage", "splitfed_v1", "splitfed_v2", "cse_fsl", "fedavg"])
    | NAMES,
    "algorithm.upload_every": NUMBERS,
    "algorithm.align_every": NUMBERS | st.none(),
    "algorithm.start": st.sampled_from(["paper", "warm_start"]),
    "algorithm.alignment.epochs": NUMBERS,
    "algorithm.alignment.batch_size": NUMBERS,
    "algorithm.alignment.buffer_size": NUMBERS,
    "algorithm.alignment.solver": st.sampled_from(["optimizer", "lbfgs"]),
    "optimizer.client.lr": REALS,
    "optimizer.server.scheduler.name": st.sampled_from(["StepLR", "CosineAnnealingLR", "CyclicLR"]),
    "optimizer.server.scheduler.arguments": st.dictionaries(
        st.sampled_from(["T_max", "step_size", "gamma", "base_lr", "max_lr", "nosuch"]), REALS, max_size=2
    ),
    "server.order": st.sampled_from(["arrival", "round_robin", "client_major"]),
    "comm.interface": NAMES,
    "evaluation.batch_size": NUMBERS,
    "loss.label_smoothing": REALS,
}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as a tree, over the small one."""
    tree: dict[str, Any] = {**SMALL, "data": dict(SMALL["data"])}
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return tree


CONFIGURATIONS = st.sets(st.sampled_from(sorted(CHOICES)), min_size=1, max_size=5).flatmap(
    lambda keys: st.fixed_dictionaries({key: CHOICES[key] for key in sorted(keys)})
)


@pytest.mark.nightly
@settings(max_examples=150)
@given(CONFIGURATIONS)
def test_any_configuration_is_prepared_or_refused_in_one_line_and_soon(
    values: dict[str, Any],
) -> None:
    started = time.monotonic()
    try:
        config = from_tree(nested(values))
        check(config, 1)
        Outlook.of(Experiment.prepare(config), None)
    except InputError as error:
        one_line(error)
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model.name", {"model.name": "resnet56", "model.arguments": {"width": 1_000_000}}),
        ("model.auxiliary.kind", {"model.auxiliary.kind": "mlp", "model.auxiliary.width": 10**9}),
    ],
)
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(key: str, values: dict[str, Any]) -> None:
    message = mistake(check, from_tree(nested(values)), 1)
    assert message.startswith(f"{key}: got ")
    assert "this host's memory is " in message
