"""The paper ledger: the bytes on the communication-load axis of FSL-SAGE's figures (arXiv 2505.23182)."""

from dataclasses import dataclass
from typing import NamedTuple

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.algorithms.rehearsal import Course


@dataclass(frozen=True)
class Sizes:
    """Bytes of the client, server and auxiliary model (all parameters and buffers) and of one sample's
    smashed data.
    """

    client: int
    server: int
    auxiliary: int
    smashed: int


def averaged_bytes(algorithm: Algorithm, course: Course, sizes: Sizes) -> int:
    """The bytes of the models of one client that are averaged at the end of a round."""
    whole = sizes.server if algorithm.client_holds_whole_model else 0
    return sizes.client + whole + (sizes.auxiliary if averages_auxiliary(algorithm, course) else 0)


def averages_auxiliary(algorithm: Algorithm, course: Course) -> bool:
    """Are the auxiliary models averaged at the end of a round?"""
    if hands_auxiliary_over(algorithm, course):
        return True
    when = "never" if algorithm.auxiliary == "none" else algorithm.average_auxiliary
    return when == "round" or (when == "alignment" and course.takes_up)


def hands_auxiliary_over(algorithm: Algorithm, course: Course) -> bool:
    """Have clients trained the auxiliary models that the server aligns? Then it goes on from their mean."""
    return algorithm.auxiliary == "aligned" and course.trains_auxiliary


class PaperBytes(NamedTuple):
    """All participants' bytes of a round: averaged models up and down, smashed data up, and what the server
    answers: gradients and aligned auxiliary models. Labels are not in it.
    """

    coded: int | None
    """as they travel; None where that depends on values that are not there yet"""
    uncoded: int
    """without codecs: the paper's rule"""


def paper_bytes(algorithm: Algorithm, course: Course, sizes: Sizes) -> PaperBytes:
    """The paper ledger of a round."""
    averaged = 2 * averaged_bytes(algorithm, course, sizes) * len(course.asks)
    asked = [ask for asks in course.asks.values() for ask in asks]
    coded = sum((ask.smashed_bytes or 0) + (ask.answer_bytes or 0) for ask in asked)
    uncoded = averaged + sum(ask.uncoded_bytes for ask in asked)
    return PaperBytes(averaged + coded if course.sized else None, uncoded)
