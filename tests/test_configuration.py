"""What a configuration is read from: a file, the files it is based on, overrides; and its way back to YAML."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from user_input import DEFAULTS

from fslsage_rpc.config import Config
from fslsage_rpc.configuration import changed_keys, from_tree, load, read_yaml, to_tree


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def changes(config: Config) -> dict[str, Any]:
    """The dotted keys in which a configuration is not the default one, and their values."""
    return {key: new for key, (_, new) in changed_keys(to_tree(Config()), to_tree(config)).items()}


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == load(write(tmp_path, "# nothing\n")) == from_tree({}) == Config()


def test_the_defaults_are_the_documented_ones() -> None:
    documented = {
        "name": "run",
        "seed": 0,
        "ranks": 3,
        "transport": "rpc",
        "data.name": "digits",
        "model.name": "simple_conv",
        "model.cut": None,
        "algorithm.name": "fsl_sage",
        "algorithm.upload_every": 5,
        "algorithm.align_every": 10,
        "algorithm.average_auxiliary": "alignment",
        "algorithm.alignment.epochs": 100,
        "algorithm.alignment.batch_size": 1000,
        "algorithm.alignment.buffer_size": 1000,
        "server.order": "round_robin",
    }
    for model, weight_decay in (("client", 1e-4), ("server", 1e-4), ("auxiliary", 0.0)):
        keys = {"name": "adam", "lr": 1e-3, "weight_decay": weight_decay}
        documented |= {f"optimizer.{model}.{key}": value for key, value in keys.items()}
    assert {key: DEFAULTS[key] for key in documented} == documented


def test_two_configurations_share_no_section() -> None:
    one, other = from_tree({}), from_tree({})
    one.clients.count = 99
    one.optimizer.client.lr = 99.0
    one.model.auxiliary["x"] = 99
    assert other == Config()


def test_a_file_sets_its_keys_and_leaves_the_others(tmp_path: Path) -> None:
    text = """
        name: first.run-2_b
        seed: 4294967295
        clients: {count: 7, participation: 0.5}
        data: {partition: file, partition_file: parts.json}
        algorithm:
          align_every: null
          alignment: {epochs: 3}
        optimizer:
          auxiliary: {name: sgd}
        comm: {transports: [shm, uv]}
        checkpoint: {keep: 3}
    """
    assert changes(load(write(tmp_path, text))) == {
        "name": "first.run-2_b",
        "seed": 4294967295,
        "clients.count": 7,
        "clients.participation": 0.5,
        "data.partition": "file",
        "data.partition_file": "parts.json",
        "algorithm.align_every": None,
        "algorithm.alignment.epochs": 3,
        "optimizer.auxiliary.name": "sgd",
        "comm.transports": ["shm", "uv"],
        "checkpoint.keep": 3,
    }


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_a_shipped_configuration_loads(path: Path) -> None:
    config = load(path)
    assert from_tree(to_tree(config)) == config


def test_reading_a_configuration_does_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from fslsage_rpc.configuration import load; load(sys.argv[1]); "
        "sys.exit('torch' in sys.modules)"
    )
    path = write(tmp_path, "rounds: 3")
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 0


@pytest.mark.parametrize(("text", "number"), [("3e-3", 0.003), ("'0.5'", 0.5), ("1", 1.0)])
def test_text_and_integers_that_mean_a_number_become_floats(tmp_path: Path, text: str, number: float) -> None:
    path = write(tmp_path, f"optimizer: {{client: {{lr: {text}}}}}\nstop: {{accuracy: {text}}}")
    config = load(path)
    assert not isinstance(yaml.safe_load(text), float)  # YAML 1.1 reads 3e-3 as text
    for value in (config.optimizer.client.lr, config.stop.accuracy):
        assert value == number
        assert type(value) is float


@settings(max_examples=100, deadline=None, derandomize=True)
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
    overrides = {
        "rounds=6": {"rounds": 6},
        "clients.count=2": {},
        "clients.count=3": {"clients.count": 3},
        "model.cut=null": {},
        "optimizer.client.lr=3e-3": {"optimizer.client.lr": 0.003},
        "algorithm.alignment.epochs=7": {"algorithm.alignment.epochs": 7},
        "comm.transports=[shm, uv]": {"comm.transports": ["shm", "uv"]},
        "data.augment=false": {"data.augment": False},
        "data.root=/a=b": {"data.root": "/a=b"},
        "name=other": {"name": "other"},
    }
    expected: dict[str, Any] = {"clients.batch_size": 16}
    for change in overrides.values():
        expected |= change
    assert changes(load(path, list(overrides))) == expected


def test_an_override_changes_its_own_key_only_where_sections_share_an_anchor(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {client: &same {lr: 1}, server: *same}")
    config = load(path, ["optimizer.client.lr=2"])
    assert (config.optimizer.client.lr, config.optimizer.server.lr) == (2.0, 1.0)


# Trees


def test_a_configuration_survives_its_tree_and_yaml(tmp_path: Path) -> None:
    given = {
        "name": "x",
        "clients": {"participation": 1e-5},
        "data": {"alpha": 1e-300, "train_limit": 100},
        "algorithm": {"align_every": None},
        "optimizer": {"server": {"weight_decay": 1e22}},
        "comm": {"transports": ["uv"], "interface": "null"},
        "stop": {"paper_gib": 0.1},
    }
    config = from_tree(given)
    assert from_tree(to_tree(config)) == config
    path = write(tmp_path, yaml.safe_dump(to_tree(config)))
    assert load(path) == config
    assert read_yaml(path) == to_tree(config)


def test_a_tree_is_complete_and_its_own() -> None:
    config = Config()
    tree = to_tree(config)
    assert set(tree) == {field.name for field in dataclasses.fields(Config)}
    tree["clients"]["count"] = 99
    assert config == Config()


def test_from_tree_leaves_its_argument_as_it_was() -> None:
    tree = {"clients": {"count": 9}, "optimizer": {"client": {"lr": "1e-2"}}}
    from_tree(tree)
    assert tree == {"clients": {"count": 9}, "optimizer": {"client": {"lr": "1e-2"}}}


def test_changed_keys_are_dotted_with_old_and_new_value() -> None:
    old = {"a": 1, "b": {"c": 2, "d": {"e": [1]}}, "gone": 3, "same": {"x": [None]}}
    new = {"a": 1, "b": {"c": 5, "d": {"e": [1, 2]}}, "same": {"x": [None]}, "fresh": {"y": 4}}
    assert changed_keys(old, new) == {
        "b.c": (2, 5),
        "b.d.e": ([1], [1, 2]),
        "gone": (3, None),
        "fresh": (None, {"y": 4}),
    }
