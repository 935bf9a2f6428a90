"""Configuration: files, base files and overrides, and that every mistake is one line."""

import dataclasses
import datetime
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fslsage_rpc.config import Config
from fslsage_rpc.configuration import changed_keys, from_tree, load, read_yaml, to_tree
from fslsage_rpc.errors import InputError

NULLABLE = {
    "data.partition_file",
    "data.train_limit",
    "data.test_limit",
    "model.cut",
    "algorithm.align_every",
    "comm.interface",
    "comm.transports",
    "checkpoint.every",
    "stop.paper_gib",
    "stop.accuracy",
}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The dotted keys of a tree and their values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
        )
    return flat


def nested(key: str, value: Any) -> dict[str, Any]:
    """The tree in which just this dotted key has a value."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


DEFAULTS = leaves(to_tree(Config()))


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mistake(tree: dict[str, Any]) -> str:
    """The message about a tree, which must be one line."""
    with pytest.raises(InputError) as caught:
        from_tree(tree)
    return one_line(caught.value)


def mistake_in_file(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return one_line(caught.value)


def one_line(error: InputError) -> str:
    message = str(error)
    assert message.strip()
    assert len(message.splitlines()) == 1, repr(message)
    return message


# Defaults and files


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == load(write(tmp_path, "# nothing\n")) == from_tree({}) == Config()


def test_defaults_are_the_documented_ones() -> None:
    config = Config()
    assert (config.name, config.seed, config.ranks, config.transport) == ("run", 0, 3, "rpc")
    assert (config.data.name, config.model.name, config.model.cut) == ("digits", "simple_conv", None)
    keys = config.algorithm
    assert (keys.name, keys.upload_every, keys.align_every) == ("fsl_sage", 5, 10)
    assert keys.average_auxiliary == "alignment"
    assert (keys.alignment.epochs, keys.alignment.batch_size, keys.alignment.buffer_size) == (100, 1000, 1000)
    for optimizer, weight_decay in (
        (config.optimizer.client, 1e-4),
        (config.optimizer.server, 1e-4),
        (config.optimizer.auxiliary, 0.0),
    ):
        assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adam", 1e-3, weight_decay)
    assert config.server.order == "round_robin"


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
        algorithm:
          align_every: null
          alignment: {epochs: 3}
        optimizer:
          auxiliary: {name: sgd}
        comm: {transports: [shm, uv]}
        stop: {accuracy: 1}
    """
    changed = changed_keys(to_tree(Config()), to_tree(load(write(tmp_path, text))))
    assert changed == {
        "name": ("run", "first.run-2_b"),
        "seed": (0, 4294967295),
        "clients.count": (4, 7),
        "clients.participation": (1.0, 0.5),
        "algorithm.align_every": (10, None),
        "algorithm.alignment.epochs": (100, 3),
        "optimizer.auxiliary.name": ("adam", "sgd"),
        "comm.transports": (None, ["shm", "uv"]),
        "stop.accuracy": (None, 1.0),
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


# Numbers


def test_a_number_that_yaml_reads_as_text_is_the_number(tmp_path: Path) -> None:
    assert yaml.safe_load("3e-3") == "3e-3"
    config = load(
        write(tmp_path, "optimizer: {client: {lr: 3e-3}, server: {lr: '0.5'}}\nstop: {accuracy: 9e-1}")
    )
    assert (config.optimizer.client.lr, config.optimizer.server.lr) == (0.003, 0.5)
    assert config.stop.accuracy == 0.9


def test_an_integer_where_a_number_is_expected_becomes_a_float() -> None:
    lr = from_tree(nested("optimizer.client.lr", 1)).optimizer.client.lr
    assert lr == 1.0
    assert type(lr) is float


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_positive_number_survives_as_number_and_as_text(number: float) -> None:
    assert from_tree(nested("data.alpha", number)).data.alpha == number
    assert from_tree(nested("data.alpha", repr(number))).data.alpha == number


# Base files


def test_a_file_lies_over_its_base_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        "rounds: 5\nclients: {count: 8, batch_size: 16}\ncomm: {transports: [shm, uv]}",
        "below.yaml",
    )
    path = write(tmp_path, "base: below.yaml\nclients: {count: 9}\ncomm: {transports: [uv]}")
    config = load(path)
    assert (config.rounds, config.clients.count, config.clients.batch_size) == (5, 9, 16)
    assert config.comm.transports == ["uv"]


def test_a_base_of_a_base_lies_lowest_and_each_is_relative_to_its_own_file(tmp_path: Path) -> None:
    write(tmp_path, "rounds: 1\nseed: 1\nname: lowest", "common/deep/lowest.yaml")
    write(tmp_path, "base: deep/lowest.yaml\nseed: 2\nname: middle", "common/middle.yaml")
    path = write(tmp_path, "base: ../common/middle.yaml\nname: top", "runs/top.yaml")
    config = load(path)
    assert (config.rounds, config.seed, config.name) == (1, 2, "top")


def test_a_base_may_be_an_absolute_path(tmp_path: Path) -> None:
    below = write(tmp_path, "rounds: 7", "elsewhere/below.yaml")
    assert load(write(tmp_path, f"base: {below}")).rounds == 7


def test_a_null_base_is_none(tmp_path: Path) -> None:
    assert load(write(tmp_path, "base: null\nrounds: 7")).rounds == 7


def test_two_files_on_one_base_are_no_cycle(tmp_path: Path) -> None:
    write(tmp_path, "rounds: 7", "below.yaml")
    write(tmp_path, "base: below.yaml\nseed: 1", "middle.yaml")
    assert (
        load(write(tmp_path, "base: middle.yaml")).rounds == load(write(tmp_path, "base: below.yaml")).rounds
    )


def test_a_cycle_of_base_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    own = write(tmp_path, f"base: ./../{tmp_path.name}/own.yaml", "own.yaml")
    message = mistake_in_file(tmp_path / "a.yaml")
    assert message.startswith("base: got a cycle")
    assert "a.yaml -> b.yaml -> a.yaml" in message
    assert mistake_in_file(own).startswith("base: got a cycle")


@pytest.mark.parametrize(("value", "shown"), [("[a.yaml]", "[a.yaml]"), ("3", "3"), ("{a: b}", "{a: b}")])
def test_a_base_that_is_no_path_is_refused(tmp_path: Path, value: str, shown: str) -> None:
    path = write(tmp_path, f"base: {value}")
    message = mistake_in_file(path)
    assert message.startswith(f"base: got {shown}, expected a file path")
    assert str(path) in message


def test_a_missing_base_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent.yaml") in mistake_in_file(write(tmp_path, "base: absent.yaml"))


# Overrides


def test_overrides_lie_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "clients: {count: 8}\nmodel: {cut: norm1}")
    overrides = [
        "clients.count=2",
        "clients.count=3",
        "model.cut=null",
        "optimizer.client.lr=3e-3",
        "algorithm.alignment.epochs=7",
        "comm.transports=[shm, uv]",
        "data.augment=false",
        "data.root=/a=b",
        "name=other",
    ]
    config = load(path, overrides)
    assert (config.clients.count, config.model.cut, config.optimizer.client.lr) == (3, None, 0.003)
    assert (config.algorithm.alignment.epochs, config.comm.transports) == (7, ["shm", "uv"])
    assert (config.data.augment, config.data.root, config.name) == (False, "/a=b", "other")


def test_an_override_lies_over_a_base_file_too(tmp_path: Path) -> None:
    write(tmp_path, "rounds: 5", "below.yaml")
    assert load(write(tmp_path, "base: below.yaml"), ["rounds=6"]).rounds == 6


def test_an_override_changes_its_own_key_only_where_sections_share_an_anchor(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {client: &same {lr: 1}, server: *same}")
    config = load(path, ["optimizer.client.lr=2"])
    assert (config.optimizer.client.lr, config.optimizer.server.lr) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rounds", "rounds: expected key=value, for example clients.count=8"),
        ("=3", "=3: expected key=value, for example clients.count=8"),
        ("", ": expected key=value, for example clients.count=8"),
        ("base=other.yaml", "base: got an override, expected it inside a configuration file"),
        ("rounds=[", "rounds: got '[', expected a YAML value"),
        ("rounds=", "rounds: got null, expected an integer >= 1"),
        ("seed.x=1", "seed: got 5, expected a mapping"),
        ("clients.cuont=3", "clients.cuont: unknown key; did you mean clients.count?"),
        ("clients=3", "clients: got 3, expected a mapping of keys"),
        ("optimizer.client.lr=-1", "optimizer.client.lr: got -1, expected a number > 0"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    assert mistake_in_file(write(tmp_path, "seed: 5"), override) == expected


@pytest.mark.parametrize(
    "override",
    [
        "a\nb",
        "a\nb=1",
        'rounds=["a\\nb"]',
        "rounds=!!int ''",
        "rounds=!!timestamp x",
        "a..b=1",
        ".=1",
        "rounds=\0",
    ],
)
def test_a_strange_override_is_one_line_too(tmp_path: Path, override: str) -> None:
    assert mistake_in_file(write(tmp_path, ""), override)


# Mistakes


@pytest.mark.parametrize(
    ("key", "value", "got", "expected"),
    [
        # the wrong type
        ("clients.count", "four", "'four'", "an integer >= 1"),
        ("clients.count", "4", "'4'", "an integer >= 1"),
        ("clients.count", 4.0, "4.0", "an integer >= 1"),
        ("clients.count", [4], "[4]", "an integer >= 1"),
        ("clients.count", {"a": 4}, "{a: 4}", "an integer >= 1"),
        ("clients.count", datetime.date(2024, 2, 29), "2024-02-29", "an integer >= 1"),
        ("clients.participation", "half", "'half'", "a number > 0 and <= 1"),
        ("clients.participation", [0.5], "[0.5]", "a number > 0 and <= 1"),
        ("data.augment", "yes", "'yes'", "true or false"),
        ("data.augment", 1, "1", "true or false"),
        ("output", 3, "3", "a text"),
        ("output", "", "''", "a text"),
        ("model.cut", 3, "3", "a text or null"),
        ("comm.transports", "uv", "'uv'", "a list, each one of uv, shm, ibv or null"),
        ("comm.transports", [], "[]", "a list, each one of uv, shm, ibv or null"),
        ("comm.transports", ["uv", "tcp"], "[uv, tcp]", "a list, each one of uv, shm, ibv or null"),
        ("comm.transports", ["uv", 3], "[uv, 3]", "a list, each one of uv, shm, ibv or null"),
        ("clients", 4, "4", "a mapping of keys"),
        ("clients", None, "null", "a mapping of keys"),
        ("algorithm.alignment", [1], "[1]", "a mapping of keys"),
        # true and false are no numbers
        ("rounds", True, "true", "an integer >= 1"),
        ("data.train_limit", True, "true", "an integer >= 1 or null"),
        ("optimizer.client.lr", True, "true", "a number > 0"),
        # out of range
        ("clients.count", 0, "0", "an integer >= 1"),
        ("clients.count", -3, "-3", "an integer >= 1"),
        ("ranks", 1, "1", "an integer >= 2"),
        ("seed", -1, "-1", "an integer >= 0 and <= 4294967295"),
        ("seed", 2**32, "4294967296", "an integer >= 0 and <= 4294967295"),
        ("clients.participation", 0, "0", "a number > 0 and <= 1"),
        ("clients.participation", 1.0001, "1.0001", "a number > 0 and <= 1"),
        ("optimizer.server.lr", 0.0, "0.0", "a number > 0"),
        ("optimizer.server.weight_decay", -1e-9, "-1.0e-09", "a number >= 0"),
        ("stop.accuracy", 2, "2", "a number > 0 and <= 1 or null"),
        ("algorithm.align_every", 0, "0", "an integer >= 1 or null"),
        # neither infinities nor NaN
        ("optimizer.client.lr", math.inf, ".inf", "a number > 0"),
        ("optimizer.client.lr", math.nan, ".nan", "a number > 0"),
        ("optimizer.client.lr", "inf", "'inf'", "a number > 0"),
        ("optimizer.client.weight_decay", "nan", "'nan'", "a number >= 0"),
        ("clients.participation", -math.inf, "-.inf", "a number > 0 and <= 1"),
        ("comm.timeout_seconds", "1e999", "'1e999'", "a number > 0"),
        ("stop.paper_gib", math.inf, ".inf", "a number > 0 or null"),
        # one of a few
        ("data.name", "imagenet", "'imagenet'", "one of digits, cifar10, cifar100, mnist, fashion_mnist"),
        ("data.partition", "IID", "'IID'", "one of iid, dirichlet, shards, file"),
        ("algorithm.average_auxiliary", False, "false", "one of never, alignment, round"),
        ("transport", ["rpc"], "[rpc]", "one of rpc, local"),
        # folder names
        ("name", "../x", "'../x'", "a folder name of letters, digits, '.', '_' and '-'"),
        ("name", "..", "'..'", "a folder name of letters, digits, '.', '_' and '-'"),
        ("name", "a/b", "'a/b'", "a folder name of letters, digits, '.', '_' and '-'"),
        ("name", "-x", "'-x'", "a folder name of letters, digits, '.', '_' and '-'"),
        ("name", "a\n", r"'a\n'", "a folder name of letters, digits, '.', '_' and '-'"),
        ("name", "a b", "'a b'", "a folder name of letters, digits, '.', '_' and '-'"),
        # known keys whose feature is not there
        ("trace", True, "true", "false (writing traces is not in this version)"),
        ("checkpoint.every", 5, "5", "null (writing checkpoints is not in this version)"),
        ("model.auxiliary", {"fc": 1}, "{fc: 1}", "{} (choosing the auxiliary model is not in this version)"),
        ("model.auxiliary", None, "null", "{} (choosing the auxiliary model is not in this version)"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(key: str, value: Any, got: str, expected: str) -> None:
    assert mistake(nested(key, value)) == f"{key}: got {got}, expected {expected}"


@pytest.mark.parametrize("value", [0, 0.0, None, "false", []])
def test_an_off_key_takes_exactly_its_off_value(value: Any) -> None:
    assert mistake(nested("trace", value)).startswith("trace: got ")


def test_off_values_are_allowed() -> None:
    tree = {"trace": False, "checkpoint": {"every": None, "keep": 3}, "model": {"auxiliary": {}}}
    config = from_tree(tree)
    assert (config.trace, config.checkpoint.every, config.model.auxiliary) == (False, None, {})
    assert config.checkpoint.keep == 3


@pytest.mark.parametrize("key", sorted(DEFAULTS))
def test_null_is_allowed_just_where_it_means_something(key: str) -> None:
    if key in NULLABLE:
        assert leaves(to_tree(from_tree(nested(key, None))))[key] is None
    else:
        assert mistake(nested(key, None)).startswith(f"{key}: got null, expected ")


@pytest.mark.parametrize("key", sorted(k for k, v in DEFAULTS.items() if type(v) in (int, float)))
@pytest.mark.parametrize("value", [True, False, "x", math.nan, -math.inf, [1], {"a": 1}])
def test_no_number_takes_what_is_no_finite_number(key: str, value: Any) -> None:
    assert mistake(nested(key, value)).startswith(f"{key}: got ")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"round": 3}, "round: unknown key; did you mean rounds?"),
        ({"clients": {"batchsize": 3}}, "clients.batchsize: unknown key; did you mean clients.batch_size?"),
        (
            {"algorithm": {"alignment": {"epoch": 3}}},
            "algorithm.alignment.epoch: unknown key; did you mean algorithm.alignment.epochs?",
        ),
        ({"server": {"zzz": 3}}, "server.zzz: unknown key; known keys: order"),
        ({"stop": {3: 3}}, "stop.3: unknown key; known keys: paper_gib, accuracy"),
        ({"base": "a.yaml", "rounds": 3}, "base: unknown key; "),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_or_all_known(tree: dict[str, Any], expected: str) -> None:
    assert mistake(tree).startswith(expected)


def test_a_partition_by_file_needs_the_file() -> None:
    message = mistake({"data": {"partition": "file"}})
    assert message.startswith("data.partition_file: got null, expected a JSON file")
    assert "data.partition" in message.partition(":")[2]
    config = from_tree({"data": {"partition": "file", "partition_file": "parts.json"}})
    assert config.data.partition_file == "parts.json"


@pytest.mark.parametrize("text", ["x" * 5000, ["x"] * 5000, {"x": "y" * 5000}])
def test_a_long_value_is_cut_in_the_message(text: Any) -> None:
    message = mistake({"rounds": text})
    assert len(message) < 200
    assert message.endswith("..., expected an integer >= 1")


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param({"a\nb": 1}, id="key"),
        pytest.param({"clients": {"a\nb": 1}}, id="key in a section"),
        pytest.param({"a\u2028b": 1}, id="line separator in a key"),
        pytest.param({"rounds": "a\nb"}, id="text"),
        pytest.param({"rounds": ["a\nb"]}, id="list"),
        pytest.param({"rounds": {"a\nb": "c\nd"}}, id="mapping"),
        pytest.param({"rounds": b"a\nb"}, id="bytes"),
        pytest.param({"clients": ["a\nb"]}, id="section"),
        pytest.param({"model": {"auxiliary": {"a": "b\nc"}}}, id="off-only key"),
    ],
)
def test_a_line_break_in_the_input_breaks_no_message(tree: dict[str, Any]) -> None:
    assert mistake(tree)


# Files that are wrong as a whole


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = mistake_in_file(tmp_path / "absent.yaml")
    assert message == f"{tmp_path / 'absent.yaml'}: no such file, expected a YAML configuration"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    message = mistake_in_file(tmp_path)
    assert message == f"{tmp_path}: cannot be read (Is a directory), expected a YAML configuration"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("rounds: [1", "line 1, column 11"),
        ("a: b: c", "line 1, column 5"),
        ("rounds: 3\n\tseed: 1", "line 2, column 1"),
        ("rounds: *absent", "line 1, column 9"),
        ("rounds: !!python/object:os.system x", "line 1, column 9"),
        ("{[a]: 1}", "line 1, column 2"),
    ],
)
def test_malformed_yaml_is_located(tmp_path: Path, text: str, where: str) -> None:
    path = write(tmp_path, text)
    assert mistake_in_file(path).startswith(f"{path}: {where}: not valid YAML (")


@pytest.mark.parametrize(
    ("text", "got"),
    [("[1, 2]", "[1, 2]"), ("hello", "'hello'"), ("3", "3"), ("true", "true"), ("- a: 1", "[{a: 1}]")],
)
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str, got: str) -> None:
    path = write(tmp_path, text)
    assert mistake_in_file(path) == f"{path}: got {got}, expected a mapping of configuration keys"


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"name: caf\xe9", b"\x80"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = mistake_in_file(path)
    assert message == f"{path}: cannot be read (not UTF-8 text), expected a YAML configuration"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("rounds: \0", id="NUL byte"),
        pytest.param("rounds: " + "9" * 5000, id="very long integer"),
        pytest.param("rounds: -0x" + "f" * 5000, id="very long hexadecimal integer"),
        pytest.param("clients: {participation: 0x" + "f" * 5000 + "}", id="hexadecimal integer beyond float"),
        pytest.param("rounds: 2024-13-45", id="impossible date"),
        pytest.param("rounds: !!timestamp x", id="timestamp tag"),
        pytest.param("rounds: !!int ''", id="int tag"),
        pytest.param("rounds: !!float ''", id="float tag"),
        pytest.param("rounds: !!bool x", id="bool tag"),
        pytest.param("rounds: !!binary aGVsbG8=", id="binary tag"),
        pytest.param("rounds: !!binary '?'", id="bad base64"),
        pytest.param("rounds: !!set {a, b}", id="set tag"),
        pytest.param("rounds: =", id="value tag"),
        pytest.param("rounds: &a [*a]", id="list that holds itself"),
        pytest.param("&a {clients: *a}", id="mapping that holds itself"),
        pytest.param("rounds: " + "[" * 400 + "]" * 400, id="deep list"),
        pytest.param("rounds: " + "[" * 5000, id="very deep list"),
        pytest.param('base: "a\\0b"', id="NUL in base"),
        pytest.param('base: "a\\nb"', id="line break in base"),
        pytest.param("base: " + "a" * 5000, id="too long base"),
        pytest.param("base: ''", id="empty base"),
        pytest.param("base: loop.yaml", id="base is a loop of links"),
        pytest.param("base: itself.yaml\ndata: &a {data: *a}", id="mappings that hold themselves, merged"),
        pytest.param("<<: 3", id="merge key"),
        pytest.param("'': 1", id="empty key"),
        pytest.param("clients: {null: 1}", id="null key"),
    ],
)
def test_any_strange_file_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    write(tmp_path, "data: &a {data: *a}", "itself.yaml")
    assert mistake_in_file(write(tmp_path, text))


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


def test_a_tree_is_plain_and_its_own() -> None:
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


def test_nothing_changed_gives_no_keys() -> None:
    assert changed_keys(to_tree(Config()), to_tree(from_tree({}))) == {}


# Fuzz

SECTIONS = sorted({part for key in DEFAULTS for part in key.split(".")})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.sampled_from(["digits", "file", "fsl_sage", "sgd", "3e-3", "nan", "1e999", "../x", "a\nb"])
)
KEYS = st.sampled_from([*SECTIONS, "base"]) | st.text(max_size=6) | st.integers() | st.none()
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=8,
    ),
    max_size=5,
)
KNOWN_KEYS_ANY_VALUES = st.dictionaries(
    st.sampled_from(sorted(DEFAULTS)),
    SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2),
    min_size=1,
    max_size=6,
)
YAML_LIKE_TEXT = st.text(alphabet="ab01.:-+[]{}&*!|>'\"#%@?,=<~_ \n\t\\\r\u2028", max_size=60)


def accepted_or_one_line(path: Path) -> None:
    try:
        config = load(path)
    except InputError as error:
        one_line(error)
    else:
        assert from_tree(to_tree(config)) == config


@settings(max_examples=80, deadline=None, derandomize=True)
@given(TREES)
def test_any_tree_is_accepted_or_refused_in_one_line(tmp_path_factory: Any, tree: dict[Any, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz_tree.yaml"
    accepted_or_one_line(write(path.parent, yaml.safe_dump(tree, allow_unicode=True), path.name))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(KNOWN_KEYS_ANY_VALUES)
def test_any_values_of_known_keys_are_accepted_or_refused_in_one_line(values: dict[str, Any]) -> None:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[last] = value
    try:
        config = from_tree(tree)
    except InputError as error:
        named = one_line(error).partition(":")[0]
    else:
        got = leaves(to_tree(config))
        assert all(type(got[key]) is type(DEFAULTS[key]) or key in NULLABLE for key in values)
        named = ""
    assert named in {"", "data.partition_file", *values}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | YAML_LIKE_TEXT.map(str.encode))
def test_any_bytes_are_accepted_or_refused_in_one_line(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz_bytes.yaml"
    path.write_bytes(content)
    accepted_or_one_line(path)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.text(max_size=20)
    | st.sampled_from(sorted(DEFAULTS)).flatmap(lambda k: YAML_LIKE_TEXT.map(f"{k}={{}}".format))
)
def test_any_override_is_accepted_or_refused_in_one_line(tmp_path_factory: Any, override: str) -> None:
    path = write(tmp_path_factory.getbasetemp(), "seed: 1", "fuzz_override.yaml")
    try:
        assert isinstance(load(path, [override]), Config)
    except InputError as error:
        one_line(error)
