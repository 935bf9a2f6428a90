"""SplitFed: split learning with parallel clients and federated averaging (arXiv 2004.12088)."""

from typing import Literal

from torch import Tensor

from fslsage_rpc.algorithms.base import Algorithm, Sizes
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import ClientStep, Exchange
from fslsage_rpc.randomness import numpy_stream


class SplitFed(Algorithm):
    """Every client step waits for the true cut-layer gradient of its batch."""

    @classmethod
    def train_loss_of(cls) -> Literal["batches", "uploads"]:
        return "batches"  # each goes up

    def client_step(self, client: Client, round: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)  # smashed data [B, ...]
        g = yield Exchange(z, y)  # true cut-layer gradient [B, ...]
        client.backward(z, g)

    def request_steps(self, client: int, round: int) -> list[int]:
        return list(range(self.federation.steps(client)))

    def paper_bytes(self, sizes: Sizes, round: int) -> int:
        """2|C|, and z up and g down for each batch."""
        participants = self.federation.participants(round)
        samples = sum(sum(self.federation.batch_sizes[client]) for client in participants)
        return 2 * sizes.client * len(participants) + 2 * sizes.smashed * samples


class SplitFedV1(SplitFed):
    """Every client trains against a server-model replica of its own; client models and replicas are averaged.

    Step for step it computes what FedAvg computes on the whole model.
    """

    name = "splitfed_v1"
    server_replicas = True


class SplitFedV2(SplitFed):
    """All clients train against one server model, which takes one step per batch.

    Within a step the server takes the clients in an order drawn anew each round (`round_robin`);
    `client_major` is the order of the FSL-SAGE authors' serial program.
    """

    name = "splitfed_v2"

    def ranking(self, round: int) -> list[int]:
        drawn = numpy_stream(self.federation.seed, "server order", round)
        order: list[int] = drawn.permutation(self.federation.participants(round)).tolist()
        return order
