"""What a terminal is shown: no text of others moves its cursor, changes its colours or its title, turns words around,
or holds a secret.

A character that a terminal obeys is shown as its escape in Python: \\x1b, \\u009b, \\u202e. An escape is made of
letters that every encoding has, and tells one character from another.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import TextIO

from siliang.secrets import HIDDEN, environment_secrets, secret_places, without_secrets

# C0 without tab and line's end, DEL and C1, which a terminal obeys, the carriage return too.
_OBEYED = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
# What is not seen, or changes the order of what is: marks of direction, separators, fillers, tags.
_UNSEEN = (
    r"\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200e\u200f\u2028-\u202e\u2061-\u206f\u3164\ufeff\uffa0"
    r"\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff"
)
# Joiners and word breaks of zero width are letters of many scripts and of emoji; within Latin words they deceive.
_JOINERS = r"\u200b-\u200d\u2060"
_BARE = re.compile(rf"(?<![^\x00-\u02ff])[{_JOINERS}]+|[{_JOINERS}]+(?![^\x00-\u02ff])")
_HOSTILE = re.compile(rf"[{_OBEYED}{_UNSEEN}]")
_ONLY_OBEYED = re.compile(rf"[{_OBEYED}]")
_ANY = re.compile(rf"[{_OBEYED}{_UNSEEN}{_JOINERS}]")
# The end of a text that more may follow: a word, half of a line's end, a letter that may be joined to more.
_TAIL = re.compile(
    rf"(?:(?:bearer|basic)\s+)?[!-~]*\r?\Z"
    rf"|(?:[^\x00-\u02ff][{_JOINERS}]+)*[^\x00-\u02ff]?[{_JOINERS}]*\Z",
    re.IGNORECASE,
)
_OPEN_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(?![\s\S]*-----END [A-Z0-9 ]*PRIVATE KEY-----)")
MOST_HELD = 4096  # characters of a text that is written in pieces: few secrets are longer


def shown(text: str) -> str:
    """A text of any number of lines as a terminal may have it: without secrets, its control characters escaped."""
    return without_controls(without_secrets(text))


def shown_changes(text: str) -> list[tuple[int, int, str]]:
    """What `shown` changes: (first character, the one behind the last, what stands there instead), in order."""
    changes = [(first, last, HIDDEN) for first, last in secret_places(text)]
    controls = [(m.start(), m.end(), _escaped(m)) for m in (*_HOSTILE.finditer(text), *_BARE.finditer(text))]
    outside = [c for c in controls if not any(first <= c[0] < last for first, last, _ in changes)]
    return sorted(changes + outside)


def one_line(text: str) -> str:
    """The same in one line and one cell: a name, a label, a text among others; lines' ends and tabs are escaped."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def without_controls(text: str) -> str:
    """The text with every character escaped that a terminal obeys, or that nobody sees; a Windows line's end is a
    line's end."""
    if not _ANY.search(text):
        return text
    return _BARE.sub(_escaped, _HOSTILE.sub(_escaped, text.replace("\r\n", "\n")))


def clean_output(text: str) -> str:
    """A text that is what a command was run for, on its way to a file or another program: without secrets, and without
    what a terminal obeys, for many of these programs show it on one. Marks of direction and joiners are part of it."""
    return _ONLY_OBEYED.sub(_escaped, without_secrets(text).replace("\r\n", "\n"))


def shell_command(*words: object) -> str:
    """A command line as a shell takes it: names with blanks or quotes in quotes, control characters as escapes.

    Args:
        words: Those that are names of files are `Path`s: one that begins with a dash would be an option.
    """
    return " ".join(map(_quoted, words))


def _quoted(word: object) -> str:
    text = f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
    text = without_secrets(text)
    if without_controls(text) == text and "\n" not in text and "\t" not in text:
        return shlex.quote(text)
    # $'...' of bash and zsh, where \x1b and \n stand for themselves
    escaped = (
        text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    )
    return f"$'{without_controls(escaped)}'"


def json_escaped(text: str) -> str:
    """JSON that says the same with each of these characters escaped; they stand in its texts alone."""
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
    """A text that comes in pieces, as a model writes it. What may be the first half of a secret, or of a line's end, is
    held back until more has come: words come as words."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, piece: str) -> str:
        """What of the text so far can be shown, and was not yet."""
        text = self._held + piece
        most = MOST_HELD * (5 if "-----BEGIN" in text else 1)  # a private key has many lines
        end = max(self._settled(text), len(text) - most)
        self._held = text[end:]
        return shown(text[:end])

    def end(self) -> str:
        """The rest."""
        rest, self._held = self._held, ""
        return shown(rest)

    def _settled(self, text: str) -> int:
        """Characters that no later piece can make part of a secret."""
        if (key := _OPEN_KEY.search(text)) is not None:
            return key.start()
        tail = _TAIL.search(text)
        end = tail.start() if tail else len(text)
        for secret in environment_secrets():
            for n in range(min(len(secret) - 1, len(text)), 0, -1):
                if text.endswith(secret[:n]):
                    end = min(end, len(text) - n)
                    break
        # one that has begun before stays in one piece
        return next((first for first, last in secret_places(text) if first < end < last), end)


class CleanStream(io.TextIOBase):
    """Standard output or error: every text that is printed to it is `shown`.

    A progress bar of a library begins its piece with a carriage return, which goes through where it draws over nothing
    but such a bar.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream  # as it is, for whoever brings its own escapes
        self._over = True  # the line holds nothing, or a bar

    def write(self, text: str) -> int:
        """Shows a text."""
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
        """Leaves the stream open, which is another's."""

    def flush(self) -> None:
        """Sends what is written on its way."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Of the stream."""
        return self.stream.fileno()

    def writable(self) -> bool:
        """It is."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """What becomes of characters that the encoding lacks."""
        return self.stream.errors

    @property
    def buffer(self) -> io.BufferedIOBase:
        """For bytes, which are nobody's text."""
        return self.stream.buffer  # type: ignore[return-value]


def clean_standard_streams() -> None:
    """Makes standard output and error screens, also where Rich has just put its own stream in their place."""
    if sys.stdout is not None and not isinstance(sys.stdout, CleanStream):
        sys.stdout = CleanStream(sys.stdout)
    if sys.stderr is not None and not isinstance(sys.stderr, CleanStream):
        sys.stderr = CleanStream(sys.stderr)


def raw_stream(stream: TextIO) -> TextIO:
    """The stream behind a screen, for text that is clean and escapes that are ours."""
    return stream.stream if isinstance(stream, CleanStream) else stream
