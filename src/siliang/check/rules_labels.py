"""Rules on the classes and tags of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from siliang.check.finding import Problem, class_counts
from siliang.check.input import CheckInput
from siliang.data.labels import TRUTHS, alike, alike_key, joined, no_label, strange, with_known_part
from siliang.data.numbers import as_number, is_whole
from siliang.language import Bilingual, local
from siliang.secrets import shortened

LARGEST_SHARE = 0.8  # of one class: above it, a model that always predicts this class looks good
LARGEST_RATIO = 10.0
MANY_ROWS = 50  # of the data: in fewer, a label of one row is no surprise
MANY_NUMBERS = 10  # with more different numbers, labels are more often measures than classes


def missing_classes(s: CheckInput) -> Iterator[Problem]:
    """Classes without rows, or nothing to tell apart.

    Cause: The training rows do not hold every class, and the model cannot learn a class without examples; or all have
    the same labels. A data.labels that does not fit the label column looks the same. Held-out rows of one class show
    nothing of what was learned.

    Fix: Check data.labels and data.columns.label. If the split caused it, use data.stratify=true.

    某些类别没有样本，或没有可区分的内容

    原因：训练样本没有覆盖全部类别，模型学不到没有样本的类别；或所有样本的标签都相同。data.labels 与标签列对不上时也会出
    现这种情况。验证样本只有一个类别时，指标看不出学到了什么。

    办法：检查 data.labels 和 data.columns.label；如果是划分造成的，用 data.stratify=true 分层划分。
    """
    names = s.examples.labels
    if names is None:
        return
    counts = class_counts(s)
    missing = [name for name in names if not counts[name]]
    if s.task.data.several and len({frozenset(e.classes) for e in s.examples.train}) == 1 and len(s.examples.train) > 1:
        own = s.examples.train[0].classes
        shown = ", ".join(map(repr, own)) or Bilingual("none", "无")
        yield Problem(
            Bilingual(
                f"all {len(s.examples.train):,} training rows have the same labels, {shown}: nothing to learn",
                f"全部 {len(s.examples.train):,} 条训练样本的标签都是 {local(shown, 'zh')}，没有可学的内容",
            ),
            fix=Bilingual(
                "They look like a 0 or 1 for each label: write the names of the labels that are 1.",
                "看起来是逐个标签的 0 或 1：请写出值为 1 的标签的名称。",
            )
            if _are_flags(own)
            else None,
        )
    elif len(names) - len(missing) < 2 and not s.task.data.several:
        seen = [name for name in names if counts[name]]
        named = ", ".join(map(repr, seen))
        yield Problem(
            Bilingual(
                f"the training rows have one class only, {named}: nothing to learn",
                f"训练样本只有一个类别 {named}，没有可学的内容",
            )
        )
    elif missing:
        shown = ", ".join(missing[:10])
        more, more_zh = (f" and {len(missing) - 10} more", " 等") if len(missing) > 10 else ("", "")
        # a class without rows is an error; a rare tag is not, since a random split often leaves it without rows
        severity = "warning" if s.task.data.named == "tags" else None
        yield Problem(
            Bilingual(
                f"{len(missing)} of {len(names)} classes have no training row: {shown}{more}",
                f"{len(names)} 个类别中有 {len(missing)} 个没有训练样本：{shown}{more_zh}",
            ),
            severity=severity,
        )
    one_class = s.task.data.named == "label" and not s.task.data.several and len(names) > 1
    if one_class and len(held_out := class_counts(s, "eval")) == 1:
        only = next(iter(held_out))
        yield Problem(
            Bilingual(
                f"the held-out rows have one class only, {only!r}: their metrics do not show what was learned",
                f"验证样本只有一个类别 {only!r}：指标看不出学到了什么",
            ),
            severity="warning",
            fix=Bilingual(
                "Give held-out rows of all classes (data.eval), or hold out a share of each with data.stratify=true.",
                "请给出包含各个类别的验证数据（data.eval），或用 data.stratify=true 按类别划分。",
            ),
        )


def _are_flags(labels: Iterable[str]) -> bool:
    """Whether the labels of a row are both values of a column of 0 and 1 for each label, and nothing else."""
    keys = {alike_key(name) for name in labels}
    return {TRUTHS.get(key, key) for key in keys} == set(TRUTHS.values())


def doubtful_labels(s: CheckInput) -> Iterator[Problem]:
    """Labels that may be mistakes.

    Cause: Labels are compared letter by letter: "a" and "a " with a blank, "1" and "1.0", "Positive" and "positive" are
    two classes each, although no text distinguishes them. "nan", "None", and -1 with 0 and 1 often mean a missing
    label; numbers with a decimal point are often measures; "a,b" with "a" and "b" is several labels in one.

    Fix: Write each class in one way, and remove rows without a label. If the names are correct, list them in
    data.labels, or accept this finding (accept: [SL020]).

    标签可疑

    原因：标签按字符逐一比较：“a”与带空格的“a ”、“1”与“1.0”、“Positive”与“positive”都算作两个类别，而文本本身区分不了它
    们。“nan”“None”以及与 0、1 并存的 -1 通常表示没有标签；带小数点的数字往往是测量值；与“a”“b”并存的“a,b”是写在一起的多
    个标签。

    办法：统一每个类别的写法，删除没有标签的样本。如果标签本来就是这样，在 data.labels 中列出，或用 accept: [SL020] 接受
    此项。
    """
    names = s.examples.labels
    if names is None or s.data.labels is not None:
        return
    counts = class_counts(s, "train", "eval")
    groups = alike(names)
    if groups:
        shown = "; ".join(" and ".join(f"{name!r} ({counts[name]:,} rows)" for name in g) for g in groups[:5])
        shown_zh = "；".join("与".join(f" {name!r}（{counts[name]:,} 条）" for name in g) for g in groups[:5])
        more, more_zh = (
            (f"; and {len(groups) - 5} more", f"；另有 {len(groups) - 5} 组") if len(groups) > 5 else ("", "")
        )
        yield Problem(
            Bilingual(f"classes that look like one: {shown}{more}", f"看起来是同一类别的标签：{shown_zh}{more_zh}")
        )
    if (none := no_label(names)) is not None:
        yield Problem(
            Bilingual(
                f"{counts[none]:,} rows have the label {none!r}, and others are numbers from 0: in GLUE and others "
                "it means a missing label",
                f"{counts[none]:,} 条样本的标签是 {none!r}，而其他标签是从 0 开始的数字：GLUE 等数据集用它表示没有标签",
            ),
            fix=Bilingual(
                "Remove these rows; if it is a class, list the classes in data.labels.",
                "删除这些样本；如果它确实是一个类别，在 data.labels 中列出所有类别。",
            ),
        )
    if s.task.data.named == "label" and not s.task.data.several and (mark := joined(names)):
        shown = shortened(", ".join(repr(name) for name in names if mark in name.strip()), 100)
        yield Problem(
            Bilingual(
                f"several labels in one, separated by {mark!r}: {shown}; classification.problem=several_labels learns "
                "them apart",
                f"一个标签里有多个类别，以 {mark!r} 分隔：{shown}；classification.problem=several_labels 会分别学习",
            )
        )
    elif s.task.data.named == "label" and not s.task.data.several and (partly := with_known_part(names)):
        mark, several = partly
        shown = shortened(", ".join(map(repr, several)), 100)
        yield Problem(
            Bilingual(
                f"labels that may be several in one, separated by {mark!r}: {shown}; a part of each is a label of its "
                "own. classification.problem=several_labels learns them apart",
                f"可能一个标签里有多个类别，以 {mark!r} 分隔：{shown}；其中一部分本身也是标签。"
                "classification.problem=several_labels 会分别学习",
            ),
            severity="warning",
        )
    together = {name for group in groups for name in group}
    if odd := [name for name in strange(names) if name not in together]:
        missing = any(name.casefold().strip() in ("nan", "-nan", "<na>", "nat") for name in odd)
        blanks = all(name != name.strip() for name in names if name != "O")  # a blank after each comma
        severity = None if missing or blanks else "warning"
        shown = ", ".join(f"{name!r} ({counts[name]:,} rows)" for name in odd[:5])
        shown_zh = "、".join(f"{name!r}（{counts[name]:,} 条）" for name in odd[:5])
        yield Problem(
            Bilingual(
                f"labels that may mean a missing label, or that hold invisible characters: {shown}",
                f"可能表示缺失、或含有不可见字符的标签：{shown_zh}",
            ),
            severity=severity,
        )
    numbers = [name for name in names if as_number(name) is not None]
    pointed = [name for name in numbers if not is_whole(name)]
    measured = len(numbers) == len(names) and (pointed or len(names) > MANY_NUMBERS)
    if s.task.data.named == "label" and measured and not s.task.data.ordered:
        described = Bilingual(f"{len(names)} different numbers", f"{len(names)} 个不同的数字")
        if pointed:
            shown = ", ".join(pointed[:3])
            described = Bilingual(f"numbers with a decimal point ({shown})", f"带小数点的数字（{shown}）")
        yield Problem(
            Bilingual(
                f"the labels are {described}: each becomes a class; classification.problem=number estimates them, and "
                "ordered learns their order",
                f"标签是{described.zh}：每个数字各算一个类别；classification.problem=number 估计数值，ordered 学习顺序",
            ),
            severity="warning",
        )


def imbalance(s: CheckInput) -> Iterator[Problem]:
    """One class outweighs the others.

    Cause: A model that always predicts the largest class has an accuracy as high as its share. Accuracy then means
    little, and a learning rate that is too high, or a method that is too weak, ends exactly there.

    Fix: Judge by f1 and not by accuracy, use data.stratify=true, or weight the classes
    (classification.class_weights=balanced) or the sources (data.train: [{path, weight}]).

    类别不均衡

    原因：只猜最大的类别就能达到同样高的准确率，因此准确率说明不了什么；学习率过高或方法能力不足时，模型正会停在这里。

    办法：看 f1 而不看准确率；用 data.stratify=true 分层划分，或为类别（classification.class_weights=balanced）或数据源
    （data.train: [{path, weight}]）设置权重。
    """
    if s.task.data.named != "label" or s.task.data.several or s.examples.labels is None:
        return
    counts = class_counts(s)
    n = sum(counts.values())
    (large, most), (small, least) = counts.most_common()[0], counts.most_common()[-1]
    if len(counts) > 1 and (most / n >= LARGEST_SHARE or most / least >= LARGEST_RATIO):
        shares = 100 * most / n, 100 * least / n
        yield Problem(
            Bilingual(
                f"{large!r} has {shares[0]:.1f}% of the training rows, {small!r} {shares[1]:.1f}%",
                f"{large!r} 占训练样本的 {shares[0]:.1f}%，{small!r} 只占 {shares[1]:.1f}%",
            )
        )


def contradictions(s: CheckInput) -> Iterator[Problem]:
    """The same text with different labels.

    Cause: One of the labels is wrong, or the text does not determine the class: no model can get both right.

    Fix: Decide for one label.

    相同的文本标签不同

    原因：其中一个标签有误，或仅凭文本无法判断类别：任何模型都不可能两个都答对。

    办法：只保留一个标签。
    """
    if s.task.labels is None:
        return
    inputs, whole = s.fingerprints["train"]
    first = {int(x): int(w) for x, w in zip(inputs[::-1], whole[::-1], strict=True)}
    rows = [i for i, (x, w) in enumerate(zip(inputs.tolist(), whole.tolist(), strict=True)) if first[x] != w]
    if rows:
        message = Bilingual(
            f"{len(rows):,} training rows have another label than an earlier row with the same text",
            f"{len(rows):,} 条训练样本与前面相同的文本标签不同",
        )
        yield Problem(message, s.places(rows), len(rows))


def rare_labels(s: CheckInput) -> Iterator[Problem]:
    """Labels that hardly any row has.

    Cause: A label of one training row is often a typing mistake; and a model does not learn a class from one example.

    Fix: Correct the label, join it with another one, or remove the row.

    几乎没有样本的标签

    原因：只出现在一条训练样本中的标签往往是笔误；而且仅凭一个例子，模型学不到一个类别。

    办法：改正该标签、并入其他标签，或删除该样本。
    """
    if s.task.data.named != "label" or len(s.examples.train) < MANY_ROWS:
        return
    counts = class_counts(s)
    rare = sorted(name for name, n in counts.items() if n == 1)
    if not rare:
        return
    wanted = set(rare)
    rows = [i for i, example in enumerate(s.examples.train) if wanted.intersection(example.classes)]
    shown = shortened(", ".join(map(repr, rare)), 100)
    yield Problem(
        Bilingual(
            f"{len(rare):,} of {len(counts):,} labels have one training row each: {shown}",
            f"{len(counts):,} 个标签中有 {len(rare):,} 个只有一条训练样本：{shown}",
        ),
        s.places(rows),
        len(rows),
    )


def broken_tags(s: CheckInput) -> Iterator[Problem]:
    """Tags that do not make spans.

    Cause: In BIO a span begins with B-; in BMES and BIOES it ends with E- or is a single S-. An I-, M- or E- that
    does not continue a span of its kind is a mistake of the annotation or of its conversion, and the span F1 counts it
    as a separate span.

    Fix: Correct the tags, or check whether sentences were cut in the middle of a span.

    标注不构成完整的片段

    原因：BIO 标注中片段以 B- 开头；BMES 和 BIOES 中片段以 E- 结尾，或是单独的 S-。前面没有同类标注的 I-、M-、E- 是标注
    或转换的错误，片段 F1 会把它算作单独的片段。

    办法：改正标注，或检查句子是否在片段中间被切断。
    """
    if s.task.data.named != "tags":
        return
    rows: list[int] = []
    first: tuple[str, str] | None = None
    for i, example in enumerate(s.examples.train):
        if broken := _broken(example.classes):
            first = first or broken
            rows.append(i)
    if first is not None:
        tag, before = first
        message = Bilingual(
            f"{len(rows):,} sentences have tags out of place, such as {tag} after {before}",
            f"{len(rows):,} 个句子的标注位置有误，例如 {before} 之后出现 {tag}",
        )
        yield Problem(message, s.places(rows), len(rows))


def _broken(tags: tuple[str, ...]) -> tuple[str, str] | None:
    """The first tag that is out of place, and the one before it; None if every tag is in place."""
    ends = any(tag.startswith(("E-", "S-", "M-")) for tag in tags)
    before = "O"
    for tag in (*tags, "O"):
        inside = tag.startswith(("I-", "M-", "E-"))
        follows = before.startswith(("B-", "I-", "M-")) and before[2:] == tag[2:]
        unfinished = ends and before.startswith(("B-", "I-", "M-")) and not (inside and follows)
        if (inside and not follows and "-" in tag) or unfinished:
            return tag, before
        before = tag
    return None
