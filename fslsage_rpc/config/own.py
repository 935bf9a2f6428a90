"""What the user brings along: functions and classes of their own, named `package.module:function`."""

import copy
import difflib
import functools
import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any, TypeGuard

from fslsage_rpc.config.values import as_annotated
from fslsage_rpc.config.yaml_files import show
from fslsage_rpc.errors import InputError

BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def is_own(name: str | None) -> TypeGuard[str]:
    """Does a configuration's name, if there is one, stand for something of the user's own?"""
    return name is not None and ":" in name


def import_own(key: str, name: str, expected: str) -> Callable[..., Any]:
    """The function or class of that name, from the working directory or from what is installed.

    Args:
        key: of the configuration, and `expected`: what it is to be; for the message.

    Raises:
        InputError: it cannot be imported, or cannot be called.
    """
    path, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, also for the console script
    try:
        if path not in sys.modules:
            importlib.invalidate_caches()  # a notebook may have written the file just now
        found: object = getattr(importlib.import_module(path), function)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise InputError(f"{key}: got {name!r}, which cannot be imported ({first_line(error)})") from None
    if not callable(found):
        raise InputError(f"{key}: got {name!r}, expected {expected}")
    return found


def import_class(key: str, name: str, base: type, known_as: str) -> Any:
    """The class of that name, which is a subclass and lacks no method.

    Args:
        key: of the configuration.
        known_as: the dotted name of the base class; for the message.

    Raises:
        InputError: it cannot be imported, or is something else.
    """
    expected = f"a subclass of {known_as}"
    found = import_own(key, name, expected)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"{key}: got {name!r}, expected {expected}")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise InputError(f"{key}: got {name!r}, which lacks {', '.join(missing)}")
    return found


def checked_arguments(
    key: str,
    name: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    first: int = 0,
    given: Collection[str] = (),
) -> dict[str, Any]:
    """Hold a configuration's `arguments` to the parameters of the function or class that they are for.

    Args:
        key: the arguments' own, as `model.arguments`.
        name: the function's in the configuration.
        first: how many values the program gives it by position.
        given: the names of those that the program gives it by keyword.

    Returns:
        The arguments as the parameters' annotations say. Nothing of the configuration is shared with them.

    Raises:
        InputError: an argument is unknown, missing, of another type, or the program's to give.
    """
    try:
        reached = parameters(function)
    except Exception:  # not every callable has a signature
        return copy.deepcopy(dict(arguments))
    by_position = [[each.name for each in one if each.kind in BY_POSITION] for one in reached]
    taken = {*given, *(each for names in by_position for each in names[:first])}
    named = {each.name: each for one in reversed(reached) for each in one if each.kind in BY_NAME}
    takes_any = _has(Parameter.VAR_KEYWORD, reached[-1])
    takes_first = len(by_position[0]) >= first or _has(Parameter.VAR_POSITIONAL, reached[0])
    if not takes_first or not (takes_any or named.keys() >= set(given)):
        return copy.deepcopy(dict(arguments))  # the call fails, whatever they are
    result = {}
    for argument, value in arguments.items():
        place = f"{key}.{argument}"
        if argument in taken:
            raise InputError(f"{place}: got {show(value)}, expected none: {name} is given it anyway")
        if argument not in named and not takes_any:
            known = [each for each in named if each not in taken]
            near = difflib.get_close_matches(argument, known, n=1, cutoff=0.4)
            others = f"known arguments: {', '.join(known)}" if known else f"it takes none: set {key}={{}}"
            hint = f"did you mean {key}.{near[0]}?" if near else others
            raise InputError(f"{place}: unknown argument of {name}; {hint}")
        annotation = named[argument].annotation if argument in named else Parameter.empty
        result[argument] = as_annotated(annotation, value, place)
    # What a class passes on beside its `**more` is not known: only what it asks for itself is missing.
    required = [each.name for each in reached[0] if each.kind in BY_NAME and each.default is Parameter.empty]
    if missing := [each for each in required if each not in {*taken, *arguments}]:
        raise InputError(
            f"{key}: got {show(dict(arguments))}, expected a value for {' and '.join(missing)}, which {name} "
            "needs"
        )
    return result


def refuse_arguments(key: str, name: str, arguments: Mapping[str, Any]) -> None:
    """What is not the user's own takes no arguments.

    Raises:
        InputError: there are some.
    """
    if arguments:
        raise InputError(f"{key}: got {show(dict(arguments))}, expected {{}}: {name} takes none")


def parameters(function: Callable[..., Any]) -> list[list[Parameter]]:
    """The parameters of a function, or of the `__init__` of a class, with annotations that are no texts.

    While an `__init__` has `**more`, which it passes on, those of the next along the MRO come behind.

    Raises:
        ValueError, TypeError: it has no signature.
    """
    mro = function.__mro__[:-1] if isinstance(function, type) else ()
    inits = [vars(kind)["__init__"] for kind in mro if "__init__" in vars(kind)]
    called: list[Callable[..., Any]] = [types.MethodType(init, function) for init in inits]
    reached: list[list[Parameter]] = []
    for each in called or [function]:
        reached.append(_parameters(each))
        if not _has(Parameter.VAR_KEYWORD, reached[-1]):
            break
    return reached


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    inside = function
    while isinstance(inside, functools.partial):
        inside = inside.func
    names = getattr(inspect.unwrap(inside), "__globals__", {})
    return [
        each.replace(annotation=_evaluated(each.annotation, names))
        for each in inspect.signature(function).parameters.values()
    ]


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    """The object that an annotation stands for; `from __future__ import annotations` makes a text of it."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except Exception:  # a name that only type checkers import
        return Parameter.empty


def _has(kind: Any, parameters: list[Parameter]) -> bool:
    return any(each.kind is kind for each in parameters)


def source_hash(name: str) -> str | None:
    """The SHA-256 of the source of what was imported by that name: of its module's file, and of the file that
    it comes from where that is another.

    Returns:
        None where no file holds it, as for what a notebook defines.
    """
    path, _, function = name.partition(":")
    module = sys.modules.get(path)
    origin = sys.modules.get(getattr(getattr(module, function, None), "__module__", None) or path)
    files = dict.fromkeys(getattr(each, "__file__", None) or "" for each in (module, origin))
    try:
        return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    except OSError:
        return None


def first_line(error: BaseException) -> str:
    """What an error is and says, in one line."""
    return (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0][:200]
