"""Errors of a disk, and what the user can do about them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from siliang.language import Bilingual, together
from siliang.types import OutputError

NOT_PERMITTED = Bilingual(
    "permission denied. Choose a folder of your own with --output", "没有权限。请用 --output 选择你自己的文件夹"
)
# The cause and the remedy of an error of the disk, by its number.
DISK_ERRORS = {
    errno.ENOSPC: Bilingual(
        "the disk is full. Make room, or choose another disk with --output",
        "磁盘已满。请清理空间，或用 --output 换一个磁盘",
    ),
    errno.EDQUOT: Bilingual(
        "your quota on that disk is used up. Make room, or choose another disk with --output",
        "你在该磁盘上的配额已用完。请清理空间，或用 --output 换一个磁盘",
    ),
    errno.EROFS: Bilingual(
        "the disk is read-only. Choose another with --output", "磁盘是只读的。请用 --output 换一个磁盘"
    ),
    errno.EACCES: NOT_PERMITTED,
    errno.EPERM: NOT_PERMITTED,
    errno.ENOENT: Bilingual(
        "the folder was removed or renamed. Start again with another --output",
        "文件夹已被删除或改名。请用另一个 --output 重新开始",
    ),
    errno.EIO: Bilingual(
        "the disk reports an input/output error. Check the disk, and choose another with --output",
        "磁盘读写出错。请检查磁盘，并用 --output 换一个磁盘",
    ),
    errno.EFBIG: Bilingual(
        "a file would be larger than that disk's file system allows. Choose another disk with --output",
        "文件超过该磁盘文件系统允许的大小。请用 --output 换一个磁盘",
    ),
}
SAVED_BEFORE = Bilingual(". Everything saved before is intact.", "。此前保存的内容是完整的。")


@contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Within the block, an error of the disk becomes an OutputError that says what to do."""
    try:
        yield
    except Exception as error:
        message = disk_error(error)
        elsewhere = isinstance(error, FileNotFoundError) and folder.is_dir()
        if isinstance(error, OutputError) or message is None or elsewhere:
            raise
        raise OutputError(together(str(folder), Bilingual(": ", "："), message, SAVED_BEFORE)) from error


def disk_error(error: BaseException) -> Bilingual | None:
    """The cause and the remedy of an error of the disk; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):  # of safetensors
        number = int(match[1])
    if number is None and "No space left" in str(error):
        number = errno.ENOSPC
    return DISK_ERRORS.get(number) if number is not None else None
