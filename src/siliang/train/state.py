"""What a checkpoint's state may hold: a training takes it only where it is what a training has written."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from siliang.language import Bilingual, local
from siliang.records import Part, StepMetrics, explained
from siliang.records.saved import Count, Number, Positive, Rate
from siliang.secrets import short_repr, shortened
from siliang.types import RecordError

# what an optimizer keeps for each number of a parameter, in the parameter's shape
QUANTIZED = "__bnb_optimizer_quant_state__"  # under which bitsandbytes saves moments of 8 bits
OF_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")


class _Random(Part):
    python: object
    numpy: object
    torch: object
    cuda: list[object]


class _Best(Part):
    step: Count
    value: Number


class _SinceLog(Part):
    loss: Number
    steps: Count


class _Guard(Part):
    runs: dict[Literal["zero loss", "zero gradient", "lost gradient"], Count]
    skipped: list[Count]
    steps: Count


class _Log(Part):
    steps: list[StepMetrics]
    train_s: Positive
    steps_s: Positive
    loss: Number | None
    rate: Rate | None


class _Reference(Part):
    keys: object
    values: object

    @model_validator(mode="after")
    def _rows_of_numbers(self) -> _Reference:
        keys, values = self.keys, self.values
        if not (
            isinstance(keys, Tensor)
            and isinstance(values, Tensor)
            and keys.dtype == torch.uint8
            and keys.ndim == 2
            and len(keys) == len(values)
            and values.dtype == torch.float32
            and values.ndim == min(len(keys), 1) + 1
        ):
            raise ValueError("must be rows of keys and of numbers, as many of the one as of the other")
        return self


class _Stream(Part):
    block: Count
    passes: list[Count]
    rows: list[Count]
    taken: list[Count]
    used: Count


class _State(Part):
    step: Count
    best: _Best | None
    no_better: Count
    optimizer: dict[str, object]
    scheduler: dict[str, object]
    scaler: dict[str, Positive] | None
    random: Annotated[list[_Random], Field(min_length=1)]
    since_log: _SinceLog
    tokens_trained: Count
    guard: _Guard
    evaluation_due: bool
    log: _Log
    stream: _Stream | None
    reference: _Reference | None


def check_state(state: Any, step: int, path: Path) -> None:
    """A checkpoint's state has the parts that a training writes.

    Args:
        step: As the checkpoint's name says.
        path: Its file, for the error.

    Raises:
        RecordError: It has not: which part, and what is allowed.
    """
    try:
        _State.model_validate(state, strict=True)
    except ValidationError as error:
        raise RecordError(
            Bilingual(f"{path} is damaged: {explained(error)}.", f"{path} 已损坏：{local(explained(error), 'zh')}。")
        ) from None
    if state["step"] != step:
        raise RecordError(
            Bilingual(
                f"{path} is damaged: step = {state['step']:,}: its folder says {step:,}.",
                f"{path} 已损坏：step = {state['step']:,}，而文件夹写的是 {step:,}。",
            )
        )
    for i, one in enumerate(state["random"]):
        try:
            random.Random().setstate(one["python"])
            np.random.RandomState().set_state(one["numpy"])
            torch.Generator().set_state(one["torch"])
        except (TypeError, ValueError, RuntimeError, OverflowError, IndexError, AttributeError):
            raise RecordError(
                Bilingual(
                    f"{path} is damaged: random.{i} is not a random state.",
                    f"{path} 已损坏：random.{i} 不是随机数状态。",
                )
            ) from None
        if not all(isinstance(device, Tensor) for device in one["cuda"]):
            raise RecordError(
                Bilingual(
                    f"{path} is damaged: random.{i}.cuda is not a random state.",
                    f"{path} 已损坏：random.{i}.cuda 不是随机数状态。",
                )
            )


def check_optimizer(
    given: Mapping[str, object], fresh: Mapping[str, object], parameters: Iterable[Tensor], path: Path
) -> None:
    """An optimizer's state fits one that has made no step yet.

    Args:
        fresh: Its `state_dict`.
        parameters: What it trains, in the order of its groups.

    Raises:
        RecordError: It does not.
    """
    check_like({"groups": given.get("param_groups")}, {"groups": fresh["param_groups"]}, "optimizer", path)
    shapes, state = [tuple(p.shape) for p in parameters], given.get("state")
    if not isinstance(state, dict) or set(given) != {"state", "param_groups"}:
        raise RecordError(
            Bilingual(f"{path} is damaged: optimizer.state is missing.", f"{path} 已损坏：缺少 optimizer.state。")
        )
    for number, moments in state.items():
        if type(number) is not int or not 0 <= number < len(shapes) or not isinstance(moments, dict):
            raise RecordError(
                Bilingual(
                    f"{path} is damaged: optimizer.state has {short_repr(number)}, which is none of the parameters.",
                    f"{path} 已损坏：optimizer.state 中有 {short_repr(number)}，没有对应的参数。",
                )
            )
        quantized = moments.get(QUANTIZED, {})
        if not isinstance(quantized, dict):
            raise RecordError(
                Bilingual(
                    f"{path} is damaged: optimizer.state.{number}.{QUANTIZED} must be a mapping.",
                    f"{path} 已损坏：optimizer.state.{number}.{QUANTIZED} 应为映射。",
                )
            )
        for name, moment in ({k: v for k, v in moments.items() if k != QUANTIZED} | quantized).items():
            if isinstance(moment, Tensor) and name in OF_PARAMETER:
                fits = tuple(moment.shape) in (shapes[number], ()) and moment.is_floating_point()
            elif isinstance(moment, Tensor):  # rows and columns, blocks, codes of 8 bits
                fits = moment.numel() <= max(math.prod(shapes[number]), 256)
            else:
                fits = name == "step" and type(moment) in (int, float) and math.isfinite(moment)
            if not fits:
                raise RecordError(
                    Bilingual(
                        f"{path} is damaged: optimizer.state.{number}.{shortened(name, 40)} must have the parameter's "
                        f"shape, {shapes[number]}.",
                        f"{path} 已损坏：optimizer.state.{number}.{shortened(name, 40)} 的形状应与参数相同，"
                        f"即 {shapes[number]}。",
                    )
                )


def check_like(given: Any, fresh: object, name: str, path: Path) -> None:
    """A tree of values has the keys, lengths and kinds of another, and its numbers are finite.

    Args:
        name: Of the tree, for the error.

    Raises:
        RecordError: It has others.
    """
    if isinstance(fresh, dict):
        fits = isinstance(given, dict) and given.keys() == fresh.keys()
        inner = [(given[key], value, f"{name}.{key}") for key, value in fresh.items()] if fits else []
    elif isinstance(fresh, list | tuple):
        fits = isinstance(given, list | tuple) and len(given) == len(fresh)
        inner = [(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(given, fresh, strict=True))] if fits else []
    elif isinstance(fresh, bool):
        fits, inner = isinstance(given, bool), []
    elif isinstance(fresh, int | float):
        fits, inner = isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given), []
    elif isinstance(fresh, Tensor):
        fits, inner = isinstance(given, Tensor) and given.shape == fresh.shape, []
    else:
        fits, inner = type(given) is type(fresh) and (fresh is None or given == fresh), []
    if not fits:
        raise RecordError(
            Bilingual(
                f"{path} is damaged: {name} = {short_repr(given)}: must be as this run has it, {short_repr(fresh)}.",
                f"{path} 已损坏：{name} = {short_repr(given)}：应与这次运行一致，即 {short_repr(fresh)}。",
            )
        )
    for a, b, inner_name in inner:
        check_like(a, b, inner_name, path)
