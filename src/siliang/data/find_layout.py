"""Which layout rows have, by their columns: other names of columns in published data, and the error where none fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from siliang.config import Columns
from siliang.data.cells import is_number
from siliang.data.layouts import LAYOUTS, RowLayout
from siliang.data.layouts_in_words import in_words
from siliang.data.spec import DataSpec
from siliang.language import Bilingual, local, together
from siliang.types import DataError, near

# Other names of a column in published datasets; used only if the default name is missing.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversation",),
    "prompt": ("question", "query"),
    "completion": ("response", "answer"),
    "tags": ("ner_tags", "pos_tags", "labels"),
    "source": ("document", "article"),
    "target": ("summary", "title", "highlights"),
    "anchor": ("query", "question"),
    "positive": ("positives", "pos", "positive_passages", "passages", "document", "passage", "answer", "response"),
    "score": ("similarity", "similarity_score", "relevance", "label"),
    "responses": ("answers", "completions", "outputs", "candidates"),
}
REJECTED = ("rejected_response", "rejected_responses")  # ms-swift's, up to version 3
# of columns that a layout has a use for and does not need
OPTIONAL_ALIASES: dict[str, tuple[str, ...]] = {
    "system": ("system_prompt",),
    "input": ("context",),
    "prompt": ("question", "query"),
    "negative": ("negatives", "neg", "negative_passages", "hard_negatives", "hard_negative", *REJECTED),
    "scores": ("ratings",),
}
RATED = ("rated-answer", "rated-messages")  # layouts of answers that are good or bad
RATED_ALIASES = {"label": ("kto_tag",), "completion": ("response", "answer", "output")}
FIRST_OF_PAIR = ("sentence1", "text_a", "premise", "question1")
SECOND_OF_PAIR = ("sentence2", "text_b", "hypothesis", "question2")
# whose names say that they are one: what is asked, and a text that answers it or not
QUESTIONS, ANSWERED = ("question", "query"), ("sentence", "text")
# likewise, where the pair has a score
SCORED_FIRST, SCORED_SECOND = ("query", "question", "anchor"), ("document", "passage", "answer", "response", "positive")
PAIRS = ("sentence-pair", "scored-pair")  # layouts of two texts
SCORES = Bilingual(
    " Scores of pairs are for task=embedding, or task=reranker, too.",
    "句对的分数也可用 task=embedding 或 task=reranker。",
)
# other names of the text column of a classification: used if exactly one of them is there
TEXTS = ("review", "sentence", "content", "comment", "tweet", "utterance", "document", "评论", "内容", "文本")
# other names of the label column: proposed in the error, not used
CLASSES_NAMED = ("labels", "class", "category", "cat", "sentiment", "target", "intent", "topic", "标签", "类别")
FLAGS = ("0", "1", "false", "true")
NUMBERS_NAMED = ("score", "rating", "stars", "similarity", "similarity_score", "value")


def find_layout(
    name: str, found: Collection[str], spec: DataSpec, columns: Columns, source: str
) -> tuple[RowLayout, Columns]:
    """The layout of rows that have the columns `found`, and the columns' names with aliases put in.

    Args:
        found: The columns' names; as a mapping, with the cells of the first row.
        spec: Of the task, which says what layouts it reads.

    Raises:
        DataError: None fits, or the one that was named does not.
    """
    suited = [LAYOUTS[layout] for layout in spec.layouts]
    if name != "auto":
        wanted = LAYOUTS[name]
        if wanted not in suited:
            allowed = ", ".join(f.name for f in suited)
            holds, tasks = in_words(name)
            raise DataError(
                Bilingual(
                    f"data.layout = {name!r} is not for {spec.name}; allowed: {allowed}. "
                    f"It holds {holds}, for {tasks}.",
                    f"data.layout = {name!r} 不适用于 {spec.name}；可用：{allowed}。它是{holds.zh}，用于 {tasks.zh}。",
                )
            )
        suited = [wanted]
    for layout in suited:
        named = _resolve(layout, found, columns)
        if named is not None:
            _check_task(found, columns, source)
            return layout, named
    raise DataError(_other_task(suited, found, spec, columns, source) or _no_layout(suited, found, columns, source))


def _check_task(found: Collection[str], columns: Columns, source: str) -> None:
    if columns.task_id is not None and columns.task_id not in found:
        there = ", ".join(map(repr, found))
        raise DataError(
            Bilingual(
                f"{source} has no column {columns.task_id!r}, which data.columns.task_id names; it has {there}.",
                f"{source} 没有 data.columns.task_id 指定的列 {columns.task_id!r}；它有 {there}。",
            )
        )


def _resolve(layout: RowLayout, found: Collection[str], columns: Columns) -> Columns | None:
    if any(name not in found for name in layout.fixed):
        return None
    changes: dict[str, str] = {}
    if layout.name in PAIRS and (pair := _question_and_text(found, columns)):
        changes = dict(zip(("text", "text_pair"), pair, strict=True))
    for need in (n for n in layout.needs if n not in changes):
        name = getattr(columns, need)
        if name in found:
            continue
        is_default = name == Columns.model_fields[need].default
        other = next((a for a in _aliases(layout, need) if is_default and a in found), None)
        if other is None and layout.name == "text-label" and need == "text" and is_default:
            other = _text_column(found, columns)
        if other is None:
            return None
        changes[need] = other
    for part in layout.optional:
        name = getattr(columns, part)
        if name not in found and name == Columns.model_fields[part].default:
            other = next((a for a in OPTIONAL_ALIASES.get(part, ()) if a in found), None)
            changes |= {part: other} if other else {}
    return columns.model_copy(update=changes)


def second_text(found: Collection[str], columns: Columns) -> str | None:
    """The column of a second text that these columns have, where they can be read as pairs of texts."""
    named = _resolve(LAYOUTS["sentence-pair"], found, columns)
    if named is None:
        return None
    return named.text if named.text_pair == columns.text else named.text_pair


def _question_and_text(found: Collection[str], columns: Columns) -> tuple[str, str] | None:
    """The two columns of a question and a text, where each is there once and nobody named others."""
    default = all(getattr(columns, n) == Columns.model_fields[n].default for n in ("text", "text_pair"))
    if not default or columns.text_pair in found or any(n in found for n in (*FIRST_OF_PAIR, *SECOND_OF_PAIR)):
        return None
    asked, texts = ([c for c in names if c in found and c != columns.label] for names in (QUESTIONS, ANSWERED))
    if len(asked) != 1 or len(texts) != 1:
        return None
    value = found[asked[0]] if isinstance(found, Mapping) else ""
    return (asked[0], texts[0]) if isinstance(value, str) and not is_number(value) else None


def _aliases(layout: RowLayout, need: str) -> tuple[str, ...]:
    if layout.name in RATED and need in RATED_ALIASES:
        return RATED_ALIASES[need]
    if layout.name in PAIRS and need in ("text", "text_pair"):
        first, second = (SCORED_FIRST, SCORED_SECOND) if layout.name == "scored-pair" else ((), ())
        return {"text": (*FIRST_OF_PAIR, *first), "text_pair": (*SECOND_OF_PAIR, *second)}[need]
    return ALIASES.get(need, ())


def _text_column(found: Collection[str], columns: Columns) -> str | None:
    """The text column, if it is unambiguous: the one with a common name, or the only one besides the label."""
    rest = [c for c in found if c != columns.label]
    common = [c for c in rest if c.lower() in TEXTS]
    if len(common) == 1:
        return common[0]
    if len(rest) != 1 or len(found) != 2:
        return None
    value = found[rest[0]] if isinstance(found, Mapping) else ""
    return None if is_number(value) else rest[0]


def _other_task(
    suited: list[RowLayout], found: Collection[str], spec: DataSpec, columns: Columns, source: str
) -> Bilingual | None:
    """Says which task learns from these columns; None where no layout of another task fits more of them."""
    if LAYOUTS["tokens-tags"] in suited and isinstance(found, Mapping) and any(map(_are_spans, found.values())):
        return None

    def there(layout: RowLayout, named: Columns) -> list[str]:
        return [name for name in (*layout.fixed, *(getattr(named, n) for n in layout.needs)) if name in found]

    best, names = None, [""] * max(len(there(layout, columns)) for layout in suited)
    for layout in (other for other in LAYOUTS.values() if other not in suited):
        named = _resolve(layout, found, columns)
        if named is None or (isinstance(found, Mapping) and isinstance(layout.example(dict(found), named), str)):
            continue
        if len(own := there(layout, named)) > len(names):
            best, names = layout, own
    # whose errors are their own: a score may be the label of a pair
    if (
        best is None
        or best.name == "chosen-rejected"
        or (best.name == "scored-pair" and LAYOUTS["sentence-pair"] in suited)
    ):
        return None
    shown, reads = ", ".join(map(repr, names)), ", ".join(layout.name for layout in suited)
    holds, tasks = in_words(best.name)
    return Bilingual(
        f"{source} has the columns {shown} ({best.name}: {holds}), which {tasks} learns from; "
        f"task={spec.name} reads {reads}.",
        f"{source} 的列是 {shown}（{best.name}：{holds.zh}），适合 {tasks.zh}；task={spec.name} 读取 {reads}。",
    )


def _no_layout(suited: list[RowLayout], found: Collection[str], columns: Columns, source: str) -> Bilingual:
    there = ", ".join(map(repr, found))
    if {columns.chosen, columns.rejected} <= {*found} and LAYOUTS["chosen-rejected"] not in suited:
        return Bilingual(
            f"{source} has a better and a worse answer, {columns.chosen!r} and {columns.rejected!r}: they are for "
            "task=preference (with any loss but kto), or task=reward. To learn one of them as it is, name its column "
            "with data.columns.",
            f"{source} 有较好和较差的回答 {columns.chosen!r} 和 {columns.rejected!r}："
            "请用 task=preference（kto 之外的损失函数）或 task=reward。"
            "若只学习其中之一，请用 data.columns 指定它的列。",
        )

    # the error speaks of one layout only: the one most of whose columns are there
    def share(layout: RowLayout) -> float:
        names = [getattr(columns, n) for n in layout.needs] + list(layout.fixed)
        return sum(n in found for n in names) / len(names)

    best = max(suited, key=lambda f: (share(f), not f.fixed, -len(f.needs)))
    keys = {getattr(columns, n): n for n in best.needs} | dict.fromkeys(best.fixed, "")
    missing = [n for n in keys if n not in found]
    free = [c for c in found if c not in keys]
    pair = _numbered_pair(free, found) if "label" in best.needs else None
    if pair is not None:
        missing = [columns.text, columns.text_pair, *([columns.label] if columns.label in missing else [])]
        best, keys = LAYOUTS["sentence-pair"], {getattr(columns, n): n for n in LAYOUTS["sentence-pair"].needs}
    likely, other = _labels_of_others(free, found) if "label" in best.needs and columns.label in missing else ("", "")
    lacking = columns.label if other else missing[0]
    if other and _resolve(LAYOUTS["scored-pair"], found, columns) is not None:
        other = together(other, SCORES)
    if "label" in best.needs and columns.label in missing and pair is None and not other:
        other = _flags(free, found)
    wrong = Bilingual(
        f"{source} has no column {lacking!r}; it has {there}.{other}",
        f"{source} 没有列 {lacking!r}；它有 {there}。{local(other, 'zh')}",
    )
    spans = [c for c in free if isinstance(found, Mapping) and _are_spans(found[c])]
    if spans and best.name == "tokens-tags":
        example = '{"tokens": ["hello", "Bob"], "tags": ["O", "B-PER"]}'
        return together(
            wrong,
            Bilingual(
                f" {spans[0]!r} holds spans of a text: token_cls learns a tag for each word, so write tokens and "
                f"tags, such as {example}.",
                f"{spans[0]!r} 是文本中的片段：token_cls 为每个词学习一个标注，请写成词和标注，如 {example}。",
            ),
        )
    if odd := next((c for c in found if any(mark in c for mark in ";|\t")), None):
        mark = next(m for m in ";|\t" if m in odd)
        return together(
            wrong,
            Bilingual(
                f"\nWhere {mark!r} separates its columns, set data.separator={mark!r}.",
                f"\n如果 {mark!r} 是列之间的分隔符，请设置 data.separator={mark!r}。",
            ),
        )
    guessed = {name: _guess(keys[name], name, free) for name in missing if keys[name]}
    if pair is not None:
        left = [c for c in free if c not in pair and not c.lower().endswith(("id", "id1", "id2", "index", "idx"))]
        guessed.update(zip(missing, pair, strict=False))
        if guessed.get(columns.label) == "NAME" and len(left) == 1 and not other:
            guessed[columns.label] = left[0]
    if likely and columns.label in guessed:
        guessed[columns.label] = likely
    named = " ".join(f"data.columns.{keys[name]}={column}" for name, column in guessed.items())
    lacks = ", ".join(map(repr, missing))
    how = Bilingual(f"{best.name} needs {lacks}", f"{best.name} 需要 {lacks}")
    if named:
        how = Bilingual(f"Name the columns with {named}", f"请用 {named} 指定各列")
    layouts = layouts_zh = ", ".join(f.name for f in suited)
    if LAYOUTS["anchor-positive"] in suited:  # names of which no other tool knows
        words = [(f.name, in_words(f.name)[0]) for f in suited]
        layouts = ", ".join(f"{name} ({holds})" for name, holds in words)
        layouts_zh = "、".join(f"{name}（{holds.zh}）" for name, holds in words)
    return together(
        wrong,
        Bilingual(
            f"\n{how}; or with data.header where the file has no header line. Layouts for this task: {layouts}.",
            f"\n{how.zh}；如果文件没有标题行，请用 data.header 给出列名。此任务可用的格式：{layouts_zh}。",
        ),
    )


def _numbered_pair(free: list[str], found: Collection[str]) -> tuple[str, str] | None:
    """Two text columns whose names differ only in their endings (text1 and text2, question_a and question_b), or have
    common names of a pair."""
    for one in free:
        value = found[one] if isinstance(found, Mapping) else ""
        if not isinstance(value, str) or is_number(value):
            continue
        others = [one[:-1] + {"1": "2", "a": "b", "A": "B"}.get(one[-1:], "")]
        others += [two for first, two in zip(FIRST_OF_PAIR, SECOND_OF_PAIR, strict=True) if one == first]
        if other := next((c for c in others if c in free and c != one), None):
            return one, other
    return None


def _are_spans(value: object) -> bool:
    """Places in a text with their kind, as annotation tools write them."""
    return isinstance(value, list) and bool(value) and all(isinstance(held, list | tuple | dict) for held in value)


def _labels_of_others(free: list[str], found: Collection[str]) -> tuple[str, str]:
    """(a column that looks like the label and holds lists or numbers, what it holds); empty if there is none."""
    for column in free:
        value = found[column] if isinstance(found, Mapping) else None
        if isinstance(value, list) and not _are_spans(value):
            return column, Bilingual(f" {column!r} holds lists.", f"{column!r} 是列表。")
        if column.lower() in NUMBERS_NAMED and is_number(value):
            return column, Bilingual(f" {column!r} holds numbers such as {value}.", f"{column!r} 是 {value} 这样的数。")
    return "", ""


def _flags(free: list[str], found: Collection[str]) -> str:
    """What columns of 0 and 1 are, where there are several; by their cells in the first row."""
    values = found if isinstance(found, Mapping) else {}
    flags = [c for c in free if str(values.get(c)).lower() in FLAGS and not c.lower().endswith(("id", "index", "idx"))]
    if len(flags) < 2:
        return ""
    shown, joined = ", ".join(map(repr, flags[:5])), ";".join(flags[:2])
    return Bilingual(
        f" Where {shown} hold 0 or 1 for each label, write the names of those that are 1 into one column, such as "
        f"{joined}, and set classification.problem=several_labels.",
        f"如果 {shown} 是各个标签的 0 或 1，请把值为 1 的标签名写进一列，如 {joined}，并设置 "
        "classification.problem=several_labels。",
    )


def _guess(need: str, name: str, free: list[str]) -> str:
    """The column that the user may mean by `name`, or the word NAME."""
    common = {"text": TEXTS, "label": CLASSES_NAMED, "output": ("response", "answer", "completion")}.get(
        need, ALIASES.get(need, ())
    )
    known = [c for c in free if c.strip().lower() in common]
    return next(iter([*near(name, free), *known]), "NAME")
