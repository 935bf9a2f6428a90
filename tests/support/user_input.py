"""Shared by the tests of user input: one-line mistakes, and the dotted keys of a configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fslsage_rpc.config.loading import to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError


def one_line(error: InputError) -> str:
    """The message of an error, which must be one line."""
    message = str(error)
    assert message.strip()
    assert len(message.splitlines()) == 1, repr(message)
    return message


def mistake(function: Callable[..., object], *arguments: object) -> str:
    """The one line with which a function must refuse its arguments."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return one_line(caught.value)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    """A configuration file, and the folders it lies in."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The dotted keys of a tree and their values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, dict) and value
        flat |= leaves(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return flat


DEFAULTS = leaves(to_tree(Config()))
NULLABLE = {
    "data.partition_file",
    "data.train_limit",
    "data.test_limit",
    "model.cut",
    "model.auxiliary.kind",
    "model.auxiliary.until",
    "model.auxiliary.width",
    "model.auxiliary.width_multiplier",
    *(f"optimizer.{party}.scheduler.name" for party in ("client", "server", "auxiliary")),
    "algorithm.align_every",
    "algorithm.alignment.tolerance",
}
NULLABLE |= {
    "comm.interface",
    "comm.transports",
    "comm.channels",
    "checkpoint.every",
    "stop.paper_gib",
    "stop.accuracy",
}
NULLABLE |= {"bench.target_accuracy", "sweep.reference", "sweep.target_accuracy"}
