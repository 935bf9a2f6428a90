"""Write the page of a nightly run from what it left in a folder: `nightly_page.py FOLDER SECONDS`.

Standard output gets the page, in Markdown.
The exit status is 1 where a test failed, or the quickstart learned too little or too slowly.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

SLOWEST, SEEDS = 10, 3
ACCURACY, LONGEST_SECONDS = 0.95, 90.0
"""bounds for the quickstart, on 2 cores"""
PACKAGES = ("torch", "torchvision", "numpy", "transformers", "peft")


def name(case: ElementTree.Element) -> str:
    """Name a test as pytest does, without its folder."""
    return f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"


def rows(*columns: str, lines: list[tuple[object, ...]]) -> str:
    """Lay out a table."""
    table = [columns, ("---",) * len(columns), *lines]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in table
    )


def quickstarts(folder: Path) -> list[tuple[str, str, str]]:
    """Read each seed's accuracy and seconds."""
    found = []
    for summary in sorted(folder.glob("runs/quickstart-*/summary.json")):
        read = json.loads(summary.read_text(encoding="utf-8"))
        seconds = read["training_seconds"] + read["evaluation_seconds"]
        seed = summary.parent.name.removeprefix("quickstart-")
        found.append((seed, f"{read['test_accuracy']['last'] or 0.0:.4f}", f"{seconds:.1f}"))
    return found


def page(folder: Path, seconds: float) -> tuple[str, bool]:
    """Put the page together, and tell whether all went well."""
    cases = [case for file in folder.glob("*.xml") for case in ElementTree.parse(file).iter("testcase")]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [(case, found) for case in cases if (found := case.find("skipped")) is not None]
    reasons: dict[str, list[str]] = {}
    for case, found in skipped:
        reasons.setdefault(found.get("message", ""), []).append(name(case))
    slowest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:SLOWEST]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    seeds = quickstarts(folder)
    learned = len(seeds) == SEEDS and all(
        float(found) >= ACCURACY and float(took) <= LONGEST_SECONDS for _, found, took in seeds
    )
    counts = [len(cases) - len(failed) - len(skipped), len(failed), len(skipped)]
    parts = [
        "# The nightly tests",
        "`.ci/nightly` writes this page; CONTRIBUTING.md says what the nightly tier holds.",
        rows(
            "what",
            "value",
            lines=[
                ("commit", commit.strip()),
                ("versions", f"Python {platform.python_version()}, {packages}"),
                ("machine", f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"),
                ("minutes", f"{seconds / 60:.0f}"),
                ("tests", "{} passed, {} failed, {} skipped".format(*counts)),
            ],
        ),
        "## The slowest ten",
        rows(
            "test",
            "seconds",
            lines=[(f"`{name(case)}`", f"{float(case.get('time', 0)):.0f}") for case in slowest],
        ),
        "## Failed",
        rows("test", lines=[(f"`{name(case)}`",) for case in failed]) if failed else "Nothing failed.",
        "## Skipped",
        rows(
            "why",
            "tests",
            lines=[(why, ", ".join(f"`{test}`" for test in tests)) for why, tests in reasons.items()],
        )
        if reasons
        else "Nothing was skipped.",
        "## Three seeds of the quickstart",
        rows("seed", "test accuracy", "seconds, evaluation included", lines=seeds),
        "## The soak in small",
        (folder / "soak.md").read_text(encoding="utf-8").strip(),
    ]
    return "\n\n".join(parts), not failed and learned


if __name__ == "__main__":
    text, passed = page(Path(sys.argv[1]), float(sys.argv[2]))
    print(text)
    sys.exit(0 if passed else 1)
