"""A page of paragraphs, tables and pictures, written as Markdown and as one HTML file that say the same."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.8rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
.facts th, .facts td { text-align: left; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; }
.narrow { display: inline-block; width: 34rem; max-width: 100%; margin-right: 1rem; }
figcaption { color: #555; font-size: 0.9rem; }
"""


FORMATS = ("png", "svg", "pdf")
"""of files of figures, in the order in which a Markdown page would show them"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 2 is a section, level 3 a part of one."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows, the others hold figures (or, in one of `facts`, texts)."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure, as the files that it is in: each under its name beside the Markdown page.

    Attributes:
        png: the figure inside the HTML page, whatever the files are.
        files: contents by name; the first is the one that the Markdown page shows.
        narrow: as wide as a column of a paper, so that the HTML page has room for two beside each other.
    """

    png: bytes
    files: Mapping[str, bytes]
    caption: str
    narrow: bool = False

    @property
    def title(self) -> str:
        """The first sentence of the caption."""
        return self.caption.partition(". ")[0]


Block = str | Heading | Table | Picture
"""a piece of a page; a text is a paragraph"""


@dataclass(frozen=True)
class Page:
    """A titled page."""

    title: str
    blocks: Sequence[Block]

    @property
    def pictures(self) -> list[Picture]:
        """The pictures on it."""
        return [block for block in self.blocks if isinstance(block, Picture)]


def to_markdown(page: Page) -> str:
    """The page as Markdown; its pictures are files beside it."""
    return "\n\n".join([f"# {_literal(page.title)}", *map(_markdown, page.blocks)]) + "\n"


def to_html(page: Page) -> str:
    """The page as one HTML file that needs no other."""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"<title>{html.escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{html.escape(page.title)}</h1>",
            *map(_html, page.blocks),
            "</body>\n</html>\n",
        ]
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_literal(block.text)}"
        case Table():
            rule = [":---" if block.facts or not column else "---:" for column in range(len(block.headers))]
            lines = [map(_literal, block.headers), rule, *(map(_literal, row) for row in block.rows)]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Picture():
            file = next(iter(block.files))
            shown = "" if file.endswith(".pdf") else "!"  # which Markdown links to, and does not show
            return f"{shown}[{_literal(block.title)}]({file})\n\n{_literal(block.caption)}"
    return _literal(block)


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Table():
            kind = ' class="facts"' if block.facts else ""
            head = "".join(f"<th>{html.escape(header)}</th>" for header in block.headers)
            rows = "\n".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in block.rows
            )
            table = f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
            return f'<div class="table">{table}</div>'
        case Picture():
            data = base64.b64encode(block.png).decode("ascii")
            caption = html.escape(block.caption)
            image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(block.title)}">'
            kind = ' class="narrow"' if block.narrow else ""
            return f"<figure{kind}>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"
    return f"<p>{html.escape(block)}</p>"


def _literal(text: str) -> str:
    """The text on one line, with what Markdown would take for a mark escaped."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))
