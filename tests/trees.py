"""Configurations in tests, as nested dictionaries."""

import copy
from typing import Any

Tree = dict[str, Any]


def merged(below: Tree, above: Tree) -> Tree:
    """A tree with another one's values on top."""
    result = copy.deepcopy(below)
    for key, value in above.items():
        inside = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if inside else copy.deepcopy(value)
    return result
