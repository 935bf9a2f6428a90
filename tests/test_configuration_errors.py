"""Every mistake in a configuration is one line that names the key or file, what it was and what it may be."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from user_input import DEFAULTS, NULLABLE, leaves, mistake, nested

from fslsage_rpc.configuration import from_tree, load, to_tree


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Values

COUNT, SHARE, POSITIVE = "an integer >= 1", "a number > 0 and <= 1", "a number > 0"
SEED = "an integer >= 0 and <= 4294967295"
TRANSPORTS = "a list, each one of uv, shm, ibv or null"
FOLDER = "a folder name of letters, digits, '.', '_' and '-'"
NO_AUXILIARY = "{} (choosing the auxiliary model is not in this version)"
NO_CHECKPOINTS = "null (writing checkpoints is not in this version)"
NO_TRACES = "false (writing traces is not in this version)"
WRONG_VALUES = [  # in YAML, just as the message shows them
    ("clients.count", COUNT, ["'four'", "'4'", "4.0", "[4]", "{a: 4}", "2024-02-29", "true", "0", "-3"]),
    ("data.train_limit", f"{COUNT} or null", ["true"]),
    ("algorithm.align_every", f"{COUNT} or null", ["0"]),
    ("ranks", "an integer >= 2", ["1"]),
    ("seed", SEED, ["-1", "4294967296"]),
    ("clients.participation", SHARE, ["'half'", "[0.5]", "0", "1.0001", "-.inf"]),
    ("stop.accuracy", f"{SHARE} or null", ["2"]),
    ("stop.paper_gib", f"{POSITIVE} or null", [".inf"]),
    ("optimizer.server.lr", POSITIVE, ["true", "0.0", ".inf", ".nan", "'inf'"]),
    ("comm.timeout_seconds", POSITIVE, ["'1e999'"]),
    ("optimizer.server.weight_decay", "a number >= 0", ["-1.0e-09", "'nan'"]),
    ("data.augment", "true or false", ["'yes'", "1"]),
    ("output", "a text", ["3", "''"]),
    ("model.cut", "a text or null", ["3"]),
    ("comm.transports", TRANSPORTS, ["'uv'", "[]", "[uv, tcp]", "[uv, 3]"]),
    ("clients", "a mapping of keys", ["4", "null"]),
    ("algorithm.alignment", "a mapping of keys", ["[1]"]),
    ("data.name", "one of digits, cifar10, cifar100, mnist, fashion_mnist", ["'imagenet'"]),
    ("data.partition", "one of iid, dirichlet, shards, file", ["'IID'"]),
    ("algorithm.average_auxiliary", "one of never, alignment, round", ["false"]),
    ("transport", "one of rpc, local", ["[rpc]"]),
    ("name", FOLDER, ["'../x'", "'..'", "'a/b'", "'-x'", "'a b'"]),
    ("model.auxiliary", NO_AUXILIARY, ["{fc: 1}", "null"]),  # known keys whose feature is not there
    ("checkpoint.every", NO_CHECKPOINTS, ["5"]),
    ("trace", NO_TRACES, ["true", "0", "0.0", "null", "'false'", "[]"]),
]


@pytest.mark.parametrize(
    ("key", "expected", "value"),
    [(key, expected, v) for key, expected, values in WRONG_VALUES for v in values],
)
def test_a_wrong_value_is_named_with_what_it_may_be(key: str, expected: str, value: str) -> None:
    tree = nested({key: yaml.safe_load(value)})
    assert mistake(from_tree, tree) == f"{key}: got {value}, expected {expected}"


def test_a_folder_name_does_not_end_in_a_line_break() -> None:
    assert mistake(from_tree, {"name": "a\n"}) == rf"name: got 'a\n', expected {FOLDER}"


@pytest.mark.parametrize("key", DEFAULTS)
def test_null_is_allowed_just_where_it_means_something(key: str) -> None:
    tree = nested({key: None})
    if key in NULLABLE:
        assert leaves(to_tree(from_tree(tree)))[key] is None
    else:
        assert mistake(from_tree, tree).startswith(f"{key}: got null, expected ")


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if type(value) in (int, float)])
def test_no_number_takes_what_is_no_finite_number(key: str) -> None:
    for value in (True, False, "x", math.nan, -math.inf, [1], {"a": 1}):
        assert mistake(from_tree, nested({key: value})).startswith(f"{key}: got ")


@pytest.mark.parametrize(
    "value", ["x" * 5000, ["x"] * 5000, {"x": "y" * 5000}], ids=["text", "list", "mapping"]
)
def test_a_long_value_is_cut_in_the_message(value: Any) -> None:
    message = mistake(from_tree, {"rounds": value})
    assert len(message) < 200
    assert message.endswith(f"..., expected {COUNT}")


@pytest.mark.parametrize(
    "tree",
    [
        {"a\nb": 1},
        {"a\u2028b": 1},
        {"clients": {"a\nb": 1}},
        {"clients": ["a\nb"]},
        {"rounds": "a\nb"},
        {"rounds": b"a\nb"},
        {"rounds": ["a\nb"]},
        {"rounds": {"a\nb": "c\nd"}},
        {"model": {"auxiliary": {"a": "b\nc"}}},
    ],
    ids=ascii,
)
def test_a_line_break_in_the_input_breaks_no_message(tree: dict[str, Any]) -> None:
    assert mistake(from_tree, tree)


# Keys


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("round", "did you mean rounds?"),
        ("clients.batchsize", "did you mean clients.batch_size?"),
        ("algorithm.alignment.epoch", "did you mean algorithm.alignment.epochs?"),
        ("server.zzz", "known keys: order"),
        ("base", ""),  # a key of files, not of trees
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_or_all_known(key: str, expected: str) -> None:
    assert mistake(from_tree, nested({key: 3})).startswith(f"{key}: unknown key; {expected}")


def test_a_key_that_is_no_text_is_unknown() -> None:
    assert mistake(from_tree, {"stop": {3: 3}}) == "stop.3: unknown key; known keys: paper_gib, accuracy"


def test_a_partition_by_file_needs_the_file() -> None:
    message = mistake(from_tree, {"data": {"partition": "file"}})
    assert message == "data.partition_file: got null, expected a JSON file, as data.partition is 'file'"


# Overrides

EXAMPLE = "expected key=value, for example clients.count=8"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rounds", f"rounds: {EXAMPLE}"),
        ("=3", f"=3: {EXAMPLE}"),
        ("", f": {EXAMPLE}"),
        ("base=other.yaml", "base: got an override, expected it inside a configuration file"),
        ("rounds=[", "rounds: got '[', expected a YAML value"),
        ("rounds=", f"rounds: got null, expected {COUNT}"),
        ("seed.x=1", "seed: got 5, expected a mapping"),
        ("clients.cuont=3", "clients.cuont: unknown key; did you mean clients.count?"),
        ("clients=3", "clients: got 3, expected a mapping of keys"),
        ("optimizer.client.lr=-1", f"optimizer.client.lr: got -1, expected {POSITIVE}"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    assert mistake(load, write(tmp_path, "seed: 5"), [override]) == expected


STRANGE_OVERRIDES = ["a\nb", "a\nb=1", 'rounds=["a\\nb"]', "a..b=1", ".=1", "rounds=\0"]
STRANGE_OVERRIDES += ["rounds=!!int ''", "rounds=!!timestamp x"]


@pytest.mark.parametrize("override", STRANGE_OVERRIDES, ids=ascii)
def test_a_strange_override_is_one_line_too(tmp_path: Path, override: str) -> None:
    assert mistake(load, write(tmp_path, ""), [override])


# Files


def test_a_file_that_is_not_there_is_named_whether_it_is_the_base_or_not(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    for path in (absent, write(tmp_path, "base: absent.yaml")):
        assert mistake(load, path) == f"{absent}: no such file, expected a YAML configuration"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    expected = f"{tmp_path}: cannot be read (Is a directory), expected a YAML configuration"
    assert mistake(load, tmp_path) == expected


@pytest.mark.parametrize("content", [b"\xff\xfe\x80", b"name: caf\xe9", b"\x80"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    expected = f"{path}: cannot be read (not UTF-8 text), expected a YAML configuration"
    assert mistake(load, path) == expected


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
    assert mistake(load, path).startswith(f"{path}: {where}: not valid YAML (")


@pytest.mark.parametrize("text", ["[1, 2]", "'hello'", "3", "true", "[{a: 1}]"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert mistake(load, path) == f"{path}: got {text}, expected a mapping of configuration keys"


@pytest.mark.parametrize("value", ["[a.yaml]", "3", "{a: b}"])
def test_a_base_that_is_no_path_is_refused(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"base: {value}")
    assert mistake(load, path) == f"base: got {value}, expected a file path relative to {path}"


def test_a_cycle_of_base_files_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    own = write(tmp_path, f"base: ./../{tmp_path.name}/own.yaml", "own.yaml")
    for path, cycle in ((first, "a.yaml -> b.yaml -> a.yaml"), (own, "own.yaml -> own.yaml")):
        assert mistake(load, path) == f"base: got a cycle ({cycle}), expected base files that end"


STRANGE_FILES = {
    "NUL byte": "rounds: \0",
    "very long integer": "rounds: " + "9" * 5000,
    "very long hexadecimal integer": "rounds: -0x" + "f" * 5000,
    "integer beyond float": "clients: {participation: 0x" + "f" * 5000 + "}",
    "impossible date": "rounds: 2024-13-45",
    "timestamp tag": "rounds: !!timestamp x",
    "int tag": "rounds: !!int ''",
    "float tag": "rounds: !!float ''",
    "bool tag": "rounds: !!bool x",
    "binary tag": "rounds: !!binary aGVsbG8=",
    "bad base64": "rounds: !!binary '?'",
    "set tag": "rounds: !!set {a, b}",
    "value tag": "rounds: =",
    "merge key": "<<: 3",
    "empty key": "'': 1",
    "null key": "clients: {null: 1}",
    "list that holds itself": "rounds: &a [*a]",
    "mapping that holds itself": "&a {clients: *a}",
    "mappings that hold themselves, merged": "base: itself.yaml\ndata: &a {data: *a}",
    "deep list": "rounds: " + "[" * 400 + "]" * 400,
    "very deep list": "rounds: " + "[" * 5000,
    "NUL in base": 'base: "a\\0b"',
    "line break in base": 'base: "a\\nb"',
    "too long base": "base: " + "a" * 5000,
    "empty base": "base: ''",
    "base is a loop of links": "base: loop.yaml",
}


@pytest.mark.parametrize("text", STRANGE_FILES.values(), ids=STRANGE_FILES)
def test_any_strange_file_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    write(tmp_path, "data: &a {data: *a}", "itself.yaml")
    assert mistake(load, write(tmp_path, text))
