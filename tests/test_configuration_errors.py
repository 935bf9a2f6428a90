"""Every mistake in a configuration is one line that names the key or file, what it was and what it may be."""

from pathlib import Path

import pytest

from fslsage_rpc.config.loading import from_tree, load, to_tree
from support.user_input import DEFAULTS, NULLABLE, leaves, mistake, write


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return write(tmp_path, "")


# Values

COUNT, SHARE, POSITIVE = "an integer >= 1 and <= 1000000000", "a number > 0 and <= 1", "a number > 0"
ROUNDS = "an integer >= 1 and <= 100000"
SEED = "an integer >= 0 and <= 4294967295"
TRANSPORTS = "a list, each one of uv, shm, ibv or null"
FOLDER = "a folder name of letters, digits, '.', '_' and '-'"
ARGUMENTS = "a mapping of names to numbers, texts or lists of numbers"
DATASETS = "digits, synthetic, cifar10, cifar100, mnist, fashion_mnist"
OWN = "package.module:function"
VARIANTS = "a mapping of names to lists of key=value texts, or to mappings of names to such lists"
ALGORITHMS = "fsl_sage, splitfed_v1, splitfed_v2, cse_fsl, fedavg"
WRONG_VALUES = [  # in YAML, just as the message shows them
    ("clients.count", COUNT, ["'four'", "'4'", "4.0", "[4]", "{a: 4}", "2024-02-29", "true", "0", "-3"]),
    ("data.train_limit", f"{COUNT} or null", ["true"]),
    ("rounds", ROUNDS, ["0", "1000000000"]),
    ("algorithm.align_every", f"{COUNT} or null", ["0"]),
    ("ranks", "an integer >= 2", ["1"]),
    ("seed", SEED, ["-1", "4294967296"]),
    ("clients.participation", SHARE, ["'half'", "[0.5]", "0", "1.0001", "-.inf"]),
    ("stop.accuracy", f"{SHARE} or null", ["2"]),
    ("stop.paper_gib", f"{POSITIVE} or null", [".inf", "0.0"]),
    ("data.alpha", POSITIVE, ["true", "0.0", ".inf", ".nan", "'inf'", "'1e999'"]),
    ("optimizer.client.lr", "a number >= 0", ["-1", "true", ".inf", "'inf'"]),
    ("optimizer.server.weight_decay", "a number >= 0", ["-1.0e-09", "'nan'"]),
    ("data.augment", "true or false", ["'yes'", "1"]),
    ("output", "a text", ["true", "''"]),
    ("model.cut", "a text or null", ["false", "2024-02-29", "[1]"]),
    ("comm.transports", TRANSPORTS, ["'uv'", "[]", "[uv, tcp]", "[uv, 3]"]),
    ("clients", "a mapping of keys", ["4", "null"]),
    ("algorithm.alignment", "a mapping of keys", ["[1]"]),
    ("data.name", f"one of {DATASETS}, or {OWN}", ["'imagenet'", "'mine:'", "3"]),
    ("algorithm.name", f"one of {ALGORITHMS}, or package.module:Class", ["'fedprox'"]),
    ("data.partition", "one of iid, dirichlet, shards, file", ["'IID'"]),
    ("algorithm.average_auxiliary", "one of never, alignment, round", ["false"]),
    ("transport", "one of rpc, local", ["[rpc]"]),
    ("name", FOLDER, ["'../x'", "'..'", "'a/b'", "'-x'", "'a b'"]),
    ("model.auxiliary.kind", f"one of copy, linear, mlp, or {OWN} or null", ["'conv'", "1"]),
    ("optimizer.server.scheduler.arguments", ARGUMENTS, ["3", "[1]", "{1: 2}", "{a: {b: 1}}", "{a: [x]}"]),
    ("checkpoint.every", f"{COUNT} or null", ["0", "true"]),
    ("bench.variants", VARIANTS, ["3", "{a: {b: c}}", "{a: {b: {c: [d=1]}}}", "{a: [1]}"]),
    ("sweep.variants", VARIANTS, ["[a]", "{1: [a=1]}"]),
    ("sweep.seeds", "a list, each an integer", ["0", "[]", "[a]"]),
    ("trace", "true or false", ["0", "0.0", "null", "'false'", "[]"]),
]


@pytest.mark.parametrize(
    ("key", "expected", "value"),
    [(key, expected, v) for key, expected, values in WRONG_VALUES for v in values],
)
def test_a_wrong_value_is_named_with_what_it_may_be(empty: Path, key: str, expected: str, value: str) -> None:
    assert mistake(load, empty, [f"{key}={value}"]) == f"{key}: got {value}, expected {expected}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rounds", "010", f"{ROUNDS}, in decimal: YAML reads it as 8"),
        ("rounds", "1:30", f"{ROUNDS}, in decimal: YAML reads it as 90"),
        ("seed", "+0_7", f"{SEED}, in decimal: YAML reads it as 7"),
        ("data.alpha", "010", f"{POSITIVE}, in decimal: YAML reads it as 8"),
        ("data.alpha", "1:30.5", f"{POSITIVE}, in decimal: YAML reads it as 90.5"),
        ("optimizer.server.scheduler.arguments", "{a: 010}", ARGUMENTS),
        ("optimizer.server.scheduler.arguments", "{a: [1, 010]}", ARGUMENTS),
    ],
)
def test_a_number_that_yaml_reads_as_another_is_refused(
    tmp_path: Path, empty: Path, key: str, value: str, expected: str
) -> None:
    message = f"{key}: got {value}, expected {expected}"
    assert mistake(load, empty, [f"{key}={value}"]) == message
    *sections, last = key.split(".")
    opening = "".join(f"{section}: {{" for section in sections)
    assert mistake(load, write(tmp_path, f"{opening}{last}: {value}{'}' * len(sections)}")) == message


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("rounds: 3\nseed: 1\nrounds: 4", "line 3, column 1"),
        ("model: {cut: '1', cut: '2'}", "line 1, column 19"),
        ("bench:\n  variants:\n    a: [seed=1]\n    a: [seed=2]", "line 4, column 5"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, text: str, where: str) -> None:
    path = write(tmp_path, text)
    message = mistake(load, path)
    assert message.startswith(f"{path}: {where}: not valid YAML (the key ")
    assert message.endswith(" is there twice)")


def test_a_folder_name_is_no_longer_than_file_systems_take() -> None:
    assert from_tree({"name": "x" * 255}).name == "x" * 255
    message = mistake(from_tree, {"name": "x" * 256})
    assert message.startswith("name: got 'xxx")
    assert message.endswith(f"expected {FOLDER}, 255 at most")


def test_a_folder_name_does_not_end_in_a_line_break() -> None:
    assert mistake(from_tree, {"name": "a\n"}) == rf"name: got 'a\n', expected {FOLDER}"


@pytest.mark.parametrize("key", DEFAULTS)
def test_null_is_allowed_just_where_it_means_something(empty: Path, key: str) -> None:
    null = [f"{key}=null"]
    if key in NULLABLE:
        assert leaves(to_tree(load(empty, null)))[key] is None
    else:
        assert mistake(load, empty, null).startswith(f"{key}: got null, expected ")


@pytest.mark.parametrize("key", [key for key, value in DEFAULTS.items() if type(value) in (int, float)])
def test_no_number_takes_what_is_no_finite_number(empty: Path, key: str) -> None:
    for value in ("true", "false", "'x'", ".nan", "-.inf", "[1]", "{a: 1}"):
        assert mistake(load, empty, [f"{key}={value}"]).startswith(f"{key}: got {value}, expected ")


def test_a_long_value_is_cut_in_the_message() -> None:
    for value in ("x" * 5000, ["x"] * 5000, {"x": "y" * 5000}):
        message = mistake(from_tree, {"rounds": value})
        assert len(message) < 200
        assert message.endswith(f"..., expected {ROUNDS}")


# Keys


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("round", "did you mean rounds?"),
        ("clients.batchsize", "did you mean clients.batch_size?"),
        ("algorithm.alignment.epoch", "did you mean algorithm.alignment.epochs?"),
        ("server.zzz", "known keys: order"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_or_all_known(empty: Path, key: str, expected: str) -> None:
    assert mistake(load, empty, [f"{key}=3"]) == f"{key}: unknown key; {expected}"


def test_a_key_of_files_or_that_is_no_text_is_unknown_in_a_tree() -> None:
    assert mistake(from_tree, {"base": "a.yaml"}).startswith("base: unknown key; ")
    assert (
        mistake(from_tree, {"stop": {3: 3}})
        == "stop.3: unknown key; known keys: paper_gib, accuracy, diverged"
    )


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
        ("rounds=", f"rounds: got null, expected {ROUNDS}"),
        ("seed.x=1", "seed: got 5, expected a mapping"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    assert mistake(load, write(tmp_path, "seed: 5"), [override]) == expected


def test_a_strange_override_is_refused_in_one_line_too(empty: Path) -> None:
    strange = ["a\nb", "a\nb=1", r'rounds=["a\nb"]', "a..b=1", ".=1", "rounds=\0"]
    for override in (*strange, "rounds=!!int ''", "rounds=!!timestamp x"):
        assert mistake(load, empty, [override]), override


# Files


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "utf16").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "latin1").write_bytes(b"name: caf\xe9")
    for path, reason in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "cannot be read (Is a directory)"),
        (tmp_path / "utf16", "cannot be read (not UTF-8 text)"),
        (tmp_path / "latin1", "cannot be read (not UTF-8 text)"),
    ):
        expected = f"{path}: {reason}, expected a YAML configuration"
        assert mistake(load, path) == mistake(load, write(tmp_path, f"base: {path}")) == expected


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
    "text": ["rounds: \0", "rounds: =", "<<: 3", "'': 1", "clients: {null: 1}"],
    "line break in a key": [r'"a\nb": 1', r'"a\Lb": 1', r'clients: {"a\nb": 1}', r'rounds: {"a\nb": 1}'],
    "line break in a value": [r'rounds: "a\nb"', r'rounds: ["a\nb"]', r'clients: ["a\nb"]'],
    "line break where just one value may be": [r'model: {auxiliary: {a: "b\nc"}}', r'trace: "b\nc"'],
    "integer": [f"rounds: {'9' * 5000}", f"rounds: -0x{'f' * 5000}", f"data: {{alpha: 0x{'f' * 5000}}}"],
    "date": ["rounds: 2024-13-45", "rounds: !!timestamp x"],
    "tag": ["rounds: !!int ''", "rounds: !!float ''", "rounds: !!bool x", "rounds: !!set {a, b}"],
    "bytes": ["rounds: !!binary YQpi", "rounds: !!binary '?'"],
    "deep": ["rounds: " + "[" * 400 + "]" * 400, "rounds: " + "[" * 5000],
    "endless": ["rounds: &a [*a]", "&a {clients: *a}", "base: endless.yaml\ndata: &a {data: *a}"],
    "base": ['base: "a\\0b"', 'base: "a\\nb"', "base: " + "a" * 5000, "base: ''", "base: loop.yaml"],
}


@pytest.mark.parametrize("kind", STRANGE_FILES)
def test_any_strange_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    write(tmp_path, "data: &a {data: *a}", "endless.yaml")
    for text in STRANGE_FILES[kind]:
        assert mistake(load, write(tmp_path, text)), text
