"""Run folders and bench results as the program writes them, with figures that are easy to add up."""

import json
from pathlib import Path
from typing import Any

import yaml

from fslsage_rpc.config.loading import from_tree, to_tree
from fslsage_rpc.config.variants import sweep_runs
from fslsage_rpc.config.yaml_files import to_yaml

MIB = 2**20
PHASES = {
    "data": 0.25,
    "forward_backward": 1.0,
    "estimate": 0.5,
    "upload_wait": 0.125,
    "gradient_wait": 0.25,
    "alignment_wait": 2.0,
    "drain_wait": 0.5,
    "averaging": 0.75,
    "other": 0.125,
}
"""seconds of a round of 5.5 s"""
ENVIRONMENT = {
    "versions": {"fslsage_rpc": "0.1.0", "torch": "2.11.0", "cuda": None},
    "transport": "rpc",
    "averaging": "gloo",
    "ranks": [{"host": "snail", "device": "cpu", "device_name": "x86_64", "cores": 4, "threads": 1}] * 3,
}


def line(t: int, accuracy: float | None, aligned: bool = False, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: 5.5 s, 3 MiB on the wire and 2 MiB of the paper ledger a round t, from 0."""
    return {
        "round": t + 1,
        "train_loss": 0.25,
        "train_loss_of": "uploads",
        "test_accuracy": accuracy,
        "round_seconds": 5.5,
        "elapsed_seconds": 5.5 * (t + 1),
        "phases": {"client": PHASES, "server": {}},
        "wire_bytes": {"smashed_up": 2 * MIB, "evaluation": MIB},
        "paper_bytes_total": 2 * MIB * (t + 1),
        "alignment": {"nmse_before": 1.0} if aligned else None,
        "drift": {"cosine": 0.1 * t, "nmse": 1.0},
        **changes,
    }


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A summary of these lines, without the figures that older versions have not."""
    scores = [each["test_accuracy"] for each in lines if each["test_accuracy"] is not None]
    return {
        "algorithm": "fsl_sage",
        "first_round": 1,
        "rounds": len(lines),
        "test_accuracy": {
            "last": scores[-1] if scores else None,
            "best": max(scores, default=None),
            "best_round": 1,
        },
        "training_seconds": 5.5 * len(lines),
        "median_round_seconds": 5.25,
        "phases": {"client": PHASES, "server": {}},
        "wire_bytes": {"smashed_up": 2 * MIB * len(lines), "evaluation": MIB * len(lines)},
        "paper_bytes_total": 2 * MIB * len(lines),
    }


def write_run(
    folder: Path, accuracies: list[float | None], *, finished: bool = True, ranks: int = 3, **keys: Any
) -> Path:
    """A run folder with one round for each accuracy; `keys` are those of its configuration."""
    folder.mkdir(parents=True)
    config = to_tree(from_tree({"name": folder.name, "output": str(folder.parent), **keys}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {**ENVIRONMENT, "ranks": ENVIRONMENT["ranks"][:1] * ranks}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [line(round, accuracy, aligned=round % 2 == 0) for round, accuracy in enumerate(accuracies)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary(lines)))
    return folder


VARIANTS: dict[str, Any] = {
    "partition": {"iid": ["data.partition=iid"], "skewed": ["data.alpha=0.3"]},
    "algorithm": {"fsl_sage": [], "splitfed_v1": ["algorithm.name=splitfed_v1"]},
    "partition x algorithm": [],
}


def write_sweep(folder: Path, runs: dict[str, list[float | None]], **keys: Any) -> Path:
    """A sweep of `VARIANTS`, of 4 rounds if not otherwise asked for: by name of a run its accuracies.

    A run with fewer rounds than these is unfinished.
    """
    folder.mkdir(parents=True)
    keys = {"rounds": 4, **keys}
    keys["sweep"] = {"variants": VARIANTS, "seeds": [0, 1, 2], **keys.get("sweep", {})}
    config = from_tree({"name": folder.name, "output": str(folder.parent), **keys})
    (folder / "sweep.yaml").write_text(to_yaml(to_tree(config)))
    planned = {run.config.name: run.config for run in sweep_runs(config)}
    for name, accuracies in runs.items():
        tree = {key: value for key, value in to_tree(planned[name]).items() if key not in ("name", "output")}
        write_run(folder / name, accuracies, finished=len(accuracies) == config.rounds, **tree)
    return folder


def write_bench(folder: Path, **changes: Any) -> Path:
    """A bench of two variants, of which the second has only what has to be there."""
    folder.mkdir(parents=True)
    variant = {
        "algorithm": "fsl_sage",
        "round_seconds": {"median": 5.5, "q1": 5.0, "q3": 6.0, "n": 4},
        "ratio_to_reference": {"median": 0.5, "q1": 0.4375, "q3": 0.625},
        "phases": {"client": PHASES, "server": {"step": 1.0}},
        "wire_bytes": {"smashed_up": 3.0 * MIB, "gradient_down": None},
        "paper_bytes": 4.0 * MIB,
        "bound_seconds": 3.0,
        "efficiency": 0.546,
        "target": {
            "accuracy": 0.8,
            "seconds": 12.5,
            "rounds": 9,
            "wire_bytes": 5 * MIB,
            "paper_bytes": 6 * MIB,
        },
        **changes,
    }
    bare = {
        "algorithm": "splitfed_v1",
        "round_seconds": {"median": None},
        "phases": {"client": {"data": None}},
    }
    tree = {"reference": "v1", "environment": ENVIRONMENT, "variants": {"wide": variant, "v1": bare}}
    (folder / "bench.json").write_text(json.dumps(tree))
    return folder
