"""The layouts of rows: a table of layouts, and a function that reads each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from siliang.config import Columns, LayoutName
from siliang.data.cells import BadRow, Result, Values, as_text, filled, is_blank
from siliang.data.encode import IGNORED
from siliang.data.examples import Labelled, Prepared, SeveralLabels, SourceTarget, Span, Tagged, Text
from siliang.data.label_cells import LabelReader, one_label
from siliang.data.list_cells import as_list, held_in_text
from siliang.data.preferences import read_chosen_rejected, read_messages_rejected
from siliang.data.rankings import read_output_list, read_ranking
from siliang.data.rated import read_rated_answer, read_rated_messages
from siliang.data.related import (
    NEGATIVE_COLUMNS,
    read_positive_messages,
    read_related,
    read_scored,
    read_scored_messages,
)
from siliang.data.turns import read_messages, read_pair
from siliang.language import Bilingual


@dataclass(frozen=True)
class RowLayout:
    """One layout.

    Attributes:
        needs: The required columns, by their names in `Columns`.
        read: A row's values to an example, or to what is wrong with it.
        fixed: Required columns that the user cannot rename.
        optional: Columns that are read if the row has them, by their names in `Columns`.
        fixed_optional: Optional columns that the user cannot rename.
    """

    name: LayoutName
    needs: tuple[str, ...]
    read: Callable[[Values, Columns], Result]
    fixed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    fixed_optional: tuple[str, ...] = ()

    def example(self, values: Values, columns: Columns, read_label: LabelReader = one_label) -> Result:
        """A row's values as an example, or what is wrong with the row.

        Args:
            read_label: Reads the label of a layout that has one.
        """
        try:
            made = self.read(values, columns)
            return _with_label(made, read_label(values, columns.label)) if isinstance(made, Labelled) else made
        except BadRow as problem:
            return problem.text

    def taken(self, columns: Columns) -> dict[str, str]:
        """The column's name for each part of the layout; the rows may lack the optional ones."""
        named = {need: getattr(columns, need) for need in (*self.needs, *self.optional)}
        task = {} if columns.task_id is None else {"task_id": columns.task_id}
        return named | {name: name for name in (*self.fixed, *self.fixed_optional)} | task


def _text(values: Values, c: Columns) -> Result:
    return Text(filled(values, c.text))


def _labelled(values: Values, c: Columns) -> Result:
    return Labelled(filled(values, c.text), "")


def _sentence_pair(values: Values, c: Columns) -> Result:
    return Labelled(filled(values, c.text), "", filled(values, c.text_pair))


def _with_label(made: Labelled, label: str | tuple[str, ...]) -> Result:
    return replace(made, label=label) if isinstance(label, str) else SeveralLabels(made.text, label, made.pair)


def _tagged(values: Values, c: Columns) -> Result:
    tokens, tags = as_list(values.get(c.tokens)), as_list(values.get(c.tags))
    if not isinstance(tokens, list) or not isinstance(tags, list):
        written = any(isinstance(value, str) for value in (tokens, tags))
        how, how_zh = "", ""
        if written:
            how = ", and holds text: write .jsonl, or a word and its tag a line (.conll)"
            how_zh = "，而这里是文本：请写成 .jsonl，或每行一个词和它的标注（.conll）"
        return Bilingual(
            f"must hold lists in {c.tokens!r} and {c.tags!r}{how}", f"的 {c.tokens!r} 和 {c.tags!r} 应为列表{how_zh}"
        )
    if not tokens:
        return Bilingual(f"has an empty {c.tokens!r}", f"的 {c.tokens!r} 为空")
    if len(tokens) != len(tags):
        return Bilingual(
            f"has {len(tokens)} tokens and {len(tags)} tags", f"有 {len(tokens)} 个词，却有 {len(tags)} 个标注"
        )
    if None in tokens:
        return Bilingual(f"has null in {c.tokens!r}", f"的 {c.tokens!r} 中有 null")
    made = Tagged(tuple(as_text(t, c.tokens) for t in tokens), tuple(as_text(t, c.tags) for t in tags))
    if not any(map(is_blank, made.tags)):
        return made
    return Bilingual(f"has an empty tag in {c.tags!r}", f"的 {c.tags!r} 中有空的标注")


def _squad(values: Values, c: Columns) -> Result:
    context, question, answers = filled(values, c.context), filled(values, c.question), values.get(c.answers)
    answers = answers if (held := held_in_text(answers)) is None else held
    if isinstance(answers, list):  # the original files: [{text, answer_start}]
        answers = {key: [a.get(key) for a in answers if isinstance(a, dict)] for key in ("text", "answer_start")}
    if not isinstance(answers, dict) or "text" not in answers or "answer_start" not in answers:
        return Bilingual(
            f"must hold text and answer_start in {c.answers!r}", f"的 {c.answers!r} 应含 text 和 answer_start"
        )
    found, starts = answers["text"], answers["answer_start"]
    if found in (None, "") and starts in (None, 0, -1):
        found, starts = [], []
    if isinstance(found, str) and type(starts) is int:
        found, starts = [found], [starts]
    if not isinstance(found, list) or not isinstance(starts, list) or len(found) != len(starts):
        return Bilingual(
            f"must hold as many texts as starts in {c.answers!r} (without an answer: two empty lists)",
            f"的 {c.answers!r} 中文本与起点的数目应相同（没有答案时为两个空列表）",
        )
    if not all(type(s) is int for s in starts) or not all(isinstance(t, str) for t in found):
        return Bilingual(f"must hold texts and whole numbers in {c.answers!r}", f"的 {c.answers!r} 应为文本和整数")
    pairs = [(str(text), start) for text, start in zip(found, starts, strict=True) if isinstance(start, int)]
    there = [(text, start) for text, start in pairs if text or start > 0]  # "" at 0 or -1 is no answer
    if lost := next((start for text, start in there if not text), None):
        return Bilingual(f"has an empty answer at {lost} in {c.answers!r}", f"的 {c.answers!r} 在 {lost} 处的答案为空")
    return Span(question, context, tuple(text for text, _ in there), tuple(start for _, start in there))


def _source_target(values: Values, c: Columns) -> Result:
    return SourceTarget(filled(values, c.source), filled(values, c.target))


LEARNED_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")  # TRL's; 1 is learned


def _prepared(values: Values, c: Columns) -> Result:
    ids, labels = values.get("input_ids"), values.get("labels")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        return Bilingual("must hold a list of whole numbers in 'input_ids'", "的 'input_ids' 应为整数列表")
    if labels is not None and not (isinstance(labels, list) and len(labels) == len(ids)):
        return Bilingual(
            f"must hold a list of {len(ids)} whole numbers in 'labels'", f"的 'labels' 应为 {len(ids)} 个整数的列表"
        )
    labels = labels or []
    if not all(type(i) is int for i in labels):
        return Bilingual("must hold whole numbers in 'labels'", "的 'labels' 应为整数")
    if any(label != IGNORED and label < 0 for label in labels):
        return Bilingual(
            f"must hold the numbers of tokens, or {IGNORED}, in 'labels'", f"的 'labels' 应为词元的编号或 {IGNORED}"
        )
    if isinstance(places := values.get("position_ids"), list) and any(b <= a for a, b in pairwise(places)):
        return Bilingual(
            "has 'position_ids' that begin anew: several texts in one row, which siliang would learn as one",
            "的 'position_ids' 重新开始：一行中有几段文本，siliang 会当作一段来学习",
        )
    for name in LEARNED_MASKS:
        if (learned := values.get(name)) is None:
            continue
        if not isinstance(learned, list) or len(learned) != len(ids) or any(x not in (0, 1) for x in learned):
            return Bilingual(
                f"must hold a list of {len(ids)} zeros and ones in {name!r}",
                f"的 {name!r} 应为 {len(ids)} 个 0 或 1 的列表",
            )
        labels = [x if on else IGNORED for x, on in zip(labels or ids, learned, strict=True)]
    mask = values.get("attention_mask")
    if isinstance(mask, list) and len(mask) == len(ids):  # padding is removed
        kept = [i for i, on in enumerate(mask) if on]
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept] if labels else []
    return Prepared(tuple(ids), tuple(labels))


def _asked(name: LayoutName, instruction: str, output: str) -> RowLayout:
    more = ("system",) if instruction == "input" else ("input", "system")
    read = read_pair(instruction, output)
    return RowLayout(name, (instruction, output), read, optional=more, fixed_optional=("history", "tools"))


BESIDE_TURNS = ("system", "tools")
PREPARED_TOO = ("labels", "attention_mask", "position_ids", *LEARNED_MASKS)
LAYOUTS: dict[str, RowLayout] = {
    layout.name: layout
    for layout in (
        RowLayout(
            "chosen-rejected",
            ("chosen", "rejected"),
            read_chosen_rejected,
            optional=("prompt", "instruction", "input", "messages", *BESIDE_TURNS),
            fixed_optional=("conversations", "history"),
        ),
        RowLayout(
            "messages-rejected",
            ("messages",),
            read_messages_rejected("rejected_response"),
            fixed=("rejected_response",),
            optional=BESIDE_TURNS,
        ),
        RowLayout(
            "rejected-messages",
            ("messages",),
            read_messages_rejected("rejected_messages"),
            fixed=("rejected_messages",),
            optional=BESIDE_TURNS,
        ),
        RowLayout(
            "responses",
            ("responses",),
            read_ranking,
            optional=("scores", "prompt", "instruction", "input", "messages", *BESIDE_TURNS),
            fixed_optional=("conversations", "history"),
        ),
        RowLayout(
            "rated-answer",
            ("completion", "label"),
            read_rated_answer,
            optional=("prompt", "instruction", "input", *BESIDE_TURNS),
            fixed_optional=("conversations", "history"),
        ),
        RowLayout("rated-messages", ("messages", "label"), read_rated_messages, optional=BESIDE_TURNS),
        RowLayout(
            "output-list",
            ("instruction", "output"),
            read_output_list,
            optional=("input", "system"),
            fixed_optional=("history", "tools"),
        ),
        RowLayout("prepared", (), _prepared, fixed=("input_ids",), fixed_optional=PREPARED_TOO),
        RowLayout("messages", ("messages",), lambda v, c: read_messages(v, c, c.messages), optional=BESIDE_TURNS),
        RowLayout(
            "sharegpt",
            (),
            lambda v, c: read_messages(v, c, "conversations"),
            fixed=("conversations",),
            optional=BESIDE_TURNS,
        ),
        _asked("alpaca", "instruction", "output"),
        _asked("prompt-completion", "prompt", "completion"),
        _asked("input-output", "input", "output"),
        RowLayout("source-target", ("source", "target"), _source_target),
        RowLayout("scored-pair", ("text", "text_pair", "score"), read_scored),
        RowLayout("scored-messages", ("messages", "label"), read_scored_messages, fixed=("positive_messages",)),
        RowLayout(
            "positive-messages",
            ("messages",),
            read_positive_messages,
            fixed=("positive_messages",),
            fixed_optional=("negative_messages",),
        ),
        RowLayout(
            "anchor-positive",
            ("anchor", "positive"),
            read_related,
            optional=("negative",),
            fixed_optional=NEGATIVE_COLUMNS,
        ),
        RowLayout("sentence-pair", ("text", "text_pair", "label"), _sentence_pair),
        RowLayout("text-label", ("text", "label"), _labelled),
        RowLayout("tokens-tags", ("tokens", "tags"), _tagged),
        RowLayout("squad", ("context", "question", "answers"), _squad),
        RowLayout("text", ("text",), _text),
    )
}
