"""Values of a configuration, held to the types of its keys and of users' parameters."""

import copy
import math
import re
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from fslsage_rpc.config.schema import Bounds, OrOwn
from fslsage_rpc.config.yaml_files import WrittenFloat, WrittenInt, show
from fslsage_rpc.errors import InputError

MISREAD = re.compile(r"[-+]?0[0-7_]+|[^:]+:.*")
"""integers that YAML 1.1 takes for octal ones, as 010, and numbers that it takes for base 60, as 1:30"""
DEEPEST = 4
"""lists and mappings inside each other, in one of `arguments`"""


def as_annotated(annotation: Any, value: Any, key: str) -> Any:
    """An argument's value as the annotation of its parameter says, where that is a type of the schema's; else
    a copy of it.

    A number is no text here, as it may have been written in another way; a text or list may be empty.

    Raises:
        InputError: the value is not of that type.
    """
    if _is_known(_without_rule(annotation)[0]):
        return convert(annotation, value, key, exact=True)
    return copy.deepcopy(value)


def convert(hint: Any, value: Any, key: str, exact: bool = False) -> Any:
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
    """The name of the type, and the value as that type (None where it is not one)."""
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


def _as_variant(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _as_texts(member) for name, member in value.items()}
    return _as_texts(value)


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
    list[str] | dict[str, list[str]]: (
        "lists of key=value texts, or to mappings of names to such lists",
        _as_variant,
    ),
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
