"""Where a path leads: what a stranger's folder names, or links to, has to lie inside it."""

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


def inside(folder: Path, name: str, *, kind: type[SiliangError] = ConfigError, source: str = "") -> Path:
    """The path of a file that a file of `folder` names: it lies inside, wherever its links lead.

    Refused on every system are absolute names, `..`, a drive's letter, a backslash, a home's `~`, control characters,
    URLs, and links that lead out. The file need not be there. A hub cache's links to its own blobs lead inside.

    Args:
        folder: The folder that the name is seen from, and may not leave.
        name: Parts with a slash between them.
        kind: The class of the error.
        source: What names it, for the error; the folder if empty.

    Raises:
        SiliangError: Of class `kind`: the name leads out of the folder.
    """
    where = source or str(folder)
    if not isinstance(name, str) or not _is_plain(name):
        raise kind(
            Bilingual(
                f"{where} names {shortened(name, 200)!r}, which is not inside of it: only files in {folder} are read.",
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
    """Nothing in a folder that is opened leads out of it, and nothing in it is other than a file or a folder.

    Links inside of it are fine, and so are a hub cache's to its own blobs. A folder that is not there has none.

    Raises:
        SiliangError: Of class `kind`: a link leads out, there is a pipe or a device, or a folder cannot be listed.
    """
    for path, problem in _strange(Path(folder)):
        raise kind(together(f"{path} ", problem))


def is_link(path: Path) -> bool:
    """Whether a path is itself a link, or a junction of Windows, wherever it leads."""
    if sys.platform == "win32":
        with suppress(FileNotFoundError):
            return bool(path.lstat().st_file_attributes & stat.FILE_ATTRIBUTE_REPARSE_POINT)
    return path.is_symlink()


def is_real_folder(path: Path) -> bool:
    """Whether a path is a folder itself, and no link to one."""
    return path.is_dir() and not is_link(path)


def _is_plain(name: str) -> bool:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    strange = name.startswith(("/", "~")) or "\\" in name or "::" in name or "://" in name
    return bool(parts) and not strange and ".." not in parts and not DRIVE.match(name) and not CONTROL.search(name)


def _is_within(target: Path, root: Path) -> bool:
    """Whether a resolved path lies in a resolved folder; that of a hub's cache has the same repository's blobs too."""
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith(("models--", "datasets--")):
        allowed.append(root.parent.parent / "blobs")
    return any(target.is_relative_to(place) for place in allowed)


def _resolved(path: Path) -> Path | None:
    """Where a path leads; None where that cannot be said: a ring of links, or a name that no file can have."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return None


def _strange(folder: Path) -> Iterator[tuple[Path, str]]:
    """What is in a folder that should not be, and what is wrong with it."""
    root = folder.resolve()
    waiting = [root] if root.is_dir() else []
    while waiting:
        parent = waiting.pop()
        shown = folder / parent.relative_to(root)
        try:
            found = sorted(parent.iterdir())
        except FileNotFoundError:  # gone since it was seen
            continue
        except OSError as error:
            why = error.strerror or error
            yield shown, Bilingual(f"cannot be looked into: {why}.", f"无法查看：{why}。")
            continue
        for path in found:
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
    """Says which names in its folder look like that of a file or folder which is not there."""
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return Bilingual("", "")
