"""From YAML files, base files and dotted overrides to a checked `Config`; every mistake is one line.

The types of the dataclasses in `schema.py` are the rules. Nothing here imports torch, so a mistake is found
at once.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.values import convert
from fslsage_rpc.config.yaml_files import NOT_YAML, Loader, read_yaml, show
from fslsage_rpc.errors import InputError

WHOLE = ("arguments", "variants")
"""mappings with names of the user's own: a file's replaces its base file's, or nothing could be taken away"""
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_NAME = 255
"""bytes that file systems take for a name"""
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
SUCCEEDED: dict[str, tuple[str, dict[Any, Any]]] = {
    "algorithm.warm_start": ("start", {False: "paper", True: "warm_start"})
}
"""keys of older versions, which the folders of old runs have; what took their place, its values by theirs"""


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
    tree = _written_out(Config(), tree)
    for override in overrides:
        _apply_override(tree, override)
        tree = _written_out(Config(), tree)
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


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        real = path.resolve()
    except (OSError, ValueError, RuntimeError):  # NUL in the name, a loop of links
        raise InputError(f"{path}: cannot be read, expected a YAML configuration") from None
    if real in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise InputError(f"base: got a cycle ({chain}), expected base files that end")
    tree = _written_out(Config(), read_yaml(path))
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise InputError(f"base: got {show(base)}, expected a file path relative to {path}")
    return _merge(_read_with_base(path.parent / base, (*seen, real)), tree)


def _is_named(section: Any) -> bool:
    """Is it a section of a name and its arguments, for which the name alone may stand?"""
    return dataclasses.is_dataclass(section) and vars(section).keys() == {"name", "arguments"}


def _written_out(defaults: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """A tree in which a name that stands for a section is that section, with no arguments."""
    written = dict(tree)
    for key, value in tree.items():
        section = getattr(defaults, str(key), None)
        if isinstance(value, str) and _is_named(section):
            written[key] = {"name": value, "arguments": {}}
        elif isinstance(value, dict) and dataclasses.is_dataclass(section):
            written[key] = _written_out(section, value)
    return written


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
        value = yaml.load(text, Loader)
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
        expected = (
            "a name, or a mapping of name and arguments" if _is_named(defaults) else "a mapping of keys"
        )
        raise InputError(f"{prefix.rstrip('.')}: got {show(tree)}, expected {expected}")
    hints = typing.get_type_hints(type(defaults), include_extras=True)
    given = {}
    for key, value in tree.items():
        if key in BECAME_ARGUMENTS.get(prefix, ()):
            once, now = BECAME_ARGUMENTS[prefix][key], f"{prefix}arguments.{key}"
            all_keys = {**once, **value} if isinstance(once, dict) and isinstance(value, dict) else value
            if all_keys != once:
                raise InputError(f"{prefix}{key}: got {show(value)}, expected none: it is {now} now")
            continue
        if f"{prefix}{key}" in SUCCEEDED:
            now, values = SUCCEEDED[f"{prefix}{key}"]
            if now in tree or value not in list(values):
                raise InputError(f"{prefix}{key}: got {show(value)}, expected none: it is {prefix}{now} now")
            key, value = now, values[value]
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
            given[key] = convert(hints[key], value, prefix + key)
    return dataclasses.replace(defaults, **given)
