"""A configuration from a file, the files it is based on and overrides, and back to YAML."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fslsage_rpc.config.loading import changed_keys, from_tree, load, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.yaml_files import read_yaml, to_yaml
from support.user_input import leaves, mistake, write


def changes(config: Config) -> dict[str, Any]:
    """The dotted keys in which a configuration is not the default one, and their values."""
    return {key: new for key, (_, new) in changed_keys(to_tree(Config()), to_tree(config)).items()}


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == load(write(tmp_path, "# nothing\n")) == from_tree({}) == Config()


TEXT = """
    name: first.run-2_b
    seed: 4294967295
    clients: {count: 7, participation: 1.0e-05}
    data: {partition: file, partition_file: parts.json, train_limit: 100, alpha: 1.0e-300}
    algorithm: {align_every: null, alignment: {epochs: 3}}
    optimizer: {auxiliary: {name: sgd, weight_decay: 1.0e+22}}
    comm: {transports: [shm, uv], interface: "null"}
    checkpoint: {keep: 3}
    stop: {paper_gib: 0.1}
"""


def test_a_file_sets_its_keys_and_leaves_the_others(tmp_path: Path) -> None:
    assert changes(load(write(tmp_path, TEXT))) == leaves(yaml.safe_load(TEXT))


def test_a_configuration_survives_its_tree_and_yaml(tmp_path: Path) -> None:
    config = load(write(tmp_path, TEXT))
    assert from_tree(to_tree(config)) == config
    path = write(tmp_path, yaml.safe_dump(to_tree(config)))
    assert load(path) == config
    assert read_yaml(path) == to_tree(config)


# Keys of older versions


OLD_KEYS = {
    "": "name seed rounds ranks transport device precision tf32 graphs output resume base trace",
    "clients.": "count participation local_epochs batch_size on_loss minimum",
    "data.": "name arguments root download partition alpha shards partition_file train_limit test_limit"
    " augment tokenizer tokens vocabulary",
    "model.": "name arguments cut width layers heads dropout pretrained memory_format",
    "model.lora.": "rank alpha dropout frozen",
    "model.auxiliary.": "kind arguments until width width_multiplier",
    "algorithm.": "name arguments upload_every align_every average_auxiliary warm_start measure_drift",
    "algorithm.alignment.": "epochs batch_size buffer_size tolerance solver",
    "optimizer.client.": "name lr weight_decay",
    "optimizer.client.scheduler.": "name arguments per",
    "optimizer.server.": "name lr weight_decay",
    "optimizer.server.scheduler.": "name arguments per",
    "optimizer.auxiliary.": "name lr weight_decay",
    "optimizer.auxiliary.scheduler.": "name arguments per",
    "loss.": "label_smoothing",
    "server.": "order",
    "comm.": "averaging upload_window interface transports channels device_maps timeout_seconds",
    "checkpoint.": "every keep",
    "evaluation.": "every batch_size",
    "stop.": "paper_gib accuracy diverged",
    "bench.": "variants reference repeats warmup_rounds target_accuracy",
}
NOW_ARGUMENTS: dict[str, Any] = {
    "data": {"tokenizer": "gpt2", "tokens": 512, "vocabulary": "full"},
    "model": {
        **dict.fromkeys(("width", "layers", "heads", "pretrained")),
        "dropout": 0.0,
        "lora": {"rank": None, "alpha": 32.0, "dropout": 0.0, "frozen": True},
    },
}
"""as the folder of an old run has them"""


def test_every_key_of_older_versions_is_read_or_its_new_name_is_told() -> None:
    old = {section + key for section, keys in OLD_KEYS.items() for key in keys.split()}
    gone = old - {*leaves(to_tree(Config())), "base"}
    assert gone == {*leaves(NOW_ARGUMENTS), "algorithm.warm_start"}
    for key in gone - {"algorithm.warm_start"}:
        section, argument, *_ = key.split(".")
        said = mistake(from_tree, {}, [f"{key}=77"])
        assert said.startswith(f"{section}.{argument}: got ")
        assert said.endswith(f"expected none: it is {section}.arguments.{argument} now")


def test_the_folder_of_an_old_run_is_read(tmp_path: Path) -> None:
    assert load(write(tmp_path, yaml.safe_dump(NOW_ARGUMENTS))) == Config()
    assert from_tree({"model": {"lora": {"alpha": 32}}}) == Config()


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("data.name", "e2e", "fslsage_rpc.language.task:LanguageTask"),
        ("model.name", "gpt2", "fslsage_rpc.language.model:gpt2"),
    ],
)
def test_a_value_of_older_versions_is_told_its_new_name(key: str, old: str, new: str) -> None:
    said = mistake(from_tree, {}, [f"{key}={old}"])
    assert said == f"{key}: got {old!r}, expected {new}, as it is called now"


@pytest.mark.parametrize("value", ["3", "null", "{rank: [1]}", "{ranks: 2}"])
def test_a_wrong_value_of_an_old_key_is_told_its_new_name(value: str) -> None:
    said = mistake(from_tree, {}, [f"model.lora={value}"])
    assert said == f"model.lora: got {value}, expected none: it is model.arguments.lora now"


@pytest.mark.gate
def test_reading_a_configuration_does_not_import_torch(tmp_path: Path) -> None:
    path = write(tmp_path, "rounds: 3")
    program = (
        f"import sys, fslsage_rpc.config.loading as c; c.load({str(path)!r}); 'torch' in sys.modules and 1/0"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("written", ["1", "1.0", "010", "1:30", "1_000", "0x1F"])
def test_a_text_may_look_like_a_number(tmp_path: Path, written: str) -> None:
    config = load(write(tmp_path, f"model: {{cut: {written}}}"), [f"name={written.replace(':', '.')}"])
    assert (config.model.cut, config.name) == (written, written.replace(":", "."))
    again = load(write(tmp_path, yaml.safe_dump(to_tree(config))))
    assert again == config
    assert from_tree({"model": {"cut": 1}}).model.cut == "1"


def test_a_text_in_quotes_stays_one_in_the_yaml_of_a_tree(tmp_path: Path) -> None:
    texts = ["1e-3", "1E5", "+.5e3", "5", "0x1F", "null", "true", "1:30", "2024-02-29", "", "a\nb"]
    values = {"texts": texts, "numbers": [1e-3, 1e5, 500, -7, 1e300], "rest": [None, True, {"deep": [[]]}]}
    text = to_yaml({"data": {"arguments": values}})
    assert read_yaml(write(tmp_path, text)) == {"data": {"arguments": values}}
    assert load(write(tmp_path, text)).data.arguments == values
    assert read_yaml(write(tmp_path, "{a: 1e-3, b: '1e-3', c: 7.E2}")) == {
        "a": 0.001,
        "b": "1e-3",
        "c": 700.0,
    }


@pytest.mark.parametrize(("text", "number"), [("3e-3", 0.003), ("'0.5'", 0.5), ("1", 1.0)])
def test_text_and_integers_that_mean_a_number_become_floats(tmp_path: Path, text: str, number: float) -> None:
    path = write(tmp_path, f"optimizer: {{client: {{lr: {text}}}}}\nstop: {{accuracy: {text}}}")
    config = load(path)
    assert not isinstance(yaml.safe_load(text), float)  # YAML 1.1 reads 3e-3 as text
    for value in (config.optimizer.client.lr, config.stop.accuracy):
        assert value == number
        assert type(value) is float


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_positive_number_survives_as_number_and_as_text(number: float) -> None:
    for value in (number, repr(number)):
        assert from_tree({"data": {"alpha": value}}).data.alpha == number


# Base files


def test_a_file_lies_over_its_base_key_by_key(tmp_path: Path) -> None:
    below = "rounds: 5\nclients: {count: 8, batch_size: 16}\ncomm: {transports: [shm, uv]}"
    write(tmp_path, below, "below.yaml")
    path = write(tmp_path, "base: below.yaml\nclients: {count: 9}\ncomm: {transports: [uv]}")
    assert changes(load(path)) == {
        "rounds": 5,
        "clients.count": 9,
        "clients.batch_size": 16,
        "comm.transports": ["uv"],
    }


def test_a_base_of_a_base_lies_lowest_and_each_is_relative_to_its_own_file(tmp_path: Path) -> None:
    write(tmp_path, "rounds: 1\nseed: 1\nname: lowest", "common/deep/lowest.yaml")
    write(tmp_path, "base: deep/lowest.yaml\nseed: 2\nname: middle", "common/middle.yaml")
    path = write(tmp_path, "base: ../common/middle.yaml\nname: top", "runs/top.yaml")
    assert changes(load(path)) == {"rounds": 1, "seed": 2, "name": "top"}


def test_a_base_may_be_an_absolute_path_or_null(tmp_path: Path) -> None:
    below = write(tmp_path, "rounds: 7", "elsewhere/below.yaml")
    assert changes(load(write(tmp_path, f"base: {below}"))) == {"rounds": 7}
    assert changes(load(write(tmp_path, "base: null\nrounds: 7"))) == {"rounds": 7}


# Overrides


def test_overrides_lie_over_file_and_base_and_the_last_one_wins(tmp_path: Path) -> None:
    write(tmp_path, "rounds: 5", "below.yaml")
    path = write(tmp_path, "base: below.yaml\nclients: {count: 8, batch_size: 16}\nmodel: {cut: norm1}")
    overrides = ["rounds=6", "clients.count=2", "clients.count=3", "model.cut=null", "data.root=/a=b"]
    overrides += ["optimizer.client.lr=3e-3", "comm.transports=[shm, uv]", "data.augment=false"]
    assert changes(load(path, overrides)) == {
        "rounds": 6,
        "clients.count": 3,
        "clients.batch_size": 16,
        "data.root": "/a=b",
        "optimizer.client.lr": 0.003,
        "comm.transports": ["shm", "uv"],
        "data.augment": False,
    }


def test_an_override_changes_its_own_key_only_where_sections_share_an_anchor(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {client: &same {lr: 1}, server: *same}")
    config = load(path, ["optimizer.client.lr=2"])
    assert (config.optimizer.client.lr, config.optimizer.server.lr) == (2.0, 1.0)


# A section by its name alone


def test_a_name_alone_stands_for_a_section_without_arguments(tmp_path: Path) -> None:
    config = load(write(tmp_path, "comm: {codec: {smashed: int8, auxiliary: {name: topk}}}"))
    assert changes(config) == {"comm.codec.smashed.name": "int8", "comm.codec.auxiliary.name": "topk"}
    assert from_tree({"comm": {"codec": {"smashed": "int8", "auxiliary": "topk"}}}) == config
    assert from_tree(to_tree(config)) == config


TOPK = "{name: topk, arguments: {share: 0.5}}"


@pytest.mark.parametrize(
    ("below", "above", "name", "arguments"),
    [
        (TOPK, "int8", "int8", {}),
        (TOPK, "topk", "topk", {}),
        ("int8", TOPK, "topk", {"share": 0.5}),
        ("topk", "{arguments: {share: 0.1}}", "topk", {"share": 0.1}),
        (TOPK, "{arguments: {share: 0.1}}", "topk", {"share": 0.1}),
        ("bf16", "int8", "int8", {}),
        (TOPK, "{name: own:Codec}", "own:Codec", {"share": 0.5}),
    ],
)
def test_a_name_alone_lies_over_and_under_a_mapping(
    tmp_path: Path, below: str, above: str, name: str, arguments: dict[str, Any]
) -> None:
    section = "comm: {codec: {gradient: %s}}"
    write(tmp_path, section % below, "below.yaml")
    config = load(write(tmp_path, f"base: below.yaml\n{section % above}"))
    assert vars(config.comm.codec.gradient) == {"name": name, "arguments": arguments}


def test_overrides_lie_over_a_name_alone_and_bring_one(tmp_path: Path) -> None:
    path = write(tmp_path, "comm: {codec: {smashed: topk}}")
    share = "comm.codec.smashed.arguments.share=0.5"
    for config in (load(path, [share]), from_tree({}, ["comm.codec.smashed=topk", share])):
        assert vars(config.comm.codec.smashed) == {"name": "topk", "arguments": {"share": 0.5}}
    config = load(path, [share, "comm.codec.smashed=int8"])
    assert vars(config.comm.codec.smashed) == {"name": "int8", "arguments": {}}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("5", ": got 5, expected a name, or a mapping of name and arguments"),
        ("null", ": got null, expected a name, or a mapping of name and arguments"),
        (
            "int9",
            ".name: got 'int9', expected one of none, bf16, int8, topk, gaussian, or package.module:Class",
        ),
        ("{names: int8}", ".names: unknown key; did you mean comm.codec.smashed.name?"),
    ],
)
def test_what_is_no_such_section_is_refused(value: str, line: str) -> None:
    assert mistake(from_tree, {}, [f"comm.codec.smashed={value}"]) == f"comm.codec.smashed{line}"


def test_only_a_section_of_name_and_arguments_is_given_by_its_name() -> None:
    expected = "expected a mapping of keys"
    assert mistake(from_tree, {"algorithm": "fedavg"}) == f"algorithm: got 'fedavg', {expected}"
    assert mistake(from_tree, {"comm": {"codec": "int8"}}) == f"comm.codec: got 'int8', {expected}"


# Trees


def test_configurations_and_trees_share_nothing() -> None:
    schedule = {"name": "MultiStepLR", "arguments": {"milestones": [1, 2], "gamma": "1e-1"}}
    given = {"clients": {"count": 9}, "optimizer": {"client": {"lr": "1e-2", "scheduler": schedule}}}
    kept = copy.deepcopy(given)
    config, other = from_tree(given), from_tree({})
    tree = to_tree(config)
    assert set(tree) == {field.name for field in dataclasses.fields(Config)}
    config.clients.count = 1
    assert config.optimizer.client.scheduler.arguments == {"milestones": [1, 2], "gamma": 0.1}
    config.optimizer.client.scheduler.arguments["milestones"].append(3)
    tree["optimizer"]["client"]["lr"] = 1
    assert given == kept
    assert other == Config()
    assert (tree["clients"]["count"], config.optimizer.client.lr) == (9, 0.01)


def test_changed_keys_are_dotted_with_old_and_new_value() -> None:
    old = {"a": 1, "b": {"c": 2, "d": {"e": [1]}}, "gone": 3, "same": {"x": [None]}}
    new = {"a": 1, "b": {"c": 5, "d": {"e": [1, 2]}}, "same": {"x": [None]}, "fresh": {"y": 4}}
    assert changed_keys(old, new) == {
        "b.c": (2, 5),
        "b.d.e": ([1], [1, 2]),
        "gone": (3, None),
        "fresh": (None, {"y": 4}),
    }


def test_where_names_of_the_users_own_differ_their_mapping_does() -> None:
    old = {"model": {"arguments": {"a": 1, "b": {"c": 2}}}}
    for new, changes in (
        ({"a": 3, "b": {"c": 2}}, {"model.arguments.a": (1, 3)}),
        ({"a": 1, "b": {"c": 5}}, {"model.arguments.b.c": (2, 5)}),
        ({"a": 1, "b": {"c": 2, "d": None}}, {"model.arguments.b": ({"c": 2}, {"c": 2, "d": None})}),
        ({"a": 1}, {"model.arguments": (old["model"]["arguments"], {"a": 1})}),
    ):
        assert changed_keys(old, {"model": {"arguments": new}}) == changes


def test_a_files_own_names_replace_its_base_files(tmp_path: Path) -> None:
    scheduler = "optimizer: {client: {scheduler: {name: %s, arguments: {%s: 5}}}}\n"
    write(tmp_path, scheduler % ("StepLR", "step_size") + "bench: {variants: {x: []}}\n", "base.yaml")
    above = "base: base.yaml\n" + scheduler % ("CosineAnnealingLR", "T_max") + "bench: {variants: {y: []}}\n"
    config = load(write(tmp_path, above))
    assert config.optimizer.client.scheduler.arguments == {"T_max": 5}
    assert config.bench.variants == {"y": []}
