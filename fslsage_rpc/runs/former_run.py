"""The run that a folder holds already, before anything is written there."""

import json
from pathlib import Path
from typing import Any

from fslsage_rpc.config.loading import changed_keys, load, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError
from fslsage_rpc.runs.metrics_file import decoded, rounds_of
from fslsage_rpc.runs.round_numbers import summary_from_one
from fslsage_rpc.runs.screen import can_be_shown

FREE_KEYS = {"rounds", "ranks", "output", "resume", "stop", "comm", "checkpoint", "evaluation", "trace"}
FREE_KEYS |= {"bench", "sweep"}  # which other commands read
"""what may differ between a run and the run whose folder it finds, all below included but for codecs"""
MEASURING_KEYS = {"ranks", "comm", "evaluation"}
"""of them, those by which other seconds, bytes or accuracies are measured: the same in all runs of a mean"""
ANOTHER = "choose another name=, or resume=never to replace that run"


class FormerRun:
    """The run in the folder of a configuration, if any.

    Args:
        config: of the run that is to come.
    """

    def __init__(self, config: Config):
        self.path = Path(config.output) / config.name
        self._config = to_tree(config)

    def finished_summary(self, as_measured: bool = False) -> dict[str, Any] | None:
        """The summary, where the run is complete and nothing more is asked of it.

        Args:
            as_measured: see `fixed_changes`.

        Raises:
            InputError: the configurations differ in more than may be changed.
        """
        old = self.config()
        for key, (was, is_now) in fixed_changes(old or self._config, self._config, as_measured).items():
            raise InputError(
                f"{key}: got {is_now!r}, expected {was!r} as in the run in {self.path}; {ANOTHER}"
            )
        return self.summary() if old and not asks_for_more(old, self._config) else None

    def config(self) -> dict[str, Any] | None:
        """Its configuration; None where there is no run, or it is to be replaced."""
        path = self.path / "config.yaml"
        return to_tree(load(path)) if self._config["resume"] == "auto" and path.exists() else None

    def summary(self) -> dict[str, Any] | None:
        """The summary of a complete run; None where there is none, or not what the program writes."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
            summary = summary_from_one(summary, self.rounds())
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return summary if can_be_shown(summary) else None

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds that are there; none where they cannot be read."""
        try:
            return rounds_of(decoded((self.path / "metrics.jsonl").read_bytes()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return []


def asks_for_more(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys by which a complete run is given more to do, each with its old and new value."""
    changes = changed_keys(old, new)
    return {key: values for key, values in changes.items() if key.split(".")[0] in ("rounds", "stop")}


def fixed_changes(
    old: dict[str, Any], new: dict[str, Any], as_measured: bool = False
) -> dict[str, tuple[Any, Any]]:
    """The keys that make another run of it, each with its old and new value.

    Args:
        as_measured: a mean is taken over both, so that `MEASURING_KEYS` count, too.
    """
    free = FREE_KEYS - (MEASURING_KEYS if as_measured else set())
    return {
        key: values
        for key, values in changed_keys(old, new).items()
        if (key.split(".")[0] not in free or key.startswith("comm.codec.")) and key != "comm.timeout_seconds"
    }
