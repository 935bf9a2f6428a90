"""Ranks of a job, and a run and the one that it goes on from, train on the same samples by the same code."""

import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fslsage_rpc.config.loading import changed_keys, to_tree
from fslsage_rpc.config.own import is_own, source_hash
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError, RankRefused
from fslsage_rpc.job.world import World
from fslsage_rpc.runs.environment import versions
from fslsage_rpc.runs.run_folder import ANOTHER, RunFolder
from fslsage_rpc.tasks.hashes import SHOWN_DIGITS, different_samples
from fslsage_rpc.training.experiment import Experiment

HOSTS_OWN = {"data.root", "data.download", "data.partition_file", "comm.interface", "device", "ranks"}
"""keys that may differ between hosts: what files hold is compared, not where they lie"""

Hashes = dict[str, str | None]


@dataclass(frozen=True)
class Basis:
    """The data, the configuration and the code of one rank.

    `sources` has the hash of each module that the configuration names, by its key; `partition` is the hash of
    what `partition.json` holds.
    """

    rank: int
    host: str
    config: dict[str, Any]
    versions: dict[str, str | None]
    sources: Hashes
    training: dict[str, Any]
    partition: str

    @classmethod
    def of(cls, experiment: Experiment, world: World) -> "Basis":
        """Those of this rank."""
        return cls(
            rank=0 if world.hosts_server or world.home is None else world.home + 1,
            host=platform.node(),
            config=to_tree(experiment.config),
            versions=versions(),
            sources=own_sources(experiment.config),
            training=experiment.training_hashes,
            partition=hashlib.sha256(json.dumps(experiment.partition_summary).encode()).hexdigest(),
        )

    def differences(self, reference: "Basis") -> Iterator[str]:
        """Lines that say what this rank has and what a reference has; causes come before effects."""
        for key, (expected, got) in changed_keys(reference.config, self.config).items():
            if key not in HOSTS_OWN:
                yield f"{key}: got {got!r}, expected {expected!r}"
        for package, (expected, got) in changed_keys(reference.versions, self.versions).items():
            yield f"{package}: got version {got}, expected {expected}"
        for key, (expected, got) in changed_keys(reference.sources, self.sources).items():
            hashes = [str(each)[:SHOWN_DIGITS] for each in (got, expected)]
            yield f"{key}: got a module whose source has hash {hashes[0]}, expected {hashes[1]}"
        if found := different_samples("training", self.training, reference.training):
            yield found
        if self.partition != reference.partition:
            yield "data.partition: got other samples for the clients, expected the same"


def compare_ranks(experiment: Experiment, world: World) -> None:
    """Collective: see that all ranks train on the same data, by the same code and configuration.

    Raises:
        InputError: on every rank, where one differs from rank 0.
        RankRefused: on a rank that has joined a run under way and differs; the others go on.
    """
    wrong: dict[int, str] = world.transport.broadcast(wrong_ranks(experiment, world))
    if wrong and world.generation == 0:
        raise InputError(wrong[min(wrong)])
    if world.rank in wrong:
        raise RankRefused(wrong[world.rank])


def wrong_ranks(experiment: Experiment, world: World) -> dict[int, str]:
    """Collective: the first difference of each rank that has one, by its place in the world; on rank 0."""
    ranks: list[Basis] = world.transport.gather(Basis.of(experiment, world)) or []
    first = {place: next(each.differences(ranks[0]), None) for place, each in enumerate(ranks)}
    return {
        place: f"rank {ranks[place].rank} (host {ranks[place].host}): {said} as on rank 0"
        for place, said in first.items()
        if said
    }


def own_sources(config: Config) -> Hashes:
    """The hashes of the modules that a configuration names, by key; None for one that no file holds."""
    names = {
        "data.name": config.data.name,
        "model.name": config.model.name,
        "model.auxiliary.kind": config.model.auxiliary.kind,
        "algorithm.name": config.algorithm.name,
        "aggregation.name": config.aggregation.name,
        **{f"comm.codec.{kind}": keys.name for kind, keys in vars(config.comm.codec).items()},
    }
    return {key: source_hash(name) for key, name in names.items() if is_own(name)}


def described(experiment: Experiment) -> dict[str, Any]:
    """The data and the code as `environment.json` has them; on the server's rank."""
    return {
        "versions": versions(),
        "sources": own_sources(experiment.config),
        "samples": {"training": experiment.training_hashes, "test": experiment.test_hashes},
    }


def compare_runs(experiment: Experiment, folder: RunFolder) -> None:
    """Hold the data and the code to those of the run that is gone on with, where its folder tells.

    Other versions and other sources are shown as warnings.

    Raises:
        InputError: the samples are others.
    """
    manifest = folder.manifest
    if manifest is None:
        return
    now = described(experiment)
    then = _recorded(folder.path / "environment.json", now)
    for which, hashes in now["samples"].items():
        before = then["samples"].get(which)
        if not _has_form(before, hashes):
            continue
        if found := different_samples(which, hashes, before):
            run = f"the run in {folder.path}, which goes on from round {manifest.rounds}"
            raise InputError(f"{found} as in {run}; {ANOTHER}")
    for package, (before, here) in changed_keys(then["versions"], now["versions"]).items():
        folder.warn(f"{package} is version {here}, where the run in {folder.path} has had {before}")
    for key in changed_keys(then["sources"], now["sources"]):
        folder.warn(f"{key}: the source of the module is not what the run in {folder.path} has had")


def _recorded(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The same of the run in a folder; now's own where it has left nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return now
    found = found if isinstance(found, dict) else {}
    return {name: found[name] if isinstance(found.get(name), dict) else now[name] for name in now}


def _has_form(value: Any, form: dict[str, Any]) -> bool:
    """Is this a mapping of the same keys to values of the same types?"""
    return isinstance(value, dict) and {k: type(v) for k, v in value.items()} == {
        k: type(v) for k, v in form.items()
    }
