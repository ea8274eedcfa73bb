"""Conversations and texts to tokens and labels: what is learned of them, and how they are cut to length."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress

from siliang.config import DataConfig
from siliang.data.chat import ChatTemplate, Written
from siliang.data.encode import IGNORED, Encoder
from siliang.data.entries import Rows, TokenEntry, dropped, token_labels
from siliang.data.example import Example
from siliang.data.examples import Prepared, Text
from siliang.data.jinja import Arguments, need_no_template
from siliang.data.messages import Conversation, Message
from siliang.data.templates import Piece, find_template, template_for
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.types import DataError


def writer(name: str, encoder: Encoder, arguments: Arguments | None = None) -> ChatTemplate:
    """The template of that name, ready to write pieces.

    Args:
        arguments: Values of the template's variables.

    Raises:
        ConfigError: There is no such template, or it has no such variable.
        DataError: It is `chat`, and the tokenizer has none.
    """
    name = template_for(name, getattr(encoder.tokenizer, "chat_template", None))
    return ChatTemplate(encoder, find_template(name), arguments)


def prompt_tokens(
    question: str | Conversation,
    tokenizer: Tokenizer,
    *,
    template: str,
    input: str = "",
    arguments: Arguments | None = None,
) -> list[int]:
    """The tokens in front of the assistant's next answer: in training without label, in generation the input."""
    talk = Conversation((Message("user", question, input),)) if isinstance(question, str) else question
    encoder = Encoder(tokenizer)
    write = writer(template, encoder, arguments)
    return encoder.prompt(write.prompt(talk), own_spacing=write.own_spacing)


def stop_tokens(tokenizer: Tokenizer, *, template: str, arguments: Arguments | None = None) -> list[int]:
    """The tokens that end an answer in this template, and the tokenizer's own end of sequence.

    Raises:
        DataError: The template refuses conversations of two rounds and of one, with a system message and without.
    """
    encoder = Encoder(tokenizer)
    write = writer(template, encoder, arguments)
    ends: list[int] = []
    for _, labels in encoder.rows([entry.pieces for entry in _with_answers(write)], own_spacing=write.own_spacing):
        ends += [a for a, b in zip(labels, [*labels[1:], IGNORED], strict=True) if a != IGNORED and b == IGNORED]
    return list(dict.fromkeys([ends[-1], *ends, encoder.need_eos()]))


def _with_answers(write: ChatTemplate) -> list[Written]:
    """The entries of a conversation that the template takes: some want a system message, or one round."""
    # ChatGLM3's answers end with the token of the next role, and only the last one with </s>
    rounds = (Message("user", "a"), Message("assistant", "a")) * 2
    system = (Message("system", "a"),)
    for talk in (rounds, system + rounds, rounds[:2]):
        with suppress(DataError):
            return write.entries([Conversation(talk)])[0]
    return write.entries([Conversation(system + rounds[:2])])[0]


def served_ends(tokenizer: Tokenizer, data: DataConfig, layouts: Collection[str]) -> list[int]:
    """The tokens at which a program that serves the trained model stops; none where no answers were learned, or where
    the template refuses such conversations as `stop_tokens` tries.

    Args:
        layouts: Of the rows of the training.
    """
    if need_no_template(layouts):
        return []
    try:
        return stop_tokens(tokenizer, template=data.template, arguments=data.template_arguments)
    except DataError:  # a trained model is saved all the same
        return []


def encode(
    encoder: Encoder, write: ChatTemplate, data: DataConfig, examples: Sequence[Example], *, split: bool = True
) -> list[Rows]:
    """Texts, conversations and prepared rows, each as one entry, or several: windows of a long text, or answers that
    the template writes otherwise when they are no longer the last (`ChatTemplate.entries`). See `tokens.tokenize`."""
    written = _write([e for e in examples if not isinstance(e, Prepared)], write, data, split=split)
    pieces = [entry.pieces for entries in written for entry in entries]
    encoded, sizes = iter(encoder.rows(pieces, own_spacing=write.own_spacing)), map(encoder.learned_bytes, pieces)
    parts = iter(written)
    rows: list[Rows] = []
    for example in examples:
        if isinstance(example, Prepared):
            ids, labels = list(example.input_ids), list(example.labels or example.input_ids)
            rows.append(_fitted(example, ids, labels, None, encoder, write, data))
            continue
        made: list[TokenEntry] = []
        for entry in next(parts):
            part = entry.of(example) if isinstance(example, Conversation) else example
            made += _fitted(part, *next(encoded), next(sizes), encoder, write, data)
        rows.append([entry for entry in made if "row" not in entry] or made[:1])  # those that are not left out
    return rows


def _fitted(
    example: Example,
    ids: list[int],
    labels: list[int],
    nbytes: int | None,
    encoder: Encoder,
    write: ChatTemplate,
    data: DataConfig,
) -> list[TokenEntry]:
    """An entry of at most max_length tokens; several of a long text; or that it is left out.

    Args:
        nbytes: Of the text that is learned; None where it is not known.
    """
    whole = isinstance(example, Text) or (isinstance(example, Prepared) and labels == ids)
    made: list[TokenEntry]
    if len(ids) <= data.max_length:
        made = [{"input_ids": ids, "labels": labels}]
    elif data.too_long == "drop":
        return dropped(labels=[])
    elif whole and data.long_text == "window":
        made = windows(ids, data.max_length, shared_tokens(data))
    elif isinstance(example, Prepared):
        over, lost = len(ids) - data.max_length, sum(x != IGNORED for x in labels[data.max_length :])
        ids, cut = ids[: data.max_length], labels[: data.max_length]
        made = [{"input_ids": ids, "labels": cut, "lost": over, "lost_answer": lost}]
    else:
        made = [_shorten(example, ids, labels, encoder, write, data)]
    for entry in made:
        entry["bytes"], entry["turn"], entry["whole_answer"] = 0, -1, []
    made[0]["bytes"] = _predicted_bytes(encoder, nbytes, labels, made)
    _note_answer(example, ids, labels, made[-1])
    return made


def _note_answer(example: Example, ids: list[int], labels: list[int], entry: TokenEntry) -> None:
    """Notes in an entry which answer its last one is, and the whole of it where it was cut.

    Args:
        ids: Before the entry was cut, as `labels`.
    """
    if not isinstance(example, Conversation):
        return
    turns = (i for i, m in enumerate(example.messages) if m.role == "assistant" and m.trained)
    entry["turn"] = max(turns, default=-1)
    first, last = last_answer(labels)
    kept = token_labels(entry)
    if labels[first:last] != kept[slice(*last_answer(kept))]:
        entry["whole_answer"] = ids[first:last]


def last_answer(labels: Sequence[int]) -> tuple[int, int]:
    """(begin, end) of the last stretch of learned tokens; equal where there is none."""
    last = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORED), 0)
    return next((i for i in range(last, 0, -1) if labels[i - 1] == IGNORED), 0), last


def shared_tokens(data: DataConfig) -> int:
    """The tokens that neighbouring windows of a text share: one at the least, from which the next is learned."""
    return min(max(data.stride or 0, 1), data.max_length // 2)


def windows(ids: list[int], limit: int, shared: int = 1) -> list[TokenEntry]:
    """A text in windows of at most `limit` tokens, which follow on from each other.

    Each but the first begins with the last `shared` tokens of the one before, without labels there, so that every token
    is learned once, the first new one of a window from the one in front of it.
    """
    rows: list[TokenEntry] = [{"input_ids": ids[:limit], "labels": ids[:limit]}]
    for start in range(limit, len(ids), limit - shared):
        part = ids[start - shared : start - shared + limit]
        rows.append({"input_ids": part, "labels": [IGNORED] * shared + part[shared:]})
    return rows


def _predicted_bytes(encoder: Encoder, whole: int | None, labels: list[int], entries: Rows) -> int:
    """The UTF-8 bytes of the text whose tokens are predicted in these entries of an example: what is learned, without a
    first token that has nothing in front of it, and without what was cut off.

    Args:
        whole: The bytes of all that is learned; None for tokens whose text is not known.
        labels: Of the example before it was cut.
    """
    learned = [x for x in labels if x != IGNORED]
    kept = [x for entry in entries for x in token_labels(entry)[1:] if x != IGNORED]
    if whole is None:
        return encoder.decoded_bytes(kept)
    if len(kept) == len(learned):
        return whole
    if len(kept) == len(learned) - 1 and labels[0] != IGNORED:
        return max(0, whole - encoder.decoded_bytes(labels[:1]))
    decoded = encoder.decoded_bytes(learned)  # a vocabulary of words has lost the spaces, in both alike
    return round(whole * encoder.decoded_bytes(kept) / decoded) if decoded else 0


def _write(examples: Sequence[Example], write: ChatTemplate, data: DataConfig, *, split: bool) -> list[list[Written]]:
    """The entries of texts and conversations."""
    talks = [e for e in examples if isinstance(e, Conversation)]
    for talk in talks:
        answers = (m for m in reversed(talk.messages) if m.role == "assistant")
        if data.train_on == "last" and not next(answers).trained:
            raise DataError(
                Bilingual(
                    "marks its last answer as one that is not learned, and data.train_on=last learns only that",
                    "的最后一个答案标为不学习，而 data.train_on=last 只学习它",
                )
            )
    written = iter(write.entries(talks, train_on=data.train_on, split=split))
    return [[Written(_plain(e))] if isinstance(e, Text) else next(written) for e in examples]


def _plain(text: Text) -> list[Piece]:
    whole = {"trained": True}
    return [Piece("{start}", **whole), Piece(text.text, data=True, **whole), Piece("{eos}", end=True, **whole)]


def _shorten(
    example: Example,
    ids: list[int],
    labels: list[int],
    encoder: Encoder,
    write: ChatTemplate,
    data: DataConfig,
) -> TokenEntry:
    """A row of at most max_length tokens; see `tokenize` for what goes first."""
    before, learned = len(ids), sum(x != IGNORED for x in labels)
    while len(ids) > data.max_length and isinstance(example, Conversation):
        shorter = _without_oldest_round(example)
        if shorter is None:
            break
        example = shorter
        ((entry,),) = write.entries([example], train_on=data.train_on, split=False)
        ((ids, labels),) = encoder.rows([entry.pieces], own_spacing=write.own_spacing)
    ids, labels = cut_row(ids, labels, data.max_length, len(encoder.start))
    lost = learned - sum(x != IGNORED for x in labels)
    return {"input_ids": ids, "labels": labels, "lost": before - len(ids), "lost_answer": lost}


def _without_oldest_round(talk: Conversation) -> Conversation | None:
    users = [i for i, m in enumerate(talk.messages) if m.role == "user"]
    if len(users) < 2:
        return None
    system = tuple(m for m in talk.messages[: users[0]] if m.role == "system")
    return Conversation((*system, *talk.messages[users[1] :]), talk.tools)


def cut_row(ids: list[int], labels: list[int], limit: int, keep: int = 0) -> tuple[list[int], list[int]]:
    """One question and its answer in at most `limit` tokens.

    The last learned token (the end of sequence) stays; the answer gets at least half of the room, the question loses
    its beginning behind the first `keep` tokens, and what follows the last answer goes.

    Returns:
        (input_ids, labels)
    """
    if len(ids) <= limit:
        return ids, labels
    learned = [i for i, x in enumerate(labels) if x != IGNORED]
    if not learned:
        return ids[:limit], labels[:limit]
    first, last = learned[0], learned[-1] + 1
    prompt, answer, answer_labels = first, ids[first:last], labels[first:last]
    room = max(limit - prompt, min(len(answer), limit // 2))
    if len(answer) > room:
        answer, answer_labels = answer[: room - 1] + answer[-1:], answer_labels[: room - 1] + answer_labels[-1:]
    front = limit - len(answer)
    head = min(keep, prompt, front)
    kept = ids[:head] + ids[prompt - (front - head) : prompt] if front < prompt else ids[:prompt]
    return kept + answer, [IGNORED] * len(kept) + answer_labels
