"""Rounds count from 1 in all that is written and shown. Older folders count from 0, and are read as if not.

Within a training round t counts from 0: it keys the random numbers.
"""

from collections.abc import Sequence
from typing import Any

FIRST_ROUND = 1


def from_one(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines of a file, of rounds and events, counted from 1. A file with a round 0 is older.

    Older lines also say nothing of divergence, and give a score to what computes with no finite numbers.
    """
    older = any(line["round"] == 0 for line in lines)
    return [_from_one(line) for line in lines] if older else list(lines)


def _from_one(line: dict[str, Any]) -> dict[str, Any]:
    line = {**line, "round": line["round"] + 1}
    if line.get("train_loss", 0.0) is None:
        return {k: None if k.startswith("test_") else v for k, v in line.items()} | {"diverged": True}
    return line


def from_zero(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines whose rounds count from 1 as an older version has written them."""
    return [{**line, "round": line["round"] - 1} for line in lines]


def summary_from_one(summary: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A summary whose rounds count from 1. One that does not name its `first_round` is older.

    Args:
        lines: of the same run's rounds, counted from 1.
    """
    if "first_round" in summary:
        return summary
    accuracy = summary["test_accuracy"]
    accuracy = {**accuracy, "best_round": accuracy["best_round"] + FIRST_ROUND}
    diverged = next((line["round"] for line in lines if line.get("diverged")), None)
    if diverged is not None:
        scored = [line for line in lines if line.get("test_accuracy") is not None]
        best = max(scored, key=lambda line: float(line["test_accuracy"]), default={})
        accuracy = {
            "last": scored[-1]["test_accuracy"] if scored else None,
            "best": best.get("test_accuracy"),
            "best_round": best.get("round"),
        }
    return {**summary, "first_round": FIRST_ROUND, "diverged": diverged, "test_accuracy": accuracy}
