"""Checks the rules of a tokenizer's file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

from siliang.language import Bilingual
from siliang.safety.limited.refused import LimitError, both_texts

MOST_GROWTH = 32  # characters made from one: Unicode's normal forms make up to 18
MOST_PADDING = 2**20
MOST_ADDED = 100_000
MOST_NUMBER = 2**24  # largest id of a token: the library makes a list of all ids up to the largest
MOST_RULES = 100  # known tokenizers have a dozen
MOST_PATTERN = 20_000  # characters
PROBES = tuple(
    [
        unit * (2000 // len(unit))
        for unit in ("a", "A", " ", "\n", "1", ".", "中", "é", "ab ", "a1", "'s", "\r\n", "\u200d😀")
    ]
    + ["The film, which isn't 2 hours long, was GOOD!\n\n  她说：“很好看。” don't_stop <|x|> e=mc²\t" * 20]
)


def check_tokenizer_rules(text: str) -> list[str] | None:
    """Why a tokenizer.json cannot be used, in English and in Chinese; None if it can.

    Counts its rules, and tries them on some texts with a vocabulary of one word. Only the rules and their regular
    expressions let a small file do harm.
    """
    why = _why_not(json.loads(text))
    return None if why is None else both_texts(why)


def _why_not(values: object) -> Bilingual | None:
    if not isinstance(values, dict):
        return Bilingual("it is not a tokenizer", "它不是分词器")
    rules = [values.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]
    growth = 1.0
    for rule in _rules(rules):
        growth *= _growth(rule)
        if why := _too_much(rule):
            return why
    if growth > MOST_GROWTH:
        return Bilingual(f"its rules make {growth:,.0f} characters of one", f"它的规则把一个字符变成 {growth:,.0f} 个")
    padding = values.get("padding")
    if isinstance(padding, dict) and any(n > MOST_PADDING for n in _numbers([padding])):
        return Bilingual(
            f"it pads texts to more than {MOST_PADDING:,} tokens", f"它把文本填充到超过 {MOST_PADDING:,} 个词元"
        )
    if len(values.get("added_tokens") or ()) > MOST_ADDED:
        return Bilingual(f"it adds more than {MOST_ADDED:,} tokens", f"它添加的词元超过 {MOST_ADDED:,} 个")
    if (largest := _largest_number(values)) > MOST_NUMBER:
        return Bilingual(
            f"it gives a token the id {largest:,}: at most {MOST_NUMBER:,} is allowed",
            f"其中有词元的编号是 {largest:,}：最大允许 {MOST_NUMBER:,}",
        )
    return _try_rules(values)


def _try_rules(values: dict[str, object]) -> Bilingual | None:
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    kept = {name: values.get(name) for name in ("version", "normalizer", "pre_tokenizer", "decoder")}
    bare = Tokenizer.from_str(json.dumps(kept | {"model": model, "added_tokens": [], "post_processor": None}))
    every = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x10000)]))
    for probe in (*PROBES, every):
        if bare.normalizer is not None and len(bare.normalizer.normalize_str(probe)) > MOST_GROWTH * len(probe) + 100:
            return Bilingual(
                f"its normalizer makes more than {MOST_GROWTH} characters of one",
                f"它的 normalizer 把一个字符变成超过 {MOST_GROWTH} 个",
            )
        ids = bare.encode(probe).ids
        if len(ids) > MOST_GROWTH * len(probe) + 100:
            return Bilingual(
                f"it makes more than {MOST_GROWTH} tokens of a character",
                f"它把一个字符变成超过 {MOST_GROWTH} 个词元",
            )
        bare.decode(ids)
    return None


def _rules(value: object) -> Iterator[dict[str, object]]:
    """The rules in a tokenizer's parts, with those within sequences of rules."""
    stack, seen = [value], 0
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            seen += 1
            if seen > MOST_RULES:
                raise LimitError(Bilingual(f"it has more than {MOST_RULES:,} rules", f"它的规则超过 {MOST_RULES:,} 条"))
            yield value
            stack += [v for v in value.values() if isinstance(v, dict | list)]
        elif isinstance(value, list):
            stack += [v for v in value if isinstance(v, dict | list)]


def _growth(rule: dict[str, object]) -> float:
    """The most characters, or tokens, that a rule can make of one."""
    if rule.get("type") == "TemplateProcessing":  # it may repeat a text
        parts = [part for name in ("single", "pair") if isinstance(part := rule.get(name), list)]
        texts = [[json.dumps(piece.get("Sequence")) for piece in part if isinstance(piece, dict)] for part in parts]
        return float(max((part.count(text) for part in texts for text in part if text != "null"), default=1))
    if rule.get("type") != "Replace":
        return 1.0
    content, pattern = str(rule.get("content")), rule.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    return 1.0 + len(content)  # an expression may match between any two characters


def _too_much(rule: dict[str, object]) -> Bilingual | None:
    if any(isinstance(v, str) and len(v) > MOST_PATTERN for k, v in rule.items() if k != "precompiled_charsmap"):
        return Bilingual(f"a rule has more than {MOST_PATTERN:,} characters", f"有一条规则超过 {MOST_PATTERN:,} 个字符")
    ids, single, pair = rule.get("ids"), rule.get("single"), rule.get("pair")
    if isinstance(ids, list) and len(ids) > 100:
        return Bilingual("it adds more than 100 tokens at one position", "它在一个位置添加超过 100 个词元")
    if isinstance(single, list) and max(len(single), len(pair) if isinstance(pair, list | dict | str) else 0) > 100:
        return Bilingual("it adds more than 100 tokens around a text", "它在一段文本前后添加超过 100 个词元")
    charsmap = rule.get("precompiled_charsmap")
    if isinstance(charsmap, str):
        data = base64.b64decode(charsmap)
        forms = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
        if max(map(len, forms), default=0) > 100:
            return Bilingual(
                "its table of characters has an entry of more than 100 bytes", "它的字符表中有一项超过 100 字节"
            )
    return None


def _largest_number(values: dict[str, object]) -> int:
    """The largest id of a token."""
    model, added = values.get("model"), values.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    numbers = [*words.values()] if isinstance(words, dict) else []  # in a list, ids are positions
    numbers += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((n for n in numbers if type(n) is int), default=0)


def _numbers(values: list[object]) -> Iterator[int | float]:
    for value in values:
        if isinstance(value, dict):
            yield from _numbers(list(value.values()))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield value
