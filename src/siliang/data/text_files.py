"""Text files: their encoding, their line ends, and their lines with numbers."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from siliang.language import Bilingual
from siliang.types import DataError

# kinds of files of data, as `kind_of` says them
COLUMN_FILES = (".bmes", ".bio", ".bioes", ".conll", ".ner")
FILE_KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", *COLUMN_FILES)
CHUNK_BYTES = 2**17
MOST_ROW = 2**24  # characters of a line, a cell or an item: more than any row has
MOST_COLUMNS = 10_000
MOST_GROWTH = 200  # decompressed bytes per byte of a compressed file, beyond SMALL_BYTES; texts have 3 to 30
SMALL_BYTES = 64 * 2**20
MARKS = (  # longest first: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHINESE = re.compile("[\u4e00-\u9fff\u3000-\u303f\uff00-\uffef\u2018-\u201d\u2014\u2026\xb7]")
COMMON_SHARE = 0.8  # of the characters beyond ASCII: common Chinese ones, where a file really is GB18030
MANY_CHARACTERS = 20  # beyond ASCII: so many are valid UTF-8 by chance in no other encoding
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"


@dataclass(frozen=True)
class TextFile:
    """A text file whose encoding is known, and that decodes from end to end.

    Attributes:
        newline: What ends its lines: a line feed (with or without a carriage return), or a carriage return alone.
        guessed: The encoding is not what a mark or UTF-8 itself says.
        longest: Characters of its longest line; 0 where that is shorter than a piece in which files are read.
    """

    path: Path
    encoding: str
    newline: str = "\n"
    guessed: bool = False
    longest: int = 0

    def lines(self) -> Iterator[tuple[int, str]]:
        """(line number, line with its end).

        Raises:
            DataError: A line is longer than a row may be.
        """
        if self.longest > MOST_ROW:
            raise DataError(
                Bilingual(
                    f"{self.path} has a line of {self.longest:,} characters: at most {MOST_ROW:,} are read. "
                    "Break the text "
                    "into lines.",
                    f"{self.path} 有一行长 {self.longest:,} 个字符：最多读取 {MOST_ROW:,} 个。请给文本分行。",
                )
            )
        with self.open(self.newline) as opened:
            yield from enumerate(opened, start=1)

    def open(self, newline: str = "") -> TextIO:
        """The file's text, its line ends as they are."""
        return io.TextIOWrapper(open_bytes(self.path), encoding=self.encoding, newline=newline)


def find_text(path: Path, encoding: str = "auto") -> TextFile:
    """Looks through a text file.

    Args:
        encoding: Python's name of it. auto: what its byte order mark says, or UTF-8, or GB18030 where the whole file
            decodes so and is Chinese.

    Raises:
        DataError: It does not decode.
    """
    with open_bytes(path) as opened:
        head = opened.read(4096)
    marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if encoding != "auto":
        name = codecs.lookup(encoding).name
        if name == "utf-8":  # a mark is not text
            name = "utf-8-sig"
        try:
            found = _through(path, name)
        except _UndecodableError as error:
            raise DataError(
                Bilingual(
                    f"{path}:{error.line}: not {encoding} text, which data.encoding says. Leave that setting "
                    "out, or give "
                    "the encoding that the file was saved in.",
                    f"{path}:{error.line}：不是 data.encoding 所说的 {encoding} 文本。请去掉该设置，"
                    "或给出文件保存时的编码。",
                )
            ) from None
        if not name.startswith("utf") and _is_utf8(path):
            raise DataError(
                Bilingual(
                    f"{path} is UTF-8, and data.encoding says {encoding}: leave that setting out.",
                    f"{path} 是 UTF-8，而 data.encoding 写的是 {encoding}：请去掉该设置。",
                )
            )
        return found
    try:
        if marked is not None:
            return _through(path, marked)
        if (count := head.count(0)) * 8 > len(head):
            order = "be" if head[0] == 0 else "le"
            raise DataError(
                Bilingual(
                    f"{path}: {count} of its first {len(head)} bytes are 0, as in UTF-16 without a byte order "
                    "mark: say "
                    f"data.encoding=utf-16-{order}, or save the file as UTF-8.",
                    f"{path}：前 {len(head)} 个字节中有 {count} 个是 0，像没有字节序标记的 UTF-16："
                    f"请设置 data.encoding=utf-16-{order}，或把文件另存为 UTF-8。",
                )
            )
        return _through(path, "utf-8")
    except _UndecodableError as error:
        line = error.line
    wanted = "UTF-8" if marked is None else marked.removesuffix("-sig").upper()
    wrong = Bilingual(f"{path}:{line}: not {wanted} text", f"{path}:{line}：不是 {wanted} 文本")
    if marked is None:
        try:
            return _through(path, "gb18030", guessed=True)
        except _UndecodableError:
            pass
    raise DataError(
        Bilingual(
            f"{wrong}. Say what it is with data.encoding (gb18030, big5, cp1252, shift_jis, utf-16 ...), or "
            "save the file "
            "as UTF-8.",
            f"{wrong.zh}。请用 data.encoding 指明编码（gb18030、big5、cp1252、shift_jis、"
            "utf-16 等），或把文件另存为 UTF-8。",
        )
    )


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, unpacked where it ends in .gz."""
    return cast("BinaryIO", gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))


def kind_of(path: Path) -> str:
    """The ending that says the kind of file: .csv of both a.csv and a.CSV.gz."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


class _UndecodableError(Exception):
    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def _through(path: Path, encoding: str, *, guessed: bool = False) -> TextFile:
    """Decodes the whole file once, piece by piece.

    Raises:
        _UndecodableError: It is something else; where `guessed`, also where it does not look like Chinese.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    feeds, returns, beyond, common, size = 0, 0, 0, 0, 0
    lengths = {"\n": _Lengths("\n"), "\r": _Lengths("\r")}
    most = SMALL_BYTES + MOST_GROWTH * path.stat().st_size
    with open_bytes(path) as opened:
        while True:
            raw = opened.read(CHUNK_BYTES)
            size += len(raw)
            if size > most:
                raise DataError(
                    Bilingual(
                        f"{path} unpacks to more than {MOST_GROWTH} times its size: unpack it yourself.",
                        f"{path} 解压后超过自身大小的 {MOST_GROWTH} 倍：请自行解压。",
                    )
                )
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _UndecodableError(1 + feeds + raw[: error.start].count(b"\n")) from None
            except UnicodeError:  # UTF-16 and UTF-32 without their mark
                raise _UndecodableError(1 + feeds) from None
            feeds += text.count("\n")
            returns += "\r" in text
            for length in lengths.values():
                length.see(text)
            if guessed:
                beyond += sum(c > "\x7f" for c in text)
                common += _common(text)
            if not raw:
                break
    if guessed and common < COMMON_SHARE * beyond:
        raise _UndecodableError(1)
    newline = "\r" if returns and not feeds else "\n"
    return TextFile(path, encoding, newline, guessed, lengths[newline].longest)


@dataclass
class _Lengths:
    """Of the lines that do not lie within one piece of a text: the longest so far, and what is seen of the last."""

    newline: str
    longest: int = 0
    open: int = 0

    def see(self, text: str) -> None:
        end = text.find(self.newline)
        self.longest = max(self.longest, self.open + (len(text) if end < 0 else end))
        self.open = self.open + len(text) if end < 0 else len(text) - text.rfind(self.newline) - 1


def _is_utf8(path: Path) -> bool:
    """It is, and not by chance: many characters of it are several bytes long."""
    beyond = 0
    try:
        with open_bytes(path) as opened, io.TextIOWrapper(opened, encoding="utf-8") as text:
            while beyond < MANY_CHARACTERS and (piece := text.read(CHUNK_BYTES)):
                beyond += sum(c > "\x7f" for c in piece)
    except UnicodeDecodeError:
        return False
    return beyond >= MANY_CHARACTERS


def _common(text: str) -> int:
    """The characters of GB 2312's first level, and the punctuation that goes with them: nearly all of any Chinese
    text, and few of what another encoding becomes when it is read as GB18030."""
    coded = "".join(CHINESE.findall(text)).encode("gb2312", "ignore")
    return sum(first <= 0xA3 or 0xB0 <= first <= 0xD7 for first in coded[::2])
