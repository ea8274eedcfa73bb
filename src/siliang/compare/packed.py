"""Files that a run needs, packed for Ray's object store, and unpacked once on a machine that does not have them.

Ray's runtime_env cannot carry them: its packages hold 512 MiB at most, leave out what a .gitignore names, and are put
on Python's path.

A file keeps its absolute path below a folder of siliang's cache: /data/a.jsonl becomes CACHE/files-HASH/data/a.jsonl.
So a path of that machine is the user's own behind the name of that folder, and what a run writes gets the user's paths
back when that name is removed.
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
LEFT_OUT = (".git", ".cache")  # of a downloaded folder
FILES, RUN = "files", "run"  # prefixes of the names of the cache's folders


@dataclass(frozen=True)
class Packed:
    """Files in pieces.

    Attributes:
        folder: The folder of the cache that they are unpacked in, named by a hash of their names and bytes.
        files: Each file's path without its first slash, and the object store's references to its pieces.
    """

    folder: str
    files: tuple[tuple[str, tuple[Any, ...]], ...]


def files_of(name: str) -> list[Path]:
    """The files of an absolute path: a file, those of a folder, or those that match a pattern. Any other name, such as
    one on the hub, has none.

    Raises:
        ConfigError: It is a folder, and a link in it leads out of it: only what the user has named is sent.
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
    """All files of a folder, in order."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in LEFT_OUT)
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
    """Writes the files below a folder that has none of them.

    Raises:
        ClusterError: A name leads out of the folder.
    """
    for name, pieces in packed.files:
        path = inside(folder, name, kind=ClusterError)
        path.parent.mkdir(parents=True, exist_ok=True)
        with append(path) as opened:
            for piece in pieces:
                opened.write(get(piece))


def unpack_once(packed: Packed, cache: Path, get: Callable[[Any], bytes]) -> None:
    """Writes the files into `cache`, unless a run before did. Removes what no run has used for a month."""
    from filelock import FileLock  # comes with Ray

    folder = inside(cache, packed.folder, kind=ClusterError)
    with FileLock(cache / f"{packed.folder}.lock"):
        if not folder.is_dir():
            prune(cache, FILES)
            prune(cache, RUN)
            with creating_folder(folder) as temporary:
                unpack(packed, temporary, get)
        used(cache, packed.folder)


def with_users_paths(value: Any, cache: Path) -> Any:
    """A message or a file's content, with the user's paths in place of those below `cache`."""
    return json.loads(_users_paths(json.dumps(value), cache))


def restore_paths(folder: Path, cache: Path) -> None:
    """Writes the user's paths into the files of a run, and seals again the folders whose files have changed."""
    changed = set()
    for path in [p for p in folder.rglob("*") if p.suffix in (".json", ".yaml") and p.name != MANIFEST]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            restored = dump_yaml(with_users_paths(parse_yaml(text), cache))
        else:
            restored = _users_paths(text, cache)
        if restored != text:
            write_text(path, restored)
            changed.add(path.parent)
    for parent in changed:
        if (parent / MANIFEST).is_file():
            write_manifest(parent)


def _users_paths(text: str, cache: Path) -> str:
    """Removes the names of the cache's folders from a JSON text."""
    written = {re.escape(json.dumps(str(cache), ensure_ascii=ascii_only)[1:-1]) for ascii_only in (False, True)}
    return re.sub(rf"(?:{'|'.join(written)})/(?:{FILES}|{RUN})-[0-9a-f]{{32}}", "", text)
