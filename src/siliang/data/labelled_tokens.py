"""Tokens for the tasks that are not a conversation: classes, tags, spans, and a source with its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from siliang.config import DataConfig
from siliang.data.encode import IGNORED
from siliang.data.entries import Rows, dropped
from siliang.data.examples import Labelled, SourceTarget, Span, Tagged
from siliang.secrets import shortened
from siliang.types import DataError


def classes(tokenizer: Any, data: DataConfig, labels: list[str], examples: Sequence[Labelled]) -> list[Rows]:
    """Texts, or pairs of texts, with the number of their class; a label that is empty is not known yet."""
    numbers = {name: i for i, name in enumerate(labels)} | {"": 0}
    pairs = [e.pair for e in examples if e.pair is not None]
    arguments: list[Any] = [[e.text for e in examples]]
    if pairs:
        assert len(pairs) == len(examples), "pairs and single texts in one data set; reading refuses them"
        arguments.append(pairs)
    whole = tokenizer(*arguments, verbose=False)
    rows: list[Rows] = []
    for i, example in enumerate(examples):
        ids, types = whole["input_ids"][i], whole["token_type_ids"][i] if pairs and "token_type_ids" in whole else None
        lost = max(0, len(ids) - data.max_length)
        if lost and data.too_long == "drop":
            rows.append(dropped(labels=0))
            continue
        if lost:
            text = [example.text] if example.pair is None else [example.text, example.pair]
            cut = tokenizer(*text, truncation=True, max_length=data.max_length)
            ids, types = cut["input_ids"], cut["token_type_ids"] if types is not None else None
        rows.append([{"input_ids": ids, "token_type_ids": types, "labels": numbers[example.label], "lost": lost}])
    return rows


def tags(tokenizer: Any, data: DataConfig, labels: list[str], examples: Sequence[Tagged]) -> list[Rows]:
    """Words with tags: the first piece of each word carries its tag, the others and the special tokens none."""
    numbers = {name: i for i, name in enumerate(labels)}
    rows: list[Rows] = []
    for example, (ids, words) in zip(examples, _words(tokenizer, [e.tokens for e in examples]), strict=True):
        tagged: list[int] = []
        for before, word in zip([None, *words], words, strict=False):
            tagged.append(IGNORED if word is None or word == before else numbers[example.tags[word]])
        lost = max(0, len(ids) - data.max_length)
        lost_answer = 0
        if lost and data.too_long == "drop":
            rows.append(dropped(labels=[]))
            continue
        if lost:
            tail = sum(word is None for word in words[words.index(0) :]) if 0 in words else 0
            front = data.max_length - tail  # the closing special tokens stay
            gone = slice(front, len(ids) - tail)
            lost_answer = sum(x != IGNORED for x in tagged[gone])
            del ids[gone], tagged[gone], words[gone]
        read = [word for word, tag in zip(words, tagged, strict=True) if tag != IGNORED]
        row = {"input_ids": ids, "labels": tagged, "words": read, "lost": lost, "lost_answer": lost_answer}
        rows.append([row])
    return rows


def _words(tokenizer: Any, sentences: Sequence[tuple[str, ...]]) -> list[tuple[list[int], list[int | None]]]:
    """(tokens, number of the word of each) of sentences that are cut into words already."""
    if tokenizer.is_fast:
        coded = tokenizer([list(s) for s in sentences], is_split_into_words=True, verbose=False)
        return [(list(coded["input_ids"][i]), list(coded.word_ids(i))) for i in range(len(sentences))]
    out = []
    for sentence in sentences:
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in sentence]
        plain = [token for piece in pieces for token in piece]
        whole = tokenizer.build_inputs_with_special_tokens(plain)
        words: list[int | None] = [n for n, piece in enumerate(pieces) for _ in piece]
        at = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
        out.append((whole, [None] * at + words + [None] * (len(whole) - at - len(plain))))
    return out


def sources_and_targets(tokenizer: Any, data: DataConfig, examples: Sequence[SourceTarget]) -> list[Rows]:
    """Sources as the encoder's input, targets as labels; both end as the tokenizer ends them (T5: </s>)."""
    sources = tokenizer([e.source for e in examples], verbose=False)["input_ids"]
    targets = tokenizer(text_target=[e.target for e in examples], verbose=False)["input_ids"]
    rows: list[Rows] = []
    for source, target in zip(sources, targets, strict=True):
        eos = tokenizer.eos_token_id
        if eos is not None and target[-1] != eos and target[-1] not in tokenizer.all_special_ids:
            target = [*target, eos]
        lost = max(0, len(source) - data.max_length)
        lost_answer = max(0, len(target) - data.max_target_length)
        if (lost or lost_answer) and data.too_long == "drop":
            rows.append(dropped(labels=[]))
            continue
        source = source[: data.max_length - 1] + source[-1:] if lost else source
        target = target[: data.max_target_length - 1] + target[-1:] if lost_answer else target
        rows.append([{"input_ids": source, "labels": target, "lost": lost + lost_answer, "lost_answer": lost_answer}])
    return rows


def spans(tokenizer: Any, data: DataConfig, examples: Sequence[Span]) -> list[Rows]:
    """Question and context in windows; an answer outside of a window is at its first token ([CLS]), as for SQuAD 2.

    Raises:
        DataError: The tokenizer cannot say where in the text its tokens are; a question leaves no room for its context;
            or no window holds an answer, which would be learned as none.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "cannot be used: this tokenizer does not say where its tokens stand in the text (it is not fast)"
        )
    stride = min(data.stride, data.max_length // 2)
    rows: list[Rows] = [[] for _ in examples]
    # the tokenizer asks for a room larger than the stride, and not kindly: a long question gets a smaller stride
    groups: dict[int, list[int]] = {}
    for number, room in enumerate(_rooms(tokenizer, data.max_length, examples)):
        groups.setdefault(stride if room > stride else room // 2, []).append(number)
    for step, numbers in groups.items():
        _windows(tokenizer, data.max_length, step, examples, numbers, rows)
    for example, windows in zip(examples, rows, strict=True):
        if example.answers and not any(row["end_positions"] for row in windows):
            answer = shortened(example.answers[0], 40)
            raise DataError(
                f"has an answer that no window of {data.max_length} tokens holds ({answer!r} at "
                f"{example.starts[0]}): it would be learned as no answer; look at its start, or raise data.max_length "
                "or data.stride"
            )
    return rows


def _rooms(tokenizer: Any, limit: int, examples: Sequence[Span]) -> list[int]:
    """How many tokens of its context a window has room for, by example."""
    own = tokenizer.num_special_tokens_to_add(pair=True)
    questions = tokenizer([e.question for e in examples], add_special_tokens=False, verbose=False)["input_ids"]
    rooms = [limit - own - len(ids) for ids in questions]
    for ids, room in zip(questions, rooms, strict=True):
        if room < 1:
            raise DataError(
                f"has a question of {len(ids):,} tokens, and data.max_length = {limit} leaves no room for its context"
            )
    return rooms


def _windows(
    tokenizer: Any, limit: int, stride: int, examples: Sequence[Span], numbers: list[int], rows: list[Rows]
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
            raise DataError("has a context of which the tokenizer makes nothing")
        start, end = _place(examples[number], offsets)
        row = {"input_ids": coded["input_ids"][i], "offsets": [x for o in offsets for x in o]}
        if "token_type_ids" in coded:
            row["token_type_ids"] = coded["token_type_ids"][i]
        rows[number].append({**row, "start_positions": start, "end_positions": end})


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
