"""What a task asks of the data, as data/ takes it: a value of plain fields and functions.

The rows of the table in `tasks/__init__.py` hold one each. `data/` knows no task by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from siliang.config import DataConfig
from siliang.data.entries import Rows
from siliang.data.example import Example
from siliang.data.label_cells import LabelReader, one_label
from siliang.models.tokenizer import Tokenizer

Encode = Callable[[Sequence[Any]], Sequence[Rows]]  # for each example, of the task's kind, its entries


@dataclass(frozen=True)
class TokenColumn:
    """A column of the table of tokens.

    Attributes:
        many: An entry has a list of numbers there; otherwise one number.
        kind: What a number is.
        hidden: The batch does not hold it: it is for the function that reads the model's output.
        target: The columns to learn: the model is called without them, so that it computes no loss.
    """

    many: bool = True
    kind: Literal["int32", "float32"] = "int32"
    hidden: bool = False
    target: bool = False


NUMBERS = TokenColumn()
LABEL, LABELS = TokenColumn(many=False, target=True), TokenColumn(target=True)


@dataclass(frozen=True)
class DataSpec:
    """What a task makes of rows.

    Attributes:
        name: The task's, as users write it.
        layouts: Names of `layouts.LAYOUTS` that the task can be trained on; the first that fits is taken.
        columns: Of the table of tokens, `input_ids` among them. `row`, `lost`, `lost_answer`, and, where an entry is
            several sequences, `sequences` come by themselves.
        encoder: Makes, from (tokenizer, settings, names of the labels), the function that turns examples into entries.
            It is a function or an object of a module, by whose file tokens that were kept are known to be of this code.
        encoded_with: What the encoder takes besides these, in words: tokens that were kept are known by it, too.
        named: The part of a row that holds the names of classes: one `label`, or `tags`. None: labels have no names.
        label_per_token: Each token has a label, or none (-100), in `labels`; otherwise each entry has one label.
        next_token: A label is the token itself, and is learned from the tokens in front of it.
        windows: A text that is too long always becomes several entries.
        sequences: An entry is several sequences that stay in one batch, such as a chosen and a rejected answer: one
            behind the other in `input_ids`, their lengths in the column `sequences`.
        templated: Conversations are written in a template (`data.template`).
        neighbours: The entries of an example depend on examples near it: one process encodes them, some at a time.
        one_layout: Sources of different layouts cannot be mixed.
        adapt: Turns the example that a layout gives into this task's kind, or says what is wrong with it.
        read_label: How the label of a row is read.
        several: A row may have several labels, or none.
        ordered: The labels are in an order.
    """

    name: str
    layouts: tuple[str, ...]
    columns: Mapping[str, TokenColumn]
    encoder: Callable[[Tokenizer, DataConfig, list[str]], Encode]
    named: Literal["label", "tags"] | None = None
    label_per_token: bool = False
    next_token: bool = False
    windows: bool = False
    sequences: bool = False
    templated: bool = False
    neighbours: bool = False
    one_layout: bool = False
    adapt: Callable[[Example], Example | str] | None = None
    encoded_with: str = ""
    read_label: LabelReader = one_label
    several: bool = False
    ordered: bool = False

    @property
    def table(self) -> dict[str, TokenColumn]:
        """The columns of the table, with that of the sequences."""
        return {**self.columns, **({"sequences": NUMBERS} if self.sequences else {})}

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns of what is learned."""
        return tuple(name for name, column in self.columns.items() if column.target)
