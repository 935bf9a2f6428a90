"""Puts what a benchmark has measured between marks of a page, in place of what was there."""

from pathlib import Path


def put(page: Path, mark: str, measured: str) -> None:
    """Put Markdown between `<!-- mark -->` and `<!-- end of mark -->`."""
    begins, ends = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begins)
    after = rest.partition(ends)[2]
    page.write_text(f"{before}{begins}\n\n{measured}\n\n{ends}{after}", encoding="utf-8")
