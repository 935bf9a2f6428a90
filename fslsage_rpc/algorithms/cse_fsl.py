"""CSE-FSL: communication- and storage-efficient federated split learning (arXiv 2302.05599, 2507.15816)."""

from torch import Tensor

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import ClientStep, Push


class CseFsl(Algorithm):
    """Clients train on the loss of their own auxiliary model, which trains too; the server returns nothing.

    The server trains on every q-th upload. Client and auxiliary models are averaged each round.
    """

    name = "cse_fsl"
    uses = frozenset({"upload_every"})
    auxiliary = "trained"

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)  # smashed data [B, ...]
        if step % self.keys.upload_every == 0:
            yield Push(z, y)  # one way
        client.backward(z, client.train_auxiliary(z, y))  # the auxiliary loss's own gradient
