"""Rules on the tokens of text and template."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from siliang.check.finding import Problem, rows_with
from siliang.check.input import CheckInput
from siliang.data.chat import ChatTemplate
from siliang.data.messages import Conversation, Message
from siliang.data.templates import find_template
from siliang.language import Bilingual
from siliang.types import DataError

UNKNOWN_SHARE = 0.001
ROLE_WORD = re.compile(r"<\|?[\w ]+\|?>|\[g?MASK\]|\[(?:CLS|SEP)\]")


def template_misfit(s: CheckInput) -> Iterator[Problem]:
    """The template is not this model's.

    Cause: A chat model was trained with one template. Another template, with role words that the tokenizer splits into
    pieces, costs tokens and has to be learned again. For a base model without chat training, any template works.

    Fix: Use data.template=auto if the tokenizer has a chat template. Otherwise use a template whose role words are
    single tokens, or plain words (human-assistant, alpaca, vicuna).

    模板与模型不符

    原因：对话模型是用特定模板训练的。换一种模板，如果角色标记会被分词器拆成几段，既多占词元，又要重新学习。未经对话训练
    的基座模型没有固定模板，用哪种都可以。

    办法：分词器带有对话模板时用 data.template=auto；否则选择角色标记为单个词元的模板，或使用普通文字的模板（
    human-assistant、alpaca、vicuna）。
    """
    if not s.task.data.next_token or all(name in ("prepared", "text") for name in s.examples.layouts):
        return
    template = find_template(s.data.template)
    own = getattr(s.tokenizer, "chat_template", None)
    if template is None:
        return
    words = dict.fromkeys(ROLE_WORD.findall(_sample(ChatTemplate(s.encoder, template, s.data.template_arguments))))
    split = [w for w in words if s.encoder.marker(w) is None]
    if split:
        n = len(s.encoder.text([split[0]])[0])
        named = ", ".join(split)
        yield Problem(
            Bilingual(
                f"{template.name}: this tokenizer has no token {named}; {split[0]} becomes {n} pieces",
                f"{template.name}：这个分词器没有词元 {named}；{split[0]} 会被拆成 {n} 段",
            )
        )
    elif own and not any(w in str(own) for w in words):
        yield Problem(
            Bilingual(
                f"{template.name} is used, but the tokenizer has its own chat template",
                f"使用了 {template.name} 模板，而分词器自带对话模板",
            )
        )


def _sample(template: ChatTemplate) -> str:
    """The template's own text in a short conversation, with a system message if it has a place for one."""
    turns = (Message("user", "a"), Message("assistant", "a"), Message("user", "a"), Message("assistant", "a"))
    try:
        entries = template.entries([Conversation((Message("system", "a"), *turns))], split=False)
    except DataError:
        entries = template.entries([Conversation(turns)], split=False)
    return " ".join(piece.text for piece in entries[0][0].pieces if not piece.data)


def unknown_tokens(s: CheckInput) -> Iterator[Problem]:
    """Text that the tokenizer does not know.

    Cause: All characters outside the vocabulary become one unknown token: the model cannot distinguish them.

    Fix: Use a model whose tokenizer knows the language, or add the missing characters with data.add_tokens.

    分词器不认识部分文本

    原因：词表之外的字符都会变成同一个未知词元，模型无法区分它们。

    办法：换用分词器支持该语言的模型，或用 data.add_tokens 添加缺少的字符。
    """
    unknown = s.tokenizer.unk_token_id
    if unknown is None or unknown in (s.encoder.eos, s.tokenizer.bos_token_id):
        return
    counts = np.array([(ids == unknown).sum() for ids in s.train.lists("input_ids")])
    total = int(s.train.lengths.sum())
    if total and counts.sum() / total > UNKNOWN_SHARE:
        rows = np.flatnonzero(counts)
        characters: Counter[str] = Counter()
        for i in rows[:50]:
            for text in s.examples.train[int(s.train.column("row")[i])].texts:
                letters = sorted(set(text))
                characters.update(c for c, ids in zip(letters, s.encoder.text(letters), strict=True) if unknown in ids)
        shown = " ".join(c for c, _ in characters.most_common(8))
        named, named_zh = (f", such as {shown}", f"，例如 {shown}") if characters else ("", "")
        n, share = int(counts.sum()), 100 * counts.sum() / total
        message = Bilingual(
            f"{n:,} of {total:,} tokens ({share:.2f}%) are unknown{named}",
            f"{total:,} 个词元中有 {n:,} 个（{share:.2f}%）不在词表中{named_zh}",
        )
        yield Problem(message, s.entries(rows), len(rows))


def special_words(s: CheckInput) -> Iterator[Problem]:
    """Special tokens in the text of the data.

    Cause: The text holds words that are special tokens of this tokenizer. siliang encodes them as plain text, so that
    no row can insert a role or an end into the conversation. Another program may encode the same text as special
    tokens.

    Fix: Nothing needs to be done if they are meant as text. Remove them if they are left over from another preparation.

    数据文本中有特殊词元

    原因：文本中有一些词正好是这个分词器的特殊词元。siliang 把它们当作普通文本编码，因此任何样本都无法在对话中插入角色或
    结束符；其他程序可能会把它们编码成特殊词元。

    办法：如果本来就是文本，无需处理；如果是先前处理时残留的，请删除。
    """
    if not s.task.writes or s.rows_are_tokens:
        return
    named = [m for m in s.encoder.reserved() if not m.isalnum()]  # without plain words, such as ChatGLM3's `sop`
    if not named:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))
    counts, rows = rows_with(s, pattern)
    if rows:
        words = ", ".join(w for w, _ in counts.most_common(5))
        message = Bilingual(
            f"{len(rows):,} training rows hold {words} in their text",
            f"{len(rows):,} 条训练样本的文本中有 {words}",
        )
        yield Problem(message, s.places(rows), len(rows))
