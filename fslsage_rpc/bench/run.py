"""`fslsage bench`: variants of one configuration in the same processes, timed side by side.

Every variant is run `repeats` times, in order and then in reverse order, so that what drifts on the machine
drifts for all of them.
"""

import gc
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fslsage_rpc.algorithms.bound import LinkSpeed, bound_seconds
from fslsage_rpc.bench.bench_screen import BenchScreen
from fslsage_rpc.bench.pieces import fit_seconds, round_pieces
from fslsage_rpc.bench.statistics import BenchRun, summarise
from fslsage_rpc.bench.table import markdown
from fslsage_rpc.config.loading import to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import bench_variants, combinations
from fslsage_rpc.config.yaml_files import to_yaml
from fslsage_rpc.device.memory import forget_host_peak
from fslsage_rpc.device.placement import forget_peak
from fslsage_rpc.errors import InputError
from fslsage_rpc.job.opening import open_world
from fslsage_rpc.job.world import World, is_first_rank, job_ranks
from fslsage_rpc.runs.environment import emulated_links, rank_environment, versions
from fslsage_rpc.runs.folder_lock import FolderLock
from fslsage_rpc.runs.places import check_place, write_whole, writing
from fslsage_rpc.runs.records import RankReport
from fslsage_rpc.training.experiment import Experiment, check
from fslsage_rpc.training.sameness import compare_ranks
from fslsage_rpc.training.trainer import Trainer

RESULTS = ("bench.json", "bench.md", "config.yaml", "links.json")


def bench(config: Config, screen: BenchScreen) -> Path:
    """Run and compare the variants, as one rank of a job or (`transport: local`) alone.

    Returns:
        The folder with bench.json and bench.md.

    Raises:
        InputError: the variants cannot run here; found before ranks meet.
    """
    variants = checked_variants(config, job_ranks(config))
    folder = Path(config.output) / config.name
    links = emulated_links()
    with _make(folder) if is_first_rank(config) else nullcontext():
        world = open_world(config)
        try:
            with screen:
                _bench(config, variants, world, folder, links, screen)
            world.close()
        except BaseException as error:
            world.fail(error)
    return folder


def checked_variants(config: Config, ranks: int) -> dict[str, Config]:
    """The configuration of every variant, by name.

    Args:
        ranks: of the job.

    Raises:
        InputError: one of them cannot run here.
    """
    variants = bench_variants(config)
    for name, variant in variants.items():
        try:
            check(variant, ranks)
            _check_rounds(variant, Experiment.prepare(variant).algorithm.interval)
        except InputError as error:
            raise type(error)(f"bench.variants.{name}: {error}") from None
    return variants


def _check_rounds(config: Config, interval: int) -> None:
    probe = BenchRun("", 0, interval, lines=[{}] * config.rounds)
    if not probe.samples(config.bench.warmup_rounds):
        warmup = math.ceil(config.bench.warmup_rounds / interval) * interval
        raise InputError(
            f"rounds: got {config.rounds}, expected at least {warmup + interval}: a whole alignment interval "
            f"({interval}) behind bench.warmup_rounds ({config.bench.warmup_rounds}), to whole intervals"
        )


def _bench(
    config: Config,
    variants: Mapping[str, Config],
    world: World,
    folder: Path,
    emulated: Mapping[str, Any],
    screen: BenchScreen,
) -> None:
    """All repeats; on the server's rank, the results are shown and written."""
    runs: list[BenchRun] = []
    links: list[dict[int, LinkSpeed]] = []
    orders: dict[str, dict[str, dict[str, str]]] = {}
    made = combinations(config.bench.variants, "bench.variants")
    ranks = world.transport.gather(rank_environment(world.device))
    for repeat in range(config.bench.repeats):
        names = list(variants)[:: 1 if repeat % 2 == 0 else -1]
        for name in names:
            forget_host_peak()
            forget_peak(world.device)
            experiment = Experiment.prepare(variants[name])
            compare_ranks(experiment, world)
            trainer = Trainer(experiment, world)
            orders[name] = experiment.image_orders
            if name == names[0]:
                links.append(trainer.measure_links())
            run = BenchRun(name, repeat, experiment.algorithm.interval)
            _train(trainer, run, links[-1], screen)
            runs.append(run)
            if world.hosts_server:
                with writing(config.output, folder):
                    _write_rounds(folder, run)
                screen.end_run(run)
            world.transport.serve(None)
            del trainer, experiment  # else the next one's peak memory would have them
            gc.collect()
    if world.hosts_server:
        result = {
            "reference": config.bench.reference,
            "environment": {
                "versions": versions(),
                **world.transport.describe(),
                "ranks": ranks,
                **emulated,
                "link_speeds": [_speed_records(each) for each in links],
            },
            "warmup_rounds": config.bench.warmup_rounds,
            "repeats": config.bench.repeats,
            "variants": {
                name: {
                    "algorithm": variants[name].algorithm.name,
                    "overrides": made[name].overrides,
                    "rounds": variants[name].rounds,
                    "image_order": orders[name],
                    **record,
                }
                for name, record in summarise(runs, config.bench).items()
            },
        }
        with writing(config.output, folder):
            write_whole(folder / "config.yaml", to_yaml(to_tree(config)))
            write_whole(folder / "bench.json", json.dumps(result, indent=2) + "\n")
            write_whole(folder / "bench.md", markdown(config.name, result))
        screen.show(config.name, result, folder)


def _train(trainer: Trainer, run: BenchRun, links: Mapping[int, LinkSpeed], screen: BenchScreen) -> None:
    """One run; lines and bounds are kept on the server's rank."""
    experiment = trainer.experiment

    def on_round(line: dict[str, Any], reports: Sequence[RankReport]) -> None:
        pieces = round_pieces(
            line,
            reports,
            experiment.federation,
            trainer.course.asks,
            links,
            experiment.algorithm.server_replicas,
            trainer.world.device,
        )
        run.lines.append(line)
        run.bounds.append(bound_seconds(pieces))
        run.fits.append(fit_seconds(line) / pieces.server_workers)
        screen.show_round(run)

    trainer.train(on_round)


def _speed_records(links: Mapping[int, LinkSpeed]) -> dict[str, dict[str, float]]:
    """By client rank; without those of a process that talks to itself, which are infinite."""
    return {
        str(rank): vars(speed) for rank, speed in links.items() if math.isfinite(sum(vars(speed).values()))
    }


def open_folder(folder: Path) -> FolderLock:
    """Make the folder, for a benchmark to be written there and by no other process.

    Raises:
        InputError: it holds a training run, or another process writes there.
        OSError: it cannot be made.
    """
    check_place(folder)
    if (folder / "metrics.jsonl").exists():
        raise InputError(
            f"name: got {folder.name!r}, where {folder} holds a training run; choose another name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return FolderLock(folder)


def _make(folder: Path) -> FolderLock:
    """The folder, without what an earlier benchmark left in it; until it is released, this process's alone.

    Raises:
        InputError: it cannot be made, or holds a training run, or another process writes there.
    """
    try:
        lock = open_folder(folder)
        for name in RESULTS:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "rounds", ignore_errors=True)
        (folder / "rounds").mkdir()
        return lock
    except OSError as error:
        raise InputError(
            f"output: got {str(folder.parent)!r}, where {folder} cannot be made ({error.strerror})"
        ) from None


def _write_rounds(folder: Path, run: BenchRun) -> None:
    """The lines that the results are made of, each with its lower bound."""
    lines = [{**line, "bound_seconds": bound} for line, bound in zip(run.lines, run.bounds, strict=True)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(folder / "rounds" / f"{run.variant}-{run.repeat}.jsonl", text)
