"""What a cell of a row is."""

from __future__ import annotations

import sys

import pytest

from siliang.data.cells import BLANKS, BadRow, filled, is_blank


def test_every_white_space_is_blank() -> None:
    assert {c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()} <= set(BLANKS)
    assert is_blank("\u2003\u200b\ufeff \n\u3000\u2003") and is_blank(None) and is_blank([]) and is_blank("")
    assert not any(map(is_blank, ("a", "\u200ba", "。", 0, False, ["", ""])))


def test_invisible_text_is_as_empty_as_none() -> None:
    for text in ("", " ", "\u200b", "\u2003\u200b\u2003"):
        with pytest.raises(BadRow, match="has an empty 'review'"):
            filled({"review": text}, "review")
