"""Rules on the rows; they need no tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from siliang.check.finding import PARTS, Problem, not_usable, rows_with
from siliang.check.input import CheckInput
from siliang.language import Bilingual

PROMPTS = ("prompt", "instruction")  # FlagEmbedding's columns of what stands in front of a query
DAMAGE = re.compile("\ufffd|\ufeff|锟斤拷|Ã[\u0080-\u00bf]|â€|\\\\u0000")
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}|\[(?:YOUR|INSERT)[ _][A-Z _]+\]")


def bad_rows(s: CheckInput) -> Iterator[Problem]:
    """Rows cannot be used.

    Cause: A line cannot be read, a field is empty or missing, or a label is not one of the classes. Such rows are never
    dropped silently: a model that learns from an empty answer learns to say nothing.

    Fix: Correct them, or skip them with data.skip_bad_rows=true.

    有样本无法使用

    原因：有的行读不出来，有的字段为空或缺失，有的标签不在类别之内。siliang 不会悄悄丢掉这些样本：模型若从空答案学习，学
    到的就是什么都不说。

    办法：改正这些行，或用 data.skip_bad_rows=true 跳过。
    """
    bad = s.examples.skipped
    if bad:
        rows = "1 row is bad" if len(bad) == 1 else f"{len(bad):,} rows are bad"
        rows_zh = f"{len(bad):,} 条样本有问题"
        yield not_usable(s, bad, Bilingual(rows, rows_zh))


def duplicates(s: CheckInput) -> Iterator[Problem]:
    """Training rows that occur more than once.

    Cause: A row that occurs twice has twice the weight. If one copy is held out, the evaluation looks better than it
    is.

    Fix: Remove the copies, or accept them (accept: [SL002]) if the weights are intended.

    训练样本有重复

    原因：重复的样本权重加倍；若其中一份进了验证集，评估结果会虚高。

    办法：删除重复的样本；如果有意如此加权，用 accept: [SL002] 接受此项。
    """
    _, whole = s.fingerprints["train"]
    _, first, counts = np.unique(whole, return_index=True, return_counts=True)
    extra = len(whole) - len(first)
    weighted = s.data.mix_temperature is not None or any(source.weight > 1 for source in s.data.train_sources)
    if extra and not weighted:
        copies = np.setdiff1d(np.arange(len(whole)), first)
        most = int(counts.max())
        yield Problem(
            Bilingual(
                f"{extra:,} of {len(whole):,} training rows are copies of others (one of them occurs {most} times)",
                f"{len(whole):,} 条训练样本中有 {extra:,} 条与其他样本重复（最多的一条出现 {most} 次）",
            ),
            s.places(copies),
            extra,
        )


def overlap(s: CheckInput) -> Iterator[Problem]:
    """Held-out rows that are also trained.

    Cause: The model has seen these questions or texts in training, so the evaluation measures its memory.

    Fix: Remove them from one of the two, or remove copies before the split (SL002).

    验证样本也出现在训练集中

    原因：模型在训练中见过这些问题或文本，评估测到的是记忆，不是泛化能力。

    办法：从其中一边删除，或在划分之前先去重（SL002）。
    """
    trained, held_out = s.fingerprints["train"][0], s.fingerprints["eval"][0]
    known = np.flatnonzero(np.isin(held_out, trained))
    if len(known):
        total, share = len(held_out), 100 * len(known) / len(held_out)
        message = Bilingual(
            f"{len(known):,} of {total:,} held-out rows ({share:.1f}%) have the question or text of a training row",
            f"{total:,} 条验证样本中有 {len(known):,} 条（{share:.1f}%）的问题或文本在训练集中出现过",
        )
        yield Problem(message, s.places(known, "eval"), len(known))


def damaged_text(s: CheckInput) -> Iterator[Problem]:
    """Text that lost its encoding.

    Cause: The text holds NUL characters, replacement characters (U+FFFD), byte order marks, or UTF-8 that was read as
    Latin-1 (Ã©, â€). The file was once opened in the wrong encoding, and the original characters are lost.

    Fix: Get the file again and save it as UTF-8, or remove these rows.

    文本出现乱码

    原因：文本中有 NUL 字符、替换字符（U+FFFD）、字节序标记，或被当作 Latin-1 读取的 UTF-8（Ã©、â€）：文件曾用错误的编码
    打开过，原来的字符已经丢失。

    办法：重新获取文件并存为 UTF-8，或删除这些行。
    """
    for part in ("train", "eval"):
        rows = [i for i, line in enumerate(getattr(s.examples, part).lines()) if DAMAGE.search(line)]
        if rows:
            message = Bilingual(
                f"{len(rows):,} {PARTS[part]} rows hold damaged characters",
                f"{len(rows):,} 条{PARTS[part].zh}样本含有乱码",
            )
            yield Problem(message, s.places(rows, part), len(rows))


def quoted_cells(s: CheckInput) -> Iterator[Problem]:
    """Cells in double quotes whose quotes are text.

    Cause: In a .tsv file quotes are text, unless the whole file can only have been written with quotes around its
    cells. Some files have titles in quotes; others come from a program that quotes cells.

    Fix: If the quotes are not part of the text, set data.separator=tab, which reads them as csv does. If they are,
    accept this finding (accept: [SL029]).

    单元格的双引号被当作文本

    原因：.tsv 文件中的引号按文本处理，除非整个文件只可能是用引号包住单元格写成的。有的文件本来就有带引号的标题，有的则
    是导出程序加了引号。

    办法：如果引号不属于文本，设 data.separator=tab，按 csv 的规则读取；如果属于文本，用 accept: [SL029] 接受此项。
    """
    for line in s.examples.doubts:
        yield Problem(line)


def texts_not_used(s: CheckInput) -> Iterator[Problem]:
    """A column of text that is not used.

    Cause: The layout of the rows has no place for a column of this name, so the model never sees it. It may be the
    other half of a pair, the passage that a question is about, or a system message.

    Fix: Assign it with data.columns, or accept this finding (accept: [SL036]) if the column should not be learned.

    有文本列未被使用

    原因：按列名，这种数据格式用不到这一列，模型看不到它。它可能是句对的另一半、问题所依据的段落，或系统消息。

    办法：用 data.columns 指定它的用途；如果本来就不该用于学习，用 accept: [SL036] 接受此项。
    """
    if all(name in ("prepared", "tokens-tags") for name in s.examples.layouts):  # which have no place for any text
        return
    for column in s.examples.unused_texts:
        yield Problem(
            Bilingual(
                f"the column {column!r} holds running text, and is not used",
                f"列 {column!r} 是成段的文本，但没有被使用",
            ),
            fix=_how_to_use(column, s.examples.columns, s),
        )


def parts_not_used(s: CheckInput) -> Iterator[Problem]:
    """A column that names parts of the data, and is not used.

    Cause: A column assigns each row to training or evaluation. siliang takes the parts from files and folders only, so
    all of these rows are trained, or held out at random.

    Fix: Write a file for each part, and name them with data.train and data.eval; or accept this finding (accept:
    [SL037]).

    标明数据划分的列未被使用

    原因：数据中有一列标明了哪些行用于训练、哪些用于评估，但 siliang 只按文件和文件夹区分，因此这些行会全部用于训练，或
    随机划入验证集。

    办法：把各部分分别存成文件，用 data.train 和 data.eval 指定；或用 accept: [SL037] 接受此项。
    """
    for column, parts in s.examples.unused_parts.items():
        named = ", ".join(map(repr, parts))
        yield Problem(
            Bilingual(
                f"the column {column!r} has the values {named}, and is not used to split the rows",
                f"列 {column!r} 的内容是 {named}，但没有用来划分数据",
            )
        )


def _how_to_use(column: str, taken: dict[str, str], s: CheckInput) -> Bilingual:
    """The settings that would use this column, for the layout of the rows."""

    def setting(part: str) -> str:
        return f"data.columns.{part}={column}"

    layout = s.examples.layout
    if layout == "text-label":
        pair = setting("text_pair")
        how = Bilingual(f"{pair} reads both as a pair of texts", f"{pair} 把两列作为句对读取")
    elif layout == "sentence-pair":
        text, pair = setting("text"), setting("text_pair")
        how = Bilingual(f"{text} or {pair} uses it instead of another column", f"{text} 或 {pair} 用它代替另一列")
    elif layout == "squad":
        how = _instead(setting("context"), taken.get("context", "context"))
    elif layout == "source-target":
        how = _instead(setting("source"), taken.get("source", "source"))
    elif layout == "text":
        text, parts = setting("text"), ("data.columns.prompt", "data.columns.completion")
        how = Bilingual(
            f"{text} learns it instead; {parts[0]} and {parts[1]} learn one column after another",
            f"{text} 改为学习这一列；{parts[0]} 和 {parts[1]} 依次学习两列",
        )
    elif layout == "anchor-positive":
        how = _beside_queries(column, s)
    else:
        places = ["system"] if layout not in ("alpaca", "prompt-completion") else ["input", "system"]
        if "system" in column.lower():
            places = ["system"]
        settings = [setting(place) for place in places]
        how = Bilingual(f"{' or '.join(settings)} adds it to the question", f"{' 或 '.join(settings)} 把它放进提问")
    return Bilingual(
        f"{how}. If it should not be learned, accept: [SL036].",
        f"{how.zh}。如果本来就不该用于学习，用 accept: [SL036] 接受此项。",
    )


def _beside_queries(column: str, s: CheckInput) -> Bilingual:
    """What may be done with a text beside queries and their texts."""
    if column.lower() not in PROMPTS:
        anchor, positive = f"data.columns.anchor={column}", f"data.columns.positive={column}"
        return Bilingual(f"{anchor} or {positive} uses it instead", f"{anchor} 或 {positive} 改用这一列")
    if s.task.with_prompt is None:
        return Bilingual("write it in front of the queries", "请把它写在查询之前")
    return Bilingual(
        "a text in front of every query is embedding.query_prompt; where it differs, write it in front of the queries",
        "放在每个查询之前的文字用 embedding.query_prompt 设置；各条不同的，请写在查询之前",
    )


def _instead(setting: str, column: str) -> Bilingual:
    return Bilingual(f"{setting} uses it instead of {column!r}", f"{setting} 用它代替 {column!r}")


def placeholders(s: CheckInput) -> Iterator[Problem]:
    """Placeholders that were not filled in.

    Cause: Text such as {{name}} should be replaced by a program; the model would learn it unchanged.

    Fix: Fill them in before training.

    占位符没有填写

    原因：{{name}} 之类的文本本应由程序替换，模型会把它原样学进去。

    办法：训练之前先填好。
    """
    if not s.task.writes:
        return
    names, rows = rows_with(s, PLACEHOLDER)
    if rows:
        named = ", ".join(name for name, _ in names.most_common(3))
        message = Bilingual(
            f"{len(rows):,} training rows hold placeholders ({named})",
            f"{len(rows):,} 条训练样本含有占位符（{named}）",
        )
        yield Problem(message, s.places(rows), len(rows))


def misplaced_answers(s: CheckInput) -> Iterator[Problem]:
    """An answer that is not at its answer_start.

    Cause: answer_start counts characters of the context. Counted in bytes, in words, or in a text that was cleaned
    later, it points elsewhere, and the model learns the wrong words.

    Fix: Count again: context[answer_start:].startswith(text) must hold. Or skip the rows with data.skip_bad_rows=true.

    答案不在 answer_start 处

    原因：answer_start 按上下文的字符计数。若按字节或词计数，或之后清洗过文本，它就指向别处，模型会学到错误的文字。

    办法：重新计算位置：context[answer_start:].startswith(text) 必须成立；或用 data.skip_bad_rows=true 跳过
    这些行。
    """
    if not s.finds_spans:
        return
    for part, examples in (("train", s.examples.train), ("eval", s.examples.eval)):
        rows = [i for i, e in enumerate(examples) if e.problem]
        if rows:
            message = Bilingual(
                f"{len(rows):,} {PARTS[part]} rows have an answer that is not at its answer_start",
                f"{len(rows):,} 条{PARTS[part].zh}样本的答案不在 answer_start 处",
            )
            yield Problem(message, s.places(rows, part), len(rows))


def nothing_held_out(s: CheckInput) -> Iterator[Problem]:
    """Nothing is held out.

    Cause: Without rows that the model never sees, learning cannot be distinguished from memory, and nothing shows when
    to stop.

    Fix: Set data.eval, or a data.test_size above 0.

    没有验证集

    原因：没有模型未见过的样本，就分不清是学会了还是背下来了，也无从判断何时该停。

    办法：设置 data.eval，或大于 0 的 data.test_size。
    """
    if not len(s.examples.eval):
        yield Problem(
            Bilingual(
                "data.eval is not set, and data.test_size holds nothing out",
                "没有设置 data.eval，data.test_size 也没有留出验证集",
            )
        )
