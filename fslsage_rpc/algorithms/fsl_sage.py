"""FSL-SAGE: federated split learning via smashed-activation gradient estimation (arXiv 2505.23182)."""

from torch import Tensor

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Align, BeginAlignment, ClientStep, Collect, Push


class FslSage(Algorithm):
    """Clients step on cut-layer gradients that an auxiliary model estimates; the server trains on every q-th
    upload.

    Every `align_every` (l) rounds the server fits each client's auxiliary model to the true gradients on that
    client's newest uploads. A client that was absent then aligns at its first step when it is back. With
    `alignment.lag` (r) it goes on meanwhile, and takes the fitted model up r rounds later. With a warm
    start round 0 is one of CSE-FSL, and alignments count from round 1.
    """

    name = "fsl_sage"
    uses = frozenset({"upload_every", "align_every", "start"})
    auxiliary = "aligned"

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)  # smashed data [B, ...]
        if step % self.keys.upload_every == 0:
            yield Push(z, y)  # one way
        if step == 0 and self.collects(client.id, t):
            client.auxiliary_weights.load((yield Collect()))  # waits only if it is not fitted yet
        if step == 0 and self.aligns(client.id, t):
            if self.keys.alignment.lag:
                yield BeginAlignment()  # one way
            else:
                client.auxiliary_weights.load((yield Align()))  # the only request that waits
        if t < self._first_alignment:
            client.backward(z, client.train_auxiliary(z, y))  # as in CSE-FSL
        else:
            client.backward(z, client.estimate(z, y))  # ĝ in place of g

    def aligns(self, client: int, t: int) -> bool:
        """Is this the client's first round since an alignment was due?"""
        past = t - self._first_alignment
        if self.keys.align_every is None or past < 0:
            return False
        due = t - past % self.keys.align_every  # the last round in which one was
        return not any(client in self.federation.participants(earlier) for earlier in range(due, t))

    def collects(self, client: int, t: int) -> bool:
        """Does the client take up its last alignment: is that `lag` rounds old, or is another due?"""
        lag, latest = self.keys.alignment.lag, -1  # latest: its last round behind that alignment
        if not lag or self.keys.align_every is None:
            return False
        for earlier in reversed(range(self._first_alignment, t)):
            if client in self.federation.participants(earlier):
                if self.aligns(client, earlier):
                    due = earlier + lag
                    return latest < due and (t >= due or self.aligns(client, t))
                latest = max(latest, earlier)
        return False

    @property
    def _first_alignment(self) -> int:
        """The first round in which alignments are due."""
        return int(self.keys.start == "warm_start")
