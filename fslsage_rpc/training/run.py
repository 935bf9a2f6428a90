"""One run from its configuration to its folder: check, prepare, train, write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fslsage_rpc.comm.world import World, is_first_rank, job_ranks, open_world
from fslsage_rpc.config import AlgorithmKeys, Config
from fslsage_rpc.report.screen import Screen
from fslsage_rpc.training.assembly import hosted_clients
from fslsage_rpc.training.checkpoint_files import Manifest
from fslsage_rpc.training.checkpoints import Checkpoints, read_state
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.records import RankReport
from fslsage_rpc.training.run_folder import (
    RunFolder,
    checkpoints_folder,
    emulated_links,
    rank_environment,
    versions,
)
from fslsage_rpc.training.trainer import Trainer


def run(config: Config, screen: Screen) -> Path:
    """Train as configured, as one rank of a job or (`transport: local`) alone.

    Returns:
        The run folder.

    Raises:
        InputError: the configuration cannot run here; found before ranks meet.
    """
    check(config, job_ranks(config))
    links = emulated_links()
    folder = RunFolder(config, screen.warn) if is_first_rank(config) else None
    experiment = Experiment.prepare(config)
    if folder:
        folder.check_partition(experiment.partition_summary)
    world = open_world(config)
    try:
        if folder is None:
            _train(experiment, world, None, links, screen)
        else:
            with screen:
                _train(experiment, world, folder, links, screen)
        world.close()
    except BaseException as error:
        world.fail(error)
    return Path(config.output) / config.name


def _train(
    experiment: Experiment,
    world: World,
    folder: RunFolder | None,
    links: Mapping[str, Any],
    screen: Screen,
) -> None:
    """Train; on the server's rank, which has the folder and the screen, show and write what comes of it."""
    finished = world.broadcast(folder and folder.finished_summary)
    if finished:
        if folder:
            screen.show_finished(finished, folder.path)
        return
    ranks = world.gather(rank_environment(world.device))
    config = experiment.config
    manifest: Manifest | None = world.broadcast(folder and folder.manifest)
    saved = None
    if manifest:
        saved = read_state(manifest, hosted_clients(experiment, world), world.hosts_server)
    trainer = Trainer(experiment, world, saved, folder.lines if folder else ())
    del saved  # the parties have copies
    checkpoints = Checkpoints(world, checkpoints_folder(config), config.checkpoint, folder)
    if folder is None:
        with checkpoints:
            trainer.train(lambda line, reports: None, checkpoints)
        return
    folder.start(
        {"versions": versions(), **world.describe(), "ranks": ranks, **links},
        experiment.partition_summary,
    )
    if manifest:
        screen.show_resumed(folder.lines, manifest.folder)
    for key in unused_keys(config.algorithm, experiment.algorithm.uses):
        screen.warn(f"algorithm.{key} is not used by {experiment.algorithm.name}")

    def on_round(line: dict[str, Any], reports: Sequence[RankReport]) -> None:
        folder.add_round(line)
        screen.show_round(line)

    with checkpoints:
        trainer.train(on_round, checkpoints)
    if trainer.trace:
        folder.add_trace(trainer.trace.text())
    summary = trainer.recorder.summary(experiment.algorithm.name, experiment.algorithm.interval)
    folder.finish(summary, trainer.final_model())
    screen.show_summary(summary, folder.path)


def unused_keys(keys: AlgorithmKeys, used: frozenset[str]) -> list[str]:
    """The keys that were changed from their defaults and that this algorithm does not read."""
    defaults = AlgorithmKeys()
    return [
        key
        for key, value in vars(keys).items()
        if key != "name" and key not in used and value != getattr(defaults, key)
    ]
