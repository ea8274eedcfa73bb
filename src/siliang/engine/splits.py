"""Whether the split of an optimizer step into batches changes the result: a method may take a mean over each batch
(`Method.mixes_rows`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from siliang.config import RunConfig
from siliang.language import Bilingual
from siliang.methods import METHODS, method_of
from siliang.peft_api.model import PeftModel


def mixing(model: nn.Module) -> list[str]:
    """What takes a mean over the rows of a batch on a model, by its name."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return [name for config in configs if (name := method_of(config).mixes_rows(config)) is not None]


def mixing_of_run(config: RunConfig) -> list[str]:
    """The same of a run, before its model is loaded."""
    method = METHODS[config.method.name]
    name = method.mixes_rows(method.config(**config.method.arguments)) if method.config is not None else None
    return [] if name is None else [name]


def notes_on_splits(model: nn.Module) -> list[str]:
    """A line for each part of the model's methods that makes the split of a step into batches count."""
    return [
        Bilingual(
            f"{name} takes a mean over each batch: train.batch_size, tokens_at_once, fit and the number of processes "
            "change the result",
            f"{name} 对每个批次取平均：train.batch_size、tokens_at_once、fit 和进程数都会改变结果",
        )
        for name in mixing(model)
    ]


def result_of_a_split(mixing: Sequence[str]) -> Bilingual:
    """What smaller batches do to the result, as a part of a sentence.

    Args:
        mixing: What takes a mean over the rows of a batch.
    """
    if not mixing:
        return Bilingual("the same result", "结果不变")
    name = mixing[0]
    return Bilingual(
        f"another result, for {name} takes a mean over each batch", f"结果会改变，因为 {name} 对每个批次取平均"
    )
