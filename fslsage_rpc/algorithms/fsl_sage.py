"""FSL-SAGE: federated split learning via smashed-activation gradient estimation (arXiv 2505.23182)."""

from torch import Tensor

from fslsage_rpc.algorithms.base import Algorithm, Sizes
from fslsage_rpc.algorithms.cse_fsl import CseFsl
from fslsage_rpc.config import AlgorithmKeys
from fslsage_rpc.federation import Federation
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Align, ClientStep, Push


class FslSage(Algorithm):
    """Clients step on cut-layer gradients that an auxiliary model estimates; the server trains on every q-th
    upload.

    Every `align_every` (l) rounds the server fits each client's auxiliary model to the true gradients on that
    client's newest uploads. A client that was absent then aligns at its first step when it is back. With
    `warm_start` round 0 is one of CSE-FSL, and these rounds count from the next.
    """

    name = "fsl_sage"
    uses = frozenset(
        {"upload_every", "align_every", "average_auxiliary", "warm_start", "alignment", "measure_drift"}
    )
    auxiliary = "aligned"

    def __init__(self, keys: AlgorithmKeys, federation: Federation):
        super().__init__(keys, federation)
        self._warm_start = CseFsl(keys, federation)

    def client_step(self, client: Client, round: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if self.warms_up(round):
            yield from self._warm_start.client_step(client, round, step, x, y)
            return
        z = client.forward(x)  # smashed data [B, ...]
        if step % self.keys.upload_every == 0:
            yield Push(z, y)  # one way
        if step == 0 and self.aligns(client.id, round):
            fitted = yield Align()  # the only blocking remote forward and backward
            client.auxiliary_weights.load(fitted)
        client.backward(z, client.estimate(z, y))  # ĝ in place of g

    def request_steps(self, client: int, round: int) -> list[int]:
        uploads = list(range(0, self.federation.steps(client), self.keys.upload_every))
        return [0, *uploads] if self.aligns(client, round) else uploads

    def aligns(self, client: int, round: int) -> bool:
        if self.keys.align_every is None or self.warms_up(round):
            return False
        due = round - (round - self.keys.warm_start) % self.keys.align_every
        return not any(client in self.federation.participants(earlier) for earlier in range(due, round))

    def warms_up(self, round: int) -> bool:
        return self.keys.warm_start and round == 0

    def averages_auxiliary(self, round: int) -> bool:
        if self.warms_up(round):
            return self._warm_start.averages_auxiliary(round)
        if self.keys.average_auxiliary == "alignment":
            return any(self.aligns(client, round) for client in self.federation.participants(round))
        return self.keys.average_auxiliary == "round"

    def paper_bytes(self, sizes: Sizes, round: int) -> int:
        """2|C|, z at each upload, |A| at an alignment, and 2|A| where the auxiliary models are averaged."""
        if self.warms_up(round):
            return self._warm_start.paper_bytes(sizes, round)
        participants = self.federation.participants(round)
        batches = self.federation.batch_sizes
        uploaded = sum(sum(batches[client][:: self.keys.upload_every]) for client in participants)
        aligned = sum(self.aligns(client, round) for client in participants)
        averaged = len(participants) * self.averages_auxiliary(round)
        models = 2 * sizes.client * len(participants) + sizes.auxiliary * (aligned + 2 * averaged)
        return models + sizes.smashed * uploaded

    @property
    def interval(self) -> int:
        return self.keys.align_every or 1
