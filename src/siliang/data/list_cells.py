"""Lists and objects that a csv file holds as text: in JSON, in Python's notation, or in NumPy's."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from functools import partial

from siliang.data.cells import BLANKS
from siliang.safety.safe_json import JsonError, parse_json


class CsvCell(str):
    """A cell of a csv or tsv file, which may be a list or an object: such files have none but as text."""

    __slots__ = ()


def csv_cell(text: str) -> str:
    """A cell, marked where it may be a list or an object."""
    return CsvCell(text) if text[:1] in ("[", "{") else text


LONGEST = 1_000_000  # characters that Python's parser is given: it needs some hundred times as many bytes
ENDS, BEGINS = (tokenize.STRING, tokenize.NUMBER, tokenize.NAME), ("[", "{", "-", "+")


def held_in_text(value: object, *, longest: int | None = None) -> list[object] | dict[object, object] | None:
    """The list or the object that a text is; None for anything else.

    Args:
        longest: Characters; a longer text is none.
    """
    text = value.strip(BLANKS) if isinstance(value, str) else ""
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")) or (longest is not None and len(text) > longest):
        return None
    # JSON, JSON with line breaks in its texts, Python
    for parse in (partial(parse_json, foreign=True), json.JSONDecoder(strict=False).decode, _of_python):
        try:
            found = parse(text)
            json.dumps(found, ensure_ascii=False, default=str).encode()  # fails on half of a character
        except (JsonError, ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(found, list | dict):
            return found
    return None


def as_list(value: object) -> object:
    """The list that a text is; any other value as it is."""
    found = held_in_text(value)
    return found if isinstance(found, list) else value


def _of_python(text: str) -> object:
    """A literal of Python, with NumPy's values as Python's.

    NumPy writes no commas, so they are added: ['a' 'b'] is a list of two texts, which Python would join, and [1 -2] has
    two numbers.
    """
    if len(text) > LONGEST:
        raise ValueError("too long")
    words: list[str] = []
    last: tokenize.TokenInfo | None = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.ERRORTOKEN:  # such as a quote that is not closed
            raise ValueError("not a literal")
        if token.type in (tokenize.NL, tokenize.NEWLINE):
            continue
        if last is not None and _are_two_values(last, token):
            words.append(",")
        words.append(token.string)
        last = token
    tree = _AsPython().visit(ast.parse(" ".join(words).strip(), mode="eval"))
    if any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(tree)):
        raise ValueError("NumPy left some of it out")
    return ast.literal_eval(tree)


def _are_two_values(before: tokenize.TokenInfo, token: tokenize.TokenInfo) -> bool:
    """Whether one ends in front of this token, and another begins with it."""
    if before.type not in ENDS and before.string not in ("]", "}", ")"):
        return False
    if token.string in ("-", "+"):  # a sign, with a blank in front of it alone: 1 -2, and not 1 - 2 or 1-2
        return before.end != token.start and token.line[token.end[1] : token.end[1] + 1].strip() != ""
    return token.type in ENDS or token.string in BEGINS


class _AsPython(ast.NodeTransformer):
    """Of NumPy's array(['a', 'b'], dtype=object) the list, of its np.float64(0.5) the number, of np.True_ True."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_array = isinstance(node.func, ast.Name) and node.func.id == "array"
        is_value = isinstance(node.func, ast.Attribute) and _is_numpy(node.func)
        return node.args[0] if (is_array or is_value) and len(node.args) == 1 else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        is_truth = _is_numpy(node) and node.attr in ("True_", "False_")
        return ast.Constant(node.attr == "True_") if is_truth else node


def _is_numpy(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "np"
