"""CSE-FSL: communication- and storage-efficient federated split learning (arXiv 2302.05599, 2507.15816)."""

from torch import Tensor

from fslsage_rpc.algorithms.base import Algorithm, Sizes
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import ClientStep, Push


class CseFsl(Algorithm):
    """Clients train on the loss of their own auxiliary model, which trains too; the server returns nothing.

    The server trains on every q-th upload. Client and auxiliary models are averaged each round.
    """

    name = "cse_fsl"
    uses = frozenset({"upload_every"})
    auxiliary = "trained"

    def client_step(self, client: Client, round: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)  # smashed data [B, ...]
        if step % self.keys.upload_every == 0:
            yield Push(z, y)  # one way
        client.backward(z, client.train_auxiliary(z, y))  # the auxiliary loss's own gradient

    def request_steps(self, client: int, round: int) -> list[int]:
        return list(range(0, self.federation.steps(client), self.keys.upload_every))

    def averages_auxiliary(self, round: int) -> bool:
        return True

    def paper_bytes(self, sizes: Sizes, round: int) -> int:
        """2|C| and 2|A|, and z at each upload."""
        participants = self.federation.participants(round)
        sizes_of = self.federation.batch_sizes
        uploaded = sum(sum(sizes_of[client][:: self.keys.upload_every]) for client in participants)
        return 2 * (sizes.client + sizes.auxiliary) * len(participants) + sizes.smashed * uploaded
