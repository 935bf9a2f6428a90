"""The phases that a round's seconds are entered under; docs/architecture.md says what is in each."""

from collections.abc import Mapping


class Phase:
    """A client rank's, a lane's, or the server's: names, as files have them."""

    DATA = "data"
    FORWARD_BACKWARD = "forward_backward"
    ESTIMATE = "estimate"
    ENCODE = "encode"
    DECODE = "decode"
    UPLOAD_WAIT = "upload_wait"
    GRADIENT_WAIT = "gradient_wait"
    ALIGNMENT_WAIT = "alignment_wait"
    COLLECT_WAIT = "collect_wait"
    DRAIN_WAIT = "drain_wait"
    AVERAGING = "averaging"
    STEP = "step"
    TARGETS = "targets"
    DRIFT = "drift"
    ALIGNMENT = "alignment"


CODING: tuple[str, ...] = (Phase.ENCODE, Phase.DECODE)
"""of a client rank and of a lane, where codecs are configured"""
COMPUTE: tuple[str, ...] = (Phase.DATA, Phase.FORWARD_BACKWARD, Phase.ESTIMATE, *CODING)
WAITS: tuple[str, ...] = (
    Phase.UPLOAD_WAIT,
    Phase.GRADIENT_WAIT,
    Phase.ALIGNMENT_WAIT,
    Phase.COLLECT_WAIT,
    Phase.DRAIN_WAIT,
)
OF_CLIENTS: tuple[str, ...] = (*COMPUTE, *WAITS, Phase.AVERAGING)
"""of a client rank; `other` is what they leave of a round"""
OF_LANES: tuple[str, ...] = (Phase.STEP, Phase.TARGETS, Phase.DRIFT, *CODING)
PARTS: Mapping[str, tuple[str, ...]] = {
    "compute": COMPUTE,
    "wait": (Phase.UPLOAD_WAIT, Phase.GRADIENT_WAIT, Phase.DRAIN_WAIT),
    "averaging": (Phase.AVERAGING,),
    "alignment": (Phase.ALIGNMENT_WAIT, Phase.COLLECT_WAIT),
}
"""a client's round as tables and figures show it"""
