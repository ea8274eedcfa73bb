"""Rules on texts that belong together, scored pairs, and texts with classes that become vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from siliang.check.finding import Problem
from siliang.check.input import CheckInput
from siliang.data.examples import Labelled, Related, Scored
from siliang.language import Bilingual

FEWEST_PAIRS = 1.0  # pairs of a class that a step has on average


def same_texts(s: CheckInput) -> Iterator[Problem]:
    """The two texts of a row are the same.

    Cause: A text is always nearest to itself: from such a row nothing is learned, and as a held-out row it is counted
    as right. Often both columns were read from one.

    Fix: Remove these rows, or name the right columns (data.columns.anchor, data.columns.positive).

    一条样本的两段文本相同

    原因：一段文本总是离自己最近：这样的样本学不到东西，作为验证样本又总算答对。常见的原因是两列取自同一列。

    办法：删除这些样本，或指定正确的列（data.columns.anchor、data.columns.positive）。
    """
    rows: list[int] = []
    for i, example in enumerate(s.examples.train):
        if isinstance(example, Related):
            same = any(text.strip() == example.anchor.strip() for text in example.positives)
        elif isinstance(example, Scored):
            same = example.text.strip() == example.pair.strip()
        else:
            return
        rows += [i] if same else []
    if rows:
        message = Bilingual(
            f"{len(rows):,} training rows have the same text twice", f"{len(rows):,} 条训练样本的两段文本相同"
        )
        yield Problem(message, s.places(rows), len(rows))


def wrong_negatives(s: CheckInput) -> Iterator[Problem]:
    """A text is a positive of an anchor in one row, and a negative in another.

    Cause: What is learned from one of the rows is unlearned from the other. Mined negatives often contain right answers
    that only another row names.

    Fix: Remove the text from the negatives. Where both rows are in one step, multiple_negatives leaves the text out of
    the sum of this anchor; in other steps, and with other losses, it is a negative.

    同一段文本在一条样本中是正例，在另一条中是负例

    原因：从一条学到的，又被另一条抵消。自动挖掘的负例中常有正确答案，只是写在别的样本里。

    办法：从负例中删除这段文本。两条样本在同一步时，multiple_negatives 会在该锚文本的求和中排除它；在其他步中，或使用
    其他损失函数时，它仍是负例。
    """
    positives: dict[str, set[str]] = {}
    for example in s.examples.train:
        if not isinstance(example, Related):
            return
        positives.setdefault(example.anchor, set()).update(example.positives)
    rows = [
        i
        for i, example in enumerate(s.examples.train)
        if isinstance(example, Related) and not positives[example.anchor].isdisjoint(example.negatives)
    ]
    if rows:
        message = Bilingual(
            f"{len(rows):,} training rows have a negative that is a positive of the same anchor elsewhere",
            f"{len(rows):,} 条训练样本的负例，在别的样本中是同一锚文本的正例",
        )
        yield Problem(message, s.places(rows), len(rows))


def nothing_to_compare(s: CheckInput) -> Iterator[Problem]:
    """The loss has nothing to compare.

    Cause: A reranker that sees positives alone learns to call every text relevant. Scores that are all the same have no
    order. Texts with classes need two of one class in a step, and multiple_negatives another row in it.

    Fix: Add negatives (column negative, or pairs with label 0); check the column of scores; or raise train.batch_size
    or train.gradient_accumulation, which for vectors may be done at no cost in memory.

    损失函数没有可比较的内容

    原因：重排模型如果只见到正例，就会认为所有文本都相关。分数全部相同则没有高低。带类别的文本在一步之中须有两条同类，
    multiple_negatives 则须有另一条样本。

    办法：加入负例（negative 列，或标签为 0 的文本对）；检查分数所在的列；或增大 train.batch_size 或
    train.gradient_accumulation，对向量来说这不增加内存。
    """
    train, step = s.examples.train, s.config.train.rows_per_step
    if not len(train):
        return
    first, together = train[0], s.task.step_loss is not None
    if isinstance(first, Related) and not together and not any(isinstance(e, Related) and e.negatives for e in train):
        yield Problem(
            Bilingual(
                "no training row has a negative, and a reranker learns by comparing",
                "没有一条训练样本带有负例，而重排模型要靠比较来学习",
            )
        )
    elif isinstance(first, Scored) and len({e.score for e in train if isinstance(e, Scored)}) == 1:
        yield Problem(
            Bilingual(
                f"all {len(train):,} training rows have the score {first.score:g}",
                f"全部 {len(train):,} 条训练样本的分数都是 {first.score:g}",
            )
        )
    elif isinstance(first, Related) and together and step == 1 and not first.negatives:
        yield Problem(
            Bilingual(
                "a step has one row: its positive is compared with nothing",
                "一步只有一条样本：它的正例没有可比较的文本",
            )
        )
    elif isinstance(first, Labelled) and together:
        counts = Counter(e.label for e in train if isinstance(e, Labelled))
        n = len(train)
        pairs = step * (step - 1) / 2 * sum(c * (c - 1) for c in counts.values()) / max(n * (n - 1), 1)
        if pairs < FEWEST_PAIRS:
            yield Problem(
                Bilingual(
                    f"a step of {step:,} rows has {pairs:.2g} pairs of one class on average ({len(counts):,} classes)",
                    f"一步 {step:,} 条样本平均只有 {pairs:.2g} 对同类文本（共 {len(counts):,} 个类别）",
                )
            )


def classes_as_scores(s: CheckInput) -> Iterator[Problem]:
    """The scores look like the numbers of classes.

    Cause: The scores are the whole numbers 0, 1 and 2. Data on inference has such numbers for entailment, neutral and
    contradiction: as scores they would say that contradictions are nearest.

    Fix: For entailment, keep the rows of the class 0 as pairs (columns anchor, positive), with those of the class 2 as
    negatives. If the numbers are grades, accept this finding (accept: [SL053]).

    分数看起来是类别的编号

    原因：分数是 0、1、2 这三个整数。推理类数据用这样的编号表示蕴含、中立和矛盾：当作分数，就成了矛盾的最接近。

    办法：对于蕴含数据，把类别 0 的样本写成文本对（列 anchor、positive），类别 2 的作为负例。如果这些数确实是等级，用
    accept: [SL053] 接受此项。
    """
    scores = {example.score for example in s.examples.train if isinstance(example, Scored)}
    if scores == {0.0, 1.0, 2.0} and s.examples.columns.get("score") == "label":
        yield Problem(
            Bilingual("the scores are 0, 1 and 2, from the column 'label'", "分数是 0、1、2，取自 'label' 列")
        )
