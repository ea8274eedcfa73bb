"""The input of the rules: settings, rows, tokens, and the base model without its weights; each is made on first use."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from siliang.config import RunConfig
from siliang.data.conversations import stop_tokens
from siliang.data.encode import IGNORED, Encoder
from siliang.data.example_set import ExampleSet
from siliang.data.load import Examples
from siliang.data.prepared import PreparedData
from siliang.data.tokens import TokenSet
from siliang.data.vocabulary import fit_embeddings, token_ids
from siliang.hardware import Machine
from siliang.language import Bilingual, local
from siliang.methods import Method, find_method
from siliang.models.base_config import MISFITS, load_config
from siliang.models.invented import mark_invented
from siliang.models.load import find_invented, model_from_config
from siliang.models.positions import Positions
from siliang.peft_api.for_tasks import get_peft_model
from siliang.peft_api.model import PeftModel
from siliang.tasks import settled, task_of
from siliang.tasks.adapter_config import adapter_config
from siliang.tasks.prepare import beginnings_note, prepare_data
from siliang.types import ModelError, first_line

WRITES = ("ForCausalLM", "LMHeadModel")  # the ends of the names of decoders


class CheckInput:
    """A run before its start.

    Attributes:
        data: The data section of the config.
        prepared: The rows and tokens.
    """

    def __init__(self, config: RunConfig, machine: Machine, prepared: PreparedData) -> None:
        self.config, self.machine, self.prepared = config, machine, prepared
        self.data, self.task = config.data, task_of(config)

    @property
    def tokenizer(self) -> Any:
        return self.prepared.tokenizer

    @cached_property
    def examples(self) -> Examples:
        """The rows.

        Raises:
            DataError: As `PreparedData.examples`.
            ConfigError: The task's settings do not fit such rows.
        """
        found = self.prepared.examples
        self.task.on(found.layout)
        return found

    @property
    def train(self) -> TokenSet:
        return self.prepared.train

    @property
    def eval(self) -> TokenSet:
        return self.prepared.eval

    @property
    def skipped(self) -> list[str]:
        """Every skipped row, with its place and the reason."""
        return self.prepared.skipped

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    @cached_property
    def positions(self) -> Positions:
        """The numbers of tokens that the model has positions for."""
        try:
            skeleton = self.skeleton()
        except ModelError:
            return Positions(None, None)
        config = self.method.config
        virtual = (
            self.config.method.arguments.get("num_virtual_tokens", 0) if config and config.is_prompt_learning else 0
        )
        return Positions.of(skeleton, virtual=int(virtual), prefix=config is not None and config.is_prefix)

    @cached_property
    def stops(self) -> list[int]:
        """The tokens that may end an answer."""
        return stop_tokens(self.tokenizer, template=self.data.template, arguments=self.data.template_arguments)

    @cached_property
    def method(self) -> Method:
        return find_method(self.config.method.name)

    @cached_property
    def model_config(self) -> PretrainedConfig:
        return load_config(self.config.model, revision=self.config.revision)

    @cached_property
    def text_config(self) -> PretrainedConfig:
        """The part of the model's config for text."""
        return self.model_config.get_text_config()

    def _config_for_task(self) -> PretrainedConfig:
        config = self.model_config
        if (outputs := self.task.model.columns(self.examples.labels)) is not None:
            config.num_labels = outputs
        return config

    @cached_property
    def invented(self) -> list[str]:
        """The modules whose weights the model's files lack; empty without files."""
        return find_invented(self.config.model, self.task.model, self.examples.labels, revision=self.config.revision)

    def skeleton(self) -> PreTrainedModel:
        """A new base model without weights, for its modules. It has rows for new tokens.

        Raises:
            ModelError: transformers has no model of this kind for the task.
        """
        config = self._config_for_task()
        try:
            with torch.device("meta"):
                model = model_from_config(config, self.task.model)
        except MISFITS as error:
            why = first_line(error, kind=not isinstance(error, ValueError))
            raise ModelError(
                Bilingual(
                    f"{self.config.model} cannot be trained for {self.task.title}: {why}",
                    f"{self.config.model} 无法用于 {self.task.title} 任务的训练：{local(why, 'zh')}",
                )
            ) from None
        if self.data.add_tokens:
            fit_embeddings(model, self.tokenizer, mean=False)
        mark_invented(model, self.invented)
        return model

    def attached(self) -> PeftModel:
        """A new skeleton with the method attached.

        Raises:
            TargetError, ConfigError: It cannot be attached.
        """
        assert self.method.config is not None
        skeleton = self.skeleton()
        with torch.device("meta"):
            added = token_ids(self.tokenizer, self.data.add_tokens)
            return get_peft_model(skeleton, adapter_config(self.config, skeleton, added))

    # ---- for several rules ----

    def places(self, rows: Iterable[int], part: str = "train") -> tuple[str, ...]:
        """The places (file and line) of the first of these examples."""
        examples: ExampleSet = getattr(self.examples, part)
        return tuple(examples.where(int(i)) for i, _ in zip(rows, range(6), strict=False))

    def entries(self, rows: Iterable[int]) -> tuple[str, ...]:
        """The places (file and line) of the first of these entries of `train`."""
        numbers = self.train.column("row")
        return self.places(numbers[int(i)] for i, _ in zip(rows, range(6), strict=False))

    @cached_property
    def notes(self) -> list[str]:
        """What was noticed while the rows were read, and what another order of them would save."""
        note = beginnings_note(self.config, self.prepared) if self._shares_beginnings else None
        return [*self.examples.notes, *([] if note is None else [note])]

    @property
    def _shares_beginnings(self) -> bool:
        """Whether training would compute shared beginnings once, as far as is seen without the model."""
        t, kind = self.config.train, (self.model_config.architectures or [""])[0]
        random = {**self.text_config.to_dict(), **self.config.method.arguments}
        drops = any("drop" in name and isinstance(p, float) and p > 0 for name, p in random.items())
        causal = self.task.decoder_only or (kind.endswith(WRITES) and not self.task.has_encoder)
        return causal and t.packing and t.neftune_alpha is None and not drops

    @cached_property
    def fingerprints(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For train and eval: (hashes of the inputs, hashes of the whole examples)."""
        return {part: _fingerprints(getattr(self.examples, part)) for part in ("train", "eval")}

    @cached_property
    def last_labels(self) -> np.ndarray:
        """The last label of each training entry; -100 if it has none, or if its text continues in the next window."""
        last = np.full(len(self.train), IGNORED, dtype=np.int64)
        for i, labels in enumerate(self.train.lists("labels")):
            learned = labels[labels != IGNORED]
            if len(learned):
                last[i] = learned[-1]
        last[~self.train.last_windows] = IGNORED
        return last

    @property
    def finds_spans(self) -> bool:
        """The task is to find the position of an answer in a context."""
        return "end_positions" in self.task.data.columns

    @property
    def rows_are_tokens(self) -> bool:
        """The rows are tokens already."""
        return self.examples.layout == "prepared"

    @property
    def steps_per_epoch(self) -> int:
        return self.config.train.steps_per_epoch(len(self.train))

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.config.train.steps(len(self.train))


def gather_input(config: RunConfig, machine: Machine | None = None, data: PreparedData | None = None) -> CheckInput:
    """The input of the rules, from a run's config.

    Args:
        data: The run's data, if it has been read, by settings that are settled.
    """
    if data is None:
        config, why = settled(config)
        data = prepare_data(config, why)
    return CheckInput(config, machine or Machine(), data)


def _fingerprints(examples: ExampleSet) -> tuple[np.ndarray, np.ndarray]:
    # with Python's 64-bit hash, different rows have the same hash once in billions of runs
    inputs = np.fromiter((hash((e.task, e.input_text)) for e in examples), dtype=np.int64, count=len(examples))
    whole = np.fromiter((hash(line) for line in examples.lines()), dtype=np.int64, count=len(examples))
    return inputs, whole
