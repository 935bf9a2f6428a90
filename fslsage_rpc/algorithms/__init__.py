"""The algorithms by the name that the configuration gives them."""

from typing import Any

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.algorithms.cse_fsl import CseFsl
from fslsage_rpc.algorithms.fedavg import FedAvg
from fslsage_rpc.algorithms.fsl_sage import FslSage
from fslsage_rpc.algorithms.splitfed import SplitFedV1, SplitFedV2
from fslsage_rpc.config.own import checked_arguments, first_line, import_class, is_own
from fslsage_rpc.config.schema import AlgorithmKeys
from fslsage_rpc.data.participation import Federation
from fslsage_rpc.errors import InputError

__all__ = ["ALGORITHMS", "Algorithm", "arguments", "create", "find", "ranked"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm for algorithm in (FslSage, SplitFedV1, SplitFedV2, CseFsl, FedAvg)
}
AUXILIARY = ("none", "aligned", "trained")
AVERAGE_AUXILIARY = ("never", "alignment", "round")


def find(name: str) -> type[Algorithm]:
    """The algorithm of that name, or the user's own class.

    Raises:
        InputError: there is none, or the user's own lacks a method.
    """
    if not is_own(name):
        return ALGORITHMS[name]
    found: type[Algorithm] = import_class(
        "algorithm.name", name, Algorithm, "fslsage_rpc.algorithms.Algorithm"
    )
    if found.auxiliary not in AUXILIARY:
        raise InputError(
            f"algorithm.name: got {name!r}, whose auxiliary is {found.auxiliary!r}, expected one of "
            + ", ".join(AUXILIARY)
        )
    if unknown := sorted(map(str, set(found.uses) - vars(AlgorithmKeys()).keys())):
        raise InputError(
            f"algorithm.name: got {name!r}, whose uses has {', '.join(unknown)}, expected keys of `algorithm`"
        )
    return found


def arguments(keys: AlgorithmKeys) -> dict[str, Any]:
    """The arguments of the algorithm's class, besides keys and federation.

    Raises:
        InputError: there is no such algorithm, or they are not what it takes.
    """
    return checked_arguments("algorithm.arguments", keys.name, find(keys.name), keys.arguments, first=2)


def create(keys: AlgorithmKeys, federation: Federation) -> Algorithm:
    """The algorithm of a configuration, for these clients.

    Raises:
        InputError: there is none, or what the user's own says of itself cannot be.
    """
    kind, more = find(keys.name), arguments(keys)
    if kind.auxiliary == "aligned":
        _check_lag(keys)
    if not is_own(keys.name):
        return kind(keys, federation, **more)
    try:
        algorithm = kind(keys, federation, **more)
        wrong = _contradiction(algorithm)
    except Exception as error:  # the user's class may raise anything
        raise InputError(f"algorithm.name: got {keys.name!r}, which fails ({first_line(error)})") from None
    if wrong:
        raise InputError(f"algorithm.name: got {keys.name!r}, whose {wrong}")
    return algorithm


def _check_lag(keys: AlgorithmKeys) -> None:
    """A fit behind the training is taken up before the next one begins, and no average overtakes it."""
    lag, every = keys.alignment.lag, keys.align_every
    if lag and every is not None and lag >= every:
        raise InputError(
            f"algorithm.alignment.lag: got {lag}, expected fewer rounds than algorithm.align_every ({every})"
        )
    if lag and keys.average_auxiliary == "round":
        raise InputError(
            "algorithm.average_auxiliary: got 'round', expected never or alignment, as "
            f"algorithm.alignment.lag is {lag}"
        )


def ranked(algorithm: Algorithm, t: int) -> list[int]:
    """The ranking of a round.

    Raises:
        InputError: it is not that of all participants.
    """
    if wrong := _misranked(algorithm, t):
        raise InputError(f"algorithm.name: got {algorithm.keys.name!r}, whose {wrong}")
    return algorithm.ranking(t)


def _misranked(algorithm: Algorithm, t: int) -> str | None:
    ranking, participants = algorithm.ranking(t), algorithm.federation.participants(t)
    if sorted(ranking) == participants:
        return None
    return f"ranking is {ranking}, expected the participants, {participants}, in some order"


def _contradiction(algorithm: Algorithm) -> str | None:
    """What cannot be of what an algorithm says of itself, which all ranks go by."""
    if wrong := _misranked(algorithm, 0):
        return wrong
    if not isinstance(algorithm.interval, int) or algorithm.interval < 1:
        return f"interval is {algorithm.interval!r}, expected rounds, from 1 on"
    if algorithm.average_auxiliary not in AVERAGE_AUXILIARY:
        return f"average_auxiliary is {algorithm.average_auxiliary!r}, expected one of " + ", ".join(
            AVERAGE_AUXILIARY
        )
    lag = algorithm.keys.alignment.lag
    if lag and algorithm.auxiliary == "aligned" and algorithm.average_auxiliary == "round":
        return f"average_auxiliary is 'round', which algorithm.alignment.lag, {lag}, does not allow"
    return None
