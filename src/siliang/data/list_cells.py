"""Lists and objects that a csv file holds as text: in JSON, in Python's notation, or in NumPy's."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Callable

from siliang.data.cells import BLANKS


class CsvCell(str):
    """A cell of a csv or tsv file, which may be a list or an object: such files have none but as text."""

    __slots__ = ()


def csv_cell(text: str) -> str:
    """A cell, marked where it may be a list or an object."""
    return CsvCell(text) if text[:1] in ("[", "{") else text


LONGEST = 1_000_000  # characters: ast needs some hundred times as many bytes


def held_in_text(value: object, *, longest: int = LONGEST) -> list[object] | dict[object, object] | None:
    """The list or the object that a text is; None for anything else.

    Args:
        longest: Characters; a longer text is none.
    """
    text = value.strip(BLANKS) if isinstance(value, str) else ""
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")) or len(text) > longest:
        return None
    parsers: tuple[Callable[[str], object], ...] = (json.loads, _of_python)
    for parse in parsers:
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(found, list | dict):
            return found
    return None


def as_list(value: object) -> object:
    """The list that a text is; any other value as it is."""
    found = held_in_text(value)
    return found if isinstance(found, list) else value


def _of_python(text: str) -> object:
    """A literal of Python, with NumPy's arrays as lists. In NumPy's ['a' 'b'], a list of two texts, Python would join
    them; so commas are added."""
    tokens: list[tuple[int, str]] = []
    for kind, word, *_ in tokenize.generate_tokens(io.StringIO(text).readline):
        if kind in (tokenize.STRING, tokenize.NUMBER) and tokens and tokens[-1][0] == kind:
            tokens.append((tokenize.OP, ","))
        if kind not in (tokenize.NL, tokenize.NEWLINE):
            tokens.append((kind, word))
    tree = ast.parse(" ".join(word for _, word in tokens).strip(), mode="eval")
    if any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree)):
        raise ValueError("NumPy left some of it out")
    return ast.literal_eval(_ArraysAsLists().visit(tree))


class _ArraysAsLists(ast.NodeTransformer):
    """Of array(['a', 'b'], dtype=object), as NumPy writes an array in an object, the list."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_array = isinstance(node.func, ast.Name) and node.func.id == "array" and len(node.args) == 1
        return node.args[0] if is_array else node
