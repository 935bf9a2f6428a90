"""The order of docs/architecture.md: each file imports only what is left of it, and a name is one thing's."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import fslsage_rpc

PACKAGE = Path(fslsage_rpc.__file__).parent
DOCUMENT = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
(LINE,) = re.findall(r"^`(version errors [\w ]+)`$", DOCUMENT, re.MULTILINE)
ORDER = [*LINE.split(), "__main__"]
"""of packages, and of files that are in none"""
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
SHARED_NAMES = {"base", "run"}
"""files that several packages have: the beginning of one, and what its command does"""


def imported(name: str) -> set[str]:
    """The files of the package that one of them imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports by a relative name"
            modules = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        inside = [each.removeprefix("fslsage_rpc.") for each in modules if each.startswith("fslsage_rpc.")]
        found |= {each for each in inside if each in FILES and each != name}
    return found


IMPORTS = {name: imported(name) for name in FILES if name != "__init__"}


def test_every_package_has_its_place() -> None:
    assert {name.partition(".")[0] for name in IMPORTS} == set(ORDER)


@pytest.mark.parametrize("name", sorted(IMPORTS))
def test_a_file_imports_what_is_left_of_its_package(name: str) -> None:
    place = {package: number for number, package in enumerate(ORDER)}
    mine = place[name.partition(".")[0]]
    assert not [each for each in IMPORTS[name] if place[each.partition(".")[0]] > mine]


def test_no_circle_goes_through_files() -> None:
    TopologicalSorter(IMPORTS).prepare()  # CycleError


def test_one_package_knows_the_device_and_two_the_other_ranks() -> None:
    for name, path in FILES.items():
        text, package = path.read_text(encoding="utf-8"), name.partition(".")[0]
        assert package == "device" or "torch.cuda" not in text, name
        assert package in ("transport", "job") or "torch.distributed" not in _imports_of_others(text), name


def _imports_of_others(text: str) -> set[str]:
    """Modules that a file imports, and their parents."""
    nodes = list(ast.walk(ast.parse(text)))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {".".join(each.split(".")[:2]) for each in named}


def test_a_batch_passes_through_twelve_rooms_that_are_where_the_page_says() -> None:
    rooms = re.findall(r"^\| \w+ \| `(\w+)/(\w+)\.py` \| `([\w.]+)` ", DOCUMENT, re.MULTILINE)
    assert len(rooms) == 12
    for package, file, path in rooms:
        found: object = import_module(f"fslsage_rpc.{package}.{file}")
        for name in path.split("."):
            found = getattr(found, name)


def test_a_name_is_one_things() -> None:
    files = Counter(name.rpartition(".")[2] for name in FILES if name not in ORDER)
    assert {name for name, count in files.items() if count > 1} <= SHARED_NAMES
    classes = Counter(
        node.name
        for path in FILES.values()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not {name for name, count in classes.items() if count > 1}
