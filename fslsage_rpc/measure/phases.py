"""The phases that a round's seconds are entered under; docs/architecture.md says what is in each."""

from collections.abc import Mapping
from enum import StrEnum


class Phase(StrEnum):
    """A client rank's, a lane's, or the server's."""

    DATA = "data"
    FORWARD_BACKWARD = "forward_backward"
    ESTIMATE = "estimate"
    UPLOAD_WAIT = "upload_wait"
    GRADIENT_WAIT = "gradient_wait"
    ALIGNMENT_WAIT = "alignment_wait"
    DRAIN_WAIT = "drain_wait"
    AVERAGING = "averaging"
    STEP = "step"
    TARGETS = "targets"
    DRIFT = "drift"
    ALIGNMENT = "alignment"


OF_CLIENTS: tuple[str, ...] = tuple(Phase)[: list(Phase).index(Phase.AVERAGING) + 1]
"""of a client rank; `other` is what they leave of a round"""
OF_LANES: tuple[str, ...] = (Phase.STEP, Phase.TARGETS, Phase.DRIFT)
COMPUTE: tuple[str, ...] = (Phase.DATA, Phase.FORWARD_BACKWARD, Phase.ESTIMATE)
PARTS: Mapping[str, tuple[str, ...]] = {
    "compute": COMPUTE,
    "wait": (Phase.UPLOAD_WAIT, Phase.GRADIENT_WAIT, Phase.DRAIN_WAIT),
    "averaging": (Phase.AVERAGING,),
    "alignment": (Phase.ALIGNMENT_WAIT,),
}
"""a client's round as tables and figures show it"""
