"""Whether a run has learned anything: the verdict that a comparison has for each of its runs."""

from __future__ import annotations

import math

from siliang.engine.evaluate import mean_loss
from siliang.engine.written import sample
from siliang.peft_api.model import PeftModel
from siliang.records import Verdict
from siliang.run_folder import OpenedRun
from siliang.tasks.verdict import learned_nothing
from siliang.train.types import Run
from siliang.use.answers import collect
from siliang.use.evaluate import engine_of, sums_of

ROWS = 32  # held-out rows on which a model that generates text is compared with its base


def what_is_wrong(run: Run) -> Verdict | None:
    """Why a run whose model is still loaded has learned nothing. None if it has learned, or if it cannot be checked:
    without held-out rows, on several devices, or after full fine-tuning of a model that generates text.

    A model that generates text is measured on a few held-out rows, with and without its adapter.
    """
    task, final = run.task, run.record.final
    if run.ranks.size > 1 or not len(run.eval_set):
        return None
    if not math.isfinite(final.get("eval_loss", 0.0)):
        return "no number"
    match task.judged_by:
        case "answers":
            return learned_nothing(task, final, collect(run, [], 0), {})
        case "base":
            if not isinstance(run.model, PeftModel):
                return None
            tuned, base = losses(run)
            return learned_nothing(task, {"eval_loss": tuned}, None, {"eval_loss": base})
        case "metrics":
            return learned_nothing(task, final, None, {})


def losses(run: Run) -> tuple[float, float]:
    """The mean loss of some held-out rows, with and without the run's adapter."""
    assert isinstance(run.model, PeftModel)
    opened = OpenedRun(run.folder, run.config, run.record, run.model, run.tokenizer, precision=run.precision)
    rows = run.eval_set.select(sample(len(run.eval_set), ROWS))
    step = run.eval_rows.step
    with engine_of(opened) as engine:
        tuned = mean_loss(engine.task, sums_of(opened, engine, rows), step)
        with run.model.disable_adapter():
            return tuned, mean_loss(engine.task, sums_of(opened, engine, rows), step)
