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
    `alignment.lag` (r) it goes on meanwhile, and takes the fitted model up r rounds later. With `warm_start`
    the first round is one of CSE-FSL, and rounds count from the next.
    """

    name = "fsl_sage"
    uses = frozenset({"upload_every", "align_every", "warm_start"})
    auxiliary = "aligned"

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)  # smashed data [B, ...]
        if step % self.keys.upload_every == 0:
            yield Push(z, y)  # one way
        if self.keys.warm_start and t == 0:
            client.backward(z, client.train_auxiliary(z, y))  # as in CSE-FSL
            return
        if step == 0 and self.collects(client.id, t):
            client.auxiliary_weights.load((yield Collect()))  # fitted meanwhile
        if step == 0 and self.aligns(client.id, t):
            if self.keys.alignment.lag:
                yield BeginAlignment()  # one way
            else:
                client.auxiliary_weights.load((yield Align()))  # the only step that waits
        client.backward(z, client.estimate(z, y))  # ĝ in place of g

    def aligns(self, client: int, t: int) -> bool:
        """Is this the client's first round since an alignment was due?"""
        past = t - int(self.keys.warm_start)  # rounds in which alignments could be due
        if self.keys.align_every is None or past < 0:
            return False
        due = t - past % self.keys.align_every  # the last round in which one was
        return not any(client in self.federation.participants(earlier) for earlier in range(due, t))

    def collects(self, client: int, t: int) -> bool:
        """Is it the client's first round in which its last alignment is `lag` rounds old, or it aligns anew?"""
        lag, latest = self.keys.alignment.lag, -1  # latest: the client's last round since then
        if not lag or self.keys.align_every is None:
            return False
        for earlier in reversed(range(t)):
            if client in self.federation.participants(earlier):
                if self.aligns(client, earlier):
                    due = earlier + lag
                    return latest < due and (t >= due or self.aligns(client, t))
                latest = max(latest, earlier)
        return False
