"""Files on their way to the machines of a cluster and back: what a run reads is copied to where it is not, once a
machine, and what a run leaves behind speaks of the user's own paths.

No torch here: whoever only carries files need not load it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siliang.data.cache import KEEP_DAYS, cache_folder
from siliang.files import MANIFEST, append, filling, is_pattern, remove_tree, seal, write_text
from siliang.paths import check_links, inside
from siliang.safe_json import dump_json
from siliang.safe_yaml import dump_yaml, parse_yaml
from siliang.types import ClusterError

FOLDER = "cluster"  # in the cache
CHUNK_BYTES = 2**25
TOKENIZER = "tokenizer_name_or_path"  # the one setting of a method that may be a folder
LEFT_OUT = (".git", ".cache")  # of a downloaded folder


@dataclass(frozen=True)
class Freight:
    """What a setting names: a file, a folder, or the files of a pattern.

    Attributes:
        given: The setting.
        root: The folder that `name` and `files` are seen from, absolute.
        name: What the setting names in it.
        files: Name, bytes, and time of the last change in nanoseconds.
    """

    given: str
    root: str
    name: str
    files: tuple[tuple[str, int, int], ...]

    def is_here(self, work: str) -> bool:
        """Whether this machine has it too, on a disk that both use.

        Args:
            work: The folder that relative paths are seen from.
        """
        absolute = Path(self.given).expanduser().is_absolute()
        try:
            found = tuple((name, *_state(Path(self.root) / name)) for name, *_ in self.files)
        except OSError:
            return False
        return found == self.files and (absolute or Path(work).is_dir())


@dataclass(frozen=True)
class Crate:
    """Files in pieces.

    Attributes:
        digest: Over names and bytes.
        files: Name, bytes, and what gives each piece.
    """

    digest: str
    files: tuple[tuple[str, int, tuple[Any, ...]], ...]


def freight_of(given: str) -> Freight | None:
    """What is there under that name; None for what is not of this machine, such as a name on the hub.

    Raises:
        ConfigError: It is a folder, and a link in it leads out of it: what is sent is what the user has named.
    """
    path = Path(given).expanduser()
    if not path.exists() and not is_pattern(given):
        return None
    if path.is_dir():
        check_links(path)
    parts = path.parts
    magic = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    pattern = not path.exists() and magic < len(parts)
    # of the last part alone: a model's folder keeps its name
    root = Path(*parts[:magic]) if pattern else Path(os.path.normpath(path)).parent
    name = "/".join(parts[magic:]) if pattern else Path(os.path.normpath(path)).name
    if pattern:
        found = [Path(p) for p in sorted(glob.glob(str(path)))]  # noqa: PTH207 (absolute patterns)
    else:
        found = list(_files(path)) if path.is_dir() else [path]
    base = root.absolute()
    names = [os.path.relpath(p.absolute(), base) for p in found]
    if not names or not name:
        return None
    return Freight(given, str(base), name, tuple((n, *_state(base / n)) for n in names))


def pack(root: Path, names: list[str], put: Callable[[bytes], Any]) -> Crate:
    """Reads files piece by piece; `put` takes each and returns what gives it again."""
    digest, files = hashlib.sha256(), []
    for name in names:
        pieces, total = [], 0
        digest.update(f"{name}\0".encode())
        with (root / name).open("rb") as opened:
            while piece := opened.read(CHUNK_BYTES):
                digest.update(piece)
                pieces.append(put(piece))
                total += len(piece)
        digest.update(f"\0{total}\0".encode())
        files.append((name, total, tuple(pieces)))
    return Crate(digest.hexdigest(), tuple(files))


def pack_folder(folder: Path, put: Callable[[bytes], Any]) -> Crate:
    """All files of a folder."""
    return pack(folder, [str(p.relative_to(folder)) for p in _files(folder)], put)


def unpack(crate: Crate, folder: Path, get: Callable[[Any], bytes]) -> None:
    """Writes the files into a folder that holds nothing yet.

    Raises:
        ClusterError: A name leads out of it.
    """
    for name, _, pieces in crate.files:
        path = inside(folder, name, kind=ClusterError)
        path.parent.mkdir(parents=True, exist_ok=True)
        with append(path) as opened:
            for piece in pieces:
                opened.write(get(piece))


def keep(crate: Crate, get: Callable[[Any], bytes]) -> Path:
    """Where this machine has the files; written there if they are not there yet, by one process for all."""
    from filelock import FileLock  # comes with ray

    parent = cache_folder() / FOLDER
    parent.mkdir(exist_ok=True)
    folder = parent / crate.digest[:32]
    with FileLock(parent / f"{folder.name}.lock"):
        if not folder.is_dir():
            forget_old(parent)
            with filling(folder) as temporary:
                unpack(crate, temporary, get)
        os.utime(folder)
    return folder


def forget_old(parent: Path) -> None:
    """Removes what nobody has used for a month."""
    for path in parent.iterdir():
        if path.is_dir() and path.stat().st_mtime < time.time() - KEEP_DAYS * 86400:
            remove_tree(path)


class Names:
    """The names that a run's files have on this machine, and the user's own.

    Attributes:
        there: What each setting became.
    """

    def __init__(self) -> None:
        self.there: dict[str, str] = {}
        self._within: list[tuple[str, str]] = []

    def add(self, freight: Freight, root: Path) -> None:
        """A freight that lies in `root` here."""
        path = Path(freight.given).expanduser()
        self.there[freight.given] = str(root / freight.name)
        above = str(path)[: -len(freight.name)] if str(path).endswith(freight.name) else f"{freight.root}/"
        self._within += [(str(root / freight.name), str(path)), (f"{root}/", above)]

    def add_folder(self, given: str, folder: Path) -> None:
        """The run's own folder."""
        self.there[given] = str(folder)
        self._within.append((str(folder), given))

    def forwards(self, config: dict[str, Any]) -> dict[str, Any]:
        """A run's config with the names of this machine."""
        there = self.there
        data = dict(config["data"])
        for part in ("train", "eval"):
            data[part] = renamed(data[part], lambda text: there.get(text, text))
        data["template"] = there.get(data["template"], data["template"])
        method = dict(config["method"])
        if isinstance(tokenizer := method.get(TOKENIZER), str):
            method[TOKENIZER] = there.get(tokenizer, tokenizer)
        own = {key: there.get(config[key], config[key]) for key in ("model", "output")}
        return config | own | {"data": data, "method": method}

    def back(self, value: Any) -> Any:
        """A message or a file's content with the user's names."""
        exact = {here: given for given, here in self.there.items()}
        return renamed(value, lambda text: exact[text] if text in exact else self._back(text))

    def restore(self, folder: Path) -> None:
        """Writes the user's names into the files of a run that name others."""
        changed = set()
        for path in [p for p in folder.rglob("*") if p.suffix in (".json", ".yaml") and p.name != MANIFEST]:
            text = path.read_text(encoding="utf-8")
            if not any(here in text for here, _ in self._within):
                continue
            if path.suffix == ".yaml":
                new = dump_yaml(self.back(parse_yaml(text)))
            else:
                indent = len(text.partition("\n")[2]) - len(text.partition("\n")[2].lstrip(" "))
                new = dump_json(self.back(json.loads(text)), indent=indent or None)
                new += "\n" * text.endswith("\n")
            write_text(path, new)
            changed.add(path.parent)
        for parent in changed:
            if (parent / MANIFEST).is_file():
                seal(parent)

    def _back(self, text: str) -> str:
        for here, given in self._within:
            text = text.replace(here, given)
        return text


def named_files(config: dict[str, Any]) -> list[str]:
    """What a run's config names that may be files of the user's machine."""
    found = [config["model"], *_strings(config["data"]["train"]), *_strings(config["data"]["eval"])]
    if str(config["data"]["template"]).endswith((".yaml", ".yml")):
        found.append(config["data"]["template"])
    if isinstance(tokenizer := config["method"].get(TOKENIZER), str):
        found.append(tokenizer)
    return list(dict.fromkeys(found))


def renamed(value: Any, name: Callable[[str], str]) -> Any:
    """A structure with each of its texts passed through `name`."""
    if isinstance(value, str):
        return name(value)
    if isinstance(value, dict):
        return {k: renamed(v, name) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, name) for v in value]
    return value


def _strings(sources: Any) -> list[str]:
    """The sources of `data.train` or `data.eval`, however they are written."""
    listed = sources if isinstance(sources, list) else [sources] if sources else []
    return [s if isinstance(s, str) else s["path"] for s in listed]


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in LEFT_OUT)
        yield from (Path(parent) / name for name in sorted(names))


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
