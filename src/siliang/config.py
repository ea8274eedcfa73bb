"""What a run is made of: the one strict schema behind run.yaml, the flags of `siliang train`, and `siliang config`."""

from __future__ import annotations

import codecs
import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NewType

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from siliang import other_names
from siliang.files import absolute, found_again
from siliang.memory.size import parse_bytes, parse_duration
from siliang.safe_yaml import YamlError, dump_yaml, parse_yaml, read_text
from siliang.secrets import short_repr, shortened
from siliang.terminal import pasted
from siliang.types import ConfigError, TaskType, near, nearest
from siliang.zero_settings import zero_settings

FORMATS = (
    "auto",
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
)


RECORDED = {"recorded": True}  # a validation's context
Bytes = NewType("Bytes", int)  # written as 12GB in run.yaml; once it is parsed, a number


class Section(BaseModel):
    """A part of the config: unknown keys are errors, and values are not guessed into other types."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, strict=True, allow_inf_nan=False
    )


def _is_recorded(info: ValidationInfo) -> bool:
    """The settings stand in a record: what they name may lie elsewhere by now, or nowhere, and is not looked at."""
    return info.context == RECORDED


def _template(value: Any, info: ValidationInfo) -> Any:
    from siliang.data.templates import find_template

    if isinstance(value, str) and not (_is_recorded(info) and value.endswith((".yaml", ".yml"))):
        value = found_again(value)
        find_template(value)
    return value


def _budget(value: Any) -> Any:
    """Parsed once: what comes after the config sees bytes."""
    if value is None or value == "auto":
        return value
    try:
        found = parse_bytes(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ConfigError(f"train.memory_budget: {error}") from None
    if isinstance(found, float) and found.is_integer():  # 4e9
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int) or found <= 0:
        raise ConfigError(
            f"train.memory_budget = {value!r}: write it as 12GB or 800MB (a bare number is bytes), auto, or null."
        )
    return found


def _encoding(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        try:
            known = codecs.lookup(value)
            "a".encode(known.name)
        except (LookupError, UnicodeError, TypeError):
            raise ConfigError(
                f"data.encoding = {value!r} is no encoding of text; auto, utf-8, utf-16, gb18030, big5, cp1252 ... are."
            ) from None
    return value


def _separator(value: Any) -> Any:
    if not isinstance(value, str) or value == "auto":
        return value
    named = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(value, value)
    if len(named) != 1 or named in '"\r\n':
        raise ConfigError(f"data.separator = {value!r}: must be one character, such as ';', or tab, or auto.")
    return named


def _duration(value: Any) -> Any:
    if isinstance(value, str):
        parse_duration(value)
    return value


def as_list(value: Any) -> Any:
    """`a,b` as [a, b], for what is a list of names: so the command line's user writes one."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _name(value: Any) -> Any:
    """A file, a folder, or a name on the hub."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ConfigError("it is an empty name.")
    if any(ord(c) < 32 or c == "\x7f" for c in value):
        # as of "C:\\new", with a line's end for the \\n
        raise ConfigError(
            f"{shortened(value, 200)!r} is a name with a control character in it. In yaml's double quotes a backslash "
            "begins an escape: write a Windows path in single quotes, without quotes, or with forward slashes."
        )
    name = os.path.expanduser(value) if value.startswith("~/") else value  # noqa: PTH111
    return found_again(name)


Name = Annotated[str, BeforeValidator(_name)]
Names = Annotated[list[str], BeforeValidator(as_list)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as numpy takes it


def _on_nan(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"stop|skip [1-9]\d{0,8}", value):
        raise ConfigError(f"train.on_nan = {value!r}: must be `stop`, or `skip` and a number of steps, as in `skip 5`.")
    return value


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
    """What is translated, summarised or asked, for seq_2_seq_lm."""
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

    train: Annotated[str | list[str | Source], BeforeValidator(_name)]
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .txt, .bmes, .bio, .conll), a pattern of files, a folder
    (from Dataset.save_to_disk, or of such files), or a name on the hub (owner/name, owner/name:config); or a list of
    these, each a name or {path, weight}."""
    eval: Annotated[str | list[str | Source] | None, BeforeValidator(_name)] = None
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
    format: Literal[FORMATS] = "auto"  # type: ignore[valid-type]
    """How the rows are laid out. auto: by their columns."""
    columns: Columns = Field(default_factory=Columns)
    """The names of the columns."""
    header: Names | None = None
    """The column names of a csv or tsv file whose first line is data already."""
    encoding: Annotated[str, BeforeValidator(_encoding)] = "auto"
    """The encoding of text files, such as utf-8, gb18030 or utf-16. auto: by the byte order mark, or UTF-8, or gb18030
    where the whole file decodes so and is Chinese, which is said."""
    separator: Annotated[str, BeforeValidator(_separator)] = "auto"
    """What separates the columns of a csv or tsv file: one character, or tab. auto: a comma (in .tsv a tab), or what
    the header line leaves no doubt about, which is said."""
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
    """Processes that tokenise. None: one for small data, all cores for large."""
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


class TrainConfig(Section):
    """How long, how fast and how carefully to train."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps; when given, `epochs` is not looked at."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows that go through the model at once."""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Batches that make one optimiser step, on all devices together: their number changes no result."""
    tokens_at_once: Annotated[int, Field(ge=8)] | None = None
    """Tokens that go through the model at once, beside batch_size: a step's rows are split to it, which changes its
    memory and not its result. None: no limit on a GPU; on a CPU
    4,096 tokens in bf16 and 2,048 in fp32."""
    packing: bool = True
    """Run the model's layers without padding. The results are the same; off by itself where a model cannot do it."""
    group_by_length: bool | None = None
    """A step's rows are of like length, steps in random order: less padding, or fewer sizes of attention. None: on
    for seq_cls and question_ans. Off for tasks with one loss per token, where grouping would give tokens of short rows
    more weight."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. None: the method's own default (`siliang methods`)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.06
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "pure-bf16", "pure-fp16"] = "auto"
    """Number format of the computation. auto: bf16 where the hardware has it, fp16 on older GPUs, fp32 otherwise.
    What is trained stays fp32, but with pure-: docs/precision.md has the bytes of each."""
    memory_budget: Annotated[Bytes | Literal["auto"] | None, BeforeValidator(_budget)] = "auto"
    """Memory that training may take, such as 12GB: as many layers as need to compute their activations again in the
    backward pass instead of keeping them. auto: most of what is free. null: no limit."""
    keep_frozen: bool = True
    """Where the lower layers are frozen (layers_to_transform) and have no dropout, what they say of a row is computed
    in the first epoch and kept, in up to a quarter of the free memory and then of the free disk."""
    gradient_checkpointing: bool = False
    """All layers compute their activations again, fit or not: least memory, about a third more time."""
    seed: Seed = 42
    """Of everything random: data order, held-out rows, new weights, dropout."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two lines of the log."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two evaluations on the held-out rows. None: only at the end."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two checkpoints. None: only when interrupted."""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes between two checkpoints, beside save_every."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept; older ones are deleted, but never the best one where `best` is set."""
    max_time: Annotated[str | None, BeforeValidator(_duration)] = None
    """Wall-clock time that the run may take, such as 8h, 90m or 1:30:00: before it is over the run saves and stops, to
    go on with --resume. Loading counts."""
    best: str | None = None
    """A metric of the held-out rows (loss, accuracy, f1, ...): what is kept at the end are the weights of the step
    where it was best, among the evaluations of eval_every and the last step."""
    on_nan: Annotated[str, BeforeValidator(_on_nan)] = "stop"
    """At a step whose loss or gradient is nan or infinite: stop; or `skip 5`, to leave out up to so many such steps."""
    fit: bool = False
    """Where the run would not fit, split its batches and recompute more, with the same result, instead of stopping.
    With several devices only where the plan says so: a step that they have begun is not begun again."""

    @property
    def saves(self) -> bool:
        """Checkpoints are made while the run goes on."""
        return bool(self.save_every or self.save_every_minutes or self.best)

    @property
    def nan_skips(self) -> int:
        """Steps that may be left out because their loss or gradient is no number."""
        return int(self.on_nan.removeprefix("skip")) if self.on_nan != "stop" else 0

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else parse_duration(self.max_time)


VIRTUAL_TOKENS = 20  # of a prompt whose length is not said, as PEFT's examples and the tutorials have it


class MethodConfig(BaseModel):
    """The method's name, and any field of its PEFT config beside it: {name: lora, r: 16}."""

    model_config = ConfigDict(extra="allow")

    name: str = "lora"
    """One of `siliang methods`; prompt, p-tuning and prefix are understood too."""

    @field_validator("name")
    @classmethod
    def _whole_name(cls, name: str) -> str:
        from siliang.methods import whole_name

        return whole_name(name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields of the method's config that were given, and the prompt's length where none was."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        from siliang.methods import find_method  # torch: only when a config is really checked

        config = find_method(self.name).config
        if config is not None and config.is_prompt_learning and self.model_extra is not None:
            self.model_extra.setdefault("num_virtual_tokens", VIRTUAL_TOKENS)
        fields = {f.name for f in dataclasses.fields(config)} - OWN_FIELDS if config else set()
        for key, value in self.arguments.items():
            if key not in fields:
                hint = name_here(key, value, section="method", fields=fields) or nearest(key, fields)
                allowed = ", ".join(sorted(fields)) or "none"
                raise ConfigError(f"method.{key} is not a setting of {self.name}.{hint} Allowed: {allowed}.")
            if isinstance(value, int) and abs(value) >= 2**31:
                raise ConfigError(f"method.{key} = {shortened(value, 40)}: no such number is of use here.")
            if isinstance(value, str) and key in LISTS and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value):
                assert self.model_extra is not None
                names = as_list(value)
                self.model_extra[key] = [int(n) for n in names] if key == "layers_to_transform" else names
        if config:
            try:
                config(**self.arguments)
            except ConfigError as error:
                raise ConfigError(f"method.{error}") from None
        return self


# Fields of a method's config that may name a folder here.
METHOD_FOLDERS = {"tokenizer_name_or_path"}
# Fields of a PEFT config that are lists of names, which the command line's user writes with commas.
LISTS = {
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
}

# Fields of a PEFT config that the run itself sets.
OWN_FIELDS = {"task_type", "base_model_name_or_path", "inference_mode", "auto_mapping"}


def _method(value: Any) -> Any:
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(name, str) and (said := other_names.METHOD_VALUES.get(other_names.plain(name))):
        raise ConfigError(f"method = {name!r}: here that is {_quoted(said.split())}.")
    return {"name": value} if isinstance(value, str) else value


def _task(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if (said := other_names.TASK_VALUES.get(other_names.plain(value))) is not None:
        raise ConfigError(f"task = {value!r}: here that is `task={said}`.")
    name = value.upper().replace("-", "_")
    return TaskType(name) if name in TaskType.__members__ else name


def _quantization(value: Any) -> Any:
    if value is None or isinstance(value, dict | QuantizationConfig):
        return value
    raise ConfigError(f"quantization = {value!r} is no section.{name_here('quantization', value)}")


class QuantizationConfig(Section):
    """The base model's linear layers in few bits: QLoRA and its kin. Needs bitsandbytes."""

    bits: Literal[4, 8] = 4
    """4 or 8."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of 4 bits: nf4 suits weights, which are nearly normal."""
    double: bool = True
    """Quantise the scales as well: 0.4 bits less a parameter."""
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What a layer's weight becomes to be multiplied. auto: bf16 where the hardware has it, fp16 on older GPUs."""


def _zero_settings(value: Any, info: ValidationInfo) -> Any:
    return value if _is_recorded(info) and isinstance(value, str) else zero_settings(value)


class DistributedConfig(Section):
    """How several devices share a training."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """ddp: every device holds the whole model. fsdp: its weights are dealt out over the devices. auto: ddp where the
    plan says that it fits, fsdp otherwise. deepspeed: its ZeRO; needs DeepSpeed."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] | None = None
    """Of deepspeed. 1: the optimiser's state is dealt out. 2: gradients, too. 3: weights, too. None: what `deepspeed`
    says, otherwise 2."""
    deepspeed: Annotated[dict[str, Any] | None, BeforeValidator(_zero_settings)] = None
    """DeepSpeed's own configuration, a mapping or the name of a .json file, as TrainingArguments(deepspeed=...) takes
    it. What siliang's settings say (batches, clipping, precision, learning rate) is left out or "auto" there."""

    @property
    def stage(self) -> int:
        """Of DeepSpeed's ZeRO; 0 for every other strategy."""
        if self.strategy != "deepspeed":
            return 0
        return self.zero_stage or (self.deepspeed or {}).get("zero_optimization", {}).get("stage", 2)

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's configuration, with the stage."""
        settings = self.deepspeed or {}
        return settings | {"zero_optimization": {**settings.get("zero_optimization", {}), "stage": self.stage}}

    @model_validator(mode="after")
    def _of_deepspeed(self) -> DistributedConfig:
        for name in ("zero_stage", "deepspeed"):
            if getattr(self, name) is not None and self.strategy != "deepspeed":
                raise ConfigError(
                    f"distributed.{name} has no effect with distributed.strategy = {self.strategy}: that has to be "
                    "deepspeed."
                )
        said = (self.deepspeed or {}).get("zero_optimization", {}).get("stage")
        if None not in (self.zero_stage, said) and self.zero_stage != said:
            raise ConfigError(
                f"zero_stage is {self.zero_stage}, but distributed.deepspeed says stage {said}: leave one out."
            )
        return self


class RunConfig(Section):
    """One run."""

    model: Name
    """The base model: a folder, or a name on the hub."""
    revision: str | None = None
    """The base model's revision on the hub."""
    task: Annotated[
        Literal[
            TaskType.CAUSAL_LM,
            TaskType.SEQ_CLS,
            TaskType.TOKEN_CLS,
            TaskType.SEQ_2_SEQ_LM,
            TaskType.QUESTION_ANS,
        ],
        BeforeValidator(_task),
    ]
    """What is learned: causal_lm (text from text), seq_cls (a class for a text), token_cls (a tag for each word),
    seq_2_seq_lm (text from text, by an encoder and a decoder) or question_ans (the answer's place in a context)."""
    method: Annotated[MethodConfig, BeforeValidator(_method)] = Field(default_factory=MethodConfig)
    """What is tuned: a name of `siliang methods`, or {name: lora, r: 16, ...}."""
    adapter: Name | None = None
    """An adapter that is trained further: a run's folder, a checkpoint in it, an adapter folder of siliang's or of
    PEFT's, or a name on the hub. Its weights are the start and its config is the method; of a run, model, task,
    template and labels are taken over where nothing else is said. It is not changed itself."""
    quantization: Annotated[QuantizationConfig | None, BeforeValidator(_quantization)] = None
    """The base model in 4 or 8 bits under the adapter: {bits: 4}. None: as it is."""
    data: DataConfig
    """The data."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training."""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """Several devices."""
    accept: Names = Field(default_factory=list)
    """Findings of `siliang check` that are known and meant, by code, such as SL002: they are shown, and do not stop.
    But for errors of SL023 and SL028, in which the run itself would end."""
    output: Name
    """The run's folder: made by the run, and must not hold anything yet."""

    @model_validator(mode="after")
    def _with_deepspeed(self) -> RunConfig:
        if self.distributed.strategy != "deepspeed":
            return self
        pure = self.train.precision.startswith("pure-")
        reasons = {
            "quantization": self.quantization and "DeepSpeed cannot deal out weights of few bits: use strategy ddp",
            "train.on_nan": self.train.nan_skips
            and "DeepSpeed makes its step before the gradient can be seen: use stop",
            "train.fit": self.train.fit and "a step that DeepSpeed has begun cannot be begun again: leave it off",
            "train.precision": pure and "DeepSpeed keeps its weights in half precision as it is: use bf16 or fp16",
        }
        for name, reason in reasons.items():
            if reason:
                raise ConfigError(f"{name} and distributed.strategy = deepspeed: {reason}.")
        return self

    @classmethod
    def build(cls, values: dict[str, Any], *, source: str = "the settings") -> RunConfig:
        """Checks `values` and fills in the defaults.

        Raises:
            ConfigError: A key is unknown (with the nearest names), missing, or has a value that is not allowed.
        """
        if (strange := _no_text(values)) is not None:
            raise ConfigError(f"{source}: {strange} holds bytes that are not UTF-8: rename it.")
        try:
            return cls.model_validate(_with_adapter(values))
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain(error)}") from None
        except (TypeError, OverflowError, RecursionError) as error:  # of values that no setting could have
            raise ConfigError(f"{source}: a value is of the wrong kind: {error}.") from None

    @classmethod
    def recorded(cls, values: dict[str, Any]) -> RunConfig:
        """The settings of a record, checked as `build` does, without a look at any file that they name.

        Raises:
            ConfigError: A key is unknown or missing, or has a value that is not allowed.
        """
        try:
            return cls.model_validate(values, context=RECORDED)
        except ValidationError as error:
            raise ConfigError(f"config: {_explain(error)}") from None
        except (TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"config: a value is of the wrong kind: {error}.") from None

    def with_strategy(self, strategy: str) -> RunConfig:
        """The same run, by several devices that share its model so."""
        return self.model_copy(update={"distributed": self.distributed.model_copy(update={"strategy": strategy})})

    def resolved(self) -> RunConfig:
        """The same run from any working directory: the names of files and folders that are here are absolute. Names on
        the hub stay names."""
        values = self.model_dump(mode="json")
        data, method = values["data"], values["method"]
        for part in ("train", "eval"):
            if isinstance(data[part], list):
                data[part] = [
                    s | {"path": absolute(s["path"])} if isinstance(s, dict) else absolute(s) for s in data[part]
                ]
            elif data[part] is not None:
                data[part] = absolute(data[part])
        if data["template"].endswith((".yaml", ".yml")):
            data["template"] = absolute(data["template"])
        for name in METHOD_FOLDERS & method.keys():
            method[name] = method[name] and absolute(str(method[name]))
        values["model"] = absolute(self.model)
        values["adapter"] = self.adapter and absolute(self.adapter)
        values["output"] = str(Path(self.output).absolute())
        return RunConfig.build(values)

    def to_yaml(self) -> str:
        """The whole config, defaults included, as run.yaml holds it."""
        return dump_yaml(self.model_dump(mode="json"))


def _with_adapter(values: dict[str, Any]) -> dict[str, Any]:
    """What the adapter that the run starts from says of method, base model and text."""
    name = values.get("adapter")
    if not isinstance(name, str):
        return values
    from siliang.start_adapter import find_start_adapter  # torch: only where there is one

    if not Path(name).exists() and other_names.plain(name) in {*other_names.METHOD_VALUES, "lora"}:
        said = other_names.METHOD_VALUES.get(other_names.plain(name), f"method={other_names.plain(name)}")
        raise ConfigError(f"adapter = {name!r} is no adapter: here that is {_quoted(said.split())}.")
    if (
        values.keys() >= {"model", "task", "method"}
        and not Path(name).expanduser().exists()
        and Path(name).is_absolute()
    ):
        return values  # of a run that began with it and has its own weights by now
    return find_start_adapter(name).filled_in(values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a yaml file.

    Raises:
        ConfigError: The file is missing, is no yaml, goes beyond what settings need, or is no mapping.
    """
    try:
        values = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"There is no settings file {path}.{near_names(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give a settings file.") from None
    except YamlError as error:
        raise ConfigError(f"{error.place(path)}: not readable as yaml: {error}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold settings such as `model: ...`, one a line; `siliang config` lists them.")
    return values


def assign(values: dict[str, Any], assignment: str) -> None:
    """Sets one field by its dotted name: `train.learning_rate=1e-3`; the value is read as yaml.

    Raises:
        ConfigError: It is no assignment.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        hint = name_here(key) if key.strip() else ""
        raise ConfigError(
            f"--set {assignment!r}: write it as section.field=value, such as train.learning_rate=1e-3.{hint}"
        )
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str) and section == "method":
            inner = values["method"] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {assignment!r}: {section} is a single value, not a section.")
        values = inner
    try:
        value = parse_yaml(text)
    except YamlError:
        value = text
    # what is text by its setting is not taken for a number or a date: a commit such as 12e45, a folder called 2024
    values[last] = text.strip() if not isinstance(value, str | list | dict | None) and _is_text(key) else value


def _is_text(key: str) -> bool:
    """Whether the setting of this dotted name is text and nothing else."""
    kind: Any = RunConfig
    for part in key.strip().split("."):
        fields = getattr(kind, "model_fields", {})
        kind = fields[part].annotation if part in fields else None
    return kind is str or {getattr(k, "__origin__", k) for k in getattr(kind, "__args__", ())} == {str, type(None)}


def differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two dumped configs differ, by their dotted names: (what it was, what it is now)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in (*now, *(k for k in was if k not in now)):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {f"{key}.{name}": pair for name, pair in differences(a, b).items()}
        elif a != b:
            found[key] = (a, b)
    return found


def describe(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of every field, in order, for `siliang config`."""
    rows: list[tuple[str, str, str, str]] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            rows += describe(kind, f"{prefix}{name}.")
            continue
        inner = next((k for k in getattr(kind, "__args__", ()) if isinstance(k, type) and issubclass(k, Section)), None)
        if inner is QuantizationConfig:
            rows += [(prefix + name, "mapping | null", "null", info.description or "")]
            rows += describe(inner, f"{prefix}{name}.")
            continue
        if info.is_required():
            default = "(required)"
        else:
            value = info.get_default(call_default_factory=True)  # type: ignore[call-arg]
            default = value.name if isinstance(value, MethodConfig) else other_names.written(value)
        rows.append((prefix + name, _type_name(kind), default, info.description or ""))
    return rows


def _type_name(kind: Any) -> str:
    if isinstance(kind, type):
        return {"MethodConfig": "name or mapping"}.get(kind.__name__, kind.__name__)
    if isinstance(kind, NewType):
        return kind.__name__.lower()
    arguments: tuple[Any, ...] = getattr(kind, "__args__", ())
    if getattr(kind, "__origin__", None) is Literal:
        return " | ".join(str(getattr(a, "value", a)).lower() for a in arguments)
    if getattr(kind, "__origin__", None) is Annotated:
        return _type_name(arguments[0])
    if getattr(kind, "__origin__", None) is list:
        return f"list of {_type_name(arguments[0])}"
    return " | ".join("null" if a is type(None) else _type_name(a) for a in arguments)


NOT_GIVEN: Any = object()
SHELL = re.compile(r"[$`\\;|&<>\x00-\x1f\x7f]")
ALSO = 20  # more of the wrong names that one message mends


def name_here(name: str, value: Any = NOT_GIVEN, *, section: str = "", fields: Iterable[str] | None = None) -> str:
    """What a name that is no setting is here, as a sentence; empty where it is neither one of ours in another section
    nor another tool's.

    Args:
        value: What was to be set.
        section: Where it stood; "" for the top.
        fields: The settings of the method at hand, for a name under `method`.
    """
    row = other_names.find(name) or _own(name)
    if row is None:
        return ""
    note = f" {row.note}" if row.note else ""
    if not row.setting:
        return f" {row.note}"
    field = row.setting.removeprefix("method.")
    if row.setting == f"{section}.{name}" or (fields is not None and field != row.setting and field not in fields):
        return ""
    if value is not NOT_GIVEN and (lacking := row.lacks.get(other_names.written(value).lower())) is not None:
        return f" {other_names.written(value)}: {lacking}"
    found = None if value is NOT_GIVEN else other_names.assignments(row, value)
    if found == []:
        return f" Nothing has to be set for that here: leave it out.{note}"
    if found is not None and _holds(found):
        return f" Here that is {_quoted(found)}.{note}"
    return f" Here that is {row.setting}, as in `{row.setting}={row.example}`.{note}"


def _quoted(assignments: Iterable[str]) -> str:
    """Settings as they may be pasted: what a shell would run or expand is in quotes."""
    return " and ".join(f"`{pasted(a) if SHELL.search(a) else a}`" for a in assignments)


def _own(name: str) -> other_names.Row | None:
    """A setting of ours that stands in another section, or is a field of a method's config."""
    from siliang.methods import METHODS

    name = other_names.plain(name)
    found = [row[0] for row in describe() if row[0].rpartition(".")[2] == name]
    configs = [m.config for m in METHODS.values() if m.config is not None]
    if not found and any(f.name == name for c in configs for f in dataclasses.fields(c) if f.name not in OWN_FIELDS):
        found = [f"method.{name}"]
    return other_names.Row(found[0], (name,), "...") if len(found) == 1 else None


def _holds(assignments: Iterable[str]) -> bool:
    """Whether a run may be set so."""
    for method in ("lora", "prompt_tuning"):
        values: dict[str, Any] = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}
        values["method"] = {"name": method}
        try:
            for assignment in assignments:
                assign(values, assignment)
            RunConfig.build(values)
            return True
        except ConfigError:
            continue
    return False


def near_names(path: Path) -> str:
    """Says which names in its folder look like that of a file or folder which is not there."""
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return ""


def _no_text(value: Any, where: str = "") -> str | None:
    """The first setting that holds bytes which are no text, as the command line's may."""
    if isinstance(value, dict):
        parts = [(f"{where}.{key}".lstrip("."), inner) for key, inner in value.items()]
        return next((found for name, inner in parts if (found := _no_text(inner, name)) is not None), None)
    if isinstance(value, list):
        return next((found for inner in value if (found := _no_text(inner, where)) is not None), None)
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{where} = {value!r}"
    return None


def _explain(error: ValidationError) -> str:
    """The first finding in one line, with what an unknown key is here; unknown keys first, for they may be what is
    missing."""
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = found[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        strange = [e for e in found if e["type"] == "extra_forbidden"]
        also = [f"{'.'.join(map(str, e['loc']))}:{h}" for e in strange[1:] if (h := _unknown(e, guess=False))][:ALSO]
        others = f"\nAlso {' '.join(also).replace(': Here that is', ':')}" if also else ""
        return f"{path} is not a setting.{_unknown(first)} `siliang config` lists them all.{more}{others}"
    if first["type"] == "missing":
        meaning = next((" ".join(row[3].split()) for row in describe() if row[0] == path), "")
        return f"{path} is missing.{more} {meaning}".rstrip()
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        text = str(inner)
        return f"{text if path.split('.')[0] in text else f'{path}: {text}'}{more}"
    shown = short_repr(first["input"], 200)
    hint = _section_for(path, first["input"]) if first["type"] in ("model_type", "dict_type") else ""
    if first["type"] == "list_type":
        hint = f" Write a list: {path}=[a, b]."
    return f"{path} = {shown}: {first['msg'][0].lower()}{first['msg'][1:]}.{hint}{more}"


def _section_for(path: str, value: Any) -> str:
    """What was meant where a section got a value of its own."""
    if path in ("data", "train") and isinstance(value, str) and value:
        return f" Here that is {_quoted([f'data.train={value}'])}."
    return f" {path} is a section: set its fields, as in {path}.field=value."


def _unknown(error: Any, *, guess: bool = True) -> str:
    """What an unknown key is here, or the names near it."""
    *sections, own = (str(part) for part in error["loc"])
    if hint := name_here(own, error["input"], section=".".join(sections)):
        return hint
    if not guess:
        return ""
    names, depth = [row[0] for row in describe()], len(sections)
    siblings = {p[depth] for n in names if len(p := n.split(".")) > depth and p[:depth] == sections}
    if hint := nearest(own, siblings):
        return hint
    alike = near(own, {name.rpartition(".")[2] for name in names})  # in another section
    found = [name for leaf in alike for name in names if name.rpartition(".")[2] == leaf]
    return f" Did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""
