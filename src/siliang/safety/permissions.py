"""Permission for models to run their own Python code: given by this user on this machine, by the code's SHA-256.

No file in the folder of a model, a run or a comparison can give the permission. It comes from the command line
(--allow-code), from the environment (SILIANG_ALLOW_CODE, with which a command passes it to the processes that it
starts), or from the user's file, which stores answers from a terminal.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path

from siliang.files import write_text
from siliang.language import Bilingual
from siliang.safety.safe_json import parse_json
from siliang.secrets import shortened
from siliang.types import ConfigError

VARIABLE = "SILIANG_ALLOW_CODE"  # hashes, separated by commas
FILE_NAME = "allowed_code.json"
MOST_BYTES = 2**20  # of the file
PLAIN_FILE = 0 if sys.platform == "win32" else os.O_NOFOLLOW | os.O_NONBLOCK  # no links; do not block on a pipe


def allow_code(sha256: str) -> None:
    """Allows a model's own code in this process and in the processes that it starts.

    Args:
        sha256: The hash of the model's folder, which the error for such a model shows: 64 hexadecimal digits.

    Raises:
        ConfigError: It is not a SHA-256.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ConfigError(
            Bilingual(
                f"--allow-code {shortened(sha256, 80)!r} is not a SHA-256 of a model's code. It has 64 "
                "hexadecimal digits; "
                "the error for such a model shows it.",
                f"--allow-code {shortened(sha256, 80)!r} 不是模型代码的 SHA-256。它有 64 个十六进制数字，"
                "见该模型的错误提示。",
            )
        )
    given = os.environ.get(VARIABLE, "").split(",")
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*filter(None, given), sha256.lower()]))


def is_allowed(sha256: str) -> bool:
    """Whether the user has allowed this code.

    Raises:
        ConfigError: The user's file is damaged, or others may write to it.
    """
    if sha256 in os.environ.get(VARIABLE, "").split(","):
        return True
    if sha256 not in _stored():
        return False
    allow_code(sha256)  # for processes on other machines, which have another file
    return True


def keep_allowed(sha256: str, folder: str) -> Path:
    """Stores the user's permission in the user's file, and returns the file's path.

    Args:
        folder: The model's folder, as a note for readers of the file.

    Raises:
        ConfigError: The file is damaged, or others may write to it.
        OSError: It cannot be written.
    """
    path = allowed_file()
    known = _stored()
    known[sha256] = {"folder": folder, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(path, json.dumps({"version": 1, "allowed": known}, indent=1), mode=0o600)  # only for this user
    return path


def allowed_file() -> Path:
    """The file with the user's permissions: in $XDG_CONFIG_HOME, or ~/.config."""
    named = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(named) if Path(named).is_absolute() else Path.home() / ".config"
    return home / "siliang" / FILE_NAME


def _stored() -> dict[str, dict[str, str]]:
    """The permissions in the user's file; empty if there is no file."""
    path = allowed_file()
    try:
        folder = path.parent.stat()
        number = os.open(path, os.O_RDONLY | PLAIN_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(
            Bilingual(
                f"{path} cannot be read: {error.strerror or error}.", f"{path} 无法读取：{error.strerror or error}。"
            )
        ) from None
    with os.fdopen(number, "rb") as file:
        _check_owner(path.parent, folder)
        _check_owner(path, os.fstat(file.fileno()))
        content = file.read(MOST_BYTES + 1)
    try:
        values = parse_json(content.decode("utf-8")) if len(content) <= MOST_BYTES else None
        known = values["allowed"] if isinstance(values, dict) else None
    except (ValueError, KeyError):
        known = None
    if not isinstance(known, dict) or not all(isinstance(value, dict) for value in known.values()):
        raise ConfigError(
            Bilingual(
                f"{path} is damaged: remove it, and allow the code again.", f"{path} 已损坏：请删除它，并重新授权代码。"
            )
        )
    return {str(name): {str(k): str(v) for k, v in value.items()} for name, value in known.items()}


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Checks that only this user can write there.

    Raises:
        ConfigError: Another user can.
    """
    if sys.platform == "win32":  # which closes a user's folder to others
        return
    if status.st_uid != os.geteuid():
        raise ConfigError(
            Bilingual(
                f"{path} allows models' code, and it is not yours: it belongs to user {status.st_uid}.",
                f"{path} 用来授权模型的代码，但它不属于你：它属于用户 {status.st_uid}。",
            )
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            Bilingual(
                f"{path} allows models' code, and others may write to it: chmod go-w it, and check it.",
                f"{path} 用来授权模型的代码，但其他人可以写入：请运行 chmod go-w，并检查其内容。",
            )
        )
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ConfigError(Bilingual(f"{path} is not a plain file.", f"{path} 不是普通文件。"))
