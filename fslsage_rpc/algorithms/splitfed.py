"""SplitFed: split learning with parallel clients and federated averaging (arXiv 2004.12088)."""

from torch import Tensor

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import ClientStep, Exchange
from fslsage_rpc.randomness import numpy_stream


class SplitFed(Algorithm):
    """Every client step waits for the true cut-layer gradient of its batch."""

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)  # smashed data [B, ...]
        g = yield Exchange(z, y)  # true cut-layer gradient [B, ...]
        client.backward(z, g)


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

    def ranking(self, t: int) -> list[int]:
        drawn = numpy_stream(self.federation.seed, "server order", t)
        order: list[int] = drawn.permutation(self.federation.participants(t)).tolist()
        return order
