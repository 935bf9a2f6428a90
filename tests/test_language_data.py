"""E2E's texts as tokens: what is predicted, how they are divided, and what is wrong with files."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fslsage_rpc.config.schema import Config
from fslsage_rpc.errors import InputError
from fslsage_rpc.language import data as e2e
from fslsage_rpc.language.data import IGNORED
from fslsage_rpc.language.task import LanguageTask
from fslsage_rpc.tasks import open_task
from fslsage_rpc.training.experiment import Experiment, check
from support.toy_language import NAMES, data_arguments, pairs, toy_config, write_csv, write_data
from support.trees import Tree
from support.user_input import mistake, one_line

pytest.importorskip("transformers")

CPU = torch.device("cpu")
NOTHING_PREDICTED = torch.full((), IGNORED)


def toy_task(root: Path, *changes: Tree) -> LanguageTask:
    task = open_task(toy_config(root, *changes))
    assert isinstance(task, LanguageTask)
    return task


def opened(config: Config) -> None:
    """What finds mistakes in the data."""
    open_task(config).prepare()


def whole(task: LanguageTask, train: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """All x `[N, T]` and y `[N, T]`."""
    samples = task.load(train)
    ((x, y),) = task.batches(samples, len(samples.labels), CPU).in_order()
    return x, y


# What is predicted


@pytest.mark.parametrize("vocabulary", ["full", "occurring"])
def test_what_is_predicted_is_the_text_and_its_end_and_nothing_else(toy_root: Path, vocabulary: str) -> None:
    task = toy_task(toy_root, data_arguments(vocabulary=vocabulary))
    words = task.vocabulary
    x, y = whole(task)
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (len(pairs()["train"]), 48)
    for inputs, following, (meaning, reference) in zip(x, y, pairs()["train"], strict=True):
        (before,), (text,) = words.encode([meaning + " ||"]), words.encode([" " + reference])
        first = len(before) - 1  # behind the last token of the meaning the text's first one comes
        last = first + len(text)
        assert inputs[: last + 1].tolist() == before + text
        assert following[first : last + 1].tolist() == [*text, words.end]
        assert set(following[:first].tolist()) | set(following[last + 1 :].tolist()) == {IGNORED}
        assert set(inputs[last + 1 :].tolist()) <= {words.end}
        assert words.decode(following[first:last]).strip() == reference


def test_labels_are_the_tokens_one_step_ahead(toy_root: Path) -> None:
    x, y = whole(toy_task(toy_root))
    ahead = y[:, :-1]
    assert torch.equal(ahead, x[:, 1:].where(ahead != IGNORED, NOTHING_PREDICTED))


def test_a_long_text_is_cut_and_its_end_is_then_not_predicted(toy_root: Path) -> None:
    task, cut = toy_task(toy_root), toy_task(toy_root, data_arguments(tokens=26))
    (x, y), (short_x, short_y) = whole(task), whole(cut)
    assert torch.equal(short_x, x[:, :26])
    assert torch.equal(short_y, y[:, :26])
    lengths = [len(words) for words in task.vocabulary.encode([f"{m} || {r}" for m, r in pairs()["train"]])]
    assert min(lengths) < 26 < max(lengths)
    ended = (short_y == cut.vocabulary.end).sum(1).tolist()
    assert ended == [int(length <= 26) for length in lengths]


def test_a_client_draws_each_of_its_texts_once_and_always_in_the_same_order(toy_root: Path) -> None:
    task = toy_task(toy_root)
    samples = task.load(train=True).subset(range(10))
    batches = task.batches(samples, 4, CPU)

    def drawn(seed: int, t: int, client: int, epochs: int = 1) -> list[tuple[int, ...]]:
        parts = batches.shuffled(seed, t, client, epochs, augment=True)
        return [tuple(row.tolist()) for x, y in parts for row in torch.cat((x, y), 1)]

    stored = [tuple(row.tolist()) for x, y in batches.in_order() for row in torch.cat((x, y), 1)]
    assert len(stored) == 10
    assert [len(x) for x, _ in batches.shuffled(0, 0, 0, 1, True)] == [4, 4, 2]
    assert Counter(drawn(0, 0, 0)) == Counter(stored)
    assert Counter(drawn(0, 0, 0, epochs=2)) == Counter(stored * 2)
    assert drawn(0, 0, 0) == drawn(0, 0, 0)
    orders = [drawn(*keys) for keys in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(set(map(tuple, orders))) == 4


# Words and numbers


@pytest.mark.parametrize("vocabulary", ["full", "occurring"])
def test_every_text_of_the_three_files_comes_back(toy_root: Path, vocabulary: str) -> None:
    words = toy_task(toy_root, data_arguments(vocabulary=vocabulary)).vocabulary
    texts = [text for rows in pairs().values() for row in rows for text in (row[0] + " ||", " " + row[1])]
    assert any(not text.isascii() for text in texts)
    for numbers, text in zip(words.encode(texts), texts, strict=True):
        assert all(0 <= number < len(words) for number in numbers)
        assert words.decode(numbers) == text


def test_only_what_occurs_has_a_number_and_anything_else_counts_as_the_end(toy_root: Path) -> None:
    full, words = (
        toy_task(toy_root, data_arguments(vocabulary=vocabulary)).vocabulary
        for vocabulary in ("full", "occurring")
    )
    assert 50 < len(words) < len(full) <= 400
    texts = [text for rows in pairs().values() for row in rows for text in (row[0] + " ||", " " + row[1])]
    used = {number for numbers in words.encode(texts) for number in numbers}
    assert used == set(range(len(words))) - {words.end}
    assert words.encode(["\x01"]) == [[words.end]]
    assert words.decode([*words.encode(["Aromi"])[0], words.end]) == "Aromi"
    assert toy_task(toy_root).classes == len(words)


# How texts are divided


def test_texts_are_labelled_by_their_restaurant(toy_root: Path) -> None:
    task = toy_task(toy_root)
    samples = task.load(train=True)
    restaurants = [sorted(NAMES)[label] for label in samples.labels.tolist()]
    assert restaurants == [meaning[len("name[") : meaning.index("]")] for meaning, _ in pairs()["train"]]
    assert task.groups == len(NAMES)
    assert task.train_samples == len(restaurants)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_texts_are_divided_by_restaurant(toy_root: Path, partition: str) -> None:
    keys = {"data": {"partition": partition, "alpha": 0.1, "shards": 1}, "clients": {"count": 4}}
    experiment = Experiment.prepare(toy_config(toy_root, keys))
    counts = Counter(meaning for meaning, _ in pairs()["train"])
    assert sorted(index for part in experiment.parts for index in part) == list(range(counts.total()))
    histograms = torch.tensor([client["labels"] for client in experiment.partition_summary]).double()
    assert histograms.shape == (4, len(NAMES))
    assert histograms.sum() == counts.total()
    most = (histograms.max(1).values / histograms.sum(1)).mean()  # of one restaurant, of a client's texts
    assert most > 0.6 if partition != "iid" else most < 0.6
    for part in experiment.parts:
        mine = experiment.prepared[0].subset(part)
        assert len(mine.x) == len(mine.labels) == len(part)


# What is wrong with the data, in one line


def damaged(root: Path, **files: bytes) -> Path:
    """The toy dataset with some of its files replaced."""
    write_data(root)
    for name, content in files.items():
        (root / "e2e" / f"{name}.csv").write_bytes(content)
    return root


GARBAGE = {
    "empty": b"",
    "header alone": b"mr,ref\n",
    "other columns": b"meaning,text\nname[A],b\n",
    "a column missing": b"mr\nname[A]\n",
    "a text missing": b"mr,ref\nname[A]\n",
    "an empty text": b"mr,ref\nname[A],\n",
    "no restaurant": b"mr,ref\nhello,b\n",
    "not UTF-8": b"mr,ref\n\xff\xfe,\xff\n",
    "NUL": b"mr,ref\n\x00,\x00\n",
    "a zip file": b"PK\x03\x04\x14\x00\x00\x00",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_damaged_file_is_named(split: str, content: bytes, toy_root: Path, tmp_path: Path) -> None:
    damaged(tmp_path, **{f"{split}set": content})
    tokenizer = data_arguments(tokenizer=str(toy_root / "tokenizer"), vocabulary="full")
    said = mistake(opened, toy_config(tmp_path, tokenizer))
    assert said.startswith(f"data.root: got {tmp_path}, where {split}set.csv of e2e is missing or damaged")
    assert all(name in said for name in e2e.FILES.values())


@pytest.mark.parametrize("vocabulary", ["full", "occurring"])
def test_a_missing_folder_is_named(toy_root: Path, tmp_path: Path, vocabulary: str) -> None:
    keys = {"data": {"root": str(tmp_path / "nowhere"), "arguments": {"vocabulary": vocabulary}}}
    assert mistake(check, toy_config(toy_root, keys), 1).startswith("data.root: got ")


PIECES = ["mr", "ref", "name[A]", "x[", "]", ",", '"', "\n", "\r", "\0", "é", "￿", " "]
csv_like = st.lists(st.sampled_from(PIECES), max_size=12).map(lambda parts: "".join(parts).encode())


@given(content=st.binary(max_size=60) | csv_like | csv_like.map(lambda text: b"mr,ref\n" + text))
def test_any_file_is_read_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "e2e" / "devset.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    found, said = [], ""
    try:
        found = e2e.read(str(tmp_path), "dev")
    except InputError as error:
        said = one_line(error)
    assert all(pair.group and pair.reference for pair in found)
    assert bool(found) != said.startswith("data.root: got ")


def broken_tokenizer(root: Path, folder: Path, change: str) -> Path:
    shutil.copytree(root / "tokenizer", folder)
    if change == "no vocab.json":
        (folder / "vocab.json").unlink()
    elif change == "no merges.txt":
        (folder / "merges.txt").unlink()
    elif change == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        name, content = change.split(": ", maxsplit=1)
        (folder / name).write_bytes(content.encode())
    return folder


@pytest.mark.parametrize(
    "change",
    [
        "no vocab.json",
        "no merges.txt",
        "empty",
        "vocab.json: {",
        "vocab.json: []",
        'vocab.json: {"a": 0}',
        "merges.txt: a",
        "merges.txt: zz zzz",
    ],
)
def test_a_broken_tokenizer_is_named(toy_root: Path, tmp_path: Path, change: str) -> None:
    folder = broken_tokenizer(toy_root, tmp_path / "tokenizer", change)
    said = mistake(opened, toy_config(toy_root, data_arguments(tokenizer=str(folder))))
    assert said.startswith(f"data.arguments.tokenizer: got {str(folder)!r}"), said
    assert "vocab.json and merges.txt" in said


def test_a_tokenizer_that_is_not_there_is_named(toy_root: Path) -> None:
    said = mistake(opened, toy_config(toy_root, data_arguments(tokenizer="no/such/folder")))
    assert said.startswith("data.arguments.tokenizer: got 'no/such/folder'")


def test_texts_need_room_behind_their_meanings_and_the_message_says_how_much(toy_root: Path) -> None:
    said = mistake(Experiment.prepare, toy_config(toy_root, data_arguments(tokens=8)))
    assert said.startswith("data.arguments.tokens: got 8, expected at least ")
    needed = int(said.removeprefix("data.arguments.tokens: got 8, expected at least ").split(",")[0])
    mistake(Experiment.prepare, toy_config(toy_root, data_arguments(tokens=needed - 1)))
    _, y = whole(toy_task(toy_root, data_arguments(tokens=needed)))
    assert (y != IGNORED).sum(1).min() == 1


@pytest.mark.parametrize(("key", "split"), [("train_limit", "train"), ("test_limit", "dev")])
def test_limits_take_the_first_texts_and_are_at_most_all(toy_root: Path, key: str, split: str) -> None:
    train, all_texts = split == "train", len(pairs()[split])
    x, _ = whole(toy_task(toy_root), train)
    limited = toy_task(toy_root, {"data": {key: 5}})
    assert torch.equal(whole(limited, train)[0], x[:5])
    assert whole(toy_task(toy_root, {"data": {key: all_texts}}), train)[0].shape == x.shape
    task = toy_task(toy_root, {"data": {key: all_texts + 1}})
    said = mistake(task.load, train)
    assert said == f"data.{key}: got {all_texts + 1}, expected at most {all_texts} for e2e"


def test_more_clients_than_texts_are_refused(toy_root: Path) -> None:
    keys: dict[str, Any] = {"clients": {"count": 9}, "data": {"train_limit": 8}}
    assert "clients.count" in mistake(Experiment.prepare, toy_config(toy_root, keys))


def test_a_byte_order_mark_and_quoted_line_breaks_are_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "e2e" / "devset.csv", [("name[A], x[1]", 'Two\nlines, "quoted".')])
    path = tmp_path / "e2e" / "devset.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert e2e.read(str(tmp_path), "dev") == [e2e.Pair("name[A], x[1]", 'Two\nlines, "quoted".')]
