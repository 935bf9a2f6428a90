"""Rounds count from 1 in all that is written and shown. Older folders count from 0, and are read as if not.

Within a training round t counts from 0: it keys the random numbers.
"""

from collections.abc import Sequence
from typing import Any

FIRST_ROUND = 1


def from_one(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines of a file, of rounds and events, counted from 1. A file with a round 0 is older."""
    older = any(line["round"] == 0 for line in lines)
    return [{**line, "round": line["round"] + 1} for line in lines] if older else list(lines)


def from_zero(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines whose rounds count from 1 as an older version has written them."""
    return [{**line, "round": line["round"] - 1} for line in lines]


def summary_from_one(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary whose rounds count from 1. One that does not name its `first_round` is older."""
    if "first_round" in summary:
        return summary
    accuracy = summary["test_accuracy"]
    best = {"best_round": accuracy["best_round"] + FIRST_ROUND}
    return {**summary, "first_round": FIRST_ROUND, "test_accuracy": {**accuracy, **best}}
