"""From tokenized texts to batches of tokens and of those that follow them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fslsage_rpc.language.data import IGNORED, TokenizedTexts
from fslsage_rpc.randomness import numpy_stream


class TokenBatches:
    """Texts kept on the training device, cut there into batches: tokens x `[B, T]`, and y `[B, T]`, the token
    that follows each, or IGNORED outside the text proper.
    """

    def __init__(self, texts: TokenizedTexts, batch_size: int, device: torch.device):
        self.labels = texts.labels
        self._tokens, self._starts, self._ends = (
            tensor.to(device) for tensor in (texts.tokens, texts.starts, texts.ends)
        )
        self._batch_size = batch_size

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All texts as stored, for evaluation."""
        for samples in torch.arange(len(self.labels), device=self._tokens.device).split(self._batch_size):
            yield self._batch(samples)

    def shuffled(
        self, seed: int, round: int, client: int, epochs: int, augment: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of one client in one round; texts are not augmented."""
        shuffle = numpy_stream(seed, "shuffle", round, client)
        for _ in range(epochs):
            order = torch.from_numpy(shuffle.permutation(len(self.labels))).to(self._tokens.device)
            for samples in order.split(self._batch_size):
                yield self._batch(samples)

    def _batch(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._tokens[samples].long()
        following = tokens[:, 1:]
        positions = torch.arange(1, tokens.shape[1], device=tokens.device)
        inside = (positions >= self._starts[samples, None]) & (positions < self._ends[samples, None])
        return tokens[:, :-1], following.where(inside, IGNORED)
