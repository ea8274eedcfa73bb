"""What has happened on a disk, and what the user can do about it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from siliang.types import OutputError

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


@contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
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
