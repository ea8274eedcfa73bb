"""The one evaluation: in training, for `siliang eval`, for predictions and comparisons.

Losses are summed, and divided once by the weight of all rows: no metric depends on how rows are batched, or on the
number of processes, except with a method that takes a mean over a batch (`Method.mixes_rows`: LILY). Rows go through
the engine, without padding where possible, in the number format of the caller's `autocast`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from siliang.data.batch import Batch
from siliang.data.prepared import EvalRows
from siliang.data.tokens import TokenSet
from siliang.engine.batches import StepCollator, in_steps
from siliang.engine.order import evaluation_batches
from siliang.engine.step import Engine
from siliang.engine.whole_step import Context, by_entry, loss_of, on, reference_values
from siliang.engine.wide_heads import heads_in_fp32
from siliang.language import Bilingual
from siliang.tasks import EntryValues, Reader, StepLoss, Task
from siliang.types import DataError


@dataclass
class Sums:
    """The sums of an evaluation.

    Attributes:
        loss: Summed over what `weight` counts; NaN if the loss is one of whole steps, which `mean_loss` computes from
            `found`.
        weight: Labelled tokens, or rows if each has one label.
        found: The model's predictions by the entry's number in the token set; empty if only the loss is computed.
    """

    loss: float = 0.0
    weight: int = 0
    found: dict[int, Any] = field(default_factory=dict[int, Any])

    @classmethod
    def of(cls, parts: Iterable[Sums]) -> Sums:
        """Merges the sums of several ranks, in the order of the entries."""
        parts = list(parts)
        found = {entry: prediction for part in parts for entry, prediction in part.found.items()}
        return cls(
            math.fsum(part.loss for part in parts),
            sum(part.weight for part in parts),
            dict(sorted(found.items())),
        )


def evaluate(
    model: nn.Module,
    engine: Engine,
    tokens: TokenSet,
    collator: StepCollator,
    *,
    batches: Iterable[Batch] | None = None,
    reader: Reader | None = None,
    autocast: Context = nullcontext,
) -> Sums:
    """Runs the entries of a token set through a model, and leaves it in eval mode.

    Args:
        model: The module to call: the engine's model, or its wrapper of a distributed strategy.
        collator: Makes the batches.
        batches: Of the entries, a rank's share of them, or with dummies, which add nothing; None for the
            `evaluation_batches` of all of `tokens`.
        reader: Extracts one item per row from the model's output; None to compute only the loss.
        autocast: Returns the context of the computation.

    Returns:
        The sums of these entries. `Sums.of` merges those of several ranks.
    """
    device = next(model.parameters()).device
    model.eval()
    sums, losses = Sums(), list[torch.Tensor]()
    with torch.no_grad(), heads_in_fp32(model, engine.task.model.heads):
        for batch in evaluation_batches(tokens, collator) if batches is None else batches:
            batch = batch.to(device)
            sums.weight += batch.weight
            if (whole := engine.task.step_loss) is not None:
                sums.found |= _values(model, engine, whole, batch, autocast)
                continue
            with autocast(), engine.loss_and_output(model, batch) as (loss, output):
                losses.append(loss)
                if reader is not None and batch.entries:
                    sums.found.update(zip(batch.entries, reader(output, batch, tokens), strict=True))
    if engine.task.step_loss is not None:
        sums.loss = math.nan
    else:
        sums.loss = math.fsum(torch.stack(losses).tolist()) if losses else 0.0
    sums.found = dict(sorted(sums.found.items()))
    return sums


def _values(
    model: nn.Module, engine: Engine, whole: StepLoss, batch: Batch, autocast: Context
) -> dict[int, EntryValues]:
    """The values of each entry for a loss of whole steps, on the CPU."""
    reference = reference_values(engine, whole, model, [batch], autocast)
    with autocast(), engine.values(model, batch) as values:
        return {i: on(kept, torch.device("cpu")) for i, kept in by_entry(batch, values, reference).items()}


def mean_loss(task: Task, sums: Sums, step: int) -> float:
    """The mean loss; NaN without labels.

    Args:
        step: Entries of an optimizer step, for a loss of whole steps.
    """
    if not sums.weight:
        return math.nan
    return sums.loss / sums.weight if task.step_loss is None else _mean_of_steps(task.step_loss, sums.found, step)


def _mean_of_steps(whole: StepLoss, found: Mapping[int, EntryValues], step: int) -> float:
    """The mean loss of a dataset's entries in order, with `step` entries per step."""
    parts = in_steps(sorted(found), step)
    return math.fsum(float(loss_of(whole, {i: found[i] for i in part})) for part in parts) / len(found)


def metrics_of(task: Task, sums: Sums, rows: EvalRows) -> dict[str, float]:
    """The mean loss, and the metrics of the task.

    Raises:
        DataError: No row has a label.
    """
    if not sums.weight:
        raise DataError(
            Bilingual(
                f"nothing can be measured: of {len(rows.tokens):,} rows not one token has a label.\n"
                "The rows need an answer, a target or tags within data.max_length tokens; `siliang check` shows their "
                "labels.",
                f"没有可评估的内容：{len(rows.tokens):,} 条样本中没有一个词元有标签。\n"
                "样本须在 data.max_length 个词元之内含有答案、目标或标注；`siliang check` 会显示标签。",
            )
        )
    found = {"loss": mean_loss(task, sums, rows.step)}
    return found | task.measure(sums.found, rows) if task.measure else found
