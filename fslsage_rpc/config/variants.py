"""Variants of one configuration: `bench` times them side by side, `sweep` trains each with several seeds.

A list of `key=value` is a variant. A mapping of such lists is a choice, which stands for nothing by itself.
A name with ` x ` builds on others: every combination of theirs is a variant, with the keys of all of them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fslsage_rpc.config.loading import FOLDER_NAME, LONGEST_NAME, from_tree, to_tree
from fslsage_rpc.config.schema import Bench, Config, Sweep, VariantKeys
from fslsage_rpc.config.yaml_files import show
from fslsage_rpc.errors import InputError

TIMES = " x "
"""between the names that a variant builds on"""
OF_PROCESSES = ("ranks", "transport", "device", "tf32", "trace", "stop")
OF_PROCESSES_IN_COMM = ("averaging", "interface", "transports", "channels", "device_maps", "timeout_seconds")
"""keys of a benchmark's processes, which all its variants share"""
OF_RUNS = ("name", "output", "resume", "bench", "sweep")
"""keys that no variant may change"""


class Combination(NamedTuple):
    """One variant: the names that it is made of, and the `key=value`s of all of them."""

    parts: tuple[str, ...]
    overrides: list[str]

    @property
    def name(self) -> str:
        """The parts, joined."""
        return "-".join(self.parts)


class SweepRun(NamedTuple):
    """One variant with one seed."""

    variant: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.output) / self.config.name


def combinations(variants: VariantKeys, key: str) -> dict[str, Combination]:
    """All variants by name, in the order in which they are written.

    Args:
        key: by which errors name the mapping, as `bench.variants`.

    Raises:
        InputError: there is none, or a name is not allowed, is there twice, or builds on an unknown one.
    """
    if not variants:
        raise InputError(f"{key}: got {{}}, expected variants, as {{fsl_sage: [algorithm.name=fsl_sage]}}")
    bricks = _bricks(variants, key)
    found: dict[str, Combination] = {}
    for name, value in variants.items():
        if isinstance(value, dict):
            continue
        names = name.split(TIMES)
        for each in names:
            if each not in bricks:
                raise InputError(
                    f"{key}: got {name!r}, expected names of {', '.join(bricks)}, with {TIMES!r}"
                )
        for chosen in itertools.product(*(bricks[each] for each in names)):
            own = value if len(names) > 1 else []
            overrides = [override for brick in chosen for override in brick.overrides] + own
            made = Combination(tuple(brick.name for brick in chosen), overrides)
            if made.name in found:
                raise InputError(f"{key}: got {made.name!r} twice, expected different variants")
            found[made.name] = made
    if not found:
        raise InputError(
            f"{key}: got choices alone, expected variants of them, as {TIMES.join(variants)!r}: []"
        )
    return found


def _bricks(variants: VariantKeys, key: str) -> dict[str, list[Combination]]:
    """By name, all that others may build on: variants, choices, and the members of these."""
    bricks: dict[str, list[Combination]] = {}

    def lay(name: str, brick: list[Combination]) -> None:
        if not FOLDER_NAME.fullmatch(name):
            raise InputError(f"{key}: got {show(name)}, expected names of letters, digits, '.', '_' and '-'")
        if name in bricks:
            raise InputError(f"{key}: got {name!r} twice, expected a name for each")
        bricks[name] = brick

    for name, value in variants.items():
        if isinstance(value, dict):
            members = [Combination((member,), overrides) for member, overrides in value.items()]
            lay(name, members)
            for member in members:
                lay(member.name, [member])
        elif TIMES not in name:
            lay(name, [Combination((name,), value)])
    return bricks


def references(found: Mapping[str, Combination], reference: str, key: str) -> dict[str, str]:
    """By variant the one that it is compared with, which is the reference or made with it.

    What that one is made of otherwise is in the variant too, and as much as can be. Left out where none is.

    Raises:
        InputError: no variant is the reference, or made with it.
    """
    with_it = {name: {*made.parts} - {reference} for name, made in found.items() if reference in made.parts}
    if reference in found:
        with_it.setdefault(reference, set())
    if not with_it:
        raise InputError(f"{key}: got {reference!r}, expected one of the variants {', '.join(found)}")
    fitting = {
        name: [other for other, parts in with_it.items() if parts <= {*made.parts}]
        for name, made in found.items()
    }
    return {name: max(names, key=lambda one: len(with_it[one])) for name, names in fitting.items() if names}


def bench_variants(config: Config) -> dict[str, Config]:
    """The configuration of every variant of a benchmark, by name.

    Raises:
        InputError: there is none, one has no reference, or an override is not allowed.
    """
    found = combinations(config.bench.variants, "bench.variants")
    compared = references(found, config.bench.reference, "bench.reference")
    for name in found:
        if name not in compared:
            raise InputError(
                f"bench.reference: got {config.bench.reference!r}, expected one for {name}, of the variants "
                + ", ".join(found)
            )
    base = {**to_tree(config), "trace": False, "stop": {"diverged": False}}
    for name, made in found.items():
        for override in made.overrides:
            section, _, rest = override.partition("=")[0].partition(".")
            if section in OF_PROCESSES or (section == "comm" and rest in (*OF_PROCESSES_IN_COMM, "")):
                raise InputError(
                    f"bench.variants.{name}: got {override}, expected keys that processes do not share"
                )
    return {name: _config(base, made, f"bench.variants.{name}", OF_RUNS) for name, made in found.items()}


def sweep_runs(config: Config) -> list[SweepRun]:
    """All runs of a sweep, seed by seed, so that one that is half done compares all variants.

    Raises:
        InputError: there is none, the reference is not among the variants, or an override is not allowed.
    """
    keys = config.sweep
    found = combinations(keys.variants, "sweep.variants")
    if keys.reference is not None:
        references(found, keys.reference, "sweep.reference")
    if len({*keys.seeds}) < len(keys.seeds):
        raise InputError(f"sweep.seeds: got {keys.seeds}, expected different ones")
    longest = max(len(f"{name}-seed{seed}") for name in found for seed in keys.seeds)
    if longest > LONGEST_NAME:
        raise InputError(f"sweep.variants: got names of {longest} letters, expected {LONGEST_NAME} at most")
    folder, runs = Path(config.output) / config.name, []
    for seed in keys.seeds:
        for name, made in found.items():
            own = _config(to_tree(config), made, f"sweep.variants.{name}", (*OF_RUNS, "seed"), seed)
            own = replace(own, name=f"{name}-seed{seed}", output=str(folder), bench=Bench(), sweep=Sweep())
            runs.append(SweepRun(name, seed, own))
    return runs


def _config(
    base: dict[str, object], made: Combination, key: str, fixed: Sequence[str], seed: int | None = None
) -> Config:
    """A variant's configuration, of this seed or of that in `base`.

    Args:
        fixed: sections that it may not change.
    """
    for override in made.overrides:
        section = override.partition("=")[0].partition(".")[0]
        if section in fixed:
            raise InputError(f"{key}: got {override}, expected keys of a run, and not its {section}")
    try:
        return from_tree(base, [*made.overrides, *([] if seed is None else [f"seed={seed}"])])
    except InputError as error:
        raise type(error)(f"{key}: {error}") from None
