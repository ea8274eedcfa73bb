"""What the rows of each layout are, and which tasks learn from them, for errors: data/ knows no task otherwise."""

from __future__ import annotations

from siliang.language import Bilingual

PAIRS = (Bilingual("better and worse answers", "较好和较差的回答"), ("preference", "reward"))
RANKED = (Bilingual("several answers to a prompt, in an order", "同一提问的多个回答及其排序"), ("preference", "reward"))
RATED = (Bilingual("answers marked as good or bad", "标为好或坏的回答"), ("preference with preference.loss=kto",))
TALKS = (Bilingual("conversations", "对话"), ("causal_lm",))
ANSWERS = (Bilingual("instructions and answers", "指令和回答"), ("causal_lm", "seq_2_seq_lm"))
RELATED = ("embedding", "reranker")
IN_WORDS: dict[str, tuple[Bilingual, tuple[str, ...]]] = {
    "chosen-rejected": PAIRS,
    "messages-rejected": PAIRS,
    "rejected-messages": PAIRS,
    "responses": RANKED,
    "output-list": RANKED,
    "rated-answer": RATED,
    "rated-messages": RATED,
    "messages": TALKS,
    "sharegpt": TALKS,
    "alpaca": ANSWERS,
    "prompt-completion": ANSWERS,
    "input-output": ANSWERS,
    "text": (Bilingual("plain texts", "纯文本"), ("causal_lm",)),
    "prepared": (Bilingual("tokens", "词元"), ("causal_lm",)),
    "text-label": (Bilingual("texts and their classes", "文本和类别"), ("seq_cls", "embedding")),
    "sentence-pair": (Bilingual("pairs of texts and their classes", "句对和类别"), ("seq_cls",)),
    "tokens-tags": (Bilingual("words and their tags", "词和标注"), ("token_cls",)),
    "squad": (Bilingual("questions on a context", "针对段落的问题"), ("question_ans",)),
    "scored-pair": (Bilingual("pairs of texts and their scores", "句对和分数"), RELATED),
    "anchor-positive": (Bilingual("texts that belong together", "相互对应的文本"), RELATED),
    "scored-messages": (Bilingual("pairs of texts and their scores, as messages", "消息形式的句对和分数"), RELATED),
    "positive-messages": (Bilingual("texts that belong together, as messages", "消息形式的相互对应的文本"), RELATED),
    "source-target": (Bilingual("sources and targets", "源文本和目标文本"), ("seq_2_seq_lm",)),
}


def in_words(layout: str) -> tuple[Bilingual, Bilingual]:
    """What a row is, and the tasks that learn from it."""
    holds, tasks = IN_WORDS[layout]
    named = [f"task={task}" for task in tasks]
    return holds, Bilingual(" or ".join(named), " 或 ".join(named))
