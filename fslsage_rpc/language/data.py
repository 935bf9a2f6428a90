"""The E2E dataset (arXiv 1706.09254): meaning representations of restaurants, and texts that say the same."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fslsage_rpc.config.own import first_line
from fslsage_rpc.config.schema import Data
from fslsage_rpc.errors import HostError, InputError
from fslsage_rpc.tasks.tensors import TensorSamples

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


def vocabulary(keys: Data, name: str, occurring: bool) -> Vocabulary:
    """The vocabulary of the tokenizer of that name, or what of it occurs in the dataset.

    Raises:
        InputError: the tokenizer, or a file of the dataset, is missing or damaged.
    """
    tokenizer = _tokenizer(name, keys.download)
    if occurring:
        return Vocabulary(tokenizer, _occurring(keys.root, name, keys.download))
    return Vocabulary(tokenizer, range(len(tokenizer)))


def prompt(meaning: str) -> str:
    """What a model goes on from when it writes a text."""
    return meaning + SEPARATOR


def tokenize(keys: Data, words: Vocabulary, longest: int, train: bool) -> TensorSamples:
    """The training or the development pairs, cut to `train_limit` or `test_limit`.

    Returns:
        Tokens x `[N, longest]`, padded, and y `[N, longest]`, the token that follows each, or IGNORED outside
        the text proper, which is behind its meaning representation. Labels number the restaurants of training
        texts.

    Raises:
        InputError: the file is missing or damaged.
    """
    pairs = read(keys.root, "train" if train else "dev", keys.train_limit if train else keys.test_limit)
    meanings = words.encode([prompt(pair.meaning) for pair in pairs])
    references = words.encode([" " + pair.reference for pair in pairs])
    if (needed := max(map(len, meanings))) > longest:  # nothing would be predicted of it
        raise InputError(
            f"data.arguments.tokens: got {longest}, expected at least {needed}, behind which a text begins"
        )
    x = torch.full((len(pairs), longest), words.end)
    y = torch.full((len(pairs), longest), IGNORED)
    for i, (meaning, reference) in enumerate(zip(meanings, references, strict=True)):
        whole = torch.tensor([*meaning, *reference, words.end][: longest + 1])
        x[i, : len(whole)] = whole[:longest]
        y[i, len(meaning) - 1 : len(whole) - 1] = whole[len(meaning) :]
    numbers = {name: number for number, name in enumerate(groups(keys.root))}
    labels = torch.tensor([numbers.get(pair.group, 0) if train else 0 for pair in pairs])
    return TensorSamples(x, y, labels)


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
            f"data.arguments.tokenizer: got {name!r}, which cannot be loaded ({first_line(error)}); expected "
            "a folder with GPT-2's vocab.json and merges.txt, or a name on the Hugging Face hub"
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
