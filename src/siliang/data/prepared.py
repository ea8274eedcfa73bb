"""The data of a run, ready for check, plan and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from siliang.config import DataConfig
from siliang.data.example import Example
from siliang.data.example_set import ExampleSet, named_bad_rows
from siliang.data.examples import Span
from siliang.data.jinja import need_no_template
from siliang.data.spec import DataSpec
from siliang.data.templates import AUTO, CHAT, template_for
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.types import DataError

if TYPE_CHECKING:  # slow to import
    from siliang.data.load import Examples
    from siliang.data.stream import TokenStream
    from siliang.data.tokens import TokenSet


class PreparedData:
    """Tokenizer, rows and tokens of a run, each read or computed on first use.

    Rows that cannot be used do not stop: they are left out, and named in `skipped`. `siliang check` shows them all, and
    a training stops at them.

    Attributes:
        settings: The data section of the run's config.
        spec: What the task asks of the data.
    """

    def __init__(
        self, settings: DataConfig, spec: DataSpec, *, model: str, revision: str | None, seed: int, note: str = ""
    ) -> None:
        """
        Args:
            model: The base model, whose tokenizer is used.
            seed: The seed of the split, if the settings of the data have none.
            note: A first note on how the data is read.
        """
        self.settings, self.spec = settings, spec
        self._model, self._revision, self._seed, self._note = model, revision, seed, note

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base model's, with the tokens that the settings add.

        Raises:
            ModelError: It cannot be loaded.
        """
        from siliang.data.vocabulary import grow_vocabulary
        from siliang.models.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(self._model, revision=self._revision)
        grow_vocabulary(tokenizer, self.settings.add_tokens)
        return tokenizer

    @cached_property
    def examples(self) -> Examples:
        """The rows before tokens, those to train on and those held out. When the tokens of a part are there, it is
        without the rows that no tokens could be made of.

        Raises:
            DataError: The data cannot be read, or not one row can be used.
        """
        from siliang.data.load import load_examples

        found = load_examples(self.settings, self.spec, seed=self._seed, keep_going=True)
        found.notes = [self._note, *found.notes] if self._note else found.notes
        return found

    @cached_property
    def train(self) -> TokenSet:
        """The tokens to train on.

        Raises:
            DataError: Not one row can be made into tokens.
        """
        self.examples.train, tokens = self._tokens(self.examples.train)
        if not len(tokens) and tokens.skipped:
            source = self.settings.train_sources[0].path
            rows = named_bad_rows(tokens.skipped)
            raise DataError(
                Bilingual(f"{source}: not one row can be used. {rows}", f"{source}：没有一条样本可用。{rows.zh}")
            )
        return tokens

    @cached_property
    def eval(self) -> TokenSet:
        """The tokens held out."""
        self.examples.eval, tokens = self._tokens(self.examples.eval)
        return tokens

    def stream(self, step: int) -> TokenStream | None:
        """The training rows as a stream; None where they are all there.

        Args:
            step: Entries of an optimizer step.
        """
        from siliang.data.stream import TokenStream

        if (shares := self.examples.shares) is None:
            return None
        return TokenStream(self.settings, self.spec, self.tokenizer, shares, labels=self.labels, step=step)

    def _tokens(self, examples: ExampleSet) -> tuple[ExampleSet, TokenSet]:
        """The examples whose tokens can be used, and these."""
        from siliang.data.tokens import tokenize, usable

        labels = self.examples.labels
        tokens = tokenize(examples, self.tokenizer, self.settings, self.spec, labels=labels, keep_going=True)
        return usable(examples, tokens)

    @property
    def labels(self) -> list[str] | None:
        """The names of classes or tags, by number; None where the task has none."""
        return self.examples.labels

    @property
    def skipped(self) -> list[str]:
        """Every row that is left out, with place and reason."""
        return [*self.examples.skipped, *self.train.skipped, *self.eval.skipped]

    @property
    def unanswered(self) -> bool:
        """Some training questions have no answer in their context."""
        return has_unanswered(self.examples.train)

    @property
    def template(self) -> str | None:
        """The name of the template that is used, which `auto` does not say; None where the task uses none."""
        if not self.spec.templated:
            return None
        return template_for(self.settings.template, getattr(self.tokenizer, "chat_template", None))

    @property
    def template_in_words(self) -> Bilingual | None:
        """Which template is used, and why; None where the rows need none."""
        name = self.template
        if name is None or need_no_template(self.examples.layouts):
            return None
        given = ", ".join(f"{key}={value}" for key, value in self.settings.template_arguments.items())
        own = name == CHAT
        called = (
            Bilingual("the tokenizer's own chat template", "分词器自带的对话模板") if own else Bilingual(name, name)
        )
        why = Bilingual("", "")
        if self.settings.template == AUTO and not own:
            why = Bilingual("; the tokenizer has no chat template of its own", "；分词器没有自带的对话模板")
        with_given = f" ({given})" if given else ""
        return Bilingual(f"{called}{with_given}{why}", f"{called.zh}{with_given}{why.zh}")

    @property
    def in_windows(self) -> bool:
        """There are texts of which a longer one becomes several entries."""
        return "text" in self.examples.layouts and self.settings.long_text == "window"


@dataclass(frozen=True)
class EvalRows:
    """Rows that a model is measured on.

    Attributes:
        tokens: Their entries; several of one example, or none.
        examples: The rows before tokens.
        labels: The names of classes or tags, by number.
        unanswered: A question may have no answer in its context.
        step: Rows of an optimizer step, over which a loss of whole steps is formed.
        skipped: Every row that is left out because it cannot be used, with its place and the reason.
    """

    tokens: TokenSet
    examples: Sequence[Example]
    labels: list[str] = field(default_factory=list[str])
    unanswered: bool = False
    step: int = 1
    skipped: list[str] = field(default_factory=list[str])


def has_unanswered(examples: Sequence[Example]) -> bool:
    """Whether some question has no answer in its context; False for rows that are not questions."""
    if not len(examples) or not isinstance(examples[0], Span):
        return False
    return any(isinstance(example, Span) and not example.answers for example in examples)
