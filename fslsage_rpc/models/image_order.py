"""Finds models that cannot compute on images in another order of memory."""

from collections.abc import Iterable

import torch

from fslsage_rpc.models.draws import left_as_they_were
from fslsage_rpc.models.segment import Segment
from fslsage_rpc.models.splitting import SplitModel
from fslsage_rpc.models.tracing import PROBE_BATCHES, probe_inputs


def failure_by_order(split: SplitModel, sample_shape: Iterable[int], auxiliary: bool) -> Exception | None:
    """The error of parts of a model that reorder images, on two samples of zeros, on the CPU, in either mode.

    The parts are left as they were, but where one fails, none reorders images any more.

    Args:
        auxiliary: look at the auxiliary model as well.

    Returns:
        None where there is none, or there is one in torch's usual order too.
    """
    halves = [split.client, split.server, split.uncut]
    with torch.no_grad(), left_as_they_were([*halves, split.auxiliary]):
        try:
            _compute(split, sample_shape, auxiliary)
        except Exception as error:  # whatever the user's forward raises
            for part in (*halves, split.auxiliary):
                assert isinstance(part, Segment)
                part.reorder_images(once=False, twice=False)
            try:
                _compute(split, sample_shape, auxiliary)
            except Exception:  # for another reason, which is looked for elsewhere
                return None
            return error
        finally:
            for half in halves:
                half.train()
    return None


def _compute(split: SplitModel, sample_shape: Iterable[int], auxiliary: bool) -> None:
    """All parts; auxiliary models are always in train mode."""
    inputs = probe_inputs(split.client, sample_shape, PROBE_BATCHES[0])
    for training in (True, False):
        for half in (split.client, split.server, split.uncut):
            half.train(training)
        z = split.client(inputs)
        split.server(z)
        split.uncut(inputs)
        if auxiliary:
            split.auxiliary(z)
