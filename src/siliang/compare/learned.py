"""Whether one run has learned anything, as a comparison says it of each of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress

import torch

from siliang.compare.answers import collect, sample
from siliang.compare.verdict import Verdict, learned_nothing
from siliang.data.collate import PadCollator
from siliang.data.encode import IGNORED
from siliang.peft_model import PeftModel
from siliang.train.run import Run
from siliang.types import TaskType

ROWS = 32  # held-out rows on which a model that writes is measured beside its base


def what_is_wrong(run: Run) -> Verdict | None:
    """Why a run whose model is still there has learned nothing; None where it has, or where it cannot be checked:
    without held-out rows, on several devices, or after full fine-tuning of a model that writes, whose base is gone.

    A model that writes is measured on a few held-out rows, with and without its adapter.
    """
    task, final = run.config.task, run.record.final
    if run.ranks.size > 1 or not len(run.eval_set):
        return None
    if not math.isfinite(final.get("eval_loss", 0.0)):
        return "no number"
    match task:
        case TaskType.SEQ_CLS:
            return learned_nothing(task, final, collect(run, [], 0), {})
        case TaskType.CAUSAL_LM | TaskType.SEQ_2_SEQ_LM if isinstance(run.model, PeftModel):
            with suppress(RuntimeError, MemoryError):  # no room for a row's logits: it cannot be checked
                tuned = _loss(run, nullcontext())
                base = _loss(run, run.model.disable_adapter())
                return learned_nothing(task, {"eval_loss": tuned}, None, {"eval_loss": base})
            return None
        case _:
            return learned_nothing(task, final, None, {})


@torch.no_grad()
def _loss(run: Run, without: AbstractContextManager[object]) -> float:
    """The mean loss over the labelled tokens of some held-out rows."""
    run.model.eval()
    device = run.model.device
    total, n = 0.0, 0
    with without, torch.autocast(device.type, run.precision.dtype, enabled=run.precision.autocast):
        for batch in _rows(run):
            labels = batch["labels"]
            if run.config.task is TaskType.CAUSAL_LM:
                logits, labels = run.model(input_ids=batch["input_ids"]).logits[:, :-1], labels[:, 1:]
                logits = logits[:, -labels.shape[1] :]  # behind virtual tokens
            else:
                logits = run.model(**batch).logits
            kept = labels != IGNORED
            total += float(torch.nn.functional.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"))
            n += int(kept.sum())
    return total / max(n, 1)


def _rows(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    collate = PadCollator(run.tokenizer.pad_token_id)
    for i in sample(len(run.eval_set), ROWS):  # one at a time: a row's logits are large enough
        yield {name: t.to(run.model.device) for name, t in collate(run.eval_set.__getitems__([i])).items()}
