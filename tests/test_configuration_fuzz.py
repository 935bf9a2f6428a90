"""Whatever a file, a tree or an override holds, it is accepted or refused in one line."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fslsage_rpc.config.loading import from_tree, load, to_tree
from fslsage_rpc.errors import InputError
from support.user_input import DEFAULTS, NULLABLE, leaves, one_line, write

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
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
TREES = st.dictionaries(KEYS, VALUES, max_size=5)
KNOWN_KEYS = st.sampled_from(sorted(DEFAULTS))
SHALLOW_VALUES = (
    SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
YAML_LIKE_TEXT = st.text(alphabet="ab01.:-+[]{}&*!|>'\"#%@?,=<~_ \n\t\\\r\u2028", max_size=60)
FILES = (
    st.binary(max_size=60)
    | YAML_LIKE_TEXT.map(str.encode)
    | TREES.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True).encode())
)


@given(FILES)
def test_any_file_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    try:
        config = load(path)
    except InputError as error:
        one_line(error)
    else:
        assert from_tree(to_tree(config)) == config


@given(st.dictionaries(KNOWN_KEYS, SHALLOW_VALUES, min_size=1, max_size=6))
def test_a_refused_value_of_a_known_key_is_named_and_an_accepted_one_has_its_keys_type(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    path = write(tmp_path_factory.getbasetemp(), "", "empty.yaml")
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in values.items()]
    try:
        config = load(path, overrides)
    except InputError as error:
        named = one_line(error).partition(":")[0]
        assert named in {"data.partition_file", *values}
    else:
        got = leaves(to_tree(config))  # which has keys below `arguments`, where there are any
        assert all(type(got.get(key, {})) is type(DEFAULTS[key]) or key in NULLABLE for key in values)


@given(st.text(max_size=20) | st.builds("{}={}".format, KNOWN_KEYS, YAML_LIKE_TEXT))
def test_any_override_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, override: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), "seed: 1", "override.yaml")
    try:
        config = load(path, [override])
    except InputError as error:
        one_line(error)
    else:
        assert from_tree(to_tree(config)) == config
