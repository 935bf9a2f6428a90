"""YAML as configurations are written in it: no key twice, and numbers that know how they were written."""

import re
from pathlib import Path
from typing import Any

import yaml

from fslsage_rpc.errors import InputError

NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""what PyYAML raises: its own errors, and those of its constructors on tags such as `!!int ''`"""
EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
"""numbers that YAML 1.1 takes for texts, as 1e-3: they are texts in quotes only"""


class WrittenInt(int):
    """An integer of a YAML file that knows how it was written: it may be meant as text."""

    written: str


class WrittenFloat(float):
    """A number of a YAML file that knows how it was written."""

    written: str


class Loader(yaml.SafeLoader):
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


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_written_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_written_float)


class Dumper(yaml.SafeDumper):
    """Writes numbers as they were written."""

    def represent_written(self, number: WrittenInt | WrittenFloat) -> yaml.ScalarNode:
        """The text of the number, without quotes."""
        kind = "int" if isinstance(number, int) else "float"
        return self.represent_scalar(f"tag:yaml.org,2002:{kind}", number.written)


Dumper.add_representer(WrittenInt, Dumper.represent_written)
Dumper.add_representer(WrittenFloat, Dumper.represent_written)
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def to_yaml(tree: dict[str, Any]) -> str:
    """The text from which `load` makes the same tree again."""
    text: str = yaml.dump(tree, Dumper=Dumper, sort_keys=False)
    return text


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
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


def _dump(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=Dumper, default_flow_style=True)
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
