"""The table of `fslsage check --cuts`."""

import torch

from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError
from fslsage_rpc.models.cuts import list_cuts
from fslsage_rpc.tasks import open_task


def cut_lines(config: Config) -> list[str]:
    """A table of the cuts of a configuration's model: smashed data of a sample, weights and multiply-adds of
    a sample's forward pass on each side.

    Raises:
        InputError: there is no such model, or it cannot be cut.
    """
    task = open_task(config)
    with torch.device("meta"):
        cuts = list_cuts(config.model, task.classes, task.sample_shape)
    if not cuts:
        raise InputError(
            f"model.name: got {config.model.name!r}, which can be cut nowhere: no module's output is one "
            "tensor with weights before and behind it, on the way to one tensor"
        )
    element_bytes = task.precision.smashed.itemsize
    head = (
        "cut",
        "smashed data",
        "bytes/sample",
        "client params",
        "server params",
        "client MACs",
        "server MACs",
    )
    rows = [
        (
            cut.name,
            "x".join(map(str, cut.smashed_shape)),
            f"{cut.smashed_elements * element_bytes:,}",
            f"{cut.client_parameters:,}",
            f"{cut.server_parameters:,}",
            f"{cut.client_multiply_adds:,}",
            f"{cut.server_multiply_adds:,}",
        )
        for cut in cuts
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
