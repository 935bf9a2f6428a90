"""Language modelling: texts that say what a meaning representation states."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fslsage_rpc.config.schema import Config
from fslsage_rpc.language import data as e2e
from fslsage_rpc.language.data import IGNORED, TokenizedTexts
from fslsage_rpc.language.tokens import TokenBatches
from fslsage_rpc.models.tracing import TokenShape
from fslsage_rpc.tasks.base import Score, Task


class LanguageTask(Task):
    """Tokens `[B, T]` to logits `[B, T, classes]` of the token that follows each, trained on the
    cross-entropy at the positions of the text alone: neither its meaning representation nor padding.

    The test set of `load` is E2E's development set. A prediction is one token.
    """

    metrics = ("perplexity",)

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocabulary = e2e.vocabulary(config.data)
        self.classes = len(self.vocabulary)
        self.sample_shape = TokenShape((config.data.tokens,))
        self.label_shape = (config.data.tokens,)
        self.groups = len(e2e.groups(config.data.root))

    @property
    def train_samples(self) -> int:
        keys = self.config.data
        return len(e2e.read(keys.root, "train", keys.train_limit))

    def prepare(self) -> None:
        self.load(train=False)

    def load(self, train: bool) -> TokenizedTexts:
        return e2e.tokenize(self.config.data, self.vocabulary, train)

    def batches(self, samples: TokenizedTexts, batch_size: int, device: torch.device) -> TokenBatches:
        return TokenBatches(samples, batch_size, device)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        smoothing = self.config.loss.label_smoothing
        return F.cross_entropy(
            outputs.flatten(0, 1), y.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
        )

    def tally(self, outputs: Tensor, y: Tensor) -> Tensor:
        logits, following = outputs.flatten(0, 1), y.flatten()
        loss = F.cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum").double()
        right = (logits.argmax(1) == following).sum().double()
        return torch.stack([loss, right, (following != IGNORED).sum().double()])

    def score(self, tally: Tensor) -> Score:
        plain = super().score(tally)
        return Score(plain.loss, plain.accuracy, {"perplexity": math.exp(min(plain.loss, 700.0))})
