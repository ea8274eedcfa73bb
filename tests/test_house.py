"""Imports go one way: a file imports what stands above it in README's file map, and nothing imports in a circle."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "siliang"
FACADE = ("__init__.py", "__main__.py")  # of siliang itself: they stand on everything

# Imports against the order: (file, what it imports): why it is still there. May only shrink.
UPWARD: dict[tuple[str, str], str] = {}

# Circles, without those that imports against the order make: the files in one. May only shrink.
CIRCLES: dict[frozenset[str], str] = {}

# What the reports may import: records, and the vocabulary.
FOR_REPORTS = ("report/", "records/", "config/", "types.py", "units.py", "errors.py", "files.py", "paths.py")
FOR_REPORTS += ("language.py", "safety/safe_yaml.py", "secrets.py", "terminal.py")
JUDGED = "the task says by which figure a run is judged, and when it has learned nothing"
REPORTS: dict[tuple[str, str], str] = {
    ("report/page.py", "next_steps.py"): "the page ends with the commands that the run can be asked with",
    ("report/gather.py", "tasks/__init__.py"): JUDGED,
    ("report/summary.py", "tasks/__init__.py"): JUDGED,
    ("report/gather.py", "tasks/verdict.py"): JUDGED,
    ("report/gather.py", "tasks/record.py"): "the task says what the record of its run must hold",
}

# Public classes of one name in several files: a reader, and a search, cannot tell them apart. May only shrink.
SAME_NAMES: dict[str, tuple[str, ...]] = {
    "Device": ("plan/device.py", "records/run.py"),
    "Finding": ("capabilities.py", "check/finding.py"),
    "LimitError": ("safety/limited/refused.py", "safety/limits.py"),
    "Tracker": ("memory/track.py", "safety/limited/templates.py"),
}


@cache
def file_map() -> list[list[str]]:
    """The rows of README's file map: names of files and folders in src/siliang."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## File map")[2]
    rows = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    return [re.findall(r"`([^`]+)`", row) for row in rows]


def row_of(file: str) -> int | None:
    """The row of the file map in which a file stands: under its own name, or else its folder's."""
    for name in (file, *(f"{folder.as_posix()}/" for folder in Path(file).parents)):
        found = [i for i, row in enumerate(file_map()) if name in row]
        if found:
            return found[0]
    return None


def modules(root: Path, package: str) -> dict[str, Path]:
    """The files of a package by the names under which they are imported."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.py")):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[Path]:
    """The files that a file imports anywhere in it, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [n if (n := f"{node.module}.{alias.name}") in known else node.module for alias in node.names]
        for name in names:
            if name in known and known[name] != path:
                yield known[name]


@cache
def graph(*packages: str) -> dict[str, frozenset[str]]:
    """What each file of these packages imports of them; names are seen from the package, or from the root."""
    known = {}
    for package in packages:
        known |= modules(SOURCE if package == "siliang" else ROOT / package, package)
    base = SOURCE if packages == ("siliang",) else ROOT

    def name(path: Path) -> str:
        return path.relative_to(base).as_posix()

    return {name(path): frozenset(map(name, imported(path, known))) for path in known.values()}


def upward() -> set[tuple[str, str]]:
    """Imports of what stands below in the file map."""
    found = set()
    for file, others in graph("siliang").items():
        if file in FACADE:
            continue
        here = row_of(file)
        assert here is not None, f"{file} is not in README's file map"
        for other in others:
            there = row_of(other)
            if other not in FACADE and (there is None or there > here):
                found.add((file, other))
    return found


def circles(edges: dict[str, frozenset[str]]) -> set[frozenset[str]]:
    """The sets of files that import each other, directly or through others (Tarjan's strong components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in sorted(edges[file]):
            if other not in index:
                visit(other)
            if other in stack:
                low[file] = min(low[file], low[other])
        if low[file] == index[file]:
            at = stack.index(file)
            if len(stack) - at > 1:
                found.add(frozenset(stack[at:]))
            del stack[at:]

    for file in sorted(edges):
        if file not in index:
            visit(file)
    return found


def test_every_name_of_the_file_map_is_there() -> None:
    names = [name for row in file_map() for name in row]
    assert len(names) == len(set(names)) > 50
    assert [name for name in names if not (SOURCE / name).exists()] == []


def test_imports_go_up_the_file_map() -> None:
    assert upward() == set(UPWARD)


def test_nothing_imports_in_a_circle() -> None:
    left = set(FACADE)
    edges = {
        file: frozenset(other for other in others - left if (file, other) not in UPWARD)
        for file, others in graph("siliang").items()
        if file not in left
    }
    assert circles(edges) == set(CIRCLES)


@pytest.mark.parametrize("package", ["bench", "faults"])
def test_nothing_around_it_imports_in_a_circle(package: str) -> None:
    assert circles(graph(package)) == set()


def test_reports_read_records_alone() -> None:
    found = {
        (file, other)
        for file, others in graph("siliang").items()
        if file.startswith("report/")
        for other in others
        if not other.startswith(FOR_REPORTS)
    }
    assert found == set(REPORTS)


def test_no_name_of_a_class_is_used_twice() -> None:
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path.relative_to(SOURCE).as_posix())
    assert {name: tuple(files) for name, files in found.items() if len(files) > 1} == SAME_NAMES


def test_a_file_that_imports_downward_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from p.b import x\n")
    (tmp_path / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\n")
    known = modules(tmp_path, "p")
    edges = {p.name: frozenset(q.name for q in imported(p, known)) for p in known.values()}
    assert edges == {"a.py": frozenset({"b.py"}), "b.py": frozenset({"a.py"})}
    assert circles(edges) == {frozenset({"a.py", "b.py"})}


def test_the_list_of_names_is_in_the_wheel() -> None:
    """`__init__.py` reads `__init__.pyi`. The wheel has all of the package's files but those that git ignores."""
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert built["targets"]["wheel"] == {"packages": ["src/siliang"]} and set(built) == {"targets"}
    assert (ROOT / "src" / "siliang" / "__init__.pyi").is_file()
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not any(fnmatch("__init__.pyi", pattern) for pattern in patterns)
