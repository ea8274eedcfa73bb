"""Hashes of the files that a run reads, so that one that was replaced is noticed. A file of gigabytes is read once: its
hash is kept in the cache with the file's state, and counts only while that is the same."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from siliang.data.cache import cache_folder, prune, used
from siliang.files import is_pattern, sha256, write_text
from siliang.hub import cached_file
from siliang.models.folder import WEIGHT_FILES, weight_files
from siliang.safety.safe_json import read_json

WEIGHTS = (".safetensors", ".bin")
# All of these are read, where a base model's folder has them ...
ALWAYS_LOADED = (
    "config.json",
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
# ... and these, for a tokenizer without tokenizer.json; some tokenizers read them in addition to it
WORDS = (
    *("*.model", "*vocab*.json", "*vocab*.txt", "merges*.txt", "dict*.txt", "bpe.codes", "*.spm", "*.tiktoken"),
    *("tekken.json", "emoji.json", "normalizer.json", "byte_maps.json", "word_*.json", "prophetnet.tokenizer"),
)
KEPT_FROM_BYTES = 2**20  # smaller files are read as quickly as their entry would be
SETTLED_S = 2.0  # a file written later than this before it was read may change again within its clock's grain


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, from the cache where the file is in the very state in which it was read."""
    state = _state(path)
    if state[0] < KEPT_FROM_BYTES:
        return sha256(path)
    entry: Path | None = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        folder = cache_folder() / "hashes"
        folder.mkdir(exist_ok=True)
        entry = folder / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.json"
        if entry.is_file():
            kept = read_json(entry)
            if kept["state"] == state and re.fullmatch("[0-9a-f]{64}", kept["sha256"]):
                used(folder, entry.name)
                return str(kept["sha256"])
    started = time.time()
    found = sha256(path)
    # the time of the change of the inode is among the state: nobody can set it, as the file's own time can be
    settled = started - max(state[1], state[2]) / 1e9 > SETTLED_S and _state(path) == state
    if entry is not None and settled:
        with suppress(OSError):
            prune(entry.parent)
            write_text(entry, json.dumps({"state": state, "sha256": found}))
    return found


def source_sha256(source: str) -> str:
    """Over the bytes of a source of data, a file, a folder or a pattern of files; of a hub name, over the name."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else []
    if path.is_dir():  # without a library's files in the data folder
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "cache-")))
    found = sorted(glob.glob(str(path), recursive=True)) if is_pattern(source) else []  # noqa: PTH207 (absolute)
    files = files or [Path(name) for name in found if Path(name).is_file()]
    return joined(map(file_sha256, files)) if files else hashlib.sha256(source.encode()).hexdigest()


def base_files(name: str, revision: str | None = None) -> dict[str, str]:
    """The SHA-256 of each file of a base model that is read: weights, configs, tokenizer; but for
    generation_config.json, as how answers are drawn is the user's to change at any time. Of a hub name, of the copy in
    the hub's cache; nothing where there is none."""
    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "config.json", revision=revision)
        if found is None:
            return {}
        folder = found.parent
    names = [*weight_files(folder)]
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        name = path.relative_to(folder).as_posix()
        if _is_one_of(name, (*ALWAYS_LOADED, *WORDS)):
            names.append(name)
    return {name: file_sha256(folder / name) for name in sorted(names) if (folder / name).is_file()}


def is_loaded_beside(name: str, others: Iterable[str]) -> bool:
    """Whether transformers loads this file of a base model's folder where it has these others already."""
    others = set(others)
    if name in WEIGHT_FILES:
        return not others & set(WEIGHT_FILES[: WEIGHT_FILES.index(name)])
    return _is_one_of(name, ALWAYS_LOADED) or ("tokenizer.json" not in others and _is_one_of(name, WORDS))


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def weights_sha256(name: str, files: dict[str, str]) -> str:
    """Over the weights among a base model's files; over its name where there are none here."""
    weights = [files[file] for file in sorted(files) if Path(file).suffix in WEIGHTS]
    return joined(weights) if weights else hashlib.sha256(name.encode()).hexdigest()


def joined(hashes: Iterable[str]) -> str:
    """One hash of several."""
    digest = hashlib.sha256()
    for found in hashes:
        digest.update(bytes.fromhex(found))
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
