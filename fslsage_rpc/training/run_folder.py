"""The run folder `output/name`: what a run leaves behind, written by the server's rank alone."""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import yaml

from fslsage_rpc.config import Config
from fslsage_rpc.configuration import changed_keys, load, to_tree
from fslsage_rpc.errors import InputError
from fslsage_rpc.report.tensorboard import TensorBoard
from fslsage_rpc.version import __version__

FREE_KEYS = {
    "rounds",
    "ranks",
    "output",
    "resume",
    "stop",
    "comm",
    "checkpoint",
    "evaluation",
    "trace",
    "bench",
}
"""what may differ between a run and the run whose folder it finds"""
WRITTEN = (
    "config.yaml",
    "environment.json",
    "partition.json",
    "metrics.jsonl",
    "summary.json",
    "model.pt",
    "trace.json",
    "links.json",
)
EVENTS = "tensorboard"


class RunFolder:
    """The folder of one run. Files appear whole or not at all; `metrics.jsonl` grows by whole lines.

    Raises:
        InputError: the folder cannot be made, or holds a benchmark or a run of another configuration.
    """

    def __init__(self, config: Config):
        self.path = Path(config.output) / config.name
        self._config = to_tree(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"output: got {config.output!r}, where {self.path} cannot be made ({error.strerror})"
            ) from None
        if (self.path / "bench.json").exists():
            raise InputError(
                f"name: got {config.name!r}, where {self.path} holds a benchmark; choose another"
            )
        self.replaces_unfinished = False
        self.finished_summary = self._read_finished() if config.resume == "auto" else None

    def start(self, environment: Mapping[str, Any], partition: list[dict[str, Any]]) -> None:
        """Remove what an earlier run left and write what is known before the first round."""
        for name in WRITTEN:
            (self.path / name).unlink(missing_ok=True)
        self._write("config.yaml", yaml.safe_dump(self._config, sort_keys=False))
        self._write("environment.json", _json(environment))
        self._write("partition.json", _json(partition))
        shutil.rmtree(self.path / EVENTS, ignore_errors=True)
        self._tensorboard = TensorBoard(self.path / EVENTS)

    def add_round(self, line: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._tensorboard.add_round(line)

    def add_trace(self, text: str) -> None:
        """Write `trace.json`."""
        self._write("trace.json", text)

    def finish(self, summary: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> None:
        """Write the final model and, last, the summary that marks the run as complete."""
        self._tensorboard.close()
        torch.save(dict(model), self.path / "model.pt.tmp")
        os.replace(self.path / "model.pt.tmp", self.path / "model.pt")
        self._write("summary.json", _json(summary))

    def _read_finished(self) -> dict[str, Any] | None:
        """The summary of a complete run of this configuration; None where this run has yet to be made."""
        if not (self.path / "config.yaml").exists():
            return None
        old = to_tree(load(self.path / "config.yaml"))
        for key, (was, is_now) in changed_keys(old, self._config).items():
            if key.split(".")[0] not in FREE_KEYS:
                raise InputError(
                    f"{key}: got {is_now!r}, expected {was!r} as in the run in {self.path}; "
                    "choose another name=, or resume=never to replace that run"
                )
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.replaces_unfinished = True
            return None
        for key in ("rounds", "stop"):
            if old.get(key) != self._config[key]:
                raise InputError(
                    f"{key}: got {self._config[key]!r}, expected {old.get(key)!r} as in the complete run in "
                    f"{self.path} (going on needs checkpoints, which are not in this version); "
                    "choose another name=, or resume=never to replace that run"
                )
        return summary

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / name, text)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def rank_environment(device: torch.device) -> dict[str, Any]:
    """What `environment.json` says of one rank."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "host": platform.node(),
        "device": str(device),
        "device_name": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """The versions that a result depends on."""
    return {
        "fslsage_rpc": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
    }


def emulated_links() -> dict[str, Any]:
    """The key `links` with what `launch/wan.py` asked of the links and measured; nothing without it.

    Raises:
        InputError: FSLSAGE_LINKS names no JSON file.
    """
    path = os.environ.get("FSLSAGE_LINKS")
    if path is None:
        return {}
    try:
        return {"links": json.loads(Path(path).read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        raise InputError(f"FSLSAGE_LINKS: got {path!r}, expected a JSON file") from None


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
