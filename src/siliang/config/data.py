"""Where the data is, and how its rows become what the model sees."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo

from siliang.config.section import Name, Names, Section, Seed, as_name, is_recorded
from siliang.files import found_again
from siliang.types import ConfigError

LayoutName = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "input-output",
    "text",
    "text-label",
    "sentence-pair",
    "tokens-tags",
    "squad",
    "source-target",
    "prepared",
]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)  # how rows may be laid out; data/formats.py reads each


def _template(value: Any, info: ValidationInfo) -> Any:
    from siliang.data.templates import find_template

    if isinstance(value, str) and not (is_recorded(info) and value.endswith((".yaml", ".yml"))):
        value = found_again(value)
        find_template(value)
    return value


def _encoding(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        try:
            known = codecs.lookup(value)
            "a".encode(known.name)
        except (LookupError, UnicodeError, TypeError):
            raise ConfigError(
                f"data.encoding = {value!r} is not a text encoding. Use auto, utf-8, utf-16, gb18030, big5, cp1252 ..."
            ) from None
    return value


def _separator(value: Any) -> Any:
    if not isinstance(value, str) or value == "auto":
        return value
    named = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(value, value)
    if len(named) != 1 or named in '"\r\n':
        raise ConfigError(f"data.separator = {value!r}: must be one character, such as ';', or tab, or auto.")
    return named


def _as_sources(value: str | list[str | Source]) -> list[Source]:
    values = value if isinstance(value, list) else [value]
    return [Source(path=v) if isinstance(v, str) else v for v in values]


class Columns(Section):
    """The names of the data's columns, where they are not the usual ones."""

    instruction: str = "instruction"
    """What is asked of the model."""
    input: str = "input"
    """What the instruction is about; may be absent or empty."""
    output: str = "output"
    """The answer that is learned."""
    prompt: str = "prompt"
    """What stands in front of a completion."""
    completion: str = "completion"
    """What is learned to follow a prompt."""
    messages: str = "messages"
    """A conversation: a list of {role, content}, or of ShareGPT's {from, value}."""
    system: str = "system"
    """A system message beside the other columns; may be absent or empty."""
    tools: str = "tools"
    """Tools that the model may call, as a list or as JSON text; may be absent or empty."""
    text: str = "text"
    """A text to classify, or, in a causal run, to learn whole."""
    text_pair: str = "text_pair"
    """The second text of a sentence pair."""
    label: str = "label"
    """The class of a text."""
    tokens: str = "tokens"
    """The words (or characters) of a sentence, for token_cls."""
    tags: str = "tags"
    """The tag of each token."""
    source: str = "source"
    """What is translated, summarized or asked, for seq_2_seq_lm."""
    target: str = "target"
    """What is to be written from the source."""
    context: str = "context"
    """The passage that holds the answer, for question_ans."""
    question: str = "question"
    """The question on the context."""
    answers: str = "answers"
    """The answer's text and start: {text: [...], answer_start: [...]}, as in SQuAD."""


class Source(Section):
    """One source of several, and how often its rows are used."""

    path: Name
    """A file, a folder, a pattern such as data/*.jsonl, or a name on the hub."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used in an epoch: 2 for twice, 0.5 for a random half. Held-out rows have no weight."""


class DataConfig(Section):
    """Where the data is and how its rows become what the model sees."""

    train: Annotated[str | list[str | Source], BeforeValidator(as_name)]
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt, .bmes, .bio, .conll), a pattern of files, a folder
    (from Dataset.save_to_disk, or of such files), or a name on the hub (owner/name, owner/name:config); or a list of
    these, each a name or {path, weight}."""
    eval: Annotated[str | list[str | Source] | None, BeforeValidator(as_name)] = None
    """The same, held out. Without it, test_size of the training rows is held out."""
    test_size: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the rows that is held out where `eval` is not given; 0 for none."""
    validation_size: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the training rows that is held out in place of the others, which are then not looked at: for choosing
    settings. None: train on all of them, and evaluate on what `eval` or test_size holds out."""
    seed: Seed | None = None
    """Of the split: with test_size the same rows as Dataset.train_test_split(test_size, seed). None: train.seed."""
    stratify: bool = False
    """Hold out the same share of every class. Off, the split is that of Dataset.train_test_split."""
    format: Literal["auto"] | LayoutName = "auto"
    """How the rows are laid out. auto: by their columns."""
    columns: Columns = Field(default_factory=Columns)
    """The names of the columns."""
    header: Names | None = None
    """The column names of a csv or tsv file whose first line is data already."""
    encoding: Annotated[str, BeforeValidator(_encoding)] = "auto"
    """The encoding of text files, such as utf-8, gb18030 or utf-16. auto: by the byte order mark, or UTF-8, or gb18030
    where the whole file decodes as that and is Chinese; the log tells which."""
    separator: Annotated[str, BeforeValidator(_separator)] = "auto"
    """What separates the columns of a csv or tsv file: one character, or tab. auto: a comma (in .tsv a tab), or what
    the header line shows without doubt; the log tells which."""
    template: Annotated[str, BeforeValidator(_template)] = "human-assistant"
    """How a conversation becomes text: human-assistant, alpaca, llama2, chatml, chatglm3, zephyr, vicuna, plain; chat
    for the tokenizer's own chat template; or a .yaml file of your own."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learned."""
    labels: Names | None = None
    """The classes or tags, in the order of their numbers. Found in the training rows where it is not given."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of a row; of a longer one see too_long."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a target, for seq_2_seq_lm."""
    stride: Annotated[int, Field(ge=0)] = 128
    """Tokens that neighbouring windows of a long context share, for question_ans."""
    too_long: Literal["cut", "drop"] = "cut"
    """A row longer than max_length: cut, or dropped. Cutting takes the oldest rounds of a conversation first, then the
    beginning of the question, then the end of the answer; the end-of-sequence token stays."""
    long_text: Literal["window", "cut"] = "window"
    """A plain text longer than max_length: window, trained whole, in windows that follow on from each other; or cut as
    too_long says. too_long=drop leaves it out either way."""
    add_tokens: Names = Field(default_factory=list)
    """New tokens for the vocabulary; the embeddings grow by them."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes that tokenize. None: one for small data, all cores for large."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, counted and listed, instead of stopping."""

    @property
    def train_sources(self) -> list[Source]:
        """The training data, one source an entry."""
        return _as_sources(self.train)

    @property
    def eval_sources(self) -> list[Source]:
        """The held-out data; empty where a share of the training rows is held out instead."""
        return _as_sources(self.eval or [])
