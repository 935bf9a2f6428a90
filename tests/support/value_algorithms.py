"""Algorithms whose requests depend on values, for tests and the ranks that they start.

With the digits and seeds of `trees.tree` their thresholds lie between the values that occur.
"""

from torch import Tensor

from fslsage_rpc.algorithms import Algorithm
from fslsage_rpc.parties.client import Client
from fslsage_rpc.parties.requests import Align, ClientStep, Exchange, Push


def size(gradient: Tensor) -> float:
    """The norm of a cut-layer gradient `[B, ...]` of a mean over a batch, as if B were 1."""
    return (gradient.norm() * len(gradient) ** 0.5).item()


class Picky(Algorithm):
    """CSE-FSL that uploads only batches from which there is much to learn."""

    auxiliary = "trained"
    requests_depend_on_values = True
    least_size = 0.547

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        gradient = client.train_auxiliary(z, y)
        if size(gradient) > self.least_size:
            yield Push(z, y)
        client.backward(z, gradient)


class UploadsAll(Picky):
    """CSE-FSL that uploads every batch."""

    least_size = 0.0


class UploadsNone(Picky):
    """Clients that train on a loss of their own, and a server that does nothing."""

    least_size = float("inf")


class Sparing(Picky):
    """SplitFedV1 that waits for the true gradient only where its own is large.

    Each client has a server model of its own, so the order in which requests arrive changes nothing.
    """

    server_replicas = True

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        gradient = client.train_auxiliary(z, y)
        if size(gradient) > self.least_size:
            gradient = yield Exchange(z, y)
        client.backward(z, gradient)


class AlignsOnNeed(Algorithm):
    """FSL-SAGE that begins as CSE-FSL, and then aligns where the estimate is large."""

    uses = frozenset({"average_auxiliary", "alignment", "measure_drift"})
    auxiliary = "aligned"
    requests_depend_on_values = True
    most_size = 0.49

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        yield Push(z, y)
        if t == 0:
            client.backward(z, client.train_auxiliary(z, y))
            return
        if step == 0 and size(client.estimate(z, y)) > self.most_size:
            client.auxiliary_weights.load((yield Align()))
        client.backward(z, client.estimate(z, y))


class AlignsOnNeedApart(AlignsOnNeed):
    """With a server model for each client: the order in which requests arrive changes nothing."""

    server_replicas = True


class AlignsTooSoon(AlignsOnNeed):
    """Asks for an alignment when there is nothing to align on."""

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        z = client.forward(x)
        client.auxiliary_weights.load((yield Align()))
        client.backward(z, client.estimate(z, y))


class LeavesOut(Algorithm):
    """FedAvg that leaves out batches of large digits: what it does depends on values, and it asks nothing."""

    client_holds_whole_model = True
    requests_depend_on_values = True

    def client_step(self, client: Client, t: int, step: int, x: Tensor, y: Tensor) -> ClientStep:
        if y.double().mean() < 5:
            client.train_whole_model(x, y)
        yield from ()
