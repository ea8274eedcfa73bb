"""A tag for each word.

Loss: cross-entropy of a head on the first token of each word. Metrics: precision, recall and F1 over whole
spans, and the F1 of each type of span.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from siliang.config import DataConfig
from siliang.data.encode import IGNORED
from siliang.data.entries import Rows, TokenEntry, dropped
from siliang.data.example import Example
from siliang.data.examples import Tagged
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABELS, NUMBERS, DataSpec, Encode, TokenColumn
from siliang.data.words import cut_into_words, join_words
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Verdict
from siliang.tasks.losses import WithLogits, cross_entropy
from siliang.tasks.metrics import ACCURACY, F1, as_iobes, f1_of, spans_of_tags, types_of
from siliang.tasks.related_texts import in_one_line
from siliang.tasks.task import TEXTS_AT_ONCE, HeldOutAnswers, Metric, Reply, Shown, Task, Trained
from siliang.types import TASK_HEADS, DataError, TaskType

if TYPE_CHECKING:  # slow to import
    from siliang.data.batch import Batch
    from siliang.data.tokens import TokenSet


@dataclass(frozen=True)
class TaggedSpan:
    """A span of words with one tag.

    Attributes:
        words: The number of its first word, and of the word behind its last.
    """

    text: str
    tag: str
    words: tuple[int, int]


@dataclass(frozen=True)
class TaggedWords:
    """A text's words, the tag of each, and the spans that these are."""

    text: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    spans: tuple[TaggedSpan, ...]
    probability: None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text."""
        return (self.text,)

    @property
    def predicted(self) -> str:
        """The spans, each with its tag."""
        return in_words(self.spans)

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        spans = [{"text": s.text, "tag": s.tag, "words": list(s.words)} for s in self.spans]
        return {"text": self.text, "words": list(self.words), "tags": list(self.tags), "spans": spans}


def in_words(spans: Iterable[TaggedSpan]) -> str:
    """Spans in one line."""
    return ", ".join(f"{span.text} {span.tag}" for span in spans)


# ---- tokens ----


class TaggedEntry(TokenEntry, total=False):
    """One sentence; `words` are the numbers of the words that carry a tag."""

    words: list[int]


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries."""
    return partial(encode, tokenizer, data, labels)


def encode(tokenizer: Tokenizer, data: DataConfig, labels: list[str], examples: Sequence[Tagged]) -> list[Rows]:
    """Words with tags: the first piece of each word carries its tag, the others and the special tokens none."""
    numbers = {name: i for i, name in enumerate(labels)}
    rows: list[Rows] = []
    for example, (ids, words) in zip(examples, _words(tokenizer, [e.tokens for e in examples]), strict=True):
        tagged: list[int] = []
        for before, word in zip([None, *words], words, strict=False):
            tagged.append(IGNORED if word is None or word == before else numbers[example.tags[word]])
        lost = max(0, len(ids) - data.max_length)
        lost_answer = 0
        if lost and data.too_long == "drop":
            rows.append(dropped(labels=[]))
            continue
        if lost:
            tail = sum(word is None for word in words[words.index(0) :]) if 0 in words else 0
            front = data.max_length - tail  # the closing special tokens stay
            gone = slice(front, len(ids) - tail)
            lost_answer = sum(x != IGNORED for x in tagged[gone])
            del ids[gone], tagged[gone], words[gone]
        read = [word for word, tag in zip(words, tagged, strict=True) if word is not None and tag != IGNORED]
        row: TaggedEntry = {
            "input_ids": ids,
            "labels": tagged,
            "words": read,
            "lost": lost,
            "lost_answer": lost_answer,
        }
        rows.append([row])
    return rows


def _words(tokenizer: Tokenizer, sentences: Sequence[tuple[str, ...]]) -> list[tuple[list[int], list[int | None]]]:
    """(tokens, number of the word of each) of sentences that are cut into words already."""
    if tokenizer.is_fast:
        coded = tokenizer([list(s) for s in sentences], is_split_into_words=True, verbose=False)
        return [(list(coded["input_ids"][i]), list(coded.word_ids(i))) for i in range(len(sentences))]
    out = []
    for sentence in sentences:
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in sentence]
        plain = [token for piece in pieces for token in piece]
        whole = tokenizer.build_inputs_with_special_tokens(plain)
        words: list[int | None] = [n for n, piece in enumerate(pieces) for _ in piece]
        at = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
        out.append((whole, [None] * at + words + [None] * (len(whole) - at - len(plain))))
    return out


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An entry of so many tokens, each with a tag."""
    return {"input_ids": [1] * length, "labels": [0] * length}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """Each token with its tag."""
    return Shown(row["input_ids"], tags=[None if n == IGNORED else labels[n] for n in row["labels"]])


# ---- metrics ----


def read(output: WithLogits, batch: Batch, tokens: TokenSet) -> list[np.ndarray]:
    """Of each row, the number of the most probable tag of each token that has one."""
    numbers = output.logits.argmax(-1).cpu().numpy().astype(np.int32)
    kept = (batch.inputs["labels"] != IGNORED).cpu().numpy()
    return [row[k] for row, k in zip(numbers, kept, strict=True)]


def measure(found: Mapping[int, np.ndarray], rows: EvalRows) -> dict[str, float]:
    """Precision, recall and F1 over spans, the share of correct tags, and the F1 of each type of span."""

    def named(numbers: np.ndarray) -> list[str]:
        return [str(rows.labels[n]) for n in numbers]

    labels = dict(enumerate(rows.tokens.lists("labels")))
    gold = [named(labels[i][labels[i] != IGNORED]) for i in found]
    return spans_of_tags([named(numbers) for numbers in found.values()], gold)


def of_labels(labels: Sequence[str]) -> tuple[Metric, ...]:
    """The F1 of each type of span."""
    return tuple(Metric(f1_of(kind)) for kind in types_of(labels))


def replies(found: Mapping[int, np.ndarray], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The spans of each sentence."""
    numbers = rows.tokens.column("row").tolist()
    for entry, tags in found.items():
        example = rows.examples[numbers[entry]]
        assert isinstance(example, Tagged)
        read = rows.tokens.table[entry]["words"]  # without those that were cut off, or of which no token is left
        words = [example.tokens[word] for word in read]
        predicted = in_words(spans_of(words, [rows.labels[n] for n in tags], example.tokens))
        reference = in_words(spans_of(words, [example.tags[word] for word in read], example.tokens))
        yield numbers[entry], Reply(join_words(example.tokens), reference, predicted, predicted == reference)


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """No span is correct."""
    return "no spans" if final.get("f1") == 0 else None


# ---- use ----


def predict(run: Trained, sentences: Iterable[str | Sequence[str]]) -> Iterator[TaggedWords]:
    """The tag of each word, in order, however long a sentence is: what does not fit into the run's `data.max_length` is
    read in several pieces.

    Args:
        sentences: Words; or a text, which is cut into words at its blanks, and, where a language writes none, into
            characters. Read while they are predicted.
    """
    waiting = iter(sentences)
    while some := list(islice(waiting, TEXTS_AT_ONCE)):
        words = [_words_of(run, s) for s in some]
        for text_or_words, sentence, tags in zip(some, words, _tags(run, words), strict=True):
            text = text_or_words if isinstance(text_or_words, str) else join_words(sentence)
            yield TaggedWords(text, sentence, tags, spans_of(sentence, tags, text_or_words))


def _words_of(run: Trained, sentence: str | Sequence[str] | Example) -> tuple[str, ...]:
    if isinstance(sentence, Example):
        raise DataError(
            Bilingual(
                f"{run.name} tags the words of sentences, and {in_one_line(sentence)!r} is neither a text nor a list "
                "of words.",
                f"{run.name} 给句子中的词加标签，而 {in_one_line(sentence)!r} 既不是文本，也不是词的列表。",
            )
        )
    return cut_into_words(sentence) if isinstance(sentence, str) else tuple(sentence)


def _tags(run: Trained, sentences: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A tag for each word: pieces of a sentence are read until all its words have one."""
    outside = "O" if "O" in run.labels else run.labels[0]
    tags: list[list[str | None]] = [[None] * len(s) for s in sentences]
    # a sentence, and the first word of its piece
    waiting = [(i, 0) for i, sentence in enumerate(sentences) if sentence]
    while waiting:
        pieces = [Tagged(sentences[i][start:], (run.labels[0],) * len(sentences[i][start:])) for i, start in waiting]
        again: list[tuple[int, int]] = []
        pieces_read = [
            (tokens, entry, numbers) for _, tokens, found in run.read(pieces) for entry, numbers in found.items()
        ]
        for (i, start), (tokens, entry, numbers) in zip(waiting, pieces_read, strict=True):
            places = [start + w for w in tokens.table[entry]["words"]]
            begin = 0 if start == 0 else len(places) // 8  # the first words of a later piece lack their left
            for k, (place, number) in enumerate(zip(places, numbers, strict=True)):
                if k >= begin or tags[i][place] is None:
                    tags[i][place] = run.labels[number]
            last = places[-1] if places else start
            if tokens.column("lost")[entry] and last + 1 < len(sentences[i]) and places:
                again.append((i, max(start + 1, last + 1 - len(places) // 4)))
        waiting = again
    # a word of which the tokenizer leaves nothing has no tag
    return [tuple(outside if tag is None else tag for tag in row) for row in tags]


def spans_of(words: Sequence[str], tags: Sequence[str], sentence: str | Sequence[str]) -> tuple[TaggedSpan, ...]:
    """The spans that the words' tags make, as seqeval reads them.

    Args:
        sentence: All its words; or the text that was cut into them, from which the spans are taken unchanged.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    spans: list[TaggedSpan] = []
    places = _places(words, sentence) if isinstance(sentence, str) else []
    for tag, first, last in get_entities([as_iobes(tag) for tag in tags]):
        if isinstance(sentence, str):
            text = sentence[places[first][0] : places[last][1]]
        else:
            text = join_words(words[first : last + 1], sentence)
        spans.append(TaggedSpan(text, tag, (first, last + 1)))
    return tuple(spans)


def _places(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends in the text that was cut into them."""
    found: list[tuple[int, int]] = []
    end = 0
    for word in words:
        begin = text.index(word, end)
        end = begin + len(word)
        found.append((begin, end))
    return found


TOKEN_CLS = Task(
    name=TaskType.TOKEN_CLS,
    adapter_type=TaskType.TOKEN_CLS,
    data=DataSpec(
        name="token_cls",
        layouts=("tokens-tags",),
        columns={
            "input_ids": NUMBERS,
            "labels": LABELS,
            "words": TokenColumn(hidden=True),  # the number of the word of each token that has a tag
        },
        encoder=encoder,
        named="tags",
        label_per_token=True,
    ),
    model=ModelSpec(
        task="token_cls", auto_class="AutoModelForTokenClassification", heads=TASK_HEADS[TaskType.TOKEN_CLS]
    ),
    legend=(
        Bilingual(
            "green: token/tag, bold where the tag is not O; grey: not learned",
            "绿色：词元/标注，非 O 的标注加粗；灰色：不参与学习",
        ),
        Bilingual("token/tag; one without a tag is not learned", "词元/标注；没有标注的不参与学习"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    loss=cross_entropy,
    smooths_labels=True,
    read=read,
    metrics=(F1, Metric("precision"), Metric("recall"), ACCURACY),
    measure=measure,
    libraries=("seqeval.metrics",),
    of_labels=of_labels,
    quality=F1,
    replies=replies,
    verdict=verdict,
    inputs=("tokens",),
    predict=predict,
    blank={"text": "", "words": [], "tags": [], "spans": []},
)
