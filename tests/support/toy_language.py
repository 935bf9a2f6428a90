"""A dataset like E2E, of some dozens of short texts, with a tokenizer of its own, and runs on it."""

import csv
import itertools
from pathlib import Path
from typing import Any

from fslsage_rpc.config.loading import from_tree
from fslsage_rpc.config.schema import Config
from support.trees import ALGORITHM, Tree, merged

NAMES = ("Aromi", "Café Élan", "The Über Inn", "東京 Ramen")
FOODS = ("Italian", "crêpes", "noodles")
AREAS = ("riverside", "city centre")
TEMPLATES = (
    "{name} serves {food} in the {area} area.",
    "In the {area} there is {name}, a place for {food}.",
    "Try {name} for {food} – it’s by the {area}!",
    "{food}? {name}, {area}.",
)


def pairs() -> dict[str, list[tuple[str, str]]]:
    """Meaning representations and texts of each file; the test set has 1 to 4 texts for each meaning."""
    combinations = list(itertools.product(NAMES, FOODS, AREAS))  # 24
    texts: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for number, (name, food, area) in enumerate(combinations):
        meaning = f"name[{name}], food[{food}], area[{area}]"
        said = [template.format(name=name, food=food, area=area) for template in TEMPLATES]
        split = "dev" if number % 6 == 5 else "test" if number % 6 == 2 else "train"
        kept = said[: 1 + (number // 6) % 4] if split == "test" else said
        texts[split] += [(meaning, text) for text in kept]
    return texts


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("mr", "ref")) -> None:
    """One of the dataset's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_data(root: Path) -> None:
    """The three files."""
    names = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
    for split, rows in pairs().items():
        write_csv(root / "e2e" / names[split], rows)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer, as GPT-2's is, trained on the texts."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    texts = [text for rows in pairs().values() for pair in rows for text in pair]
    tokenizer.train_from_iterator(
        texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))


def toy_tree(root: Path, *changes: Tree) -> Tree:
    """A small run on the texts at fp64: a GPT-2 of 4 blocks, cut behind the first.

    LoRA alone is trained, and the auxiliary model has the other three blocks.
    """
    adamw = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.01}
    tree: Tree = {
        "rounds": 2,
        "precision": "fp64",
        "transport": "local",
        "device": "cpu",
        "clients": {"count": 3, "batch_size": 8},
        "data": {
            "name": "fslsage_rpc.language.task:LanguageTask",
            "arguments": {"tokenizer": str(root / "tokenizer"), "tokens": 48, "vocabulary": "occurring"},
            "root": str(root),
            "partition": "iid",
        },
        "model": {
            "name": "fslsage_rpc.language.model:gpt2",
            "arguments": {"width": 16, "layers": 4, "heads": 2, "lora": {"rank": 2, "alpha": 8}},
            "cut": "h.0",
        },
        "algorithm": {
            **ALGORITHM,
            "alignment": {"epochs": 4, "batch_size": 8, "buffer_size": 16},
        },
        "optimizer": {"client": adamw, "server": adamw, "auxiliary": {"lr": 1e-2}},
        "comm": {"transports": ["uv"], "timeout_seconds": 60},
    }
    for change in changes:
        tree = merged(tree, change)
    return tree


def data_arguments(**arguments: Any) -> Tree:
    """Arguments of the dataset."""
    return {"data": {"arguments": arguments}}


def model_arguments(**arguments: Any) -> Tree:
    """Arguments of the model."""
    return {"model": {"arguments": arguments}}


def toy_config(root: Path, *changes: Tree) -> Config:
    """The same, checked."""
    return from_tree(toy_tree(root, *changes))
