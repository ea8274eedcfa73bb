"""Output for a terminal: no untrusted text moves the cursor, changes colours or the title, reverses words, or shows a
secret.

Control characters are shown as their escapes in Python: \\x1b, \\u009b, \\u202e. Escapes consist of letters of every
encoding, and are different for each character.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import TextIO

from siliang.secrets import HIDDEN, environment_secrets, secret_places, without_secrets

# Control characters: C0 without tab and newline, with carriage return; DEL; and C1.
_OBEYED = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
# Characters that are invisible or change the order of others: marks of direction, separators, fillers, tags.
_UNSEEN = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200e\u200f\u2028-\u202e\u2061-\u206f\u3164\ufeff\uffa0"
    r"\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff"
)
# Joiners and word breaks of zero width belong to many scripts and to emoji; within Latin words they deceive.
_JOINERS = r"\u200b-\u200d\u2060"
_BARE = re.compile(rf"(?<![^\x00-\u02ff])[{_JOINERS}]+|[{_JOINERS}]+(?![^\x00-\u02ff])")
_HOSTILE = re.compile(rf"[{_OBEYED}{_UNSEEN}]")
_ONLY_OBEYED = re.compile(rf"[{_OBEYED}]")
_ANY = re.compile(rf"[{_OBEYED}{_UNSEEN}{_JOINERS}]")
# The unfinished end of a streamed text: a word, half of a line end, a letter that may be joined to the next.
_TAIL = re.compile(
    rf"(?:(?:bearer|basic)\s+)?[!-~]*\r?\Z"
    rf"|(?:[^\x00-\u02ff][{_JOINERS}]+)*[^\x00-\u02ff]?[{_JOINERS}]*\Z",
    re.IGNORECASE,
)
_OPEN_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(?![\s\S]*-----END [A-Z0-9 ]*PRIVATE KEY-----)")
MOST_BUFFERED = 4096  # characters of a streamed text: few secrets are longer


def shown(text: str) -> str:
    """A text of any number of lines for a terminal: without secrets, with control characters escaped."""
    return without_controls(without_secrets(text))


def shown_changes(text: str) -> list[tuple[int, int, str]]:
    """The changes of `shown`: (first character, the one after the last, replacement), in order."""
    changes = [(first, last, HIDDEN) for first, last in secret_places(text)]
    controls = [(m.start(), m.end(), _escaped(m)) for m in (*_HOSTILE.finditer(text), *_BARE.finditer(text))]
    outside = [c for c in controls if not any(first <= c[0] < last for first, last, _ in changes)]
    return sorted(changes + outside)


def one_line(text: str) -> str:
    """`shown` in one line, for a name, a label or a cell: newlines and tabs are escaped too."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def without_controls(text: str) -> str:
    """The text with control characters and invisible characters escaped; a Windows line end becomes a newline."""
    if not _ANY.search(text):
        return text
    return _BARE.sub(_escaped, _HOSTILE.sub(_escaped, text.replace("\r\n", "\n")))


def clean_output(text: str) -> str:
    """The output of a command for a file or another program: without secrets and control characters, since many
    programs show it on a terminal. Marks of direction and joiners stay."""
    return _ONLY_OBEYED.sub(_escaped, without_secrets(text).replace("\r\n", "\n"))


def shell_command(*words: object) -> str:
    """A command line for a shell: names with blanks or quotes are quoted, control characters are escaped.

    Args:
        words: File names are `Path`s: a name that begins with a dash gets `./`, so that it is not an option.
    """
    return " ".join(map(_quoted, words))


def _quoted(word: object) -> str:
    text = f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
    text = without_secrets(text)
    if without_controls(text) == text and "\n" not in text and "\t" not in text:
        return shlex.quote(text)
    # $'...' of bash and zsh, with escapes such as \x1b and \n
    escaped = (
        text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    )
    return f"$'{without_controls(escaped)}'"


def json_escaped(text: str) -> str:
    """The same JSON with control and invisible characters escaped; they occur only in its texts."""
    return _ANY.sub(_json_escape, text)


def _escaped(found: re.Match[str]) -> str:
    return "".join(map(escape, found[0]))


def escape(character: str) -> str:
    """A character as its escape in Python's quotes, and in $'...' of bash and zsh."""
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _json_escape(found: re.Match[str]) -> str:
    encoded = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{encoded[i]:02x}{encoded[i + 1]:02x}" for i in range(0, len(encoded), 2))


class StreamedText:
    """A text that a model generates in pieces. The first half of a possible secret, or of a line end, is buffered until
    the next piece; so whole words are shown."""

    def __init__(self) -> None:
        self._buffer = ""

    def add(self, piece: str) -> str:
        """The part of the text so far that can be shown now."""
        text = self._buffer + piece
        most = MOST_BUFFERED * (5 if "-----BEGIN" in text else 1)  # a private key has many lines
        end = max(self._settled(text), len(text) - most)
        self._buffer = text[end:]
        return shown(text[:end])

    def end(self) -> str:
        """The rest of the text."""
        rest, self._buffer = self._buffer, ""
        return shown(rest)

    def _settled(self, text: str) -> int:
        """The number of characters that cannot become part of a secret with later pieces."""
        if (key := _OPEN_KEY.search(text)) is not None:
            return key.start()
        tail = _TAIL.search(text)
        end = tail.start() if tail else len(text)
        for secret in environment_secrets():
            for n in range(min(len(secret) - 1, len(text)), 0, -1):
                if text.endswith(secret[:n]):
                    end = min(end, len(text) - n)
                    break
        # do not cut a secret that begins before
        return next((first for first, last in secret_places(text) if first < end < last), end)


class CleanStream(io.TextIOBase):
    """Standard output or error; every text that is printed to it is `shown`.

    A library's progress bar begins with a carriage return. It is passed on if the line is empty or holds such a bar.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream  # the raw stream, for text with its own escapes
        self._over = True  # the line is empty, or holds a progress bar

    def write(self, text: str) -> int:
        """Writes a text."""
        drawn = self._over and text.startswith("\r")
        first = "\r" if drawn else ""
        last = "\r" if drawn and len(text) > 1 and text.endswith("\r") else ""
        self.stream.write(first + shown(text.strip("\r") if drawn else text) + last)
        if "\n" in text:
            self._over = text.endswith("\n")
        elif text:
            self._over = drawn
        return len(text)

    def close(self) -> None:
        """Does nothing: this object does not own the stream."""

    def flush(self) -> None:
        """Flushes the stream."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self.stream.fileno()

    def writable(self) -> bool:
        """True."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """The stream's handling of characters that its encoding lacks."""
        return self.stream.errors

    @property
    def buffer(self) -> io.BufferedIOBase:
        """The stream's buffer, for bytes."""
        return self.stream.buffer  # type: ignore[return-value]


def clean_standard_streams() -> None:
    """Makes standard output and error clean streams, also after Rich has replaced them."""
    if sys.stdout is not None and not isinstance(sys.stdout, CleanStream):
        sys.stdout = CleanStream(sys.stdout)
    if sys.stderr is not None and not isinstance(sys.stderr, CleanStream):
        sys.stderr = CleanStream(sys.stderr)


def raw_stream(stream: TextIO) -> TextIO:
    """The stream within a clean stream, for clean text and siliang's own escapes."""
    return stream.stream if isinstance(stream, CleanStream) else stream
