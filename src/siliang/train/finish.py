"""The end of a run: its final metrics, with the weights of the best step where it chooses one, and what it saves."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from siliang.data.conversations import served_ends
from siliang.data.jinja import with_chat_template
from siliang.files import find_damage, replacing_folder
from siliang.language import both
from siliang.memory.peak import PeakMemory
from siliang.models.save import save_model
from siliang.peft_api.model import PeftModel
from siliang.records import Record
from siliang.run_folder import ADAPTER, CHECKPOINTS, MODEL
from siliang.tasks import LabelHooks
from siliang.tasks.labels.calibration import at_the_end
from siliang.train.loop import Training
from siliang.train.saving import (
    checkpoints,
    full_weights,
    gathered_adapter,
    is_sharded_over_ranks,
    read_weights,
)
from siliang.train.types import Run


def measure(training: Training, memory: PeakMemory) -> None:
    """Writes the final metrics into the record. Where an earlier step was the best, the model is as it was then."""
    run, started = training.prepared, time.perf_counter()
    record = run.record
    if len(run.eval_set):
        metrics = _best_metrics(training)
        record.final = _named(metrics, run)
        if run.task.labels is not None:
            _report_and_choose(run, run.task.labels)
        record.seconds.eval = round(time.perf_counter() - started, 3)
    write_peak(record, memory)
    if run.ranks.size > 1:
        record.memory.peak_bytes_by_rank = run.ranks.gather(record.memory.peak_bytes)
        record.memory.peak_bytes = max(record.memory.peak_bytes_by_rank)
    if losses := [line.loss for line in record.steps if line.loss is not None]:
        record.final["train_loss"] = losses[-1]


def _report_and_choose(run: Run, hooks: LabelHooks) -> None:
    """Writes the held-out rows by class into the record, and then what predictions need, which is chosen on them as the
    settings say. No metric in the record has it: chosen on the same rows, it would be too good."""
    record = run.record
    record.class_report = hooks.report(run.sums.found, run.eval_rows)
    if hooks.fit is not None and record.classification is not None:
        record.classification = hooks.fit(record.classification, run.sums.found, run.eval_rows)
        temperature = record.classification.temperature
        if temperature is not None and at_the_end(temperature):
            run.listener.say(
                both(
                    f"warning    temperature {temperature:g} is the end of its range: the held-out rows are all right, "
                    "or no better than chance, and probabilities mean little",
                    f"警告       温度 {temperature:g} 已到取值范围的尽头：验证集全部正确，或不比随机好，"
                    "概率没有多少意义",
                )
            )


def write_peak(record: Record, memory: PeakMemory) -> None:
    """The peak so far, of the steps and of the whole run, into the record."""
    record.memory.steps_bytes = memory.update()
    record.memory.peak_bytes = max(record.memory.loading_bytes, record.memory.steps_bytes)


def _best_metrics(training: Training) -> dict[str, float]:
    """The metrics of the last step. If the run chooses its best step and an earlier one was better, the model gets that
    one's weights, and the metrics are theirs."""
    run = training.prepared
    metrics, best = training.current_metrics(), training.best
    if best is None or run.config.train.best is None:
        return metrics
    run.record.best_step = best.step
    if best.step == training.step:
        return metrics
    saved = checkpoints(run.folder / CHECKPOINTS).get(best.step)
    if saved is None or find_damage(saved) is not None:
        run.listener.say(
            both(
                f"warning    the best checkpoint, of step {best.step:,}, is gone or damaged: the last step is kept",
                f"警告       最好的第 {best.step:,} 步的检查点丢失或损坏：保留最后一步",
            )
        )
        run.record.best_step = training.step
        return metrics
    read_weights(saved, run.model)
    metrics = training.measure()
    training.log.show(training.moment, measured=metrics)  # the log has them already, at their own step
    return metrics


def _named(metrics: dict[str, float], run: Run) -> dict[str, float]:
    """The last evaluation's metrics under the names of the record."""
    others = {name: value for name, value in metrics.items() if name != "loss"}
    final = {"eval_loss": metrics["loss"]} | others
    return final | run.task.of_loss(final["eval_loss"], run.eval_rows)


def save(run: Run) -> None:
    """Writes the adapter, or the whole model; every rank must call this."""
    weights = full_weights(run.model) if is_sharded_over_ranks(run.model) else None
    with gathered_adapter(run.model):
        run.record.parameters.adapter_bytes = run.ranks.from_main(lambda: _write(run, weights))


def _facts(run: Run) -> dict[str, str]:
    """What the adapter's card says of the run: nothing that is private."""
    metrics = {name: f"{value:.4g}" for name, value in run.record.final.items()}
    task = run.task.title
    given = run.config.data.train
    names = [
        source if isinstance(source, str) else source.path for source in ([given] if isinstance(given, str) else given)
    ]
    return {"task": task, "data": ", ".join(Path(name).name for name in names), "trained with": "siliang", **metrics}


def _write(run: Run, weights: dict[str, Tensor] | None) -> int:
    """Writes under a temporary name, then renames; returns the bytes of the weights."""
    final: Path = run.folder / (ADAPTER if isinstance(run.model, PeftModel) else MODEL)
    with replacing_folder(final) as temporary:
        if isinstance(run.model, PeftModel):
            run.model.save_pretrained(temporary, model_card=False)
            run.model.create_or_update_model_card(temporary, _facts(run))
            base = run.model.get_base_model()
        else:
            tokenizer, data = run.tokenizer, run.config.data
            ends: list[int] = []
            if run.task.decoder_only:  # what serves it writes conversations as training did
                ends = served_ends(tokenizer, data, run.examples.layouts)
                tokenizer, _ = with_chat_template(
                    tokenizer, data.template, run.examples.layouts, data.template_arguments
                )
            save_model(temporary, run.model, tokenizer, state_dict=weights, ends=ends)
            base = run.model
        if (more := run.task.extra_files) is not None:
            assert isinstance(base, PreTrainedModel)
            more(temporary, base, run.tokenizer)
    return sum(p.stat().st_size for p in final.rglob("*") if p.suffix == ".safetensors")
