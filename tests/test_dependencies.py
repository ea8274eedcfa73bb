"""What src imports is declared in pyproject.toml, and pinned in constraints.txt."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_HERE = {"deepspeed": "deepspeed"}  # what no test installs, by the name under which it is imported
COMES_WITH = {"filelock": "ray"}  # imported only where that is there


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    return {plain(re.split(r"[<>=!~\[ ]", name, maxsplit=1)[0]) for name in wanted}


def imported() -> set[str]:
    """The top-level packages that src imports, siliang and Python's own left out."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return (
        found - set(sys.stdlib_module_names) - {"siliang", "_typeshed"}
    )  # the latter: what type checkers have of Python


def test_what_is_imported_is_declared() -> None:
    known = packages_distributions()
    names = imported() - {name for name, other in COMES_WITH.items() if other in declared()}
    distributions = {name: {plain(d) for d in known.get(name, [NOT_HERE.get(name, name)])} for name in names}
    assert {name for name, found in distributions.items() if not found & declared()} == set()


def test_what_is_declared_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {plain(line.partition("==")[0]) for line in lines if "==" in line}
    assert declared() - pinned <= {"deepspeed"}  # which no test of ours installs
