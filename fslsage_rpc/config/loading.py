"""From YAML files, base files and dotted overrides to a checked `Config`; every mistake is one line.

The types of the dataclasses in `config.py` are the rules. Nothing here imports torch, so a mistake is found
at once.
"""

import copy
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from fslsage_rpc.config.schema import Bounds, Config, OrOwn
from fslsage_rpc.errors import InputError

NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""what PyYAML raises: its own errors, and those of its constructors on tags such as `!!int ''`"""
WHOLE = ("arguments", "variants")
"""mappings with names of the user's own: a file's replaces its base file's, or nothing could be taken away"""
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_NAME = 255
"""bytes that file systems take for a name"""
MISREAD = re.compile(r"[-+]?0[0-7_]+|[^:]+:.*")
"""integers that YAML 1.1 takes for octal ones, as 010, and numbers that it takes for base 60, as 1:30"""
EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
"""numbers that YAML 1.1 takes for texts, as 1e-3: they are texts in quotes only"""
DEEPEST = 4
"""lists and mappings inside each other, in one of `arguments`"""
BECAME_ARGUMENTS: dict[str, dict[str, Any]] = {
    "data.": {"tokenizer": "gpt2", "tokens": 512, "vocabulary": "full"},
    "model.": {
        **{"width": None, "layers": None, "heads": None, "dropout": 0.0, "pretrained": None},
        "lora": {"rank": None, "alpha": 32.0, "dropout": 0.0, "frozen": True},
    },
}
"""keys of older versions that are `arguments` now, and their defaults, which the folders of old runs have"""
RENAMED = {
    "data.name=e2e": "fslsage_rpc.language.task:LanguageTask",
    "model.name=gpt2": "fslsage_rpc.language.model:gpt2",
}
"""values of older versions, and what they are called now"""


class WrittenInt(int):
    """An integer of a YAML file that knows how it was written: it may be meant as text."""

    written: str


class WrittenFloat(float):
    """A number of a YAML file that knows how it was written."""

    written: str


class _Loader(yaml.SafeLoader):
    """Loads as safely, takes no key twice, and keeps how numbers are written."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        None, None, f"the key {key.value} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_written_int(self, node: yaml.ScalarNode) -> WrittenInt:
        """The integer, with its text."""
        number = WrittenInt(self.construct_yaml_int(node))
        number.written = node.value
        return number

    def construct_written_float(self, node: yaml.ScalarNode) -> WrittenFloat:
        """The number, with its text."""
        number = WrittenFloat(self.construct_yaml_float(node))
        number.written = node.value
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_written_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_written_float)


class _Dumper(yaml.SafeDumper):
    """Writes numbers as they were written."""

    def represent_written(self, number: WrittenInt | WrittenFloat) -> yaml.ScalarNode:
        """The text of the number, without quotes."""
        kind = "int" if isinstance(number, int) else "float"
        return self.represent_scalar(f"tag:yaml.org,2002:{kind}", number.written)


_Dumper.add_representer(WrittenInt, _Dumper.represent_written)
_Dumper.add_representer(WrittenFloat, _Dumper.represent_written)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (and the files it is based on) with `key.sub=value` overrides on top.

    Raises:
        InputError: a file is missing or malformed, or a key or value is not allowed.
    """
    try:
        return from_tree(_read_with_base(Path(path), seen=()), overrides)
    except RecursionError:  # YAML anchors can make a mapping that holds itself
        raise InputError(f"{path}: got mappings without end, expected ones that end") from None


def from_tree(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A checked `Config` from nested dictionaries as YAML gives them, with `key.sub=value` overrides on top.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or is out of range.
    """
    tree = dict(tree)
    for override in overrides:
        _apply_override(tree, override)
    config: Config = _build(Config(), tree, prefix="")
    if not FOLDER_NAME.fullmatch(config.name) or len(config.name) > LONGEST_NAME:
        longest = f", {LONGEST_NAME} at most" if len(config.name) > LONGEST_NAME else ""
        raise InputError(
            f"name: got {show(config.name)}, expected a folder name of letters, digits, '.', '_' and '-'"
            f"{longest}"
        )
    if config.data.partition == "file" and config.data.partition_file is None:
        raise InputError("data.partition_file: got null, expected a JSON file, as data.partition is 'file'")
    return config


def to_tree(config: Config) -> dict[str, Any]:
    """The nested dictionaries of a configuration, as they are written to `config.yaml`."""
    return dataclasses.asdict(config)


def to_yaml(tree: dict[str, Any]) -> str:
    """The text from which `load` makes the same tree again."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


def changed_keys(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", own: bool = False
) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two configuration trees differ, each with its old and new value.

    Args:
        own: the names are the user's own: where they are others, it is the mapping that differs.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        inside = own or key in WHOLE
        if isinstance(a, dict) and isinstance(b, dict) and not (inside and a.keys() != b.keys()):
            changes |= changed_keys(a, b, f"{prefix}{key}.", inside)
        elif a != b:
            changes[prefix + key] = (a, b)
    return changes


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, expected a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason}), expected a YAML configuration") from None
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: {where}not valid YAML ({problem})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: got {show(tree)}, expected a mapping of configuration keys")
    return tree


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):  # NUL in the name, a loop of links
        raise InputError(f"{path}: cannot be read, expected a YAML configuration") from None
    if real in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise InputError(f"base: got a cycle ({chain}), expected base files that end")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"base: got {show(base)}, expected a file path relative to {path}")
    return _merge(_read_with_base(path.parent / base, (*seen, real)), tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if key not in WHOLE and isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise InputError(f"{override}: expected key=value, for example clients.count=8")
    if key == "base":
        raise InputError("base: got an override, expected it inside a configuration file")
    try:
        value = yaml.load(text, _Loader)
    except NOT_YAML:
        raise InputError(f"{key}: got {text!r}, expected a YAML value") from None
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        below = tree.get(section, {})
        if not isinstance(below, dict):
            raise InputError(f"{'.'.join(sections[: depth + 1])}: got {show(below)}, expected a mapping")
        tree[section] = dict(below)  # its own: YAML anchors put one mapping in two places
        tree = tree[section]
    tree[last] = value


def _build(defaults: Any, tree: Any, prefix: str) -> Any:
    """The section `defaults` with the keys of `tree` checked and put in."""
    if not isinstance(tree, dict):
        raise InputError(f"{prefix.rstrip('.')}: got {show(tree)}, expected a mapping of keys")
    hints = typing.get_type_hints(type(defaults), include_extras=True)
    given = {}
    for key, value in tree.items():
        if key in BECAME_ARGUMENTS.get(prefix, ()):
            once, now = BECAME_ARGUMENTS[prefix][key], f"{prefix}arguments.{key}"
            all_keys = {**once, **value} if isinstance(once, dict) and isinstance(value, dict) else value
            if all_keys != once:
                raise InputError(f"{prefix}{key}: got {show(value)}, expected none: it is {now} now")
            continue
        if isinstance(value, str) and (new := RENAMED.get(f"{prefix}{key}={value}")):
            raise InputError(f"{prefix}{key}: got {show(value)}, expected {new}, as it is called now")
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            known = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
            raise InputError(f"{prefix}{key}: unknown key; {known}")
        default = getattr(defaults, key)
        if dataclasses.is_dataclass(default):
            given[key] = _build(default, value, f"{prefix}{key}.")
        else:
            given[key] = _convert(hints[key], value, prefix + key)
    return dataclasses.replace(defaults, **given)


def as_annotated(annotation: Any, value: Any, key: str) -> Any:
    """An argument's value as the annotation of its parameter says, where that is a type of the schema's; else
    a copy of it.

    A number is no text here, as it may have been written in another way; a text or list may be empty.

    Raises:
        InputError: the value is not of that type.
    """
    if _is_known(_without_rule(annotation)[0]):
        return _convert(annotation, value, key, exact=True)
    return copy.deepcopy(value)


def _convert(hint: Any, value: Any, key: str, exact: bool = False) -> Any:
    """The value as the type says, or an InputError that names the key, the value and what it may be."""
    hint, rule, optional = _without_rule(hint)
    if value is None and optional:
        return None
    bounds = rule if isinstance(rule, Bounds) and hint in (int, float) else None
    kind, converted = _as_type(hint, value, exact)
    if isinstance(rule, OrOwn) and hint is str:
        kind, converted = str(rule), converted if converted and rule.allow(converted) else None
    empty = isinstance(converted, str | list) and not converted and not exact
    if converted is None or empty or (bounds and not bounds.allow(converted)):
        expected = kind + (f" {bounds}" if bounds else "") + (" or null" if optional else "")
        if hint in (int, float) and _is_misread(value):
            expected += f", in decimal: YAML reads it as {show(_plain(value))}"
        raise InputError(f"{key}: got {show(value)}, expected {expected}")
    return converted


def _without_rule(hint: Any) -> tuple[Any, Any, bool]:
    """A type without what is around it: the rule that annotates it, and whether it may also be null."""
    rule: Any = None
    optional = False
    while True:
        origin = typing.get_origin(hint)
        if origin is typing.Annotated:
            rule = next((each for each in hint.__metadata__ if isinstance(each, Bounds | OrOwn)), rule)
            hint = hint.__origin__
        elif origin in (typing.Union, types.UnionType):
            members = [member for member in typing.get_args(hint) if member is not type(None)]
            if len(members) > 1:
                return hint, rule, optional
            (hint,), optional = members, True
        else:
            return hint, rule, optional


def _is_known(hint: Any) -> bool:
    """Can `_as_type` tell whether a value is of this type? (A hint may be any object.)"""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return all(type(choice) in (str, int, bool) for choice in arguments)
    if origin is list:
        return len(arguments) == 1 and _is_known(arguments[0])
    if origin is dict:
        return len(arguments) == 2 and arguments[0] is str and arguments[1] is Any
    return any(hint is known for known in (bool, int, float, str))


def _as_type(hint: Any, value: Any, exact: bool = False) -> tuple[str, Any]:
    """What the type is called, and the value as that type (None where it is not one)."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        found = [choice for choice in choices if type(choice) is type(value) and choice == value]
        return "one of " + ", ".join(map(show if exact else str, choices)), found[0] if found else None
    if typing.get_origin(hint) is list:
        (member,) = typing.get_args(hint)
        items = [_as_type(member, item, exact)[1] for item in value] if isinstance(value, list) else [None]
        return f"a list, each {_as_type(member, None, exact)[0]}", None if None in items else items
    if typing.get_origin(hint) is dict:
        kind, convert = MAPPINGS[typing.get_args(hint)[1]]
        return f"a mapping of names to {kind}", _as_mapping(value, convert)
    if hint is bool:
        return "true or false", value if isinstance(value, bool) else None
    if hint is int:
        good = isinstance(value, int) and not isinstance(value, bool) and not _is_misread(value)
        return "an integer", _plain(value) if good else None
    if hint is float:
        return "a number", _as_float(value)
    text = value if exact else _as_text(value)
    return "a text in quotes" if exact else "a text", text if isinstance(text, str) and _can_be_written(
        text
    ) else None


def _is_misread(value: Any) -> bool:
    """Does YAML take a number for another one than its digits say?"""
    return bool(MISREAD.fullmatch(getattr(value, "written", "")))


def _plain(number: Any) -> Any:
    """The number alone, a bool where it is one."""
    if isinstance(number, bool):
        return number
    return int(number) if isinstance(number, int) else float(number)


def _as_text(value: Any) -> str | None:
    """A text, or the text of what YAML takes for a number."""
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.written
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(ValueError):  # an integer of thousands of digits
            return str(value)
    return value if isinstance(value, str) else None


def _can_be_written(text: str) -> bool:
    """No NUL, which ends a path, and no half of a surrogate pair, which UTF-8 cannot hold."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _as_mapping(value: Any, convert: Callable[[Any], Any]) -> dict[str, Any] | None:
    """A mapping with its values converted; a copy, so that nothing is shared with the YAML tree."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return None
    try:
        return {name: convert(item) for name, item in value.items()}
    except ValueError:
        return None


def _as_texts(value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return list(value)
    raise ValueError(value)


def _as_number_or_text(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(member, int | float) for member in value):
        return [_as_argument(member) for member in value]
    if isinstance(value, str):
        number = _as_float(value)
        return value if number is None else number
    if isinstance(value, int | float):
        return _as_argument(value)
    raise ValueError(value)


def _as_argument(value: Any, depth: int = DEEPEST) -> Any:
    """A copy, of numbers that do not know how they were written."""
    if isinstance(value, list | dict) and depth:
        if isinstance(value, list):
            return [_as_argument(member, depth - 1) for member in value]
        if all(isinstance(name, str) and _can_be_written(name) for name in value):
            return {name: _as_argument(member, depth - 1) for name, member in value.items()}
    elif value is None or (isinstance(value, str) and _can_be_written(value)):
        return value
    elif isinstance(value, int | float) and not _is_misread(value) and value == value:  # NaN differs from NaN
        str(value)  # ValueError: an integer of thousands of digits
        return _plain(value)
    raise ValueError(value)


MAPPINGS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    Any: ("numbers, texts, true, false, null, and lists and mappings of these", _as_argument),
    float | str | list[float]: ("numbers, texts or lists of numbers", _as_number_or_text),
    list[str]: ("lists of key=value texts", _as_texts),
}
"""by the type of a mapping's values: what they are called, and what converts them"""


def _as_float(value: Any) -> float | None:
    """The number that a number or text stands for."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or _is_misread(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) else number


def _dump(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True)
    return text


def show(value: Any) -> str:
    """The value as YAML writes it, short enough for one line."""
    if value is None:
        return "null"
    try:
        text = repr(value) if isinstance(value, str) else _dump(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists hundreds deep
        text = f"a value of type {type(value).__name__} too large to show"
    text = " ".join(text.replace("\n...", "").split())
    return text if len(text) <= 60 else text[:57] + "..."
