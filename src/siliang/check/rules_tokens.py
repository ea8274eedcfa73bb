"""Rules on tokens and labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from siliang.check.finding import PARTS, Problem, not_usable
from siliang.check.input import CheckInput
from siliang.data.collate import PadCollator
from siliang.data.encode import IGNORED
from siliang.data.examples import Prepared, Text
from siliang.language import Bilingual


def rows_without_tokens(s: CheckInput) -> Iterator[Problem]:
    """Rows cannot be made into tokens.

    Cause: The template cannot write them (unknown roles, special tokens in the text), they have no labels, or their
    tokens are of no use: fewer than two, most of them unknown to the tokenizer, a question that leaves no room for its
    context, an answer that no window holds.

    Fix: Correct them, or skip them with data.skip_bad_rows=true. If most rows are affected, check the model's tokenizer
    and data.template.

    有样本无法转换为词元

    原因：模板写不出这些样本（有模板不支持的角色、文本中有特殊词元），或其中没有要学习的内容，或词元没有用处：少于两个、
    多数不在词表中、问题太长放不下上下文、没有窗口包含答案。

    办法：改正这些行，或用 data.skip_bad_rows=true 跳过。如果大多数样本如此，检查模型的分词器和 data.template。
    """
    bad = [*s.train.skipped, *s.eval.skipped]
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad):,} rows"
        rows_zh = f"{len(bad):,} 条样本"
        yield not_usable(s, bad, Bilingual(rows, rows_zh))


def end_not_learned(s: CheckInput) -> Iterator[Problem]:
    """The end of sequence is not learned.

    Cause: An answer must end with the end-of-sequence token, and that token must have a label; otherwise the model
    never learns to stop, and generates up to the maximum length. The token gets lost when "</s>" is written as text
    (Llama-2's tokenizer splits it, or joins it to the last word), when truncation cuts it off, and when padding is
    masked by the token's id while the pad token is the end of sequence.

    Fix: Give siliang text and not tokens: it appends the end by its id and never cuts it. In your own preparation,
    append tokenizer.eos_token_id to input_ids and labels, truncate before it, and mask padding by position.

    没有学习结束符

    原因：答案必须以结束符（EOS）结尾，并且结束符要有标签；否则模型学不会停下，会一直写到长度上限。以下情况会丢掉结束符：
    把 "</s>" 写成文本（Llama-2 的分词器会把它拆开，或与前一个词连在一起）、截断时被切掉、填充词元就是结束符而又按词元编
    号屏蔽填充。

    办法：直接给 siliang 文本而不是词元：它按编号添加结束符，且从不切掉。自行预处理时，把 tokenizer.eos_token_id 同时加
    到 input_ids 和 labels 末尾，在它之前截断，并按位置屏蔽填充。
    """
    if not s.task.data.next_token:
        return
    last = s.last_labels
    rows = np.flatnonzero((last != IGNORED) & ~np.isin(last, s.stops))
    if not len(rows):
        return
    masked = 0
    wanted = set(s.stops)
    chosen = set(rows.tolist())
    for i, (ids, labels) in enumerate(zip(s.train.lists("input_ids"), s.train.lists("labels"), strict=True)):
        if i in chosen:
            tail = [int(t) for t, x in zip(ids, labels, strict=True) if int(t) in wanted and x == IGNORED]
            masked += bool(tail) and int(ids[-1]) in wanted
    present, present_zh = "", ""
    if masked:
        present, present_zh = (
            f"; in {masked:,} of them it is present, but its label is masked",
            f"；其中 {masked:,} 条有结束符，但标签被屏蔽",
        )
    message = Bilingual(
        f"{len(rows):,} of {len(last):,} rows end their last answer without the end-of-sequence token{present}",
        f"{len(last):,} 条样本中有 {len(rows):,} 条的最后一个答案没有以结束符结尾{present_zh}",
    )
    yield Problem(message, s.entries(rows), len(rows))


def all_masked(s: CheckInput) -> Iterator[Problem]:
    """A row in which nothing is learned.

    Cause: Every label is masked (-100): the loss of such a row is 0, and that of a batch of such rows nan (0 divided by
    0). For questions on a context: no window holds the answer, so the model learns to find none.

    Fix: Find out where the labels were lost: an answer that was cut off completely, a template that finds no answer, a
    mask by the wrong token, answers that are all empty.

    样本中没有要学习的内容

    原因：所有标签都被屏蔽（-100）：这样的样本损失为 0，整个批次如此时损失为 nan（0 除以 0）。对阅读理解任务：没有一个窗
    口包含答案，模型只会学到“找不到答案”。

    办法：查明标签丢在哪里：答案被整个截掉、模板找不到答案、屏蔽时用错了词元，或答案全为空。
    """
    if s.finds_spans:
        if len(s.train) and not (s.train.column("end_positions") > 0).any():
            yield Problem(
                Bilingual(
                    f"none of the {len(s.train):,} windows holds an answer",
                    f"{len(s.train):,} 个窗口都不包含答案，模型无从查找",
                )
            )
        return
    rows = np.flatnonzero(s.train.learned == 0)
    if len(rows):
        every, every_zh = (" (all of them)", "（全部）") if len(rows) == len(s.train) else ("", "")
        message = Bilingual(
            f"{len(rows):,} of {len(s.train):,} rows have no label{every}",
            f"{len(s.train):,} 条样本中有 {len(rows):,} 条{every_zh}没有任何标签",
        )
        yield Problem(message, s.entries(rows), len(rows))
    for part, tokens, examples in (("train", s.train, s.examples.train), ("eval", s.eval, s.examples.eval)):
        if len(examples) and not len(tokens):
            yield Problem(
                Bilingual(
                    f"none of the {len(examples):,} {PARTS[part]} rows is left (data.too_long=drop)",
                    f"{len(examples):,} 条{PARTS[part].zh}样本一条也没有剩下（data.too_long=drop）",
                )
            )
    if len(s.eval) and not s.eval.learned.sum():
        yield Problem(
            Bilingual(
                f"none of the {len(s.eval):,} held-out rows has a label: there is nothing to measure",
                f"{len(s.eval):,} 条验证样本都没有标签，无法评估",
            )
        )


def nothing_varies(s: CheckInput) -> Iterator[Problem]:
    """All rows teach the same thing.

    Cause: Every token is the same one, or every tag, or no row has an answer: the loss falls to 0, and the model's
    output does not depend on the input. If every answer is the same, this is a warning.

    Fix: Check the columns (data.columns, data.layout), the labels, and the model's tokenizer.

    所有样本要学的内容都一样

    原因：所有词元都是同一个，或所有标注都相同，或没有一条样本有答案：损失会降到 0，而模型的输出与输入无关。所有答案都相
    同时，此项为警告。

    办法：检查列的设置（data.columns、data.layout）、标签，以及模型的分词器。
    """
    n = len(s.train)
    words = {int(t) for ids in s.train.lists("input_ids") for t in np.unique(ids)} - set(s.tokenizer.all_special_ids)
    if n and len(words) < 2:
        one = Bilingual("a special one", "特殊词元")
        if words:
            word = repr(s.tokenizer.convert_ids_to_tokens(words.pop()))
            one = Bilingual(word, word)
        total = int(s.train.lengths.sum())
        yield Problem(
            Bilingual(
                f"all {total:,} tokens of all rows are the same, {one}",
                f"所有样本的 {total:,} 个词元都是同一个：{one.zh}",
            )
        )
    if s.finds_spans and n and not (s.train.column("end_positions") > 0).any():
        yield Problem(Bilingual(f"none of the {n:,} windows holds an answer", f"{n:,} 个窗口都不包含答案"))
    if not s.task.data.label_per_token:
        return
    learned = {int(x) for labels in s.train.lists("labels") for x in np.unique(labels)} - {IGNORED}
    if s.task.data.named == "tags" and n and len(learned) == 1:
        tag = (s.examples.labels or [])[learned.pop()]
        yield Problem(Bilingual(f"all tags are {tag!r}", f"所有标注都是 {tag!r}"))
    if not s.task.writes:
        return
    answers = {labels[labels != IGNORED].tobytes() for labels in s.train.lists("labels")}
    if learned and s.task.data.next_token and learned <= set(s.stops):
        yield Problem(
            Bilingual(f"only the end of sequence is learned in {n:,} rows", f"{n:,} 条样本只有结束符参与学习")
        )
    elif len(answers) == 1 and len({ids.tobytes() for ids in s.train.lists("input_ids")}) > 1:
        yield Problem(
            Bilingual(f"all {n:,} rows have the same answer", f"{n:,} 条样本的答案全部相同"), severity="warning"
        )


def truncated(s: CheckInput) -> Iterator[Problem]:
    """Rows that are cut.

    Cause: They are longer than data.max_length (a target: than data.max_target_length). Of a conversation the oldest
    rounds are cut first, then the beginning of the question and the end of the answer; of any other text its end. The
    special tokens at the end stay. A plain text becomes windows and is not cut, unless data.long_text says so.

    Fix: Raise that length (memory grows with it), or drop such rows with data.too_long=drop.

    样本被截断

    原因：样本长于 data.max_length（目标文本长于 data.max_target_length）。对话先去掉最早的轮次，再截去问题的开头和答案
    的末尾；其他文本截去末尾。末尾的特殊词元总会保留。纯文本会切成窗口而不截断，除非 data.long_text 另有设置。

    办法：调大该长度（内存随之增加），或用 data.too_long=drop 去掉这些样本。
    """
    if s.task.data.windows:
        return
    lost, answers = s.train.column("lost"), s.train.column("lost_answer")
    rows = np.flatnonzero(lost > 0)
    if len(rows):
        n = len(s.train)
        share, tokens, longest = 100 * len(rows) / n, int(lost.sum()), s.data.max_length
        learned, learned_zh = "", ""
        if n_answers := int((answers > 0).sum()):
            learned, learned_zh = (
                f"; {n_answers:,} lose part of what is learned",
                f"；其中 {n_answers:,} 条丢失了要学习的部分",
            )
        message = Bilingual(
            f"{len(rows):,} of {n:,} rows ({share:.1f}%) are cut to {longest} tokens, "
            f"{tokens:,} tokens are lost{learned}",
            f"{n:,} 条样本中有 {len(rows):,} 条（{share:.1f}%）被截断到 {longest} 个词元，"
            f"共丢失 {tokens:,} 个词元{learned_zh}",
        )
        yield Problem(message, s.entries(rows), len(rows))
    if s.train.dropped:
        yield Problem(
            Bilingual(
                f"{s.train.dropped:,} rows are dropped for their length (data.too_long=drop)",
                f"{s.train.dropped:,} 条样本因过长被去掉（data.too_long=drop）",
            )
        )


def prompt_learned(s: CheckInput) -> Iterator[Problem]:
    """The question has labels.

    Cause: Every token has a label, also in the user's words: the model learns to write questions, and their loss
    outweighs that of the short answers.

    Fix: Mask the question with -100. If the rows are plain text without questions, leave the labels column out.

    问题部分也有标签

    原因：每个词元都有标签，包括用户说的话：模型会学着写问题，而且问题的损失会盖过简短的答案。

    办法：用 -100 屏蔽问题部分；如果是纯文本而不是问答，去掉 labels 列。
    """
    if not s.task.data.next_token or [*s.examples.layouts] == ["text"]:
        return
    whole = s.train.learned == s.train.lengths
    if any(name in ("prepared", "text") for name in s.examples.layouts):
        plain = (isinstance(e, Text) or (isinstance(e, Prepared) and not e.labels) for e in s.examples.train)
        whole = whole & ~np.fromiter(plain, bool, len(s.examples.train))[s.train.column("row")]
    rows = np.flatnonzero(whole & (s.train.lengths > 1))
    if len(rows):
        message = Bilingual(
            f"{len(rows):,} of {len(s.train):,} rows have a label on every token",
            f"{len(s.train):,} 条样本中有 {len(rows):,} 条的每个词元都有标签",
        )
        yield Problem(message, s.entries(rows), len(rows))


def shifted_labels(s: CheckInput) -> Iterator[Problem]:
    """Labels that are shifted already.

    Cause: transformers' models shift the labels themselves: label i belongs to token i. If they were shifted before,
    they are shifted twice, and the model learns the token after the next.

    Fix: Give labels that are the tokens themselves, or -100.

    标签已经移过位

    原因：transformers 的模型会自行移位：第 i 个标签对应第 i 个词元。若事先移过，就移了两次，模型学到的是再下一个词元。

    办法：标签应与词元相同，或为 -100。
    """
    if not s.task.data.next_token:
        return
    rows = []
    for i, (ids, labels) in enumerate(zip(s.train.lists("input_ids"), s.train.lists("labels"), strict=True)):
        at = np.flatnonzero(labels != IGNORED)
        inner = at[at < len(ids) - 1]
        if len(inner) < 2:
            continue
        right, next_one = (labels[inner] == ids[inner]).mean(), (labels[inner] == ids[inner + 1]).mean()
        if next_one > 0.9 and right < 0.5:
            rows.append(i)
    if rows:
        message = Bilingual(
            f"{len(rows):,} of {len(s.train):,} rows have the next token's labels",
            f"{len(s.train):,} 条样本中有 {len(rows):,} 条的标签是下一个词元",
        )
        yield Problem(message, s.entries(rows), len(rows))


def padding_learned(s: CheckInput) -> Iterator[Problem]:
    """Padding would be learned, or the end masked with it.

    Cause: If the pad token is the end of sequence, a mask by the token's id masks the end too, and without a mask the
    model learns to repeat the end. siliang masks by position; this rule checks it on a batch of your rows.

    Fix: Report it: this is a bug in siliang.

    填充会被学习，或结束符被一同屏蔽

    原因：填充词元就是结束符时，按编号屏蔽会把结束符一同屏蔽；不屏蔽则模型会学着不断重复结束符。siliang 按位置屏蔽，本规
    则在你的一批数据上加以验证。

    办法：这是 siliang 的缺陷，请报告。
    """
    if not s.task.writes or len(s.train) < 2:
        return
    order = np.argsort(s.train.lengths)
    short, long = s.train[int(order[0])], s.train[int(order[-1])]
    batch = PadCollator(s.tokenizer.pad_token_id)([short, long])
    n = len(short["labels"])
    right = batch["labels"][0, :n].tolist() == short["labels"] and bool((batch["labels"][0, n:] == IGNORED).all())
    if not right or int(batch["attention_mask"][0].sum()) != len(short["input_ids"]):
        yield Problem(
            Bilingual("a padded batch does not have the labels of its rows", "填充后的批次与各样本的标签不一致")
        )


def never_invoked(s: CheckInput) -> Iterator[Problem]:
    """Rows without aLoRA's invocation.

    Cause: aLoRA computes from the last occurrence of method.alora_invocation_tokens in a row on. A row that lacks these
    tokens, or has them behind what it learns, is computed by the base model alone and teaches nothing. The tokens of a
    text depend on its neighbours: a word at the beginning may have another id than one behind a blank.

    Fix: Take the ids as they are in the rows, of a part of the template that begins every answer, such as its
    assistant tag.

    有样本不含 aLoRA 的触发序列

    原因：aLoRA 从样本中最后一次出现 method.alora_invocation_tokens 的位置开始计算。样本中没有这些词元，或它们在学习内
    容之后时，只由基座模型计算，什么也学不到。同一段文本的词元还取决于它前后的内容：句首的词与空格后的词编号可能不同。

    办法：使用样本中实际的编号，取模板中每个回答开头都有的部分，例如 assistant 标记。
    """
    tokens = s.config.method.arguments.get("alora_invocation_tokens")
    if not tokens or not s.task.writes:
        return
    rows: list[int] = []
    for i, (ids, labels) in enumerate(zip(s.train.lists("input_ids"), s.train.lists("labels"), strict=True)):
        learned = np.flatnonzero(np.asarray(labels) != IGNORED)
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), min(len(tokens), len(ids)))
        begins = np.flatnonzero((windows == tokens).all(1)) if len(tokens) <= len(ids) else windows[:0]
        if len(learned) and not (len(begins) and begins[-1] < learned[-1]):
            rows.append(i)
    if rows:
        message = Bilingual(
            f"{len(rows):,} of {len(s.train):,} rows do not have alora_invocation_tokens before what they learn",
            f"{len(s.train):,} 条样本中有 {len(rows):,} 条在学习内容之前没有 alora_invocation_tokens",
        )
        yield Problem(message, s.entries(rows), len(rows))
