"""Rules on labels and scores that are numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

import numpy as np

from siliang.check.finding import Problem, class_counts
from siliang.check.input import CheckInput
from siliang.data.examples import Scored
from siliang.data.numbers import has_decimal_comma
from siliang.language import Bilingual
from siliang.secrets import shortened

FAR = 20.0  # from 0: a mean or a standard deviation


def far_numbers(s: CheckInput) -> Iterator[Problem]:
    """Numbers that are far from 0 or far apart.

    Cause: A new head begins with outputs near 0 of a spread near 1. The squared error of numbers of hundreds is large,
    the gradient is clipped, and the training spends its steps on reaching their mean.

    Fix: Learn the numbers on another scale, such as (number - mean) / standard deviation, or a price's logarithm.

    数值离 0 太远，或分布太广

    原因：新建的输出头一开始的输出在 0 附近，离散程度约为 1。如果数值成百上千，平方误差很大，梯度会被裁剪，训练的步数都
    花在接近平均值上。

    办法：换一个尺度学习，如（数值 - 平均值）/ 标准差，或对价格取对数。
    """
    if s.task.labels is None or s.task.data.named is not None or not len(s.train):
        return
    numbers = s.train.column("labels").astype(np.float64)
    mean, spread = float(numbers.mean()), float(numbers.std())
    if not spread:
        yield Problem(
            Bilingual(
                f"all training rows have the number {mean:g}: nothing to learn",
                f"所有训练样本的数值都是 {mean:g}：没有可学习的内容",
            ),
            severity="error",
        )
    elif max(abs(mean), spread) > FAR:
        yield Problem(
            Bilingual(
                f"the numbers have the mean {mean:.4g} and the standard deviation {spread:.4g}",
                f"数值的平均值是 {mean:.4g}，标准差是 {spread:.4g}",
            )
        )


def decimal_commas(s: CheckInput) -> Iterator[Problem]:
    """Numbers with a decimal comma.

    Cause: Labels and scores such as "3,5" are read as 3.5. Two classes by their numbers, joined by a comma, look the
    same.

    Fix: Nothing, if they are numbers (accept: [SL054]). For several labels, set classification.problem=several_labels.

    用逗号作小数点的数

    原因：“3,5”这样的标签和分数读作 3.5。用逗号连接的两个类别编号看起来也是这样。

    办法：如果确实是数，不必处理（accept: [SL054]）。如果是多个标签，请设置 classification.problem=several_labels。
    """
    scored = len(s.examples.train) > 0 and isinstance(s.examples.train[0], Scored)
    if s.task.data.named is not None or s.task.data.several or (s.task.labels is None and not scored):
        return
    if scored:
        both_parts = chain(s.examples.train, s.examples.eval)
        counts = Counter(example.comma for example in both_parts if isinstance(example, Scored) and example.comma)
    else:
        counts = class_counts(s, "train", "eval")
    written = [name for name in counts if has_decimal_comma(name.strip())]
    if written:
        rows = sum(counts[name] for name in written)
        shown = shortened(", ".join(map(repr, written[:3])), 60)
        yield Problem(
            Bilingual(
                f"{rows:,} rows have a number with a decimal comma, such as {shown}; "
                f"{written[0]!r} is read as {written[0].replace(',', '.')}",
                f"{rows:,} 条样本的数用逗号作小数点，如 {shown}；{written[0]!r} 读作 {written[0].replace(',', '.')}",
            )
        )
