"""The folder of a sweep, read from disk and checked: which of its runs are there, and how far they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fslsage_rpc.config.loading import load, to_tree
from fslsage_rpc.config.schema import Config
from fslsage_rpc.config.variants import Combination, SweepRun, combinations, references, sweep_runs
from fslsage_rpc.errors import InputError
from fslsage_rpc.report.sources import SavedRun, read_run
from fslsage_rpc.runs.former_run import asks_for_more, fixed_changes
from fslsage_rpc.runs.run_folder import SWEEP
from fslsage_rpc.runs.screen import can_be_shown

LISTED = 5
"""runs that a sentence names of each state, at most"""


class RunState(StrEnum):
    """How far a run of a sweep is."""

    COMPLETE = "complete"
    DIVERGED = "diverged"
    UNFINISHED = "unfinished"
    NOT_BEGUN = "not begun"
    OTHER = "of other settings"


@dataclass(frozen=True)
class SweepMember:
    """One run of a sweep: what it is to be, and what there is of it."""

    planned: SweepRun
    state: RunState
    run: SavedRun | None
    """None where it has no configuration yet"""

    @property
    def rounds(self) -> int:
        """How many are done."""
        return self.run.lines[-1]["round"] if self.run and self.run.lines else 0

    def __str__(self) -> str:
        name = self.planned.config.name
        match self.state:
            case RunState.DIVERGED if self.run:
                return f"{name} (in round {self.run.diverged})"
            case RunState.UNFINISHED:
                return f"{name} (round {self.rounds} of {self.planned.config.rounds})"
        return name


@dataclass(frozen=True)
class SavedSweep:
    """The folder of a sweep: its configuration, its variants by name, and all its runs, seed by seed."""

    folder: Path
    config: Config
    variants: dict[str, Combination]
    members: list[SweepMember]

    @property
    def references(self) -> dict[str, str]:
        """By variant the one that it is compared with; empty where no reference is set."""
        reference = self.config.sweep.reference
        return references(self.variants, reference, "sweep.reference") if reference else {}

    def of(self, variant: str) -> list[SweepMember]:
        """The runs of a variant."""
        return [member for member in self.members if member.planned.variant == variant]

    def complete(self, variant: str) -> dict[int, SavedRun]:
        """The complete runs of a variant that have not diverged, by seed."""
        return {
            member.planned.seed: member.run
            for member in self.of(variant)
            if member.run and member.state is RunState.COMPLETE
        }

    @property
    def progress(self) -> str:
        """A sentence: how many of the runs are complete, and which are not."""
        named = {
            state: [str(member) for member in self.members if member.state is state] for state in RunState
        }
        complete = len(named.pop(RunState.COMPLETE))
        if complete == len(self.members):
            return f"All {complete} runs are complete." if complete > 1 else "The run is complete."
        lists = [f"{state}: {_listed(names)}" for state, names in named.items() if names]
        return "; ".join([f"{complete} of {len(self.members)} runs are complete", *lists]) + "."


def is_sweep(folder: str | Path) -> bool:
    """Is this the folder of a sweep?"""
    try:
        return (Path(folder) / SWEEP).is_file()
    except (OSError, ValueError):  # whoever reads the folder says what is wrong
        return False


def read_sweep(folder: str | Path) -> SavedSweep:
    """The sweep in a folder, which may lie elsewhere than it was made.

    Raises:
        InputError: there is none, or what the folder holds is damaged or of another configuration.
    """
    folder = Path(folder)
    path = folder / SWEEP
    try:
        config = load(path)
        variants = combinations(config.sweep.variants, "sweep.variants")
        runs = sweep_runs(config)
    except InputError as error:
        raise InputError(f"RUN: got {str(folder)!r}, whose {SWEEP} cannot be used ({error})") from None
    return SavedSweep(folder, config, variants, [_member(folder, run) for run in runs])


def _member(sweep: Path, planned: SweepRun) -> SweepMember:
    folder = sweep / planned.config.name
    if not (folder / "config.yaml").exists():
        begun = folder.is_dir() and any(folder.iterdir())
        return SweepMember(planned, RunState.UNFINISHED if begun else RunState.NOT_BEGUN, None)
    run, tree = read_run(folder, planned.config.name, planned.variant), to_tree(planned.config)
    if fixed_changes(run.config, tree, as_measured=True):
        return SweepMember(planned, RunState.OTHER, None)
    # One that was complete may have been given more to do since, and a damaged summary is made again.
    complete = run.lines and can_be_shown(run.summary) and not asks_for_more(run.config, tree)
    if not complete:
        return SweepMember(planned, RunState.UNFINISHED, run)
    return SweepMember(planned, RunState.DIVERGED if run.diverged else RunState.COMPLETE, run)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
