"""Questions and their contexts to tokens: a context that is too long becomes windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from siliang.config import DataConfig
from siliang.data.entries import TokenEntry
from siliang.data.examples import Span
from siliang.data.spec import Encode
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.secrets import shortened
from siliang.types import DataError

SHARED = 128  # tokens of neighbouring windows, as in BERT's run_squad


class WindowEntry(TokenEntry, total=False):
    """One window.

    Attributes:
        offsets: Begin and end of each token in the context, one after the other; -1 for tokens that are not of it.
        start_positions: The answer's first token.
        end_positions: Its last; 0 where the window does not hold it.
    """

    offsets: list[int]
    start_positions: int
    end_positions: int


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries."""
    return partial(encode, tokenizer, data)


def encode(tokenizer: Tokenizer, data: DataConfig, examples: Sequence[Span]) -> list[list[WindowEntry]]:
    """Question and context in windows; an answer outside of a window is at its first token ([CLS]), as for SQuAD 2.

    Raises:
        DataError: The tokenizer cannot say where in the text its tokens are; a question leaves no room for its context;
            or no window holds an answer, which would be learned as none.
    """
    if not tokenizer.is_fast:
        raise DataError(
            Bilingual(
                "cannot be used: this tokenizer does not give the positions of its tokens in the text (it is not fast)",
                "无法使用：这个分词器不给出词元在文本中的位置（不是 fast 分词器）",
            )
        )
    stride = min(SHARED if data.stride is None else data.stride, data.max_length // 2)
    rows: list[list[WindowEntry]] = [[] for _ in examples]
    # the tokenizer asks for a room larger than the stride, and not kindly: a long question gets a smaller stride
    groups: dict[int, list[int]] = {}
    for number, room in enumerate(_rooms(tokenizer, data.max_length, examples)):
        groups.setdefault(stride if room > stride else room // 2, []).append(number)
    for step, numbers in groups.items():
        _windows(tokenizer, data.max_length, step, examples, numbers, rows)
    for example, windows in zip(examples, rows, strict=True):
        if example.answers and not any(row.get("end_positions") for row in windows):
            answer = shortened(example.answers[0], 40)
            raise DataError(
                Bilingual(
                    f"has an answer that no window of {data.max_length} tokens holds ({answer!r} at "
                    f"{example.starts[0]}): it would be learned as no answer; look at its start, or raise "
                    "data.max_length "
                    "or data.stride",
                    f"的答案在 {data.max_length} 个词元的任何窗口中都放不下（{answer!r}，"
                    f"位于 {example.starts[0]}）：会被当作无答案学习；请检查起始位置，"
                    "或增大 data.max_length 或 data.stride",
                )
            )
    return rows


def _rooms(tokenizer: Tokenizer, limit: int, examples: Sequence[Span]) -> list[int]:
    """How many tokens of its context a window has room for, by example."""
    own = tokenizer.num_special_tokens_to_add(pair=True)
    questions = tokenizer([e.question for e in examples], add_special_tokens=False, verbose=False)["input_ids"]
    rooms = [limit - own - len(ids) for ids in questions]
    for ids, room in zip(questions, rooms, strict=True):
        if room < 1:
            raise DataError(
                Bilingual(
                    f"has a question of {len(ids):,} tokens, and data.max_length = {limit} leaves no room for "
                    "its context",
                    f"的问题有 {len(ids):,} 个词元，data.max_length = {limit} 没有给上下文留下位置",
                )
            )
    return rooms


def _windows(
    tokenizer: Tokenizer,
    limit: int,
    stride: int,
    examples: Sequence[Span],
    numbers: list[int],
    rows: list[list[WindowEntry]],
) -> None:
    """Adds the windows of the examples with these numbers to their rows."""
    coded = tokenizer(
        [examples[n].question for n in numbers],
        [examples[n].context for n in numbers],
        truncation="only_second",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    for i, place in enumerate(coded["overflow_to_sample_mapping"]):
        number, owner = numbers[place], coded.sequence_ids(i)
        offsets = [o if s == 1 else (-1, -1) for o, s in zip(coded["offset_mapping"][i], owner, strict=True)]
        if all(a < 0 for a, _ in offsets):
            raise DataError(
                Bilingual("has a context of which the tokenizer makes nothing", "的上下文经分词器处理后没有词元")
            )
        start, end = _place(examples[number], offsets)
        row: WindowEntry = {
            "input_ids": coded["input_ids"][i],
            "offsets": [x for o in offsets for x in o],
            "start_positions": start,
            "end_positions": end,
        }
        if "token_type_ids" in coded:
            row["token_type_ids"] = coded["token_type_ids"][i]
        rows[number].append(row)


def _place(example: Span, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where the window does not hold all of it."""
    if not example.answers:
        return 0, 0
    begin = example.starts[0]
    until = begin + len(example.answers[0])
    inside = [i for i, (a, b) in enumerate(offsets) if a >= 0 and a < until and b > begin]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < until:
        return 0, 0
    return inside[0], inside[-1]
