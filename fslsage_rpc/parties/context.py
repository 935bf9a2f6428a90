"""Device, timeline and loss of a party, whatever it computes."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from fslsage_rpc.device.graphs import CapturedOptimizer, Graphed
from fslsage_rpc.device.placement import CPU
from fslsage_rpc.device.streams import WorkQueue
from fslsage_rpc.measure.timeline import Timeline
from fslsage_rpc.models.dropout import Masks
from fslsage_rpc.parties.coding import Codings
from fslsage_rpc.parties.losses import Loss


@dataclass(frozen=True)
class Context:
    """A client's, a lane's or a fit's, and the server's own."""

    device: torch.device = CPU
    timeline: Timeline = field(default_factory=Timeline)
    """of the thread that computes"""
    loss: Loss = F.cross_entropy
    seed: int = 0
    """of the run, from which dropout's masks follow"""
    graphs: bool = False
    """steps are captured, but for those of models that draw masks"""
    queue: WorkQueue = field(default_factory=WorkQueue)
    codings: Codings = field(default_factory=Codings)

    def graphed(self, masks: Masks, optimizer: CapturedOptimizer | None = None) -> Graphed:
        """A computation of a model with these masks, which is captured or not."""
        return Graphed(self.graphs and not masks, optimizer)
