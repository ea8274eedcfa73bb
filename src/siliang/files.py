"""Atomic writes of files and folders: written under a temporary name, flushed to the disk, then renamed.

The temporary name is random and new, and links are not followed, so that an untrusted folder cannot redirect the write.
An existing file of the final name is replaced.

A folder gets a manifest with the size and the hash of each of its files, so that damage is found before it is used.
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
LONGEST_KEPT_BYTES = 200  # of a file's name: most file systems allow 255

# Do not follow links, and do not pass descriptors to other programs. Windows needs O_BINARY to keep line ends.
if sys.platform == "win32":
    FLAGS = os.O_BINARY | os.O_NOINHERIT
    FOLDER_FLAGS = os.O_RDONLY
else:
    FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
    FOLDER_FLAGS = os.O_DIRECTORY | os.O_CLOEXEC | (os.O_PATH if sys.platform == "linux" else os.O_RDONLY)


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Writes a UTF-8 file atomically. A link at `path` is replaced; its target is not changed.

    Args:
        mode: The file's permissions, before the user's umask.
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
    """Yields a temporary name next to `path`, for libraries that write to a name. The file is renamed to `path` if the
    block succeeds. A link at `path` is replaced.
    """
    with _new_beside(path) as new:
        mode = stat.S_IMODE(os.fstat(new.opened).st_mode)
        os.close(new.opened)
        yield new.temporary
        new.temporary.chmod(mode)  # safetensors replaces the file by one that only this user may read
        _flush(new.temporary)
        new.rename()


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `folder`. If the block succeeds, it gets a manifest and replaces `folder`."""
    with _folder_beside(folder) as temporary:
        yield temporary
        _open_up(temporary)
        write_manifest(temporary)
        remove(folder)
        temporary.rename(folder)
        _flush(folder.parent)


@contextmanager
def creating_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `folder`, which is empty or missing. The temporary folder becomes `folder` if
    the block succeeds and `folder` is still empty or missing.
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
    """Opens a file for appending. A link, or a file with several hard links, is first replaced by a new file."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) and (not stat.S_ISREG(status.st_mode) or status.st_nlink > 1):
            path.unlink()
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | FLAGS, 0o666)
    return os.fdopen(opened, "ab")


def remove(path: Path) -> None:
    """Removes a folder, a file, or a link without its target. A folder is renamed first, so that a killed process never
    leaves part of it under its name.
    """
    if is_real_folder(path):
        temporary = path.with_name(temporary_name(path.name))
        path.rename(temporary)
        remove_tree(temporary)
    else:
        path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Removes as much of a folder as possible, without an error; a link to a folder, without its target."""
    with suppress(OSError):
        if is_link(folder):
            folder.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)


def remove_stale(parent: Path, names: str) -> None:
    """Removes temporary files and folders in `parent` that killed processes have left.

    Args:
        names: A pattern of the final names; other temporary files stay.
    """
    for path in parent.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and re.fullmatch(names, match["name"]):
            if is_real_folder(path):
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """A temporary name for `name` that cannot be predicted."""
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
    """The first difference between a folder and its manifest, in words; None without one."""
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
        message = message_of(error)
        return Bilingual(message.rstrip("."), local(message, "zh").rstrip(".。"))
    except FileNotFoundError:
        return Bilingual(f"{MANIFEST} is missing", f"缺少 {MANIFEST}")
    except OSError as error:
        why = error.strerror or error
        return Bilingual(f"it cannot be read: {why}", f"无法读取：{why}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return Bilingual(f"{MANIFEST} is damaged", f"{MANIFEST} 已损坏")
    return None


def absolute(name: str) -> str:
    """The absolute name of an existing file, folder or pattern of files; any other name unchanged."""
    path = Path(name).expanduser()
    here = path.exists() or (is_pattern(name) and bool(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    return str(path.absolute()) if here else name


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern of files. A name with hidden secrets is not: it would match other files."""
    return any(c in name for c in "*?[") and HIDDEN not in name


def restore_name(name: str) -> str:
    """The name on this disk of a name with hidden secrets, as run.yaml has it; unchanged if not exactly one matches."""
    if HIDDEN not in name:
        return name
    pattern = "*".join(map(glob.escape, name.split(HIDDEN)))
    paths = [path for path in glob.iglob(pattern) if without_secrets(path) == name]  # noqa: PTH207 (absolute patterns)
    return paths[0] if len(paths) == 1 else name


def sha256(path: Path) -> str:
    """The SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True)
class _New:
    """A new file, under a temporary name in the folder of `path`.

    Attributes:
        folder: The folder's descriptor, which stays valid if the folder is renamed; None on systems that do not open
            folders.
        opened: The file's descriptor, which the caller closes.
    """

    path: Path
    temporary: Path
    folder: int | None
    opened: int

    def rename(self) -> None:
        """Renames the file to `path`."""
        old, new = (p if self.folder is None else p.name for p in (self.temporary, self.path))
        os.replace(old, new, src_dir_fd=self.folder, dst_dir_fd=self.folder)


@contextmanager
def _new_beside(path: Path, mode: int = 0o666) -> Iterator[_New]:
    """Creates a new file, and removes it after the block if it still has its temporary name."""
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
    """The descriptor of a folder; None on systems that do not open folders."""
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
    """Creates a new folder, and removes it after the block if it still has its temporary name."""
    temporary = folder.with_name(temporary_name(folder.name))
    temporary.mkdir()
    try:
        yield temporary
    finally:
        remove_tree(temporary)


def _open_up(folder: Path) -> None:
    """Gives the files the permissions of the user's umask: safetensors makes files that only this user may read."""
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
