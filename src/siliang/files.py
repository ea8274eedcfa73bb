"""Files and folders that are whole or not there: written under another name, flushed to the disk, and named last.

The temporary name is random and new, and no link is followed: a folder from elsewhere cannot redirect the write. A file
that has the last name already is replaced.

A folder is sealed by a manifest with the size and the hash of each of its files, so that damage is found before it is
used.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from siliang.language import Bilingual, local
from siliang.paths import inside, is_link, is_real_folder
from siliang.safety.safe_json import read_json
from siliang.secrets import HIDDEN, without_secrets
from siliang.types import ConfigError, message_of

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-[0-9a-f]{16}", re.DOTALL)
LONGEST_KEPT_BYTES = 200  # of a file's name: most file systems take 255

# A link is not followed, and the descriptor goes to no other program. Windows has neither, and keeps line ends else.
if sys.platform == "win32":
    FLAGS = os.O_BINARY | os.O_NOINHERIT
    FOLDER_FLAGS = os.O_RDONLY
else:
    FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
    FOLDER_FLAGS = os.O_DIRECTORY | os.O_CLOEXEC | (os.O_PATH if sys.platform == "linux" else os.O_RDONLY)


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a file of UTF-8, never half of it. A link at `path` is replaced, and what it leads to stays as it is.

    Args:
        mode: Who may read and write it, of which the user's umask takes away.
    """
    content = text.encode("utf-8")
    with _new_beside(path, mode) as new:
        with os.fdopen(new.opened, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.rename()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, for libraries that write to a name; it becomes `path` only if the block
    succeeds. A link at `path` is replaced.
    """
    with _new_beside(path) as new:
        mode = stat.S_IMODE(os.fstat(new.opened).st_mode)
        os.close(new.opened)
        yield new.temporary
        new.temporary.chmod(mode)  # safetensors puts a file of its own there, for this user alone
        _flush(new.temporary)
        new.rename()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder` to write into; it is sealed and becomes `folder` only if the block
    succeeds.
    """
    with _folder_beside(folder) as temporary:
        yield temporary
        _open_up(temporary)
        write_manifest(temporary)
        remove(folder)
        temporary.rename(folder)
        _flush(folder.parent)


@contextmanager
def creating_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which is empty or not there; it becomes `folder` only if the block
    succeeds and nobody has put anything there meanwhile.
    """
    with _folder_beside(folder) as temporary:
        yield temporary
        _open_up(temporary)
        if is_link(folder):
            folder.unlink()
        elif folder.exists():
            folder.rmdir()
        temporary.rename(folder)


def append(path: Path) -> BinaryIO:
    """Opens a file to append to it. A link, or a file with several names, is replaced by a new file first."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) and (not stat.S_ISREG(found.st_mode) or found.st_nlink > 1):
            path.unlink()
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | FLAGS, 0o666)
    return os.fdopen(opened, "ab")


def remove(path: Path) -> None:
    """Removes a folder, a file, or a link and nothing that it leads to. A folder is renamed first: a process that is
    killed meanwhile leaves no half of it under its name.
    """
    if is_real_folder(path):
        aside = path.with_name(temporary_name(path.name))
        path.rename(aside)
        remove_tree(aside)
    else:
        path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Removes what can be removed of a folder, without an error; of a link to one, the link."""
    with suppress(OSError):
        if is_link(folder):
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stale(parent: Path, names: str) -> None:
    """Removes what this module left in `parent` when its process was killed.

    Args:
        names: A pattern of the names that are written there; all else stays.
    """
    for path in parent.iterdir():
        found = TEMPORARY.fullmatch(path.name)
        if found and re.fullmatch(names, found["name"]):
            if is_real_folder(path):
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """A name beside `name` that nobody can foresee."""
    kept = name if len(os.fsencode(name)) <= LONGEST_KEPT_BYTES else "file"
    return f".{kept}.tmp-{secrets.token_hex(8)}"


def write_manifest(folder: Path) -> None:
    """Flushes every file of `folder` to the disk, and writes the manifest last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_text(folder / MANIFEST, json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1))
    _flush(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None for nothing."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        for name, wanted in listed.items():
            path = inside(folder, name, source=MANIFEST)
            if not path.is_file():
                return Bilingual(f"{name} is missing", f"缺少 {name}")
            if path.stat().st_size != wanted["bytes"]:
                size, was = path.stat().st_size, wanted["bytes"]
                return Bilingual(
                    f"{name} has {size:,} bytes, not {was:,}", f"{name} 有 {size:,} 字节，应为 {was:,} 字节"
                )
            if sha256(path) != wanted["sha256"]:
                return Bilingual(f"{name} has changed since it was written", f"{name} 写成之后被改动过")
    except ConfigError as error:
        said = message_of(error)
        return Bilingual(said.rstrip("."), local(said, "zh").rstrip(".。"))
    except FileNotFoundError:
        return Bilingual(f"{MANIFEST} is missing", f"缺少 {MANIFEST}")
    except OSError as error:
        why = error.strerror or error
        return Bilingual(f"it cannot be read: {why}", f"无法读取：{why}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return Bilingual(f"{MANIFEST} is damaged", f"{MANIFEST} 已损坏")
    return None


def absolute(name: str) -> str:
    """A file, a folder or a pattern of files that is here, by its absolute name; any other name as it is."""
    path = Path(name).expanduser()
    here = path.exists() or (is_pattern(name) and bool(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    return str(path.absolute()) if here else name


def is_pattern(name: str) -> bool:
    """Whether a name stands for every file that fits it. One whose secrets were hidden does not: others would fit."""
    return any(c in name for c in "*?[") and HIDDEN not in name


def restore_name(name: str) -> str:
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


@dataclass(frozen=True)
class _New:
    """A new file, under a temporary name in the folder of `path`.

    Attributes:
        folder: The folder's descriptor, which stays the same folder whatever its name becomes; None on systems that do
            not open folders.
        opened: Its own descriptor, which the caller closes.
    """

    path: Path
    temporary: Path
    folder: int | None
    opened: int

    def rename(self) -> None:
        """Gives it the name of `path`."""
        old, new = (p if self.folder is None else p.name for p in (self.temporary, self.path))
        os.replace(old, new, src_dir_fd=self.folder, dst_dir_fd=self.folder)


@contextmanager
def _new_beside(path: Path, mode: int = 0o666) -> Iterator[_New]:
    """Makes a file that was not there; what is left under its temporary name is removed behind the block."""
    temporary = path.with_name(temporary_name(path.name))
    with _descriptor(path.parent) as folder:
        name = temporary if folder is None else temporary.name
        try:
            opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS, mode, dir_fd=folder)
        except OSError as error:
            error.filename = str(path)  # the name that the user knows
            raise
        try:
            yield _New(path, temporary, folder, opened)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)


@contextmanager
def _descriptor(folder: Path) -> Iterator[int | None]:
    """Opens a folder; None on systems that cannot."""
    if not {os.open, os.unlink, os.rename} <= os.supports_dir_fd:
        yield None
        return
    opened = os.open(folder, FOLDER_FLAGS)
    try:
        yield opened
    finally:
        os.close(opened)


@contextmanager
def _folder_beside(folder: Path) -> Iterator[Path]:
    """Makes a folder that was not there; what is left under its temporary name is removed behind the block."""
    temporary = folder.with_name(temporary_name(folder.name))
    temporary.mkdir()
    try:
        yield temporary
    finally:
        remove_tree(temporary)


def _open_up(folder: Path) -> None:
    """Gives its files the rights that the user's umask leaves: safetensors makes them for this user alone."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not is_link(path):
            path.chmod(mode)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems cannot flush a folder
            os.fsync(opened)
    finally:
        os.close(opened)
