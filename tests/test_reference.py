"""The oracle against plain loops: a round of each algorithm, with nothing of the project's but the models."""

import copy
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fslsage_rpc.config.schema import Data, Model
from fslsage_rpc.data.datasets import load
from fslsage_rpc.models.splitting import build
from support.rank_program import train_locally

BATCH, UPLOAD_EVERY, EPOCHS, BUFFER, ALIGN_BATCH, LR = 16, 2, 3, 40, 25, 3e-3
PARTS = [list(range(0, 70)), list(range(70, 115)), list(range(115, 149))]
SEED = 5
TREE: dict[str, Any] = {
    "seed": SEED,
    "rounds": 1,
    "precision": "fp64",
    "device": "cpu",
    "clients": {"count": 3, "batch_size": BATCH},
    "data": {"partition": "file", "test_limit": 60},
    "algorithm": {
        "upload_every": UPLOAD_EVERY,
        "align_every": 1,
        "start": "paper",
        "average_auxiliary": "alignment",
        "alignment": {"epochs": EPOCHS, "batch_size": ALIGN_BATCH, "buffer_size": BUFFER},
    },
    "optimizer": {party: {"lr": LR, "weight_decay": 1e-4} for party in ("client", "server", "auxiliary")},
}


def keyed(purpose: str, client: int) -> np.random.Generator:
    words = np.random.SeedSequence([SEED, zlib.crc32(purpose.encode()), 0, client]).generate_state(
        1, np.uint64
    )
    return np.random.default_rng(int(words[0]) >> 1)


def client_batches(client: int) -> list[tuple[Tensor, Tensor]]:
    digits = load(Data(), train=True)
    images = (digits.images.double() / 16 - 0.305) / 0.376
    order = torch.tensor(PARTS[client])[
        torch.from_numpy(keyed("shuffle", client).permutation(len(PARTS[client])))
    ]
    return [(images[part], digits.labels[part]) for part in order.split(BATCH)]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=LR, weight_decay=1e-4)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def gradient_at(model: nn.Module, z: Tensor, y: Tensor, graph: bool = False) -> Tensor:
    z = z.detach().clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(z), y), z, create_graph=graph)[0]


def mean(models: list[nn.Module], shares: list[float]) -> list[Tensor]:
    return [
        sum(share * p for share, p in zip(shares, group, strict=True))
        for group in zip(*(m.parameters() for m in models), strict=True)
    ]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-12 * b.norm())


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module, nn.Module]:
    split = build(Model(name="simple_conv"), 10, (1, 8, 8), SEED, torch.float64)
    return split.client, split.server, split.auxiliary


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "partition.json"
    path.write_text(str(PARTS))
    return {**TREE, "data": {**TREE["data"], "partition_file": str(path)}}


SHARES = [len(part) / 149 for part in PARTS]
CASES = [("round_robin", "none"), ("client_major", "none"), ("round_robin", "bf16")]


def travelled(codec: str, tensor: Tensor) -> Tensor:
    return tensor.detach().bfloat16().double() if codec == "bf16" else tensor.detach().clone()


def codecs(codec: str) -> dict[str, Any]:
    return {"codec": dict.fromkeys(("smashed", "gradient", "auxiliary"), codec)}


@pytest.mark.parametrize(("order", "codec"), CASES)
def test_one_round_of_fsl_sage(
    order: str, codec: str, tree: dict[str, Any], models: tuple[nn.Module, nn.Module, nn.Module]
) -> None:
    client_model, server, auxiliary = models
    clients = [copy.deepcopy(client_model) for _ in PARTS]
    auxiliaries = [copy.deepcopy(auxiliary) for _ in PARTS]
    batches = [client_batches(i) for i in range(3)]
    optimizers = [adam(m) for m in clients]
    server_optimizer = adam(server)
    buffers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in PARTS]
    losses: list[tuple[float, int]] = []

    def local_step(i: int, k: int) -> None:
        x, y = batches[i][k]
        z = clients[i](x)
        if k % UPLOAD_EVERY == 0:
            uploaded = travelled(codec, z)
            loss = F.cross_entropy(server(uploaded), y)
            losses.append((loss.item(), len(y)))
            step(server_optimizer, loss)
            buffers[i] += list(zip(uploaded, y, strict=True))
            buffers[i] = buffers[i][-BUFFER:]
        if k == 0:
            zs, ys = (torch.stack(part) for part in zip(*buffers[i], strict=True))
            chunks = list(zip(zs.split(ALIGN_BATCH), ys.split(ALIGN_BATCH), strict=True))
            targets = [gradient_at(server, *chunk) for chunk in chunks]
            auxiliary_optimizer = adam(auxiliaries[i])
            for _ in range(EPOCHS):
                for (z_a, y_a), target in zip(chunks, targets, strict=True):
                    estimate = gradient_at(auxiliaries[i], z_a, y_a, graph=True)
                    step(auxiliary_optimizer, ((estimate - target) ** 2).sum())
            for fitted, in_use in zip(auxiliaries[i].parameters(), auxiliary.parameters(), strict=True):
                if codec == "bf16":
                    fitted.data = in_use.data + travelled(codec, fitted - in_use)
        optimizers[i].zero_grad()
        z.backward(gradient_at(auxiliaries[i], z, y))
        optimizers[i].step()

    turns = [(i, k) for i in range(3) for k in range(len(batches[i]))]
    for i, k in turns if order == "client_major" else sorted(turns, key=lambda turn: (turn[1], turn[0])):
        local_step(i, k)

    outcome = train_locally({**tree, "server": {"order": order}, "comm": codecs(codec)})
    assert close(outcome.tensors["client 1/floats"], flat(mean(clients, SHARES)))
    assert close(outcome.tensors["server of 1/floats"], flat(list(server.parameters())))
    assert close(outcome.tensors["client 1 auxiliary/floats"], flat(mean(auxiliaries, SHARES)))
    expected_loss = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert outcome.lines[0]["train_loss"] == pytest.approx(expected_loss, rel=1e-12)


@pytest.mark.parametrize(("order", "codec"), CASES)
def test_one_round_of_splitfed_v1(
    order: str, codec: str, tree: dict[str, Any], models: tuple[nn.Module, nn.Module, nn.Module]
) -> None:
    client_model, server_model, _ = models
    clients = [copy.deepcopy(client_model) for _ in PARTS]
    replicas = [copy.deepcopy(server_model) for _ in PARTS]
    losses: list[tuple[float, int]] = []
    for i in range(3):
        whole = nn.Sequential(clients[i], replicas[i])
        optimizer = adam(whole)
        for x, y in client_batches(i):
            z = clients[i](x)
            uploaded = travelled(codec, z).requires_grad_()
            loss = F.cross_entropy(replicas[i](uploaded), y)
            losses.append((loss.item(), len(y)))
            optimizer.zero_grad()
            loss.backward()
            z.backward(travelled(codec, uploaded.grad))
            optimizer.step()

    algorithm = {"algorithm": {"name": "splitfed_v1"}, "server": {"order": order}, "comm": codecs(codec)}
    outcome = train_locally({**tree, **algorithm})
    assert close(outcome.tensors["client 2/floats"], flat(mean(clients, SHARES)))
    for client in range(3):
        assert close(outcome.tensors[f"server of {client}/floats"], flat(mean(replicas, SHARES)))
    expected_loss = sum(loss * n for loss, n in losses) / 149
    assert outcome.lines[0]["train_loss"] == pytest.approx(expected_loss, rel=1e-12)
