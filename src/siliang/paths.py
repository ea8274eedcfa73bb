"""Checks paths: the names and links in an untrusted folder must lead to files inside it."""

from __future__ import annotations

import re
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from siliang.language import Bilingual, together
from siliang.secrets import shortened
from siliang.types import ConfigError, SiliangError, nearest

DRIVE = re.compile(r"[A-Za-z]:")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def inside(folder: Path, name: object, *, kind: type[SiliangError] = ConfigError, source: str = "") -> Path:
    """The path of a file that is named in a file of `folder`, and is inside `folder`, also through links.

    Refuses, on every system, absolute names, `..`, drive letters, backslashes, `~`, control characters, URLs, and links
    that lead out. The file need not exist. A hub cache's links to its own blobs count as inside.

    Args:
        folder: The folder of the name.
        name: Text: parts separated by slashes.
        kind: The class of the error.
        source: The file with the name, for the error; empty for the folder.

    Raises:
        SiliangError: Of class `kind`: the name leads out of the folder.
    """
    where = source or str(folder)
    if not isinstance(name, str) or not _is_plain(name):
        raise kind(
            Bilingual(
                f"{where} names {shortened(name, 200)!r}, which is not inside it: only files in {folder} are read.",
                f"{where} 写有 {shortened(name, 200)!r}，它不在文件夹之内：只读取 {folder} 中的文件。",
            )
        )
    path = Path(folder) / name
    target = _resolved(path)
    if target is None or not _is_within(target, folder.resolve()):
        raise kind(
            Bilingual(
                f"{where} names {shortened(name, 200)!r}, which a link leads out of {folder}: put the file "
                "itself there.",
                f"{where} 写有 {shortened(name, 200)!r}，它是指向 {folder} 之外的链接：请放入文件本身。",
            )
        )
    return path


def check_links(folder: Path, kind: type[SiliangError] = ConfigError) -> None:
    """Checks that a folder has only files, folders, and links that lead inside it.

    Links of a hub cache to its own blobs are allowed. A missing folder passes.

    Raises:
        SiliangError: Of class `kind`: a link leads out, there is a pipe or a device, or a folder cannot be listed.
    """
    for path, problem in _problems(Path(folder)):
        raise kind(together(f"{path} ", problem))


def is_link(path: Path) -> bool:
    """Whether a path is itself a link, or a junction of Windows."""
    if sys.platform == "win32":
        with suppress(FileNotFoundError):
            return bool(path.lstat().st_file_attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT)
    return path.is_symlink()


def is_real_folder(path: Path) -> bool:
    """Whether a path is a folder, and not a link to one."""
    return path.is_dir() and not is_link(path)


def _is_plain(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    special = name.startswith(("/", "~")) or "\\" in name or "::" in name or "://" in name
    return bool(parts) and not special and ".." not in parts and not DRIVE.match(name) and not CONTROL.search(name)


def _is_within(target: Path, root: Path) -> bool:
    """Whether a resolved path is in a resolved folder; the folder of a hub cache includes its repository's blobs."""
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith(("models--", "datasets--")):
        allowed.append(root.parent.parent / "blobs")
    return any(target.is_relative_to(place) for place in allowed)


def _resolved(path: Path) -> Path | None:
    """The target of a path; None for a cycle of links, or for an impossible name."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return None


def _problems(folder: Path) -> Iterator[tuple[Path, str]]:
    """The paths in a folder that are not allowed, and the reasons."""
    root = folder.resolve()
    waiting = [root] if root.is_dir() else []
    while waiting:
        parent = waiting.pop()
        shown = folder / parent.relative_to(root)
        try:
            children = sorted(parent.iterdir())
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError as error:
            why = error.strerror or error
            yield shown, Bilingual(f"cannot be listed: {why}.", f"无法列出其内容：{why}。")
            continue
        for path in children:
            if is_link(path):
                target = _resolved(path)
                if target is None or not _is_within(target, root):
                    where = Bilingual("nowhere", "不存在的地方")
                    if target:
                        where = Bilingual(f"out of {folder}, to {target}", f" {folder} 之外的 {target}")
                    yield (
                        shown / path.name,
                        Bilingual(
                            f"is a link that leads {where}. Put the file itself there, or remove it.",
                            f"是指向{where.zh}的链接。请放入文件本身，或删除它。",
                        ),
                    )
                continue
            with suppress(FileNotFoundError):
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode):
                    waiting.append(path)
                elif not stat.S_ISREG(mode):
                    yield (
                        shown / path.name,
                        Bilingual("is neither a file nor a folder. Remove it.", "既不是文件也不是文件夹。请删除。"),
                    )


def near_names(path: Path) -> Bilingual:
    """Proposes names in the folder of a missing file or folder that look like its name."""
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return Bilingual("", "")
