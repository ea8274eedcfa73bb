"""The index of transformers' models, kept between processes.

transformers learns which names its 1,700 files of models define by reading all of them, twice, when it is imported:
half a second. Its result is kept in the cache, under the names, sizes and times of all of these files.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from siliang.data.cache import cache_folder, prune, used
from siliang.files import write_text

MODULE, FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
FOLDER = "imports"
# a folder: its subfolders by name, and, by the libraries that they need, the names that each of its modules defines
Index = dict[str | frozenset[str], Any]
MakeIndex = Callable[[str | Path], Index]


def keep_index() -> None:
    """Uses the kept index in this process. Does nothing if transformers is imported already."""
    if MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the module as ever, and replaces its function before anyone has called it."""

    _inner: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        assert self._inner is not None
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._inner is not None
        self._inner.exec_module(module)
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._inner
        if (real := getattr(module, FUNCTION, None)) is not None and module.__file__ is not None:
            setattr(module, FUNCTION, _kept(real, Path(module.__file__).parents[1] / "models"))


def _kept(real: MakeIndex, models: Path) -> MakeIndex:
    """The function, which takes the index of the folder of models from the cache.

    Args:
        real: Makes the index of a folder, or of a file's folder. It calls itself, by its name in the module, for
            subfolders.
    """

    def create_import_structure_from_path(module_path: str | Path) -> Index:
        path = Path(module_path)
        if models not in (path, path.parent) or (path.parent == models and path.suffix != ".py"):
            return real(module_path)
        file: Path | None = None
        with suppress(OSError, ValueError, TypeError):
            file = cache_folder() / FOLDER / f"{_state(models)}.json"
            if file.is_file():
                index = _decoded(json.loads(file.read_text(encoding="utf-8")))
                used(file.parent, file.name)
                return index
        index = real(module_path)
        if file is not None:
            with suppress(OSError):
                file.parent.mkdir(exist_ok=True)
                prune(file.parent)
                write_text(file, json.dumps(_encoded(index)))
        return index

    return create_import_structure_from_path


@cache
def _state(folder: Path) -> str:
    """The names, sizes and times of a folder's files, as a hash."""
    lines = [str(folder), *sorted(_files(str(folder)))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


def _files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                state = entry.stat()
                yield f"{entry.path} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
            elif entry.name != "__pycache__" and entry.is_dir():
                yield from _files(entry.path)


def _encoded(index: Index) -> dict[str, object]:
    folders = {name: _encoded(inner) for name, inner in index.items() if isinstance(name, str)}
    defined = [
        [sorted(needs), {module: sorted(names) for module, names in modules.items()}]
        for needs, modules in index.items()
        if not isinstance(needs, str)
    ]
    return {"folders": folders, "defined": defined}


def _decoded(kept: object) -> Index:
    """The index.

    Raises:
        ValueError, TypeError: That is none.
    """
    if not isinstance(kept, dict) or kept.keys() != {"folders", "defined"}:
        raise ValueError("no folder")
    index: Index = {_name(name): _decoded(inner) for name, inner in kept["folders"].items()}
    for needs, modules in kept["defined"]:
        index[frozenset(map(_text, needs))] = {_name(m): {*map(_name, names)} for m, names in _items(modules)}
    return index


def _items(value: object) -> Iterator[tuple[object, Sequence[object]]]:
    if not isinstance(value, Mapping):
        raise ValueError("no modules")
    yield from value.items()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise ValueError(f"{value!r} is no name")
    return value
