"""A pytest plugin that makes `peft` mean siliang, so that PEFT's own tests run on it unchanged: `make peft-tests`.

Every module of PEFT has the same names here: siliang's public ones, and views of siliang's layers for PEFT's classes of
layers. A test that uses another name is skipped when it does: "refused" where docs/porting.md says that siliang does
not have it, "internal" where it is no public name of PEFT. A failure that differs.json expects is skipped for the
reason there. Where a test asks for the words of an error or a warning, those of siliang's own are taken too, and the
test is counted as "words".
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
from collections import defaultdict
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from warnings import WarningMessage
from zlib import crc32

import pytest
import torch
from _pytest.raises import RaisesExc
from _pytest.recwarn import WarningsChecker
from views import VIEWS

from siliang.language import Bilingual
from siliang.types import SiliangError

DOC = (Path(__file__).resolve().parents[2] / "docs" / "porting.md").read_text(encoding="utf-8")
REFUSED = set(re.findall(r"`(\w+)`", DOC[DOC.index("## What siliang does not have") :]))
DIFFERS: dict[str, str] = json.loads(Path(__file__).with_name("differs.json").read_text(encoding="utf-8"))

# where siliang has what PEFT's submodules export
HOMES = ["siliang", *(f"siliang.peft_api.{name}" for name in ("functions", "hotswap", "optimizers", "names", "status"))]
PLAIN = {
    "__version__": "0.21.2",
    "CONFIG_NAME": "adapter_config.json",
    "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "WEIGHTS_NAME": "adapter_model.bin",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": "all-linear",
    "infer_device": lambda: "cuda" if torch.cuda.is_available() else "cpu",
    "_get_submodules": lambda model, key: (
        model.get_submodule(key.rpartition(".")[0]),
        model.get_submodule(key),
        key.rpartition(".")[2],
    ),
}
# of PEFT's modules those that tests reach through another module
SUBMODULES = {"boft", "config", "layer", "lora", "lorafa", "model", "optimizers", "shira", "tuners", "utils"}


# ---- the modules ----


class Shim(ModuleType):
    """A module of PEFT."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _value(self.__name__, name)
        setattr(self, name, value)
        return value


def _value(module: str, name: str) -> object:
    """What `module`, one of PEFT's, has under `name`."""
    if name in PLAIN:
        return PLAIN[name]
    if name in (found := VIEWS.get(module.removeprefix("peft."), {})) or name in (found := VIEWS[""]):
        return found[name]
    if name.startswith(("is_transformers_ge_v5", "is_torch_ge", "is_bnb")):
        return _Answer(name, truth=True)
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: importlib.util.find_spec(name[3:-10]) is not None
    if name.startswith("is_"):
        return _Answer(name, truth=False)
    for home in HOMES:
        if (value := getattr(importlib.import_module(home), name, None)) is not None:
            return value
    if name in REFUSED:
        return missing(name, "refused")
    if name in SUBMODULES:
        return importlib.import_module(f"{module}.{name}")
    return missing(name, "internal")


class _Answer:
    """True or False, as a value and as the result of a function."""

    def __init__(self, name: str, *, truth: bool) -> None:
        self._name, self._truth = name, truth

    def __bool__(self) -> bool:
        return self._truth

    def __call__(self) -> bool:
        return importlib.util.find_spec("bitsandbytes") is not None if self._name.startswith("is_bnb") else self._truth


def missing(name: str, why: str) -> Any:
    """In the place of a class or function that siliang lacks; the test that uses it is skipped."""

    def use(*_args: object, **_kwargs: object) -> object:
        if "PYTEST_CURRENT_TEST" not in os.environ:  # a list of cases is being made
            return object.__new__(found)
        pytest.skip(f"{why}: {name}")

    def use_attribute(_self: object, attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return use()

    kind = type("Missing", (type,), {"__call__": use, "__getattr__": use_attribute})
    found = kind(name, (), {"__module__": "peft", "__getattr__": use_attribute})
    return found


class Finder(MetaPathFinder, Loader):
    """Finds the shim's modules before those of an installed PEFT."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "peft" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Shim(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It fills itself."""


sys.meta_path.insert(0, Finder())


# ---- what a result means ----


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--results` and `--every`."""
    parser.addoption("--results", type=Path, help="write each test's outcome there, a line of JSON each")
    parser.addoption("--every", type=int, default=1, help="run one test of this many")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Samples, the same each time."""
    every = int(str(config.getoption("--every")))
    items[:] = [item for item in items if crc32(item.nodeid.encode()) % every == 0]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes outcomes down."""
    if RESULTS is not None and (report.when == "call" or report.outcome != "passed"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else _last_line(report)
        outcome = "words" if report.passed and WORDS.pop(report.nodeid, False) else report.outcome
        with RESULTS.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([report.nodeid, outcome, why]) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Where outcomes are written."""
    global RESULTS
    RESULTS = given.absolute() if (given := config.getoption("--results")) else None


RESULTS: Path | None = None

# ---- siliang's errors and warnings have words of their own; their classes must be PEFT's ----

WORDS: dict[str, bool] = {}  # the tests that saw other words


def _in_other_words(said: object) -> bool:
    """Whether an error or a warning is siliang's own; notes that the test saw it."""
    ours = isinstance(said, SiliangError) or (
        isinstance(said, BaseException) and bool(said.args) and isinstance(said.args[0], Bilingual)
    )
    if ours:
        WORDS[os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]] = True
    return ours


def _raised(self: Any, e: BaseException, theirs: Any = RaisesExc._check_match) -> bool:
    return theirs(self, e) or _in_other_words(e)


def _warned(self: Any, warning: WarningMessage, theirs: Any = WarningsChecker.matches) -> bool:
    of_kind = issubclass(warning.category, self.expected_warning)
    return theirs(self, warning) or (of_kind and _in_other_words(warning.message))


RaisesExc._check_match, WarningsChecker.matches = _raised, _warned


def _last_line(report: pytest.TestReport) -> str:
    """What a failure says, and where."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"{crash.message.splitlines()[0]} at {Path(crash.path).name}:{crash.lineno}" if crash else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Skips instead of failures where a failure is known to be none of siliang's faults."""
    report = yield
    if report.failed and call.excinfo is not None and (why := _reason(item.nodeid, call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {why}")
    return report


def _reason(nodeid: str, error: BaseException) -> str | None:
    """Why a failure is expected; None where it is not."""
    text = str(error)
    refused = next((name for name in REFUSED if re.search(rf"\b{name}\b", text)), None)
    if refused is not None and isinstance(error, AttributeError | TypeError):  # a field that siliang does not have
        return f"refused: {refused}"
    return next((why for pattern, why in DIFFERS.items() if re.search(pattern, nodeid)), None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Models come from the local cache, also the first time, where HF_HUB_OFFLINE says so."""
    utils = sys.modules.get("tests.testing_utils")
    if utils is not None and os.environ.get("HF_HUB_OFFLINE") == "1":
        vars(utils)["_HUB_MODEL_ACCESSES"] = _Everything(int)


class _Everything(defaultdict[str, int]):
    """Says of each model that it has been loaded before."""

    def __contains__(self, key: object) -> bool:
        return True
