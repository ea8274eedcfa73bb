"""Rules on the rows as they were read: nothing here needs tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import numpy as np

from siliang.check.finding import Found
from siliang.check.subject import Subject
from siliang.data.examples import Labelled, Span, Tagged
from siliang.data.formats import misplaced
from siliang.data.labels import alike, joined, no_label, strange
from siliang.data.numbers import as_number, is_whole
from siliang.secrets import shortened

LARGEST_SHARE = 0.8  # of one class, above which a model that says nothing else looks good
LARGEST_RATIO = 10.0
MANY_NUMBERS = 10  # from where on numbers are more often measured than classes
DAMAGE = re.compile("\ufffd|\ufeff|锟斤拷|Ã[\u0080-\u00bf]|â€|\\\\u0000")
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}|\[(?:YOUR|INSERT)[ _][A-Z _]+\]")


def bad_rows(s: Subject) -> Iterator[Found]:
    """Rows cannot be used.

    Cause: A line that cannot be read, a field that is empty or missing, a label that is not one of the classes. They
    are never dropped silently: an empty answer, learned, teaches the model to say nothing.

    Fix: Mend them, or leave them out with data.skip_bad_rows=true.
    """
    bad = s.examples.skipped
    if bad:
        rows = "1 row is bad" if len(bad) == 1 else f"{len(bad)} rows are bad"
        said = f"{rows}: {'; '.join(bad[:3])}{f'; and {len(bad) - 3:,} more' if len(bad) > 3 else ''}"
        left = "left out, as data.skip_bad_rows says" if s.data.skip_bad_rows else None
        yield Found(said, tuple(bad[:6]), len(bad), left, "warning" if left else None)


def duplicates(s: Subject) -> Iterator[Found]:
    """Training rows that are there twice.

    Cause: The same row again is the same lesson again: it weighs twice, and where one copy is held out it makes the
    evaluation look better than it is.

    Fix: Remove the copies, or accept them (accept: [SL002]) where the data is meant to weigh that way.
    """
    _, whole = s.prints["train"]
    _, first, counts = np.unique(whole, return_index=True, return_counts=True)
    extra = len(whole) - len(first)
    weighted = any(source.weight > 1 for source in s.data.train_sources)
    if extra and not weighted:
        copies = np.setdiff1d(np.arange(len(whole)), first)
        most = int(counts.max())
        yield Found(
            f"{extra:,} of {len(whole):,} training rows are copies of others (the most common is there {most} times)",
            s.places(copies),
            extra,
        )


def overlap(s: Subject) -> Iterator[Found]:
    """Held-out rows that are also trained.

    Cause: The model has seen these questions or texts in training, so the evaluation measures its memory.

    Fix: Remove them from one of the two, or remove copies before the split (SL002).
    """
    seen, asked = s.prints["train"][0], s.prints["eval"][0]
    known = np.flatnonzero(np.isin(asked, seen))
    if len(known):
        share = 100 * len(known) / len(asked)
        yield Found(
            f"{len(known):,} of {len(asked):,} held-out rows ({share:.1f}%) have the question or text of a trained one",
            s.places(known, "eval"),
            len(known),
        )


def damaged_text(s: Subject) -> Iterator[Found]:
    """Text that lost its encoding.

    Cause: NUL characters, replacement characters (U+FFFD), byte order marks inside the text, or the marks of UTF-8
    read as Latin-1 (Ã©, â€): the file was once opened in another encoding than its own, and what was there is lost.

    Fix: Get the file again and save it as UTF-8; or remove these rows.
    """
    for part in ("train", "eval"):
        rows = [i for i, line in enumerate(getattr(s.examples, part).lines()) if DAMAGE.search(line)]
        if rows:
            yield Found(f"{len(rows):,} {_part(part)} rows hold damaged characters", s.places(rows, part), len(rows))


def missing_classes(s: Subject) -> Iterator[Found]:
    """A class that training never sees.

    Cause: The training rows do not hold every class: the model cannot learn what it is not shown, and a data.labels
    that does not fit the label column shows itself so too.

    Fix: Look at data.labels and data.columns.label; where the split is to blame, use data.stratify=true.
    """
    names = s.examples.labels
    if names is None:
        return
    counts = _class_counts(s)
    missing = [name for name in names if not counts[name]]
    if len(names) - len(missing) < 2:
        seen = [name for name in names if counts[name]]
        yield Found(f"the training rows have one class only, {', '.join(map(repr, seen))}: nothing to learn")
    elif missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        # a rare tag that a random split took away is a pity; a rare class is an error
        severity = "warning" if s.task.data.named == "tags" else None
        yield Found(
            f"{len(missing)} of {len(names)} classes have no training row: {', '.join(missing[:10])}{more}",
            severity=severity,
        )


def doubtful_labels(s: Subject) -> Iterator[Found]:
    """Labels that are not what they seem.

    Cause: Labels are compared to the letter: "a" and "a " with a blank, "1" and "1.0", "Positive" and "positive" are
    two classes each, which no text tells apart. "nan", "None", and -1 beside 0 and 1 say that there is none,
    numbers with a point are often measurements, and "a,b" beside "a" and "b" is several labels in one.

    Fix: Write each class in one way, and remove rows without one. Where the names are meant as they are, list them in
    data.labels, or accept this finding (accept: [SL020]).
    """
    names = s.examples.labels
    if names is None or s.data.labels is not None:
        return
    counts = _class_counts(s, "train", "eval")
    groups = alike(names)
    if groups:
        shown = [" and ".join(f"{name!r} ({counts[name]:,} rows)" for name in group) for group in groups[:5]]
        more = f"; and {len(groups) - 5} more" if len(groups) > 5 else ""
        yield Found(f"classes that look like one: {'; '.join(shown)}{more}")
    if (none := no_label(names)) is not None:
        yield Found(
            f"{counts[none]:,} rows have the label {none!r} beside numbers from 0: so GLUE and others write that there "
            "is no label",
            fix="Remove these rows; where it is a class, list the classes in data.labels.",
        )
    if s.task.data.named == "label" and (mark := joined(names)):
        shown = shortened(", ".join(repr(name) for name in names if mark in name.strip()), 100)
        yield Found(f"several labels in one, separated by {mark!r}: {shown}; seq_cls learns one class for a text")
    together = {name for group in groups for name in group}
    if odd := [name for name in strange(names) if name not in together]:
        missing = any(name.casefold().strip() in ("nan", "-nan", "<na>", "nat") for name in odd)
        blanks = all(name != name.strip() for name in names if name != "O")  # a blank behind each comma
        severity = None if missing or blanks else "warning"
        shown = ", ".join(f"{name!r} ({counts[name]:,} rows)" for name in odd[:5])
        yield Found(f"labels that may stand for none, or hold what is not seen: {shown}", severity=severity)
    numbers = [name for name in names if as_number(name) is not None]
    pointed = [name for name in numbers if not is_whole(name)]
    measured = len(numbers) == len(names) and (pointed or len(names) > MANY_NUMBERS)
    if s.task.data.named == "label" and measured:
        what = f"numbers with a point ({', '.join(pointed[:3])})" if pointed else f"{len(names)} different numbers"
        yield Found(
            f"the labels are {what}: each is a class of its own; a regression is not learned", severity="warning"
        )


def quoted_cells(s: Subject) -> Iterator[Found]:
    """Cells in double quotes whose quotes are text.

    Cause: In a .tsv file quotes are text unless all of the file can only have been written with quotes around its
    cells: some files have titles in quotes, others were written by a program that quotes.

    Fix: Where the quotes are not meant as text, say data.separator=tab, which reads them as csv does; where they are,
    accept this finding (accept: [SL029]).
    """
    for line in s.examples.doubts:
        yield Found(line)


def texts_not_used(s: Subject) -> Iterator[Found]:
    """A column of text that is not used.

    Cause: The layout of the rows has no place for this column by its name, so the model never sees it: the other half
    of a pair, the passage that a question is about, a system message.

    Fix: Say what it is with data.columns, or accept this finding (accept: [SL036]) where it is not meant to be learned
    from.
    """
    if s.examples.layout in ("prepared", "tokens-tags"):  # which have no place for any text
        return
    for column in s.examples.texts_aside:
        yield Found(
            f"the column {column!r} holds running text, and is not used", fix=_place_of(column, s.examples.columns, s)
        )


def parts_not_used(s: Subject) -> Iterator[Found]:
    """A column that names parts of the data, and is not used.

    Cause: The rows say themselves which of them are for training and which for evaluation; siliang takes parts from
    files and folders, so all of these rows are trained on, or are held out by chance.

    Fix: Write a file for each part, and name them with data.train and data.eval; or accept this finding (accept:
    [SL037]).
    """
    for column, parts in s.examples.parts_aside.items():
        yield Found(f"the column {column!r} says {', '.join(map(repr, parts))}, and is not used to split the rows")


def _place_of(column: str, taken: dict[str, str], s: Subject) -> str:
    """The settings that would use this column, for the layout of the rows."""

    def said(part: str) -> str:
        return f"data.columns.{part}={column}"

    layout = s.examples.layout
    if layout == "text-label":
        how = f"{said('text_pair')} reads both as a pair of texts"
    elif layout == "sentence-pair":
        how = f"{said('text')} or {said('text_pair')} takes it in the place of another"
    elif layout == "squad":
        how = f"{said('context')} takes it in the place of {taken.get('context', 'context')!r}"
    elif layout == "source-target":
        how = f"{said('source')} takes it in the place of {taken.get('source', 'source')!r}"
    elif layout == "text":
        how = (
            f"{said('text')} learns it instead; data.columns.prompt and data.columns.completion learn one after another"
        )
    else:
        places = ["system"] if layout not in ("alpaca", "prompt-completion") else ["input", "system"]
        if "system" in column.lower():
            places = ["system"]
        how = f"{' or '.join(map(said, places))} puts it into what is asked"
    return f"{how}. Where it is not meant to be learned from, accept: [SL036]."


def imbalance(s: Subject) -> Iterator[Found]:
    """One class outweighs the others.

    Cause: A model that always says the largest class is right that often: accuracy says little, and a learning rate
    that is too high or a method that is too weak ends exactly there.

    Fix: Look at f1 and not at accuracy, use data.stratify=true, or weigh the sources (data.train: [{path, weight}]).
    """
    if s.task.data.named != "label" or s.examples.labels is None:
        return
    counts = _class_counts(s)
    n = sum(counts.values())
    (large, most), (small, least) = counts.most_common()[0], counts.most_common()[-1]
    if len(counts) > 1 and (most / n >= LARGEST_SHARE or most / least >= LARGEST_RATIO):
        yield Found(f"{large!r} has {100 * most / n:.1f}% of the training rows, {small!r} {100 * least / n:.1f}%")


def contradictions(s: Subject) -> Iterator[Found]:
    """The same text with different labels.

    Cause: One of the two is wrong, or the classes are not told apart by the text: no model can get both right.

    Fix: Decide for one label.
    """
    if s.task.data.named != "label":
        return
    asked, whole = s.prints["train"]
    pairs = {int(a): int(w) for a, w in zip(asked[::-1], whole[::-1], strict=True)}  # the first of each
    rows = [i for i, (a, w) in enumerate(zip(asked.tolist(), whole.tolist(), strict=True)) if pairs[a] != w]
    if rows:
        yield Found(
            f"{len(rows):,} training rows have another label than the same text before", s.places(rows), len(rows)
        )


def placeholders(s: Subject) -> Iterator[Found]:
    """Placeholders that nobody filled in.

    Cause: Text such as {{name}} is for a program that puts something in its place; the model would learn it as it
    stands.

    Fix: Fill them in before training.
    """
    if not s.task.writes:
        return
    names: Counter[str] = Counter()
    rows: list[int] = []
    for i, line in enumerate(s.examples.train.lines()):
        if found := PLACEHOLDER.findall(line):
            names.update(found)
            rows.append(i)
    if rows:
        named = ", ".join(name for name, _ in names.most_common(3))
        yield Found(f"{len(rows):,} training rows hold placeholders ({named})", s.places(rows), len(rows))


def broken_tags(s: Subject) -> Iterator[Found]:
    """Tags that do not make spans.

    Cause: In BIO a span begins with B-, in BMES and BIOES it ends with E- or is a single S-; an I-, M- or E- that
    follows nothing of its kind is a mistake of the annotation or of its conversion, and the span F1 counts it as a
    span of its own.

    Fix: Mend the tags, or look whether sentences were cut in the middle of a span.
    """
    if s.task.data.named != "tags":
        return
    rows, what = [], ""
    for i, example in enumerate(s.examples.train):
        assert isinstance(example, Tagged)
        if broken := _broken(example.tags):
            what = what or broken
            rows.append(i)
    if rows:
        yield Found(f"{len(rows):,} sentences have tags out of place, such as {what}", s.places(rows), len(rows))


def misplaced_answers(s: Subject) -> Iterator[Found]:
    """An answer that is not where it is said to be.

    Cause: answer_start counts characters of the context; counted in bytes, in words, or in a text that was cleaned
    since, it points elsewhere, and the model learns the wrong words.

    Fix: Count again: context[answer_start:].startswith(text) must hold.
    """
    if not s.finds_spans:
        return
    rows = [i for i, e in enumerate(s.examples.train) if isinstance(e, Span) and misplaced(e)]
    if rows:
        yield Found(
            f"{len(rows):,} training rows have an answer that does not stand at its start", s.places(rows), len(rows)
        )


def nothing_held_out(s: Subject) -> Iterator[Found]:
    """Nothing is held out.

    Cause: Without rows that the model never sees, nobody can tell learning from memory, or when to stop.

    Fix: Give data.eval, or a data.test_size above 0.
    """
    if not len(s.examples.eval):
        yield Found("there is no data.eval, and data.test_size holds nothing out")


def _part(part: str) -> str:
    return "training" if part == "train" else "held-out"


def _class_counts(s: Subject, *parts: str) -> Counter[str]:
    """Rows of each class, in the training rows where no part is named."""
    counts: Counter[str] = Counter()
    for example in chain.from_iterable(getattr(s.examples, part) for part in parts or ("train",)):
        if isinstance(example, Labelled):
            counts[example.label] += 1
        elif isinstance(example, Tagged):
            counts.update(example.tags)
    return counts


def _broken(tags: tuple[str, ...]) -> str:
    """The first tag that cannot stand where it stands, with the one before it; nothing where all is well."""
    ends = any(tag.startswith(("E-", "S-", "M-")) for tag in tags)
    before = "O"
    for tag in (*tags, "O"):
        inside = tag.startswith(("I-", "M-", "E-"))
        follows = before.startswith(("B-", "I-", "M-")) and before[2:] == tag[2:]
        unfinished = ends and before.startswith(("B-", "I-", "M-")) and not (inside and follows)
        if (inside and not follows and "-" in tag) or unfinished:
            return f"{tag} after {before}"
        before = tag
    return ""
