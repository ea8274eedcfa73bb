"""Files of one word and its tag a line: CoNLL, BIO, BMES."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import chain

from siliang.data.reading import DataRow, Reading
from siliang.data.text_files import TextFile
from siliang.language import Bilingual
from siliang.secrets import shortened
from siliang.types import DataError

COMMENT = re.compile(r"# *(\S+ *= |new(doc|par)\b)")  # CoNLL-U's
WORD_NUMBER = re.compile(r"[0-9]+([-.][0-9]+)?")  # and of what it writes for two words at once, or for none
NUMBERED_SENTENCES = 50  # looked at to know whether words are numbered
MANY_COLUMNS = 8  # behind a word's number: CoNLL-U and its kind, whose last column is not a tag


def tagged_rows(file: TextFile, name: str, reading: Reading) -> Iterator[DataRow]:
    """Sentences of one word and its tag a line, with an empty line between two: CoNLL, BIO, BMES."""
    first = _first_word_column(file, name)
    if first:
        reading.note(
            Bilingual(
                f"{name}: its first column numbers the words, and its second is read as the words",
                f"{name}：第一列是词的编号，第二列按词读取",
            )
        )
    tokens: list[str] = []
    tags: list[str] = []
    start, problem = 1, None
    for number, line in chain(_column_lines(file), [(0, "")]):
        if not line.strip():
            if tokens or problem:
                yield DataRow({"tokens": tokens, "tags": tags}, f"{name}:{start}", problem)
            tokens, tags, start, problem = [], [], number + 1, None
            continue
        fields = _line_fields(line)
        if len(fields) < 2 + first:
            problem = problem or Bilingual(
                f"has no tag in line {number}: {shortened(line, 200)!r}",
                f"的第 {number} 行没有标注：{shortened(line, 200)!r}",
            )
            continue
        if first and not fields[0].isdecimal():
            continue
        tokens.append(fields[first])
        tags.append(fields[-1].strip())


def _column_lines(file: TextFile) -> Iterator[tuple[int, str]]:
    """The lines of a file of tagged words, without comments; where a document begins, an empty one."""
    for number, ended in file.lines():
        line = ended.rstrip("\r\n")
        if "\t" in line or not COMMENT.match(line):
            yield number, "" if line.startswith("-DOCSTART-") else line


def _line_fields(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.split()


def _first_word_column(file: TextFile, name: str) -> int:
    """0, or 1 where the first column numbers the words of each sentence.

    Raises:
        DataError: It does, and there is no column of words, or none of tags.
    """
    sentences, several, numbers, fewest, most = 0, False, 0, sys.maxsize, 0
    for _, line in chain(_column_lines(file), [(0, "")]):
        if not line.strip():
            sentences, numbers = sentences + bool(numbers), 0
            if sentences == NUMBERED_SENTENCES:
                break
            continue
        fields = _line_fields(line)
        if not WORD_NUMBER.fullmatch(fields[0]):
            return 0
        if fields[0].isdecimal():
            numbers += 1
            if int(fields[0]) != numbers:
                return 0
        several = several or numbers > 1
        fewest, most = min(fewest, len(fields)), max(most, len(fields))
    if not several:
        return 0
    if fewest < 3:
        raise DataError(
            Bilingual(
                f"{name}: its first column numbers the words, and no other holds them: write word and tag.",
                f"{name}：第一列是词的编号，而没有词所在的列：请写出词和标注。",
            )
        )
    if most >= MANY_COLUMNS:
        raise DataError(
            Bilingual(
                f"{name}: {most} columns that start with a word's number, as in CoNLL-U. The last is not a tag: keep "
                "the columns of the word and of its tag (of CoNLL-U 2 and 4), and its empty lines.",
                f"{name}：共 {most} 列，以词的编号开头，像 CoNLL-U。最后一列不是标注："
                "请保留词和标注所在的列（CoNLL-U 的第 2 和第 4 列）以及空行。",
            )
        )
    return 1
