"""The rows of the workloads: of the project's test data, or of the demo's reviews where that is not needed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from bench.workloads import SEED, Data
from siliang.demo import TRAIN

SHARED = Path(__file__).resolve().parents[2] / "shared"
SYSTEM_TOKENS = 300
PROMPT_TOKENS, ANSWER_TOKENS = (150, 250), (70, 130)  # of W7's pairs
POOL = 8_000  # rows of alpaca_zh from which the pairs are made

Row = dict[str, str]


def shared_rows(data: Data) -> Iterator[Row]:
    """Rows of the project's test data.

    Raises:
        FileNotFoundError: It is not there.
    """
    if data == "reviews":
        for line in (SHARED / "data/sst2/train.tsv").read_text(encoding="utf-8").splitlines():
            text, _, label = line.rpartition("\t")
            yield {"text": text, "label": label}
    elif data == "pairs":
        yield from _pairs()
    else:
        before = {"system": _system()} if data == "system" else {}
        for row in _instructions():
            yield before | row


def made_up_rows(data: Data) -> Iterator[Row]:
    """Rows of the demo's reviews, which are cut in two for instructions; the halves of two make a pair."""
    rows = [json.loads(line) for line in TRAIN.read_text(encoding="utf-8").splitlines()]
    before = {"system": " ".join(rows[0]["text"].split()[:12])} if data == "system" else {}
    for row, other in pairwise(rows):
        words, others = row["text"].split(), other["text"].split()
        half = len(words) // 2
        first, second = " ".join(words[:half]), " ".join(words[half:])
        if data == "reviews":
            yield {"text": row["text"], "label": str(row["label"])}
        elif half and data == "pairs":
            yield {"prompt": first, "chosen": second, "rejected": " ".join(others[len(others) // 2 :])}
        elif half:
            yield before | {"instruction": first, "input": "", "output": second}


def _instructions() -> Iterator[Row]:
    for row in json.loads((SHARED / "data/alpaca_zh_52k.json").read_text(encoding="utf-8")):
        if row["instruction"].strip() and row["output"].strip():
            yield {key: row[key] for key in ("instruction", "input", "output")}


def _system() -> str:
    """A system prompt of tools, as long as `SYSTEM_TOKENS`."""
    tools = json.loads((SHARED / "data/instruct/glaive_toolcall_zh_demo.json").read_text(encoding="utf-8"))
    text = "你是一个乐于助人的助手，可以使用以下工具。\n" + "\n".join(row["tools"] for row in tools[:20])
    return _cut(text, _tokenizer(), SYSTEM_TOKENS)


def _pairs() -> Iterator[Row]:
    """Pairs: an instruction behind a passage, its answer, and another instruction's answer of similar length."""
    tokenizer, draw = _tokenizer(), random.Random(SEED)
    rows = list(islice(_instructions(), POOL))
    answers = [len(ids) for ids in tokenizer([row["output"] for row in rows]).input_ids]
    fitting = [row for row, n in zip(rows, answers, strict=True) if ANSWER_TOKENS[0] <= n <= ANSWER_TOKENS[1]]
    for row, other in zip(fitting, fitting[1:] + fitting[:1], strict=True):
        passage = "\n".join(draw.choice(rows)["output"] for _ in range(40))
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        room = draw.randint(*PROMPT_TOKENS) - len(tokenizer(question).input_ids)
        prompt = f"{_cut(passage, tokenizer, room)}\n\n{question}" if room > 0 else question
        yield {"prompt": prompt, "chosen": row["output"], "rejected": other["output"]}


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizers/minimind")


def _cut(text: str, tokenizer: Any, tokens: int) -> str:
    """The first tokens of a text; a character that would be cut in two is left out."""
    return tokenizer.decode(tokenizer(text).input_ids[:tokens]).rstrip("\ufffd")
