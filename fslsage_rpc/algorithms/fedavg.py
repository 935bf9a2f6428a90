"""FedAvg: communication-efficient learning of deep networks from decentralized data (arXiv 1602.05629)."""

from torch import Tensor

from fslsage_rpc.algorithms.base import Algorithm
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import ClientStep


class FedAvg(Algorithm):
    """Every client trains its own copy of the whole model; copies are averaged. The server only evaluates."""

    name = "fedavg"
    client_holds_whole_model = True

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        client.train_whole_model(x, y)
        yield from ()  # it asks nothing of the server
