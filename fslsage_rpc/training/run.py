"""One run from its configuration to its folder: check, prepare, train, write."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from fslsage_rpc.config.schema import AlgorithmKeys, Config
from fslsage_rpc.device.memory import forget_host_peak
from fslsage_rpc.device.placement import forget_peak
from fslsage_rpc.errors import Diverged, RunOver
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.job.stopping import Stopped, StopRequest
from fslsage_rpc.job.world import World, is_first_rank, job_ranks
from fslsage_rpc.runs.checkpoint_files import Manifest
from fslsage_rpc.runs.checkpoints import Checkpoints, snapshot
from fslsage_rpc.runs.environment import emulated_links, rank_environment
from fslsage_rpc.runs.records import RankReport
from fslsage_rpc.runs.run_folder import RunFolder, checkpoints_folder
from fslsage_rpc.runs.screen import Screen
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.going_on import from_checkpoint, from_memory
from fslsage_rpc.training.sameness import compare_ranks, compare_runs, described
from fslsage_rpc.training.trainer import Trainer


def run(config: Config, screen: Screen, stop: StopRequest | None = None) -> Path:
    """Train as configured, as one rank of a job or (`transport: local`) alone.

    Args:
        stop: looks out for signals, once the ranks have met.

    Returns:
        The run folder.

    Raises:
        InputError: the configuration cannot run here; found before ranks meet.
        Stopped: on request, before its end.
        Diverged: by which `stop.diverged` has ended the run, now or before.
    """
    forget_host_peak()  # before the data are loaded, which may take more than the training
    warn = screen.warn if is_first_rank(config) else None
    links = emulated_links()
    experiment, folder = prepare(config, job_ranks(config), warn)
    with folder or nullcontext():
        world = open_world(config)
        with (
            stop or nullcontext()
        ):  # also while it fails: torchrun sends SIGTERM to ranks that have a word to say
            try:
                ended = None
                forget_peak(world.device)
                with (
                    screen if folder else nullcontext(),
                    suppress(RunOver),
                ):  # it was meeting the others at the end
                    ended = _train(experiment, world, folder, links, screen, stop)
                world.close()
            except BaseException as error:
                world.fail(error)
    if ended:
        raise ended
    return Path(config.output) / config.name


def prepare(
    config: Config, ranks: int, warn: Callable[[str], None] | None
) -> tuple[Experiment, RunFolder | None]:
    """All that can be found wrong before ranks meet is found here.

    Args:
        ranks: of the job.
        warn: shows one line; None on ranks that do not have the folder.

    Returns:
        The experiment, and the folder, for the caller to release.

    Raises:
        InputError: the configuration cannot run here, or not in this folder.
    """
    check(config, ranks)
    folder = RunFolder(config, warn) if warn else None
    try:
        experiment = Experiment.prepare(config)
        if folder:
            compare_runs(experiment, folder)
            folder.check_partition(experiment.partition_summary)
    except BaseException:
        if folder:
            folder.release()
        raise
    return experiment, folder


def _train(
    experiment: Experiment,
    world: World,
    folder: RunFolder | None,
    links: Mapping[str, Any],
    screen: Screen,
    stop: StopRequest | None = None,
) -> Stopped | Diverged | None:
    """Train; on the server's rank, which has the folder and the screen, show and write what comes of it.

    Returns:
        How the run stopped, if it did so before its end.
    """
    config = experiment.config
    transport = world.transport
    finished = transport.broadcast(folder and folder.finished_summary) if world.generation == 0 else None
    if finished:
        if folder:
            screen.show_finished(finished, folder.path, folder.has_checkpoint)
        round = finished.get("diverged")
        return Diverged(round) if round and config.stop.diverged else None
    elastic = config.clients.on_loss == "drop" and config.transport == "rpc"
    root, orders = checkpoints_folder(config), experiment.image_orders
    checkpoints = Checkpoints(world, root, config.checkpoint, folder, orders, elastic)
    trainer: Trainer | None = None
    if world.generation == 0:  # else this rank joins a run under way
        compare_ranks(experiment, world)
        ranks = transport.gather(rank_environment(world.device))
        manifest: Manifest | None = transport.broadcast(folder and folder.manifest)
        if manifest:
            orders.update(manifest.image_orders)
        saved = from_checkpoint(experiment, world, manifest, folder) if manifest else None
        trainer = Trainer(experiment, world, saved, folder.rounds if folder else ())
        if elastic:
            checkpoints.memory = {saved.rounds if saved else 0: saved and snapshot(saved)}
        del saved  # the parties have copies
    if folder and trainer:
        folder.start(
            {
                **described(experiment),
                **transport.describe(),
                "ranks": ranks,
                "image_order": orders,
                **links,
            },
            experiment.partition_summary,
        )
        if manifest:
            screen.show_resumed(folder.rounds, manifest.folder)
        for key in unused_keys(config.algorithm, experiment.algorithm.reads()):
            screen.warn(f"algorithm.{key} is not used by {config.algorithm.name}")
        for warning in experiment.warnings:
            screen.warn(warning)

    def on_round(line: dict[str, Any], reports: Sequence[RankReport]) -> None:
        if folder:
            folder.add_round(line)
            screen.show_round(line)
            if line["round"] - 1 == config.checkpoint.every and (first := checkpoints.newest()):
                screen.show_checkpoint_size(sum(part.stat().st_size for part in first.glob("*.pt")))

    with checkpoints:
        while True:
            try:
                if trainer is None:
                    compare_ranks(experiment, world)
                    saved = from_memory(experiment, world, checkpoints, folder, screen)
                    trainer = Trainer(experiment, world, saved, folder.rounds if folder else ())
                    del saved
                stops = trainer.train(on_round, checkpoints, stop or (lambda: False))
                break
            except Exception as error:
                trainer = None
                world.accept_loss(error)
                checkpoints.complete()  # or given up, where it lacks the part of a rank that was lost
            world.regroup()
    if stops:
        if stop:
            stop.obeyed()
        return _stopped(world, checkpoints, folder, screen)
    diverged = Diverged(trainer.diverged) if trainer.diverged else None
    if folder:
        if trainer.trace:
            folder.add_trace(trainer.trace.text())
        if diverged:
            folder.mark_diverged(str(diverged))
        summary = trainer.recorder.summary(config.algorithm.name, experiment.algorithm.interval)
        folder.finish(summary, trainer.final_model())
        screen.show_summary(summary, folder.path)
        if diverged:
            screen.show_diverged(diverged, checkpoints.newest())
    return diverged


def _stopped(world: World, checkpoints: Checkpoints, folder: RunFolder | None, screen: Screen) -> Stopped:
    """Collective: what is left to do when a run has stopped on request."""
    checkpoint = checkpoints.newest() if folder else None
    if folder:
        if checkpoint:
            folder.mark_stopped(checkpoint)
        screen.show_stopped(checkpoint)
    return Stopped(world.transport.broadcast(checkpoint is not None))


def unused_keys(keys: AlgorithmKeys, used: frozenset[str]) -> list[str]:
    """The keys that were changed from their defaults and that this algorithm does not read."""
    defaults = AlgorithmKeys()
    return [
        key
        for key, value in vars(keys).items()
        if key not in ("name", "arguments", *used) and value != getattr(defaults, key)
    ]
