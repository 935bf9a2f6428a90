"""The federated average: local clients summed first, then one weighted all-reduce over the client ranks."""

from collections.abc import Callable, Mapping

import torch

from fslsage_rpc.models.flat import Weights, check_shares, weighted_sum


def federated_average(
    models: Mapping[int, tuple[Weights, ...]],
    shares: Mapping[int, float],
    all_reduce: Callable[[Weights], None],
) -> tuple[Weights, ...]:
    """The weighted mean over all participants of all ranks, for each model that a client brings.

    Floating-point numbers are averaged by weight, integers by maximum. All models travel in one buffer.

    Args:
        models: per client of this rank, participant or not, the same tuple of models: (client,) or (client,
            auxiliary).
        shares: w_i of the participants (of all ranks), adding up to 1.
        all_reduce: sums the floats and takes the maximum of the integers over the client ranks, in place.

    Raises:
        ValueError: the shares do not add up to 1.
    """
    check_shares(shares.values())
    mine = [client for client in models if client in shares]
    totals = [
        weighted_sum([models[c][i] for c in mine], [shares[c] for c in mine], like)
        for i, like in enumerate(next(iter(models.values())))
    ]
    joint = Weights(torch.cat([t.floats for t in totals]), torch.cat([t.integers for t in totals]))
    all_reduce(joint)
    floats = joint.floats.split([t.floats.numel() for t in totals])
    integers = joint.integers.split([t.integers.numel() for t in totals])
    return tuple(Weights(f, i) for f, i in zip(floats, integers, strict=True))
