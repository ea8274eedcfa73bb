"""Validates the messages and files from a machine of a cluster before they are used: the machine may be compromised.

This module imports only the standard library and small modules: the Ray process that transfers files has no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from siliang.files import append, remove, remove_tree, temporary_name
from siliang.language import Bilingual, local
from siliang.paths import inside
from siliang.secrets import short_repr
from siliang.types import ClusterError

# the files of a run's folder, of its adapter or model, and of its checkpoints
ENDINGS = "json|jsonl|safetensors|bin|model|txt|jinja|md|spm|vocab|tiktoken|bpe|codes"
FILE = rf"(?:additional_chat_templates/)?[A-Za-z0-9_][A-Za-z0-9_.+-]{{0,120}}\.(?:{ENDINGS})"
CODE = r"(?:[A-Za-z0-9_]{1,100}/){0,8}[A-Za-z0-9_]{1,100}\.py"  # of a model with custom code
FOLDERS = "adapter|model|checkpoints/(?:damaged-)?checkpoint-[0-9]{1,15}"
RUN_FILE = re.compile(rf"run\.yaml|run\.json|answers\.json|(?:{FOLDERS})/(?:{FILE}|{CODE})", re.ASCII)
MAX_FILES = 10_000
MAX_TEXT_BYTES = 2**28  # of a file without weights
WEIGHTS = (".safetensors", ".bin")
Message = dict[str, Any]  # a request to a worker, or a reply; its kind is in `kind`
# the fields of each kind of message, without `kind`
FIELDS: dict[str, dict[str, type]] = {
    "ready": {"node": str, "node_id": str, "versions": dict, "cache": str},
    "began": {},
    "say": {"line": str},
    "progress": {"progress": dict},
    "file": {"name": str, "bytes": bytes},
    "folder": {"nbytes": int},
    "done": {"found": dict},
    "failed": {"error": str},
    "died": {"error": str},
}
UNKNOWN_MESSAGE = Bilingual(
    "the machine sent an unknown message: install the same version of siliang on it as here",
    "那台机器发来了未知的消息：请在那里安装与本机相同版本的 siliang",
)


def checked(message: object) -> Message:
    """The message, if it is valid; otherwise a message of the kind `failed`."""
    invalid = {"kind": "failed", "error": UNKNOWN_MESSAGE}
    valid = as_message(message)
    if valid is None:
        return invalid
    metrics = valid["found"].items() if valid["kind"] == "done" else ()
    if not all(isinstance(name, str) and isinstance(value, int | float) for name, value in metrics):
        return invalid
    return valid


def as_message(message: object) -> Message | None:
    """The message with only the fields of its kind; None if its kind is unknown or a field is missing."""
    if not isinstance(message, dict) or not isinstance(kind := message.get("kind"), str) or kind not in FIELDS:
        return None
    if not all(isinstance(message.get(name), type_) for name, type_ in FIELDS[kind].items()):
        return None
    return {"kind": kind} | {name: message[name] for name in FIELDS[kind]}


class IncomingFolder:
    """Receives a run's folder in pieces, in a temporary folder that is renamed when it is complete.

    Args:
        folder: The path of the run's folder.
        max_bytes: An upper limit of its size.
        node: The name of the machine, for errors.

    Attributes:
        incomplete: Whether bytes are missing.
    """

    incomplete = False

    def __init__(self, folder: Path, max_bytes: int, node: str = "a machine") -> None:
        self._folder, self._max_bytes, self._node = folder, max_bytes, node
        self._temporary: Path | None = None
        self._bytes: dict[str, int] = {}

    def receive(self, message: Message) -> None:
        """Processes a message of the kind `file` or `folder`.

        Raises:
            ClusterError: The message is not a piece of a run's folder.
        """
        if message["kind"] == "file":
            self.write(message["name"], message["bytes"])
        else:
            self.incomplete = not self.finish(message["nbytes"])

    def write(self, name: str, piece: bytes) -> None:
        """Appends to a file.

        Raises:
            ClusterError: No run has a file of that name, or the file is too large.
        """
        if not RUN_FILE.fullmatch(name):
            raise self._error(
                Bilingual(f"a file {short_repr(name)}, which no run has", f"运行中不会有的文件 {short_repr(name)}")
            )
        self._bytes[name] = self._bytes.get(name, 0) + len(piece)
        if len(self._bytes) > MAX_FILES:
            raise self._error(Bilingual(f"more than {MAX_FILES:,} files", f"超过 {MAX_FILES:,} 个文件"))
        if not name.endswith(WEIGHTS) and self._bytes[name] > MAX_TEXT_BYTES:
            raise self._error(
                Bilingual(f"{name} with more than {MAX_TEXT_BYTES:,} bytes", f"超过 {MAX_TEXT_BYTES:,} 字节的 {name}")
            )
        if sum(self._bytes.values()) > self._max_bytes:
            raise self._error(
                Bilingual(
                    f"more than {self._max_bytes:,} bytes, the limit for this run",
                    f"超过 {self._max_bytes:,} 字节的内容，这是这次运行的上限",
                )
            )
        path = inside(self._temporary_folder(), name, kind=ClusterError)
        path.parent.mkdir(parents=True, exist_ok=True)
        with append(path) as opened:
            opened.write(piece)

    def finish(self, nbytes: int) -> bool:
        """Renames the folder if all bytes have arrived; returns whether they have."""
        if sum(self._bytes.values()) != nbytes:
            self.discard()
            return False
        temporary = self._temporary_folder()
        remove(self._folder)
        temporary.rename(self._folder)
        self._temporary, self._bytes = None, {}
        return True

    def discard(self) -> None:
        """Removes the received files."""
        if self._temporary is not None:
            remove_tree(self._temporary)
        self._temporary, self._bytes = None, {}

    def _temporary_folder(self) -> Path:
        if self._temporary is None:
            self._temporary = self._folder.with_name(temporary_name(self._folder.name))
            self._temporary.mkdir(parents=True)
        return self._temporary

    def _error(self, what: str) -> ClusterError:
        self.discard()
        return ClusterError(
            Bilingual(
                f"{self._node} sent {what}. Nothing was saved: check the programs that run on that machine.",
                f"{self._node} 发来了{local(what, 'zh')}。未保存任何内容：请检查那台机器上运行的程序。",
            )
        )
