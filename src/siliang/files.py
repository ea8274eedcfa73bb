"""Files and folders that are whole or not there: written under another name, flushed to the disk, and named last.

A folder is sealed by a manifest with the size and the hash of each of its files, so that damage is found before it is
used.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from siliang.safe_json import read_json
from siliang.secrets import HIDDEN, redacted, without_secrets
from siliang.terminal import without_controls
from siliang.types import OutputError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

# What libraries write of settings into the folder of a model or a checkpoint.
SETTINGS = ("config.json", "generation_config.json", "trainer_state.json")
TOKENIZER = "tokenizer_config.json"
NAMES = ("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file")

# What the user can do about an error of the disk, by its number.
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full. Make room, or choose another disk with --output",
    errno.EDQUOT: "your quota on that disk is used up. Make room, or choose another disk with --output",
    errno.EROFS: "the disk is read-only. Choose another with --output",
    errno.EACCES: "permission denied. Choose a folder of your own with --output",
    errno.EPERM: "permission denied. Choose a folder of your own with --output",
    errno.ENOENT: "the folder is gone: somebody removed or renamed it. Begin again with another --output",
    errno.EIO: "the disk does not answer rightly. Look at its health, and choose another with --output",
    errno.EFBIG: "a file would be larger than that disk's file system allows. Choose another disk with --output",
}


def pasted(*words: object) -> str:
    """A command line as a shell takes it: names with blanks or quotes in quotes, control characters as escapes.

    Args:
        words: Those that are names of files are `Path`s: one that begins with a dash would be an option.
    """
    return " ".join(map(_quoted, words))


def _quoted(word: object) -> str:
    text = f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
    text = without_secrets(text)
    if without_controls(text) == text and "\n" not in text and "\t" not in text:
        return shlex.quote(text)
    # $'...' of bash and zsh, where \x1b and \n stand for themselves
    escaped = (
        text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    )
    return f"$'{without_controls(escaped)}'"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to; it becomes `path` only if the block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder` to write into; it is sealed and becomes `folder` only if the block
    succeeds.
    """
    temporary = folder.with_name(f".{folder.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        seal(temporary)
        remove_folder(folder)
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder; who is killed meanwhile leaves no half of it under its name."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.tmp-old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Removes what `replacing` and `replacing_folder` left in `parent` when their process was killed."""
    for path in parent.glob(".*.tmp*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Flushes every file of `folder` to the disk, and writes the manifest last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1), encoding="utf-8")
    _flush(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None for nothing."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        for name, wanted in listed.items():
            path = folder / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                return f"{MANIFEST} names {name!r}, which is not in the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {wanted['bytes']:,}"
            if sha256(path) != wanted["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Within the block an error of the disk becomes an OutputError that says what to do."""
    try:
        yield
    except Exception as error:
        message = disk_error(error)
        elsewhere = isinstance(error, FileNotFoundError) and folder.is_dir()
        if isinstance(error, OutputError) or message is None or elsewhere:
            raise
        raise OutputError(f"{folder}: {message}. What was saved before is whole.") from error


def disk_error(error: BaseException) -> str | None:
    """What happened on the disk and what to do; None where it was something else."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors' own class
        number = int(found[1])
    if number is None and "No space left" in str(error):
        number = errno.ENOSPC
    return DISK_ERRORS.get(number) if number is not None else None


def absolute(name: str) -> str:
    """A file, a folder or a pattern of files that is here, by its absolute name; any other name as it is."""
    path = Path(name).expanduser()
    here = path.exists() or (is_pattern(name) and bool(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    return str(path.absolute()) if here else name


def hide_secrets(folder: Path) -> None:
    """Takes the secrets out of the settings that a library has written into a folder. A tokenizer's words and templates
    stay, which are what it was trained with."""
    for path in [folder / name for name in (*SETTINGS, TOKENIZER) if (folder / name).is_file()]:
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == TOKENIZER:
            clean = values | {key: redacted(values[key]) for key in NAMES if key in values}
        else:
            clean = redacted(values)
        if clean != values:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")


def is_pattern(name: str) -> bool:
    """Whether a name stands for every file that fits it. One whose secrets were hidden does not: others would fit."""
    return any(c in name for c in "*?[") and HIDDEN not in name


def found_again(name: str) -> str:
    """A name that was written with its secrets hidden, as run.yaml holds it, as it is on this disk; as it was written
    where nothing here, or more than one thing, could be meant."""
    if HIDDEN not in name:
        return name
    pattern = "*".join(map(glob.escape, name.split(HIDDEN)))
    found = [path for path in glob.iglob(pattern) if without_secrets(path) == name]  # noqa: PTH207 (absolute patterns)
    return found[0] if len(found) == 1 else name


def sha256(path: Path) -> str:
    """Of a file's bytes, read piece by piece."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot flush a folder
            os.fsync(opened)
    finally:
        os.close(opened)
