"""Checks a tokenizer's files before they are loaded: their rules are programs from an unknown author."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from siliang.hub import find_file
from siliang.language import Bilingual, local
from siliang.safety.limited.tokenizer_rules import MOST_NUMBER
from siliang.safety.limits import RefusedError, check_tokenizer_rules
from siliang.safety.safe_json import JsonError, read_json
from siliang.types import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
NUMBERED = ("vocab.json", "added_tokens.json")  # tokens and their ids
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
NAMES = ("tokenizer.json", *SETTINGS, *NUMBERED)
# further or alternative files of a folder, of which only the size is checked
WORDS = ("vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "vocab-src.json", "vocab-tgt.json", "target_vocab.json")
PIECES = ("tokenizer", "spiece", "sentencepiece", "sentencepiece.bpe", "spm", "spm_char")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
OTHER_FILES = (*WORDS, *(f"{name}.model" for name in PIECES), "source.spm", "target.spm", *TEMPLATES)
MOST_BYTES = {"tokenizer.json": 200 * 2**20}
OTHERS = 20 * 2**20


def check_tokenizer(name: str, revision: str | None = None) -> None:
    """Checks a model's tokenizer by loading it in a process with limits first.

    Args:
        name: The model's folder, or its name on the Hub.

    Raises:
        ModelError: The tokenizer exceeds a limit.
    """
    for file in NAMES:
        path = find_file(name, file, revision)
        if path is None:
            continue
        most = MOST_BYTES.get(file, OTHERS)
        _check_size(path, most)
        if file == "tokenizer.json":
            _try(path)
        elif file in NUMBERED:
            _check_numbers(path, most)
    if (folder := Path(name)).is_dir():
        for path in (path for pattern in OTHER_FILES for path in folder.glob(pattern)):
            _check_size(path, OTHERS)


def check_made(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None = None) -> None:
    """Checks the rules that transformers made from files other than a tokenizer.json: a sentencepiece model has a table
    of character replacements.

    Raises:
        ModelError: The rules exceed a limit.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or find_file(name, "tokenizer.json", revision) is not None:
        return
    try:
        check_tokenizer_rules(core.to_str())
    except RefusedError as error:
        raise ModelError(
            Bilingual(
                f"{name}: its tokenizer cannot be used: {first_line(str(error))}.",
                f"{name}：它的分词器无法使用：{local(first_line(error), 'zh')}。",
            )
        ) from None


def _check_size(path: Path, most: int) -> None:
    if (size := path.stat().st_size) > most:
        raise ModelError(
            Bilingual(
                f"{path} has {size:,} bytes: at most {most:,} are read.",
                f"{path} 有 {size:,} 字节：最多读取 {most:,} 字节。",
            )
        )


def _check_numbers(path: Path, most_bytes: int) -> None:
    try:
        values = read_json(path, most_bytes=most_bytes, foreign=True)
    except (JsonError, OSError):  # loading raises it, if the file is used
        return
    numbers = (n for n in values.values() if type(n) is int) if isinstance(values, dict) else ()
    if (largest := max(numbers, default=0)) > MOST_NUMBER:
        raise ModelError(
            Bilingual(
                f"{path} gives a token the id {largest:,}: at most {MOST_NUMBER:,} is allowed.",
                f"{path} 中有词元的编号是 {largest:,}：最大允许 {MOST_NUMBER:,}。",
            )
        )


def _try(path: Path) -> None:
    try:
        check_tokenizer_rules(path.read_text(encoding="utf-8"))
    except RefusedError as error:
        raise ModelError(
            Bilingual(
                f"{path} cannot be used: {first_line(str(error))}.",
                f"{path} 无法使用：{local(first_line(error), 'zh')}。",
            )
        ) from None
    except UnicodeDecodeError:
        raise ModelError(
            Bilingual(f"{path} cannot be used: it is not UTF-8.", f"{path} 无法使用：它不是 UTF-8 编码。")
        ) from None
