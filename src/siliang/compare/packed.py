"""The input files of a run, packed into Ray's object store, and unpacked once on each machine that does not have them.

Ray's runtime_env cannot be used: its packages are limited to 512 MiB, exclude the files named in a .gitignore, and are
added to Python's path.

A file keeps its absolute path below a folder of siliang's cache: /data/a.jsonl becomes CACHE/files-HASH/data/a.jsonl.
To restore the user's paths in the files that a run writes, the prefix CACHE/files-HASH is removed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siliang.data.cache import prune, used
from siliang.files import MANIFEST, append, creating_folder, is_pattern, write_manifest, write_text
from siliang.paths import check_links, inside
from siliang.safety.safe_yaml import dump_yaml, parse_yaml
from siliang.types import ClusterError

PIECE_BYTES = 2**25
EXCLUDED = (".git", ".cache")  # subfolders of a downloaded model or dataset
FILES, RUN = "files", "run"  # prefixes of the folder names in the cache


@dataclass(frozen=True)
class Packed:
    """Files in pieces.

    Attributes:
        folder: The name of their folder in the cache: a hash of the files' names and bytes.
        files: For each file, its path without the first slash, and the references to its pieces in the object store.
    """

    folder: str
    files: tuple[tuple[str, tuple[Any, ...]], ...]


def files_of(name: str) -> list[Path]:
    """The files of an absolute path: a file, a folder or a glob pattern. No files for any other name, such as a
    repository on the hub.

    Raises:
        ConfigError: A link in the folder points outside of it. Only files that the user has named are sent.
    """
    path = Path(name)
    if not path.is_absolute():
        return []
    if path.is_dir():
        check_links(path)
        return list(walk(path))
    if path.exists():
        return [path]
    return sorted(Path(found) for found in glob.glob(name, recursive=True)) if is_pattern(name) else []  # noqa: PTH207


def walk(folder: Path) -> Iterator[Path]:
    """All files of a folder, sorted."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in EXCLUDED)
        yield from (Path(parent) / name for name in sorted(names))


def pack(files: list[Path], put: Callable[[bytes], Any]) -> Packed:
    """Reads files piece by piece; `put` stores a piece and returns the reference to it."""
    digest, packed = hashlib.sha256(), []
    for path in files:
        name, pieces = path.relative_to(path.anchor).as_posix(), []
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as opened:
            while piece := opened.read(PIECE_BYTES):
                digest.update(piece)
                pieces.append(put(piece))
        packed.append((name, tuple(pieces)))
    return Packed(f"{FILES}-{digest.hexdigest()[:32]}", tuple(packed))


def unpack(packed: Packed, folder: Path, get: Callable[[Any], bytes]) -> None:
    """Writes the files into a folder that does not have them.

    Raises:
        ClusterError: A file's name points outside of the folder.
    """
    for name, pieces in packed.files:
        path = inside(folder, name, kind=ClusterError)
        path.parent.mkdir(parents=True, exist_ok=True)
        with append(path) as opened:
            for piece in pieces:
                opened.write(get(piece))


def unpack_once(packed: Packed, cache: Path, get: Callable[[Any], bytes]) -> None:
    """Writes the files into `cache`, unless an earlier run did. Removes files that no run has used for a month."""
    from filelock import FileLock  # comes with Ray

    folder = inside(cache, packed.folder, kind=ClusterError)
    with FileLock(cache / f"{packed.folder}.lock"):
        if not folder.is_dir():
            prune(cache, FILES)
            prune(cache, RUN)
            with creating_folder(folder) as temporary:
                unpack(packed, temporary, get)
        used(cache, packed.folder)


def with_user_paths(value: Any, cache: Path) -> Any:
    """A message, or the content of a file, with the paths below `cache` replaced by the user's paths."""
    return json.loads(_restore_paths(json.dumps(value), cache))


def restore_paths(folder: Path, cache: Path) -> None:
    """Restores the user's paths in the files of a run, and rewrites the manifests of the changed folders."""
    changed = set()
    for path in [p for p in folder.rglob("*") if p.suffix in (".json", ".yaml") and p.name != MANIFEST]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            restored = dump_yaml(with_user_paths(parse_yaml(text), cache))
        else:
            restored = _restore_paths(text, cache)
        if restored != text:
            write_text(path, restored)
            changed.add(path.parent)
    for parent in changed:
        if (parent / MANIFEST).is_file():
            write_manifest(parent)


def _restore_paths(text: str, cache: Path) -> str:
    """Removes the prefixes CACHE/files-HASH and CACHE/run-HASH from a JSON text."""
    escaped = {re.escape(json.dumps(str(cache), ensure_ascii=ascii_only)[1:-1]) for ascii_only in (False, True)}
    return re.sub(rf"(?:{'|'.join(escaped)})/(?:{FILES}|{RUN})-[0-9a-f]{{32}}", "", text)
