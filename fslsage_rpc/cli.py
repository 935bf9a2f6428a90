"""The command line: `fslsage`, or `python -m fslsage_rpc`, alone or under torchrun."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from fslsage_rpc.commands import count, needs_ranks
from fslsage_rpc.config.loading import from_tree, load
from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import FIRST_WORD_SECONDS, Diverged, HostError, InputError
from fslsage_rpc.job.stopping import (
    INTERRUPTED,
    LAUNCHED,
    NOBODY_READS,
    STOPPED,
    Stopped,
    StopRequest,
    under_torchrun,
    uninterrupted,
)

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is first imported, which is below


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 done, 2 wrong input, 75 stopped on request after a checkpoint (0 under torchrun, to
        which any other is a failure), 130 interrupted, 141 nobody reads the output, 1 anything else (0 of a
        run that has diverged, where a launcher says so).
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        try:
            options = _parse(arguments)
            status: int = options.command(options, arguments)
            return status
        finally:
            sys.stdout.flush()  # the interpreter itself would say so at length where nobody reads any more
    except InputError as error:
        _report(error)
        return 2
    except Stopped as stopped:
        return (0 if under_torchrun() else STOPPED) if stopped.resumable else 1
    except Diverged:  # the screen has said so
        return 0 if LAUNCHED in os.environ else 1
    except BrokenPipeError:  # as in `fslsage train CONFIG | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes
        return NOBODY_READS
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options, overrides and folders in any order: argparse itself takes none of those behind an option."""
    parser = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    words = next((vars(options)[name] for name in ("overrides", "folders") if name in options), None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words += rest
    return options


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="fslsage", description="Federated split learning over torch.distributed, measured."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=OneLineParser)
    train = commands.add_parser("train", help="train as a configuration file says")
    train.add_argument("config", help="YAML configuration file")
    train.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="values to use instead of the file's"
    )
    train.set_defaults(command=_train)
    bench = commands.add_parser("bench", help="time the variants of a configuration side by side")
    bench.add_argument("config", help="YAML configuration file with a `bench` section")
    bench.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values to use instead")
    bench.set_defaults(command=_bench)
    sweep = commands.add_parser("sweep", help="train all variants with all seeds, and compare them")
    sweep.add_argument("config", help="YAML configuration file with a `sweep` section")
    sweep.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values to use instead")
    sweep.add_argument("--only", metavar="PATTERN", help="of names of variants or runs, as 'iid-*'")
    sweep.add_argument(
        "--jobs", default="1", metavar="N", help="runs side by side, as many as cores or GPUs (1)"
    )
    sweep.add_argument("--launch", metavar="PROGRAM", help="that starts each run, as launch/local.sh")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs with bytes and estimated hours")
    sweep.set_defaults(command=_sweep)
    plan = commands.add_parser("plan", help="predict rounds over other links and with more clients")
    plan.add_argument("config", help="YAML configuration file")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values to use instead")
    plan.add_argument("--bandwidth", metavar="RATE", help="of each client rank's link, as 100mbit")
    plan.add_argument("--rtt", metavar="TIME", help="round trip of each link, as 20ms")
    plan.add_argument("--clients", metavar="N[,N...]", help="numbers of clients; else the configuration's")
    plan.add_argument("--client-ranks", metavar="N", help="ranks that host them; else one for each client")
    plan.add_argument(
        "--shared-cores", metavar="N", help="all ranks share one machine of so many cores; else one each"
    )
    plan.add_argument(
        "--calibrate", metavar="RUN", help="folder of a benchmark; else this machine is measured"
    )
    plan.set_defaults(command=_plan)
    report = commands.add_parser("report", help="runs and benches, or a sweep, in one page with figures")
    report.add_argument(
        "folders", nargs="+", metavar="RUN", help="run folder, or folder of a bench; or that of a sweep alone"
    )
    report.add_argument(
        "--out", metavar="DIR", help="folder for report.html, .md and figures; of a sweep, else RUN/report"
    )
    report.add_argument(
        "--label", action="append", default=[], metavar="NAME", help="one for each RUN, in their order"
    )
    report.add_argument(
        "--format", metavar="FORMATS", help="of figures, as png,pdf,svg; else png, and of a sweep png,pdf"
    )
    report.set_defaults(command=_compare)
    check = commands.add_parser("check", help="what this machine is, and what one round of a run takes on it")
    check.add_argument("config", nargs="?", help="YAML configuration file; none: the machine alone")
    check.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values to use instead")
    check.add_argument(
        "--cuts", action="store_true", help="list where the model can be cut, and what each cut means"
    )
    check.set_defaults(command=_check)
    evaluate = commands.add_parser("evaluate", help="evaluate the finished model of a run folder again")
    evaluate.add_argument("run", help="run folder")
    evaluate.set_defaults(command=_evaluate)
    if not arguments or arguments[0] not in commands.choices:
        _add_commands_of_packages(commands)
    return parser


def _add_commands_of_packages(commands: Any) -> None:
    """Add the commands of this and other packages that entry points name; one that fails is left out."""
    from importlib.metadata import entry_points

    from fslsage_rpc.config.own import first_line

    for entry in entry_points(group="fslsage_rpc.commands"):
        try:
            entry.load()(commands)
        except (Exception, SystemExit) as error:  # a stranger's may raise anything
            if "RANK" not in os.environ:
                what = f"the entry point {entry.name}: {entry.value} of fslsage_rpc.commands"
                print(f"fslsage_rpc: {what} is left out ({first_line(error)})", file=sys.stderr)


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load(options.config, options.overrides)
    if needs_ranks(config):
        return _launch(config, arguments)
    with uninterrupted():
        from fslsage_rpc.job.world import is_first_rank
        from fslsage_rpc.runs.screen import Screen
        from fslsage_rpc.training.run import run

    screen = Screen(config)
    run(config, screen, StopRequest(screen.warn if is_first_rank(config) else None))
    return 0


def _bench(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load(options.config, options.overrides)
    if needs_ranks(config):
        return _launch(config, arguments)
    with uninterrupted():
        from fslsage_rpc.bench.bench_screen import BenchScreen
        from fslsage_rpc.bench.run import bench

    bench(config, BenchScreen(config))
    return 0


def _sweep(options: argparse.Namespace, arguments: list[str]) -> int:
    if "RANK" in os.environ:
        raise InputError("sweep: got a rank of a job, expected no launcher, or one for each run as --launch")
    config, jobs = load(options.config, options.overrides), count("--jobs", options.jobs)
    with uninterrupted():
        from fslsage_rpc.sweep.run import forecast, sweep

    if options.dry_run:
        forecast(config, options.only, jobs)
        return 0
    return sweep(config, options.only, jobs, options.launch)


def _plan(options: argparse.Namespace, arguments: list[str]) -> int:
    config = load(options.config, options.overrides)
    clients = _counts("--clients", options.clients or str(config.clients.count))
    ranks = count("--client-ranks", options.client_ranks) if options.client_ranks else None
    cores = count("--shared-cores", options.shared_cores) if options.shared_cores else None
    with uninterrupted():
        from fslsage_rpc.plan.run import plan

    plan(config, clients, options.bandwidth, options.rtt, ranks, cores, options.calibrate)
    return 0


def _counts(option: str, text: str) -> list[int]:
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise InputError(f"{option}: got {text!r}, expected whole numbers from 1 on, as 10,100")
    return counts


def _launch(config: Config, arguments: list[str]) -> int:
    """The same command on ranks of its own."""
    with uninterrupted():
        from fslsage_rpc.training.experiment import check
    check(config, config.ranks)
    with uninterrupted():
        from fslsage_rpc.job.launching import launch  # not everywhere to be had: check says so by name

    return launch(config.ranks, arguments)


def _compare(options: argparse.Namespace, arguments: list[str]) -> int:
    with uninterrupted():
        from fslsage_rpc.report.page import FORMATS
        from fslsage_rpc.report.sweeps import is_sweep
        from fslsage_rpc.report.terminal import GET_MATPLOTLIB, has_matplotlib

    formats = options.format.split(",") if options.format is not None else []
    if not set(formats) <= set(FORMATS):
        raise InputError(
            f"--format: got {options.format!r}, expected one or more of png, svg and pdf, as png,pdf"
        )
    sweeps = [folder for folder in options.folders if is_sweep(folder)]
    if sweeps:
        return _report_sweep(sweeps[0], options, formats)
    if options.out is None:
        raise InputError("the following arguments are required: --out (see fslsage report --help)")
    if not has_matplotlib():
        raise InputError(f"report: needs matplotlib: {GET_MATPLOTLIB}")
    with uninterrupted():
        from fslsage_rpc.report.comparison import write_report

    print(f"Report: {write_report(options.folders, options.out, options.label, formats or ['png'])}")
    return 0


def _report_sweep(folder: str, options: argparse.Namespace, formats: list[str]) -> int:
    if len(options.folders) > 1:
        raise InputError(
            f"RUN: got {len(options.folders)}, of which {folder!r} is a sweep's, expected that one alone"
        )
    if options.label:
        raise InputError(f"--label: got {options.label[0]!r} for a sweep, whose variants have names")
    with uninterrupted():
        from fslsage_rpc.report.terminal import report_sweep

    report_sweep(folder, options.out, formats)
    return 0


def _check(options: argparse.Namespace, arguments: list[str]) -> int:
    if options.cuts:
        return _list_cuts(options)
    if options.config is not None:
        config = load(options.config, options.overrides)
    else:  # the ranks that there are, or this process alone
        config = from_tree({} if int(os.environ.get("WORLD_SIZE", 1)) > 1 else {"transport": "local"})
    if needs_ranks(config):
        return _launch(config, arguments)
    with uninterrupted():
        from fslsage_rpc.check.display import CheckScreen
        from fslsage_rpc.check.run import examine

    findings = examine(config, configured=options.config is not None)
    if findings:
        CheckScreen().show(findings)
    return 0


def _list_cuts(options: argparse.Namespace) -> int:
    """Where the model of a configuration can be cut; nothing else is looked at."""
    if options.config is None:
        raise InputError("check --cuts: got no configuration, expected one that names a model")
    config = load(options.config, options.overrides)
    with uninterrupted():
        from fslsage_rpc.check.cut_table import cut_lines

    print("\n".join(cut_lines(config)))
    return 0


def _evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    with uninterrupted():
        from fslsage_rpc.training.evaluation import evaluate_run

    score = evaluate_run(options.run)
    metrics = "".join(f"  test {name} {value:.4f}" for name, value in score.metrics.items())
    print(f"test accuracy {score.accuracy:.4f}  test loss {score.loss:.4f}{metrics}")
    return 0


def _report(error: InputError) -> None:
    """The one line, from rank 0; another rank speaks only of its own host, which rank 0 cannot know."""
    rank, on_host = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    where = f" (on rank {rank}, host {platform.node()})" if rank else ""
    if rank:  # if rank 0, or the first rank of another host, has the same problem, its end ends this rank
        time.sleep(FIRST_WORD_SECONDS * (2 if 0 < on_host < rank else 1))
    if not rank or isinstance(error, HostError):
        print(f"fslsage_rpc: {error}{where}", file=sys.stderr, flush=True)
