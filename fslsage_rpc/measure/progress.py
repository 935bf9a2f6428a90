"""What a rank is doing, in words."""

from dataclasses import dataclass

from fslsage_rpc.measure.timeline import Timeline


@dataclass
class Progress:
    """The round under way and the open phase of the rank's clients. (It outlives the training: it holds
    little.)
    """

    timeline: Timeline
    round: int
    """from 0"""

    def __call__(self) -> str:
        phase = self.timeline.open_phase
        return f"round {self.round + 1}" + (f" ({phase})" if phase else "")
