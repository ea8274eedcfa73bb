"""Rules on tokens and labels: what will be learned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from siliang.check.finding import Found
from siliang.check.subject import Subject
from siliang.data.collate import PadCollator
from siliang.data.encode import IGNORED
from siliang.data.examples import texts
from siliang.data.templates import CHAT, find_template

UNKNOWN_SHARE = 0.001
ROLE_WORD = re.compile(r"<\|?[\w ]+\|?>|\[g?MASK\]|\[(?:CLS|SEP)\]")


def rows_without_tokens(s: Subject) -> Iterator[Found]:
    """Rows cannot be made into tokens.

    Cause: The template cannot write them (roles that it has no place for, special tokens that could not be followed),
    nothing of them is learned, or their tokens are no use: fewer than two, most of them unknown to the tokenizer, a
    question that leaves no room for its context, an answer that no window holds.

    Fix: Mend them, or leave them out with data.skip_bad_rows=true. Where it is so with most rows, look at the model's
    tokenizer and at data.template.
    """
    bad = [*s.train.skipped, *s.eval.skipped]
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad):,} rows"
        said = f"{rows}: {'; '.join(bad[:3])}{f'; and {len(bad) - 3:,} more' if len(bad) > 3 else ''}"
        left = "left out, as data.skip_bad_rows says" if s.data.skip_bad_rows else None
        yield Found(said, tuple(bad[:6]), len(bad), left, "warning" if left else None)


def end_not_learned(s: Subject) -> Iterator[Found]:
    """The end of sequence is not learned.

    Cause: An answer must end with one token, the end of sequence, and that token must carry a label; otherwise the
    model never learns to stop and talks on until the length runs out. It gets lost when "</s>" is written as text
    (Llama-2's tokenizer splits it, or joins it to the last word), when truncation cuts it off, and when padding is
    masked by the token's number while the pad token is the end of sequence.

    Fix: Give siliang the text and not tokens: it appends the end by its number and never cuts it. In a preparation of
    your own append tokenizer.eos_token_id to input_ids and labels, cut in front of it, and mask padding by position.
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
    said = f"{len(rows):,} of {len(last):,} rows end their last answer without the end-of-sequence token"
    if masked:
        said += f"; in {masked:,} of them it stands there with its label masked"
    yield Found(said, s.entries(rows), len(rows))


def all_masked(s: Subject) -> Iterator[Found]:
    """A row in which nothing is learned.

    Cause: Every label is masked (-100): the loss of such a row is 0, of a batch of them nan (0 divided by 0). Of
    questions on a context: not one window holds the answer, so the model learns to find none.

    Fix: Look where the labels went: an answer cut off whole, a template that finds no answer, a mask by the wrong
    token, answers that are all empty.
    """
    if s.finds_spans:
        if len(s.train) and not (s.train.column("end_positions") > 0).any():
            yield Found(f"not one of {len(s.train):,} windows holds an answer: there is nothing to find")
        return
    rows = np.flatnonzero(s.train.learned == 0)
    if len(rows):
        every = " (all of them)" if len(rows) == len(s.train) else ""
        yield Found(f"{len(rows):,} of {len(s.train):,} rows carry no label at all{every}", s.entries(rows), len(rows))
    for part, tokens, examples in (("training", s.train, s.examples.train), ("held-out", s.eval, s.examples.eval)):
        if len(examples) and not len(tokens):
            yield Found(f"not one of the {len(examples):,} {part} rows is left (data.too_long=drop)")
    if len(s.eval) and not s.eval.learned.sum():
        yield Found(f"not one of the {len(s.eval):,} held-out rows carries a label: there is nothing to measure")


def nothing_varies(s: Subject) -> Iterator[Found]:
    """There is one thing only to learn.

    Cause: Every token is the same one, or every tag, or no row has an answer: the loss falls to nothing, and what the
    model says afterwards does not hang on what it is asked. So it is where every answer is the same (a warning).

    Fix: Look at the columns (data.columns, data.format), at the labels, and at the model's tokenizer.
    """
    n = len(s.train)
    words = {int(t) for ids in s.train.lists("input_ids") for t in np.unique(ids)} - set(s.tokenizer.all_special_ids)
    if n and len(words) < 2:
        one = repr(s.tokenizer.convert_ids_to_tokens(words.pop())) if words else "none but special ones"
        yield Found(f"the {int(s.train.lengths.sum()):,} tokens of all rows are one and the same, {one}")
    if s.finds_spans and n and not (s.train.column("end_positions") > 0).any():
        yield Found(f"not one of {n:,} windows holds an answer")
    if not s.task.data.label_per_token:
        return
    learned = {int(x) for labels in s.train.lists("labels") for x in np.unique(labels)} - {IGNORED}
    if s.task.data.named == "tags" and n and len(learned) == 1:
        yield Found(f"all tags are {(s.examples.labels or [])[learned.pop()]!r}")
    if not s.task.writes:
        return
    answers = {labels[labels != IGNORED].tobytes() for labels in s.train.lists("labels")}
    if learned and s.task.data.next_token and learned <= set(s.stops):
        yield Found(f"nothing is learned of {n:,} rows but how they end")
    elif len(answers) == 1 and len({ids.tobytes() for ids in s.train.lists("input_ids")}) > 1:
        yield Found(f"all {n:,} rows have the same answer", severity="warning")


def truncated(s: Subject) -> Iterator[Found]:
    """Rows that are cut.

    Cause: They are longer than data.max_length (a target: than data.max_target_length). Of a conversation the oldest
    rounds go first, then the beginning of the question and the end of the answer; of any other text its end goes. The
    special tokens at the end stay. A plain text becomes windows and is not cut, unless data.long_text says so.

    Fix: Raise that length (memory grows with it), or leave such rows out with data.too_long=drop.
    """
    if s.task.data.windows:
        return
    lost, answers = s.train.column("lost"), s.train.column("lost_answer")
    rows = np.flatnonzero(lost > 0)
    if len(rows):
        n = len(s.train)
        said = f"{len(rows):,} of {n:,} rows ({100 * len(rows) / n:.1f}%) are cut to {s.data.max_length} tokens, "
        said += f"{int(lost.sum()):,} tokens are lost"
        if n_answers := int((answers > 0).sum()):
            said += f"; {n_answers:,} lose part of what is learned"
        yield Found(said, s.entries(rows), len(rows))
    if s.train.dropped:
        yield Found(f"{s.train.dropped:,} rows are left out for their length (data.too_long=drop)")


def prompt_learned(s: Subject) -> Iterator[Found]:
    """The question carries labels.

    Cause: Labels stand on every token, the user's words included: the model learns to write questions, and the loss
    of the short answers drowns in theirs.

    Fix: Mask the question with -100. Where the rows are plain text and no questions, leave the labels column out.
    """
    if not s.task.data.next_token or s.examples.layout == "text":
        return
    named = np.array([len(e.labels) > 0 for e in s.examples.train]) if s.rows_are_tokens else None  # type: ignore[union-attr]
    whole = s.train.learned == s.train.lengths
    if named is not None:
        whole = whole & named[s.train.column("row")]
    rows = np.flatnonzero(whole & (s.train.lengths > 1))
    if len(rows):
        yield Found(f"{len(rows):,} of {len(s.train):,} rows have a label on every token", s.entries(rows), len(rows))


def shifted_labels(s: Subject) -> Iterator[Found]:
    """Labels that are shifted already.

    Cause: transformers' models shift the labels themselves: label i belongs to token i. Shifted before, they are
    shifted twice, and the model learns the token after the next.

    Fix: Give labels that are the tokens themselves, or -100.
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
        yield Found(
            f"{len(rows):,} of {len(s.train):,} rows have labels of the token after", s.entries(rows), len(rows)
        )


def template_misfit(s: Subject) -> Iterator[Found]:
    """The template is not this model's.

    Cause: A chat model was trained with one template; another one, with role words that its tokenizer splits in pieces,
    costs tokens and has to be learned anew. A base model knows none, so any will do there.

    Fix: Use data.template=chat where the tokenizer has a chat template; otherwise one whose role words are single
    tokens, or are plain words (human-assistant, alpaca, vicuna).
    """
    if not s.task.data.next_token or s.rows_are_tokens or s.examples.layout == "text":
        return
    template = find_template(s.data.template)
    own = getattr(s.tokenizer, "chat_template", None)
    if template is None:
        return
    fields = (template.begin, template.system, template.user, template.assistant, template.end, template.tool)
    words = dict.fromkeys(w for f in fields for w in ROLE_WORD.findall(f) if "content" not in w and "tool" not in w)
    split = [w for w in words if s.encoder.marker(w) is None]
    if split:
        n = len(s.encoder.text([split[0]])[0])
        yield Found(f"{template.name}: this tokenizer has no token {', '.join(split)}; {split[0]} becomes {n} pieces")
    elif own and s.data.template != CHAT and not any(w in str(own) for w in words):
        yield Found(f"{template.name} is used, while the tokenizer has a chat template of its own")


def unknown_tokens(s: Subject) -> Iterator[Found]:
    """Text that the tokenizer does not know.

    Cause: Characters outside of the vocabulary all become one and the same unknown token: what they said is lost.

    Fix: Use a model whose tokenizer knows the language, or add the missing ones with data.add_tokens.
    """
    unknown = s.tokenizer.unk_token_id
    if unknown is None or unknown in (s.encoder.eos, s.tokenizer.bos_token_id):
        return
    counts = np.array([(ids == unknown).sum() for ids in s.train.lists("input_ids")])
    total = int(s.train.lengths.sum())
    if total and counts.sum() / total > UNKNOWN_SHARE:
        rows = np.flatnonzero(counts)
        strange: Counter[str] = Counter()
        for i in rows[:50]:
            for text in texts(s.examples.train[int(s.train.column("row")[i])]):
                letters = sorted(set(text))
                strange.update(c for c, ids in zip(letters, s.encoder.text(letters), strict=True) if unknown in ids)
        named = f", such as {' '.join(c for c, _ in strange.most_common(8))}" if strange else ""
        share = 100 * counts.sum() / total
        yield Found(
            f"{int(counts.sum()):,} of {total:,} tokens ({share:.2f}%) are unknown{named}", s.entries(rows), len(rows)
        )


def special_words(s: Subject) -> Iterator[Found]:
    """Special tokens in the text of the data.

    Cause: The text holds words that are special tokens of this tokenizer. siliang keeps them text, so nobody can put a
    role or an end into the conversation; a program that tokenises the same text carelessly will not.

    Fix: Nothing, where they are meant as text. Where they are left over from another preparation, remove them.
    """
    if not s.task.writes or s.rows_are_tokens:
        return
    named = [m for m in s.encoder.reserved() if not m.isalnum()]  # a word such as ChatGLM3's `sop` is only a word
    if not named:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))
    counts: Counter[str] = Counter()
    rows = []
    for i, line in enumerate(s.examples.train.lines()):
        if found := pattern.findall(line):
            counts.update(found)
            rows.append(i)
    if rows:
        words = ", ".join(w for w, _ in counts.most_common(5))
        yield Found(f"{len(rows):,} training rows hold {words} in their text", s.places(rows), len(rows))


def padding_learned(s: Subject) -> Iterator[Found]:
    """Padding would be learned, or the end masked with it.

    Cause: Where the pad token is the end of sequence, a mask by the token's number takes the end with it, and no mask
    at all teaches the model to go on ending. siliang masks by position; this rule proves it on a batch of your rows.

    Fix: Report it: this must not happen.
    """
    if not s.task.writes or len(s.train) < 2:
        return
    order = np.argsort(s.train.lengths)
    short, long = s.train[int(order[0])], s.train[int(order[-1])]
    batch = PadCollator(s.tokenizer.pad_token_id)([short, long])
    n = len(short["labels"])
    right = batch["labels"][0, :n].tolist() == short["labels"] and bool((batch["labels"][0, n:] == IGNORED).all())
    if not right or int(batch["attention_mask"][0].sum()) != len(short["input_ids"]):
        yield Found("a padded batch does not carry the labels of its rows")
