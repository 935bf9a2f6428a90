"""The rules of style of CONTRIBUTING.md that can be counted."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
FOLDERS = ("fslsage_rpc", "launch", "benchmarks", "configs", "docs", "examples", "tests")
EXEMPT = "tests/style_exempt.txt"
LONGEST = 25
END = re.compile(r"""(?<!\be\.g\.)(?<!\bi\.e\.)(?<=[.!?])[)"'’”]*(?=\s|$)""")
# Paragraphs of a docstring, and items: `- text` and `name: text`.
BLOCK = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*] |[*]*\w+(?:, \w+)*: ))|(?<=:)\n")
# Code of a docstring: spans, and indented lines behind an empty one.
CODE = re.compile(r"`[^`]+`|(?<=\n\n)(?: {4}.*(?:\n|$))+")
UNITS = "%|[mµun]?s|min|h|seconds?|minutes?|hours?|[KMGTk]?i?B|bytes|[KMGkmg]?bit(?:/s)?"
FIGURE = re.compile(rf"\([^()]*?(?<![\w.])(?:\d[\d.,]*\s?(?:{UNITS})(?!\w)|0\.\d+(?![\d.]))[^()]*\)")
EMPTY_OPENING = re.compile(r"(?:That of|Of|What|See)\b")
IMPORT = re.compile(r"^\s*(?:from|import) .*\btest_\w+.*$", re.MULTILINE)
SILENCE = re.compile(r"#\s*(?:type: ignore(?:\[[^]]*\])?|noqa(?:: *[A-Z]+\d+(?:, *[A-Z]+\d+)*)?)(.*)")


def sentences(text: str) -> list[str]:
    return [part.strip() for part in END.split(text) if part.strip()]


def complaints_about_prose(text: str) -> Iterator[str]:
    """Complaints about one paragraph, in which `code` stands for each code span."""
    for sentence in sentences(text):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if len(words) > LONGEST:
            yield f"{len(words)} words, {LONGEST} at most: {' '.join(words[:6])} ..."
    for bracket in FIGURE.findall(text):
        yield f"a figure in brackets: {bracket}"


def complaints_about_markdown(text: str) -> Iterator[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in pairwise(tokens):
        if before.type != "paragraph_open":
            continue  # headings, tables and code
        breaks = {"softbreak": "\n", "hardbreak": "\n", "code_inline": "code"}
        parts = [breaks.get(part.type, part.content) for part in token.children or () if part.type != "image"]
        prose = "".join(parts)
        yield from complaints_about_prose(prose)
        lines = prose.split("\n")
        for line in lines:
            if len(sentences(line)) > 1:
                yield f"more than one sentence on a line: {line[:40]} ..."
        for line in lines[:-1]:
            if not re.search(END.pattern + "$", line):
                yield f"a line ends within a sentence: ... {line[-40:]}"


def complaints_about_docstring(text: str) -> Iterator[str]:
    prose = CODE.sub("code", inspect.cleandoc(text))
    if opening := EMPTY_OPENING.match(prose):
        yield f"a docstring begins with {opening[0]!r}: {prose[:40]} ..."
    for block in BLOCK.split(prose):
        yield from complaints_about_prose(block)


def complaints_about_python(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(docstring))):
                yield from complaints_about_docstring(docstring)


@cache
def complaints() -> dict[str, list[str]]:
    """Complaints about each file that has any, by its path."""
    check = {".md": complaints_about_markdown, ".py": complaints_about_python}
    files = [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    found = {
        str(file.relative_to(ROOT)): list(check[file.suffix](file.read_text(encoding="utf-8")))
        for file in files
        if file.suffix in check
    }
    return {file: said for file, said in found.items() if said}


def exempt() -> list[str]:
    lines = (ROOT / EXEMPT).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_prose() -> None:
    old = exempt()
    wrong = [f"{file}: {line}" for file, said in complaints().items() if file not in old for line in said]
    assert not wrong, "\n" + "\n".join(wrong)


def test_exemptions_only_shrink() -> None:
    missing = [file for file in exempt() if not (ROOT / file).is_file()]
    assert not missing, f"{EXEMPT} names files that are not there"
    clean = [file for file in exempt() if file not in complaints()]
    assert not clean, f"these follow the rules now: take their lines out of {EXEMPT}"


def test_silenced_tools_say_why() -> None:
    silent = [
        f"{file.relative_to(ROOT)}:{number}"
        for folder in ("fslsage_rpc", "launch")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if (silence := SILENCE.search(line)) and not re.search(r"\w\w", silence[1])
    ]
    assert not silent, "`type: ignore` and `noqa` say why on their line"


def test_no_test_file_imports_another() -> None:
    importing = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for line in IMPORT.findall(file.read_text(encoding="utf-8"))
    ]
    assert not importing, "what tests share belongs in tests/support/"


LONG = "one " * 26


@pytest.mark.parametrize(
    ("check", "text", "said"),
    [
        (complaints_about_markdown, "One sentence.\nAnd one of `a. b. c` more.\n\n- an item", []),
        (complaints_about_markdown, f"| a |\n|---|\n| {LONG} |\n\n```\n{LONG}\n```\n\n# {LONG}", []),
        (complaints_about_markdown, "It ran on two ranks (1 GPU, torch 2.11, arXiv 2505.23182, 2024).", []),
        (complaints_about_markdown, "One. Two.", ["more than one sentence on a line"]),
        (complaints_about_markdown, "One sentence on\ntwo lines.", ["a line ends within a sentence"]),
        (complaints_about_markdown, LONG, ["26 words"]),
        (complaints_about_markdown, "It is fast (0.95 of it) and short (15 s).", ["a figure"] * 2),
        (complaints_about_python, '"""See a."""\ndef f():\n    """Of b."""', ["a docstring begins"] * 2),
        (complaints_about_python, f'"""Add.\n\nArgs:\n    a: {LONG[:80]}\n    b: {LONG[:80]}\n"""', []),
        (complaints_about_python, f'"""Add.\n\n    {LONG}\n\nArgs:\n    a: b\n"""', []),
        (complaints_about_python, f'"""Add.\n\nReturns:\n    {LONG}\n"""', ["26 words"]),
    ],
)
def test_the_rules(check: Callable[[str], Iterator[str]], text: str, said: list[str]) -> None:
    found = list(check(text))
    assert len(found) == len(said), found
    assert all(map(str.startswith, found, said)), found
