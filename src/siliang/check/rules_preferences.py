"""Rules on pairs of a better and a worse answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

from siliang.check.finding import PARTS, Problem
from siliang.check.input import CheckInput
from siliang.data.messages import Ranked, Rated
from siliang.language import Bilingual

OF_BOTH_KINDS = ("margin", "chosen_reward", "rejected_reward")  # metrics that need good answers and bad ones
FEWEST = 20  # pairs of which a share says something
LENGTH_SHARE = 0.9
REFUSAL_SHARE = 0.2  # of chosen answers that refuse, where fewer rejected ones do
REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry,|i can'?t|i cannot|i'?m unable|as an ai\b"
    r"|很?抱歉|对不起|我不能|我无法|作为一个?(ai|人工智能))",
    re.IGNORECASE,
)


def contradictory_pairs(s: CheckInput) -> Iterator[Problem]:
    """Pairs of answers that occur in both orders, or answers that are marked as good and as bad.

    Cause: For the same prompt, one row prefers an answer to another, and a second row prefers the other; or the same
    answer to it is good in one row and bad in another. What the model learns from the one it unlearns from the other.

    Fix: Decide which answer is better, and remove the other row.

    同一对回答出现了两种顺序，或同一回答既标为好又标为坏

    原因：同一个提问，一条样本认为甲比乙好，另一条认为乙比甲好；或者同一回答在一条样本中标为好，在另一条中标为坏。
    模型从一条学到的，又被另一条抵消。

    办法：确定哪个回答更好，删除另一条。
    """
    yield from _marked_twice(s)
    first: dict[tuple[str, str, str], int] = {}
    found: list[int] = []
    for number, asked, chosen, rejected in _pairs(s):
        first.setdefault((asked, chosen, rejected), number)
        if (asked, rejected, chosen) in first:
            found.append(number)
    if found:
        message = Bilingual(
            f"{len(found):,} training rows have the answers of another row in the opposite order",
            f"{len(found):,} 条训练样本的两个回答与另一条相同，但顺序相反",
        )
        yield Problem(message, s.places(found), len(found))


def _marked_twice(s: CheckInput) -> Iterator[Problem]:
    marks: dict[tuple[str, str], bool] = {}
    found: list[int] = []
    for number, example in enumerate(s.examples.train):
        if not isinstance(example, Rated):
            return
        key = example.input_text, example.ranked.words[0]
        if marks.setdefault(key, example.desirable) != example.desirable:
            found.append(number)
    if found:
        message = Bilingual(
            f"{len(found):,} training rows have the answer of another row, with the opposite mark",
            f"{len(found):,} 条训练样本的回答与另一条相同，但好坏相反",
        )
        yield Problem(message, s.places(found), len(found))


def one_kind_of_answer(s: CheckInput) -> Iterator[Problem]:
    """All answers are marked as good, or all as bad.

    Cause: KTO pushes good answers up and bad ones down. With one kind alone the model learns nothing about the
    difference; good answers alone are learned better by task=causal_lm. Held-out rows of one kind have no margin, and
    no reward of the other kind.

    Fix: Add answers of the other kind, or learn the good ones with task=causal_lm.

    所有回答都标为好，或都标为坏

    原因：KTO 提高好回答、压低坏回答的概率。只有一种时，模型学不到二者的差别；如果全是好回答，用 task=causal_lm 学习
    更好。验证样本只有一种时，没有两种奖励的差值，也没有另一种的奖励。

    办法：加入另一种回答，或用 task=causal_lm 学习好回答。
    """
    for part, examples in (("train", s.examples.train), ("eval", s.examples.eval)):
        marks = {example.desirable for example in examples if isinstance(example, Rated)}
        if len(marks) == 1 and (part == "eval" or len(examples) > 1):
            word, word_zh = ("good", "好") if marks == {True} else ("bad", "坏")
            is_needed = part == "train" or s.config.train.best in OF_BOTH_KINDS
            yield Problem(
                Bilingual(
                    f"all answers of the {PARTS[part]} rows are marked as {word}",
                    f"{PARTS[part].zh}样本的回答全部标为{word_zh}",
                ),
                severity=None if is_needed else "warning",
            )
            return


def length_decides(s: CheckInput) -> Iterator[Problem]:
    """One kind of answer is nearly always the longer one.

    Cause: A model that only learns to write longer (or shorter) answers does well on such pairs. If the rejected
    answers are the longer ones, the two columns may also be swapped.

    Fix: Look at some rows. Swap the columns with data.columns.chosen and data.columns.rejected if they are swapped. For
    the task preference, a loss that divides by the length helps (preference.loss=sigmoid_norm or simpo). If the lengths
    are as they should be, accept this finding (accept: [SL045]).

    两类回答的长短几乎总是一样

    原因：模型只要学会写得更长（或更短），就能在这样的样本上取得好结果。如果总是被拒绝的回答更长，也可能是两列写反了。

    办法：看几条样本。若写反了，用 data.columns.chosen 和 data.columns.rejected 交换两列。preference 任务可改用除以长度
    的损失（preference.loss=sigmoid_norm 或 simpo）。如果长短本应如此，用 accept: [SL045] 接受此项。
    """
    lengths = [(len(chosen), len(rejected)) for _, _, chosen, rejected in _pairs(s)]
    differing = [(a, b) for a, b in lengths if a != b]
    if len(differing) < FEWEST:
        return
    share = sum(a > b for a, b in differing) / len(differing)
    if max(share, 1 - share) < LENGTH_SHARE:
        return
    longer, longer_zh = ("chosen", "所选的") if share > 0.5 else ("rejected", "被拒绝的")
    percent = 100 * max(share, 1 - share)
    yield Problem(
        Bilingual(
            f"the {longer} answer is the longer one in {percent:.0f}% of {len(differing):,} training pairs",
            f"{len(differing):,} 对训练回答中有 {percent:.0f}% 是{longer_zh}回答更长",
        )
    )


def refusals_preferred(s: CheckInput) -> Iterator[Problem]:
    """Many of the preferred answers are refusals.

    Cause: A large share of the chosen answers begins like a refusal ("I'm sorry", "As an AI"), and fewer of the
    rejected ones do. Either the two columns are swapped, or the model will learn to refuse.

    Fix: Look at some rows. Swap the columns with data.columns.chosen and data.columns.rejected if they are swapped; if
    refusing is what is to be learned, accept this finding (accept: [SL046]).

    较好的回答中有许多是拒答

    原因：所选的回答有很大一部分以拒答开头（“抱歉”“作为一个 AI”），被拒绝的回答中反而较少。要么两列写反了，要么模型会学
    会拒答。

    办法：看几条样本。若写反了，用 data.columns.chosen 和 data.columns.rejected 交换两列；如果就是要学会拒答，用 accept:
    [SL046] 接受此项。
    """
    pairs = [(number, *(bool(REFUSAL.match(e.words[i])) for i in (0, -1))) for number, e in _ranked(s)]
    chosen = [number for number, better, worse in pairs if better and not worse]
    rejected = sum(worse and not better for _, better, worse in pairs)
    if len(pairs) >= FEWEST and len(chosen) >= REFUSAL_SHARE * len(pairs) and len(chosen) > rejected:
        message = Bilingual(
            f"{len(chosen):,} of {len(pairs):,} chosen answers refuse where the rejected one does not "
            f"({rejected:,} the other way round)",
            f"{len(pairs):,} 个所选的回答中有 {len(chosen):,} 个是拒答，而对应的被拒绝回答不是"
            f"（相反的有 {rejected:,} 个）",
        )
        yield Problem(message, s.places(chosen), len(chosen))


def _pairs(s: CheckInput) -> Iterator[tuple[int, str, str, str]]:
    """(number of the training row, prompt, better answer, worse answer) of each pair."""
    for number, example in _ranked(s):
        words = example.words
        for better, worse in example.pairs:
            yield number, example.input_text, words[better], words[worse]


def _ranked(s: CheckInput) -> Iterator[tuple[int, Ranked]]:
    """The training rows with ranked answers, with their numbers; none of another task."""
    for number, example in enumerate(s.examples.train):
        if not isinstance(example, Ranked):
            return
        yield number, example
