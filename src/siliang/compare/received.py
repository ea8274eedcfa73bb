"""Checks what a machine of a cluster sends back, before it is used: others may have taken the machine over.

Only the standard library and small modules here: the Ray process that carries files does not load torch.
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
CODE = r"(?:[A-Za-z0-9_]{1,100}/){0,8}[A-Za-z0-9_]{1,100}\.py"  # of a model that brings code
FOLDERS = "adapter|model|checkpoints/(?:damaged-)?checkpoint-[0-9]{1,15}"
RUN_FILE = re.compile(rf"run\.yaml|run\.json|answers\.json|(?:{FOLDERS})/(?:{FILE}|{CODE})", re.ASCII)
MOST_FILES = 10_000
MOST_TEXT_BYTES = 2**28  # of a file that holds no weights
WEIGHTS = (".safetensors", ".bin")
Message = dict[str, Any]  # a request to a worker, or what it sends back; its kind is in `kind`
# the fields of each kind of message, beside its kind
MESSAGES: dict[str, dict[str, type]] = {
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
UNKNOWN = Bilingual(
    "its machine sent an unknown message: is its siliang the same as here?",
    "它的机器发来了未知的消息：那里的 siliang 与这里的相同吗？",
)


def checked(message: object) -> Message:
    """The message, if it is one of `MESSAGES`; otherwise one of the kind `failed`, which says so."""
    wrong = {"kind": "failed", "error": UNKNOWN}
    found = as_message(message)
    if found is None:
        return wrong
    metrics = found["found"].items() if found["kind"] == "done" else ()
    return found if all(isinstance(name, str) and isinstance(value, int | float) for name, value in metrics) else wrong


def as_message(message: object) -> Message | None:
    """The message with the fields of its kind and no others; None if it is none of `MESSAGES`."""
    if not isinstance(message, dict) or not isinstance(kind := message.get("kind"), str) or kind not in MESSAGES:
        return None
    if not all(isinstance(message.get(name), wanted) for name, wanted in MESSAGES[kind].items()):
        return None
    return {"kind": kind} | {name: message[name] for name in MESSAGES[kind]}


class Incoming:
    """A run's folder that comes in pieces; it gets its name when it is whole.

    Args:
        folder: Its path.
        most_bytes: More than the run may have.
        node: The machine, for errors.

    Attributes:
        incomplete: Not all bytes came.
    """

    incomplete = False

    def __init__(self, folder: Path, most_bytes: int, node: str = "a machine") -> None:
        self._folder, self._most_bytes, self._node = folder, most_bytes, node
        self._temporary: Path | None = None
        self._bytes: dict[str, int] = {}

    def receive(self, message: Message) -> None:
        """Takes a message of the kind `file` or `folder`.

        Raises:
            ClusterError: It is not a piece of a run's folder.
        """
        if message["kind"] == "file":
            self.write(message["name"], message["bytes"])
        else:
            self.incomplete = not self.finish(message["nbytes"])

    def write(self, name: str, piece: bytes) -> None:
        """Adds to a file.

        Raises:
            ClusterError: No run has a file of that name, or it is larger than a run's can be.
        """
        if not RUN_FILE.fullmatch(name):
            raise self._wrong(
                Bilingual(f"a file {short_repr(name)}, which no run has", f"运行中不会有的文件 {short_repr(name)}")
            )
        self._bytes[name] = self._bytes.get(name, 0) + len(piece)
        if len(self._bytes) > MOST_FILES:
            raise self._wrong(Bilingual(f"more than {MOST_FILES:,} files", f"超过 {MOST_FILES:,} 个文件"))
        if not name.endswith(WEIGHTS) and self._bytes[name] > MOST_TEXT_BYTES:
            raise self._wrong(
                Bilingual(f"{name} with more than {MOST_TEXT_BYTES:,} bytes", f"超过 {MOST_TEXT_BYTES:,} 字节的 {name}")
            )
        if sum(self._bytes.values()) > self._most_bytes:
            raise self._wrong(
                Bilingual(
                    f"more than {self._most_bytes:,} bytes, which is more than this run can have",
                    f"超过 {self._most_bytes:,} 字节的内容，多于这次运行可能有的",
                )
            )
        path = inside(self._begun(), name, kind=ClusterError)
        path.parent.mkdir(parents=True, exist_ok=True)
        with append(path) as opened:
            opened.write(piece)

    def finish(self, nbytes: int) -> bool:
        """Gives the folder its name, if all of its bytes came; returns whether they did."""
        if sum(self._bytes.values()) != nbytes:
            self.discard()
            return False
        temporary = self._begun()
        remove(self._folder)
        temporary.rename(self._folder)
        self._temporary, self._bytes = None, {}
        return True

    def discard(self) -> None:
        """Removes what came."""
        if self._temporary is not None:
            remove_tree(self._temporary)
        self._temporary, self._bytes = None, {}

    def _begun(self) -> Path:
        if self._temporary is None:
            self._temporary = self._folder.with_name(temporary_name(self._folder.name))
            self._temporary.mkdir(parents=True)
        return self._temporary

    def _wrong(self, what: str) -> ClusterError:
        self.discard()
        return ClusterError(
            Bilingual(
                f"{self._node} sent {what}. Nothing of it was kept: look at what runs on that machine.",
                f"{self._node} 发来了{local(what, 'zh')}。未保留任何内容：请检查那台机器上运行的程序。",
            )
        )
