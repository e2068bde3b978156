"""The plan of the package: rooms in the order in which data flows, none of which knows what comes after it."""

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.clones import ROOT

ROOMS = (
    *("errors", "files", "schema", "parameters", "runtime", "corpus", "models", "objective", "evaluation", "teacher"),
    *("training", "report", "config", "pipeline", "research", "commands", "cli", "__main__"),
)
PARTS_OF_EVALUATION = ("tasks", "scoring", "results")
WHOLE = {"config", "pipeline", "research", "cli"}  # who may hold all of params.yaml

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "microlm").rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "microlm":
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in full)


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports: read when the first test asks, not by every process that collects."""
    return {name: set(imported(path)) for name, path in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_top_level_is_a_few_modules_and_rooms_and_each_says_what_lives_there() -> None:
    top = [path for path in (ROOT / "microlm").iterdir() if path.suffix == ".py" and not path.stem.startswith("__")]
    # a room that is gone may leave a folder of compiled files behind
    rooms = [path for path in (ROOT / "microlm").iterdir() if path.is_dir() and any(path.glob("*.py"))]
    assert len(top) <= 6 and len(rooms) <= 11
    assert {path.stem for path in top} | {path.name for path in rooms} | {"__main__"} == set(ROOMS)
    for folder in (path.parent for path in (ROOT / "microlm").rglob("*.py")):
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert said, f"{folder}: says nothing of itself"


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_module_imports_from_a_later_room(module: str) -> None:
    later = [name for name in imports()[module] if room(name) and ROOMS.index(room(name)) > ROOMS.index(room(module))] \
        if room(module) else []  # fmt: skip
    assert later == []


def test_nothing_imports_itself_on_the_way() -> None:
    graphlib.TopologicalSorter(imports()).prepare()  # CycleError names the circle


def test_what_is_asked_knows_nothing_of_how_it_is_scored_nor_that_of_what_it_means() -> None:
    def part(module: str) -> int:
        names = module.split(".")
        inside = names[1:2] == ["evaluation"] and len(names) > 3
        return PARTS_OF_EVALUATION.index(names[2]) if inside else -1

    assert [(a, b) for a, bs in imports().items() for b in bs if part(a) >= 0 and part(b) > part(a)] == []


def test_only_the_top_holds_all_of_the_parameters() -> None:
    assert (
        sorted(name for name, found in imports().items() if "microlm.config" in found and room(name) not in WHOLE) == []
    )


def test_an_installed_package_has_every_file_that_is_no_module() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["microlm"]
    packed = {file for pattern in patterns for file in (ROOT / "microlm").glob(pattern)}
    others = {file for file in (ROOT / "microlm").rglob("*.*") if file.suffix not in (".py", ".pyc")}
    assert others and others <= packed
