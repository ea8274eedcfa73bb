"""Examples to tokens and labels, and tokens to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from siliang.data.examples import Labelled, Turn
from siliang.data.templates import chat_answer, chat_prompt, human_assistant

IGNORED = -100  # the label of a token that is not trained


@dataclass
class Tokens:
    """One example: `input_ids` and, of the same length, `labels` (or, for a class, its number)."""

    input_ids: list[int]
    labels: list[int] | int
    truncated: bool = False


class TokenDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenised examples, as the Trainer wants them."""

    def __init__(self, rows: list[Tokens]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.rows[i].input_ids, "labels": self.rows[i].labels}


def tokenise(
    examples: Sequence[Turn | Labelled],
    tokenizer: Any,
    *,
    template: Literal["human-assistant", "chat"],
    max_length: int,
) -> TokenDataset:
    """Tokens and labels of each example, at most `max_length` of them."""
    start = special_prefix(tokenizer)
    rows = []
    for example in examples:
        if isinstance(example, Labelled):
            ids = tokenizer(example.text, verbose=False)["input_ids"]
            cut = (
                tokenizer(example.text, truncation=True, max_length=max_length)["input_ids"]
                if len(ids) > max_length
                else ids
            )
            rows.append(Tokens(cut, example.label, len(ids) > max_length))
        else:
            rows.append(_turn_tokens(example, tokenizer, start, template, max_length))
    return TokenDataset(rows)


def prompt_tokens(turn: Turn, tokenizer: Any, *, template: Literal["human-assistant", "chat"]) -> list[int]:
    """The tokens in front of the answer: in training those that carry no label, in generation the input."""
    if template == "chat":
        return _encode(tokenizer, chat_prompt(tokenizer, turn.instruction, turn.input))
    return special_prefix(tokenizer) + _encode(tokenizer, human_assistant(turn.instruction, turn.input))


def special_prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of every text: Llama's <s>, for BLOOM none."""
    plain = _encode(tokenizer, "a")
    whole = tokenizer("a")["input_ids"]
    return whole[: len(whole) - len(plain)] if plain and whole[-len(plain) :] == plain else []


def _turn_tokens(turn: Turn, tokenizer: Any, start: list[int], template: str, max_length: int) -> Tokens:
    eos = [tokenizer.eos_token_id]
    if turn.is_plain:
        prompt, answer = [], start + _encode(tokenizer, turn.output) + eos
    elif template == "chat":
        prompt = prompt_tokens(turn, tokenizer, template="chat")
        answer = _encode(tokenizer, chat_answer(tokenizer, turn.instruction, turn.input, turn.output).rstrip())
        if answer[-1] not in tokenizer.all_special_ids:
            answer = answer + eos
    else:
        prompt = start + _encode(tokenizer, human_assistant(turn.instruction, turn.input))
        # the end token is put there by its number: as text, Llama-2's tokenizer would join it to the last word
        answer = _encode(tokenizer, turn.output) + eos
    if len(prompt) + len(answer) <= max_length:
        return Tokens(prompt + answer, [IGNORED] * len(prompt) + answer)
    # the answer's end token stays; the answer gets at least half of the room; the prompt loses its beginning
    room = max(max_length - len(prompt), min(len(answer), max_length // 2))
    answer = answer if len(answer) <= room else answer[: room - 1] + answer[-1:]
    prompt = prompt[len(prompt) - (max_length - len(answer)) :] if len(answer) < max_length else []
    return Tokens(prompt + answer, [IGNORED] * len(prompt) + answer, truncated=True)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@dataclass
class PadCollator:
    """Rows to one batch, padded on the right to the longest.

    Attributes:
        pad_token_id: What fills the gaps. Its labels and attention are off, so any token will do.
        multiple: Lengths are rounded up to a multiple of this.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: input_ids, attention_mask and labels, each (rows, length); labels (rows,) for classes."""
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.multiple) * self.multiple
        classes = isinstance(rows[0]["labels"], int)
        labels = [r["labels"] if classes else _pad(r["labels"], IGNORED, length) for r in rows]
        return {
            "input_ids": torch.tensor([_pad(r["input_ids"], self.pad_token_id, length) for r in rows]),
            "attention_mask": torch.tensor([_pad([1] * len(r["input_ids"]), 0, length) for r in rows]),
            "labels": torch.tensor(labels),
        }


def _pad(values: list[int], filler: int, length: int) -> list[int]:
    return values + [filler] * (length - len(values))
