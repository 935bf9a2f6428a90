"""Language modelling: texts that say what a meaning representation states."""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fslsage_rpc.config.schema import Bounds, Config
from fslsage_rpc.language import data as e2e
from fslsage_rpc.language.data import IGNORED
from fslsage_rpc.models.tracing import TokenShape
from fslsage_rpc.tasks.base import Score, Task
from fslsage_rpc.tasks.tensors import TensorBatches, TensorSamples


class LanguageTask(Task):
    """Tokens `[B, T]` to logits `[B, T, classes]` of the token that follows each, trained on the
    cross-entropy at the positions of the text alone: neither its meaning representation nor padding.

    The test set of `load` is E2E's development set. A prediction is one token.

    Args:
        tokenizer: a folder with GPT-2's vocab.json and merges.txt, or a name on the Hugging Face hub.
        tokens: T; shorter texts are padded, longer ones cut.
        vocabulary: the tokenizer's whole one, or only the tokens that occur in the dataset's three files.
    """

    metrics = ("perplexity",)

    def __init__(
        self,
        config: Config,
        tokenizer: str = "gpt2",
        tokens: Annotated[int, Bounds(minimum=1, maximum=100_000)] = 512,
        vocabulary: Literal["full", "occurring"] = "full",
    ):
        super().__init__(config)
        self.vocabulary = e2e.vocabulary(config.data, tokenizer, occurring=vocabulary == "occurring")
        self.classes = len(self.vocabulary)
        self.sample_shape = TokenShape((tokens,))
        self.label_shape = (tokens,)
        self.groups = len(e2e.groups(config.data.root))

    @property
    def train_samples(self) -> int:
        keys = self.config.data
        return len(e2e.read(keys.root, "train", keys.train_limit))

    def prepare(self) -> None:
        self.load(train=False)

    def load(self, train: bool) -> TensorSamples:
        return e2e.tokenize(self.config.data, self.vocabulary, self.label_shape[0], train)

    def batches(self, samples: TensorSamples, batch_size: int, device: torch.device) -> TensorBatches:
        return TensorBatches(samples, batch_size, device, self.precision.weights)

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
