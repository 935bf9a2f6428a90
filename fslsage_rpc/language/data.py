"""The E2E dataset (arXiv 1706.09254): meaning representations of restaurants, and texts that say the same."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fslsage_rpc.config.own import first_line
from fslsage_rpc.config.schema import Data
from fslsage_rpc.errors import HostError, InputError

FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
SEPARATOR = " ||"
"""between the meaning representation and the text"""
IGNORED = -100
"""the label of a position at which nothing is to be predicted"""


@dataclass(frozen=True)
class Pair:
    """A meaning representation, as `name[Aromi], eatType[pub]`, and one text that says it."""

    meaning: str
    reference: str

    @property
    def group(self) -> str:
        """The restaurant: what partitions divide by."""
        return self.meaning.partition("]")[0].partition("[")[2]


@dataclass(frozen=True)
class TokenizedTexts:
    """`tokens` `[N, T + 1]` of int32, padded; the text itself is at positions `starts` `[N]` to `ends` `[N]`
    of them, behind its meaning representation. `labels` `[N]` numbers the restaurants of training texts.
    """

    tokens: Tensor
    starts: Tensor
    ends: Tensor
    labels: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held, each with the samples in front."""
        return self.tokens, self.starts, self.ends, self.labels

    def subset(self, indices: Any) -> "TokenizedTexts":
        """The samples at these indices, copied."""
        return TokenizedTexts(*(tensor[indices] for tensor in self.tensors))


class Vocabulary:
    """From texts to the numbers of tokens and back.

    Args:
        tokenizer: GPT-2's.
        tokens: the ones that have a number, in order.

    Attributes:
        end: the number of the token that ends a text.
    """

    def __init__(self, tokenizer: Any, tokens: Sequence[int]):
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._numbers = {token: number for number, token in enumerate(tokens)}
        self.end = self._numbers[tokenizer.eos_token_id]

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text; one that has no number counts as the end."""
        return [
            [self._numbers.get(token, self.end) for token in tokens]
            for tokens in _tokens(self._tokenizer, texts)
        ]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of these tokens."""
        tokens = [self._tokens[number] for number in numbers]
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def read(root: str, split: str, limit: int | None = None) -> list[Pair]:
    """The first pairs of the train, dev or test file.

    Raises:
        InputError: the file is missing or damaged, or has fewer pairs.
    """
    path = Path(root) / "e2e" / FILES[split]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            pairs = [Pair(row["mr"], row["ref"]) for row in csv.DictReader(file)]
        sound = bool(pairs) and all(pair.group and pair.reference for pair in pairs)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error):
        sound = False
    if not sound:
        expected = ", ".join(f"e2e/{name}" for name in FILES.values())
        raise HostError(
            f"data.root: got {Path(root).absolute()}, where {path.name} of e2e is missing or damaged; "
            f"expected there: {expected}, with columns mr and ref"
        )
    if limit is not None and limit > len(pairs):
        key = "train_limit" if split == "train" else "test_limit"
        raise InputError(f"data.{key}: got {limit}, expected at most {len(pairs)} for e2e")
    return pairs[:limit]


def vocabulary(keys: Data) -> Vocabulary:
    """The tokenizer's vocabulary, or what of it occurs in the dataset.

    Raises:
        InputError: the tokenizer, or a file of the dataset, is missing or damaged.
    """
    tokenizer = _tokenizer(keys.tokenizer, keys.download)
    if keys.vocabulary == "full":
        return Vocabulary(tokenizer, range(len(tokenizer)))
    return Vocabulary(tokenizer, _occurring(keys.root, keys.tokenizer, keys.download))


def prompt(meaning: str) -> str:
    """What a model goes on from when it writes a text."""
    return meaning + SEPARATOR


def tokenize(keys: Data, words: Vocabulary, train: bool) -> TokenizedTexts:
    """The training or the development pairs, cut to `train_limit` or `test_limit`.

    Raises:
        InputError: the file is missing or damaged.
    """
    pairs = read(keys.root, "train" if train else "dev", keys.train_limit if train else keys.test_limit)
    length = keys.tokens + 1
    meanings = words.encode([prompt(pair.meaning) for pair in pairs])
    references = words.encode([" " + pair.reference for pair in pairs])
    tokens = torch.full((len(pairs), length), words.end, dtype=torch.int32)
    starts, ends = torch.zeros(2, len(pairs), dtype=torch.int32)
    for i, (meaning, reference) in enumerate(zip(meanings, references, strict=True)):
        whole = [*meaning, *reference, words.end][:length]
        tokens[i, : len(whole)] = torch.tensor(whole, dtype=torch.int32)
        starts[i], ends[i] = min(len(meaning), length), len(whole)
    if (starts == length).any():  # nothing would be predicted of it
        needed = max(map(len, meanings))
        raise InputError(
            f"data.tokens: got {keys.tokens}, expected at least {needed}, behind which a text begins"
        )
    numbers = {name: number for number, name in enumerate(groups(keys.root))}
    labels = torch.tensor([numbers.get(pair.group, 0) if train else 0 for pair in pairs])
    return TokenizedTexts(tokens, starts, ends, labels)


@cache
def groups(root: str) -> list[str]:
    """The restaurants of the training pairs, by name.

    Raises:
        InputError: the file is missing or damaged.
    """
    return sorted({pair.group for pair in read(root, "train")})


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    tokens: list[list[int]] = tokenizer(texts)["input_ids"]
    return tokens


@cache
def _tokenizer(name: str, download: bool) -> Any:
    from fslsage_rpc.language import hub

    try:
        return hub.load(_whole_tokenizer, name, download)
    except InputError:
        raise
    except Exception as error:  # the hub, the file system, a file that is something else
        raise HostError(
            f"data.tokenizer: got {name!r}, which cannot be loaded ({first_line(error)}); expected a folder "
            "with GPT-2's vocab.json and merges.txt, or a name on the Hugging Face hub"
        ) from None


def _whole_tokenizer(name: str, **keys: Any) -> Any:
    """transformers would make one without its files, too."""
    from fslsage_rpc.language.model import import_extra

    tokenizer = import_extra("transformers").GPT2TokenizerFast.from_pretrained(name, **keys)
    if len(tokenizer) <= 256:
        raise ValueError(f"it has {len(tokenizer)} tokens, fewer than one for each byte and an end")
    return tokenizer


@cache
def _occurring(root: str, tokenizer_name: str, download: bool) -> list[int]:
    tokenizer = _tokenizer(tokenizer_name, download)
    pairs = [pair for split in FILES for pair in read(root, split)]
    texts = [text for pair in pairs for text in (prompt(pair.meaning), " " + pair.reference)]
    return sorted(
        {tokenizer.eos_token_id, *(token for tokens in _tokens(tokenizer, texts) for token in tokens)}
    )
