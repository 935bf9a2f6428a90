"""What a finished language model writes, and how it is scored."""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import fslsage_rpc
from fslsage_rpc import cli
from fslsage_rpc.language import data as e2e
from fslsage_rpc.language import generation as texts
from fslsage_rpc.language.beam_search import write_on
from fslsage_rpc.language.generation import bleu, generate, language_run, prompts
from support.commands import fslsage, offer_commands
from support.toy_language import pairs, toy_tree
from support.user_input import mistake

pytest.importorskip("transformers")
pytest.importorskip("peft")

MEANINGS = list(dict.fromkeys(meaning for meaning, _ in pairs()["test"]))
ROWS = [Counter(meaning for meaning, _ in pairs()["test"])[meaning] for meaning in MEANINGS]


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_commands(monkeypatch)


@pytest.fixture(scope="module")
def finished(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned something."""
    output = tmp_path_factory.mktemp("runs")
    learning = {"algorithm": {"name": "splitfed_v2"}, "model": {"arguments": {"lora": {"rank": None}}}}
    keys = {"rounds": 4, "precision": "fp32", "name": "finished", "output": str(output), **learning}
    run = fslsage_rpc.train(toy_tree(toy_root, keys, {"evaluation": {"every": 4}}))
    assert run.rounds[-1]["test_loss"] < 0.8 * math.log(language_run(run.folder)[1].classes)
    return run.folder


def whole_model_writes(folder: Path, meanings: Sequence[str], beams: int) -> list[str]:
    run, task = language_run(folder)
    model = run.split.whole().eval()
    return texts._write(task, lambda tokens: model(tokens)[:, -1], meanings, beams)


# Beam search


def table(rows: dict[int, list[float]]) -> Any:
    """A model whose next token depends on the last one alone, by the shares of the tokens."""

    def next_logits(tokens: Tensor) -> Tensor:
        return torch.tensor([rows[int(last)] for last in tokens[:, -1]]).log()

    return next_logits


MISLED = {1: [0, 0, 0.55, 0.45], 2: [0.34, 0, 0.33, 0.33], 3: [1, 0, 0, 0], 0: [1, 0, 0, 0]}


@pytest.mark.parametrize(("beams", "expected"), [(1, [2]), (3, [3])])
def test_beams_find_what_greed_misses(beams: int, expected: list[int]) -> None:
    begun = torch.tensor([[1]])
    assert write_on(table(MISLED), begun, classes=4, end=0, longest=6, beams=beams) == [expected]


@pytest.mark.parametrize("beams", [1, 2])
def test_texts_end_at_the_longest_and_each_for_itself(beams: int) -> None:
    endless = {1: [0, 0, 1, 0], 2: [0, 0, 1, 0], 3: [1, 0, 0, 0], 0: [1, 0, 0, 0]}
    begun = torch.tensor([[1, 1], [2, 3]])
    written = write_on(table(endless), begun, classes=4, end=0, longest=7, beams=beams)
    assert written == [[2] * 5, []]


# A finished model


def test_greed_takes_the_likeliest_token_each_time(finished: Path) -> None:
    run, task = language_run(finished)
    model, words = run.split.whole().eval(), task.vocabulary
    expected = []
    for tokens in prompts(task, MEANINGS):
        new: list[int] = []
        while len(tokens) + len(new) < 48:
            with torch.no_grad():
                token = int(model(torch.tensor([tokens + new]))[0, -1].argmax())
            if token == words.end:
                break
            new.append(token)
        expected.append(words.decode(new).strip())
    assert all(expected)
    assert whole_model_writes(finished, MEANINGS, beams=1) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_the_two_halves_write_what_the_whole_model_writes(finished: Path, beams: int) -> None:
    meanings = [*MEANINGS, "name[Someone Else], area[elsewhere]"]
    written = generate(finished, meanings, beams)
    assert written is not None
    assert written.texts == whole_model_writes(finished, meanings, beams)
    assert written.wire_bytes == 0  # in one process


def test_texts_do_not_depend_on_what_is_written_beside_them(finished: Path) -> None:
    together = whole_model_writes(finished, [*MEANINGS[:2], MEANINGS[0]], beams=2)
    alone = [whole_model_writes(finished, [meaning], beams=2)[0] for meaning in MEANINGS[:2]]
    assert together == [*alone, alone[0]]


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_two_ranks_write_it_too(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "transport": "rpc"}))
    done = fslsage("generate", folder, *MEANINGS, "--beams", "2", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == whole_model_writes(finished, MEANINGS, beams=2)
    assert "bytes between the two halves" in done.stderr


def test_the_commands_write_and_score(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(finished), *MEANINGS[:2], "--beams", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == whole_model_writes(finished, MEANINGS[:2], 1)
    assert cli.main(["evaluate", str(finished)]) == 0
    (scored,) = capsys.readouterr().out.splitlines()
    assert scored.startswith("test accuracy 0.")
    assert "test perplexity " in scored
    assert cli.main(["bleu", str(finished), "2", "--beams", "1"]) == 0
    (scored,) = capsys.readouterr().out.splitlines()
    assert scored.startswith("BLEU ")
    assert scored.endswith("on 2 meaning representations, 1 beams")


# What is refused


def test_a_meaning_that_leaves_no_room_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = ", ".join(f"food[{number}]" for number in range(30))
    said = mistake(generate, finished, [MEANINGS[0], long], 1)
    assert said.startswith(repr(long))
    assert said.endswith("tokens, expected less than data.arguments.tokens, 48")
    assert cli.main(["generate", str(finished), long]) == 2
    assert capsys.readouterr().err.startswith(f"fslsage_rpc: {long!r}: got ")


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_text_is_refused(finished: Path, capsys: pytest.CaptureFixture[str], empty: str) -> None:
    assert cli.main(["generate", str(finished), MEANINGS[0], empty]) == 2
    said = "fslsage_rpc: generate: got an empty TEXT, expected one as 'name[Aromi], eatType[pub]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "nowhere", "name[A]"],
        ["bleu", "nowhere"],
        ["generate", "RUN", "name[A]", "--beams", "0"],
        ["generate", "RUN", "name[A]", "--beams", "5,10"],
        ["bleu", "RUN", "some"],
        ["bleu", "RUN", "0"],
        ["generate", "RUN"],
    ],
    ids=" ".join,
)
def test_other_mistakes_are_one_line(
    finished: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(finished) if word == "RUN" else word for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fslsage_rpc: ")
    assert "invalid choice" not in line


def test_a_run_on_images_writes_nothing(tmp_path: Path) -> None:
    keys = {"name": "images", "output": str(tmp_path), "rounds": 1, "clients": {"count": 1}}
    run = fslsage_rpc.train(
        {**keys, "data": {"train_limit": 40, "test_limit": 10}, "algorithm": {"name": "fedavg"}}
    )
    for command in (lambda: generate(run.folder, ["a"], 1), lambda: bleu(run.folder, 1, 1)):
        assert mistake(command) == f"{run.folder}: got a run on digits, expected one of a language model"


def test_a_run_without_its_model_writes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.pt").write_bytes(b"garbage")
    said = mistake(generate, tmp_path / "run", MEANINGS[:1], 1)
    assert said.startswith(f"{tmp_path / 'run' / 'model.pt'}: cannot be read")


# BLEU


def written_by(monkeypatch: pytest.MonkeyPatch, hypotheses: Sequence[str]) -> None:
    def write(task: object, next_logits: object, meanings: Sequence[str], beams: int) -> list[str]:
        assert list(meanings) == MEANINGS[: len(meanings)]
        return list(hypotheses[: len(meanings)])

    monkeypatch.setattr(texts, "_write", write)


def references(root: Path) -> list[list[str]]:
    return [[p.reference for p in e2e.read(str(root), "test") if p.meaning == m] for m in MEANINGS]


def test_what_people_wrote_scores_100(
    finished: Path, toy_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    of_each = references(toy_root)
    assert sorted(map(len, of_each)) == [1, 2, 3, 4]
    for place in (0, -1):
        written_by(monkeypatch, [said[place] for said in of_each])
        for limit, meanings in ((None, 4), (2, 2)):
            scored = bleu(finished, limit, 1)
            assert scored.score == pytest.approx(100)
            assert scored.meanings == meanings
    written_by(monkeypatch, ["nothing of it"] * 4)
    assert bleu(finished, None, 1).score < 1


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def papineni(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """Corpus BLEU-4 by its definition, with the reference length nearest to each hypothesis's."""
    logs = 0.0
    for n in range(1, 5):
        right = total = 0
        for said, them in zip(hypotheses, references, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for one in them:
                most |= ngrams(one, n)
            right += (ngrams(said, n) & most).total()
            total += ngrams(said, n).total()
        logs += math.log(right / total) / 4
    length = sum(map(len, hypotheses))
    nearest = sum(
        min((abs(len(one) - len(said)), len(one)) for one in them)[1]
        for said, them in zip(hypotheses, references, strict=True)
    )
    return 100 * math.exp(min(0.0, 1 - nearest / length) + logs)


def test_several_texts_of_unequal_number_are_all_counted(
    finished: Path, toy_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sacrebleu = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a")
    of_each = references(toy_root)
    hypotheses = [said[len(said) // 2].replace(" the ", " that ", 1) + " Good" for said in of_each]
    hypotheses[1] = " ".join(hypotheses[1].split()[:-4])
    split = sacrebleu.Tokenizer13a()
    expected = papineni(
        [split(text).split() for text in hypotheses],
        [[split(text).split() for text in them] for them in of_each],
    )
    first_alone = papineni(
        [split(text).split() for text in hypotheses], [[split(them[0]).split()] for them in of_each]
    )
    written_by(monkeypatch, hypotheses)
    assert 20 < expected < 95
    assert expected != pytest.approx(first_alone, abs=1)
    assert bleu(finished, None, 1).score == pytest.approx(expected, rel=1e-6)
