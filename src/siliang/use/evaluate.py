"""The metrics of a trained run on rows, computed as in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from siliang.config import RunConfig
from siliang.data.collate import PadCollator
from siliang.data.example_set import bad_rows_message, named_bad_rows
from siliang.data.load import load_examples, load_rows
from siliang.data.prepared import EvalRows, has_unanswered
from siliang.data.tokens import TokenSet, tokenize, usable
from siliang.engine.batches import Sharing, StepCollator, most_tokens
from siliang.engine.evaluate import Sums, metrics_of
from siliang.engine.evaluate import evaluate as measure
from siliang.engine.kept import KeptEngine
from siliang.engine.order import evaluation_batches
from siliang.engine.step import Engine
from siliang.engine.whole_step import keep_reference
from siliang.engine.written import MeasuredTexts, measure_texts
from siliang.language import Bilingual, together
from siliang.methods import find_method
from siliang.records import ClassReport
from siliang.run_folder import OpenedRun, autocast, load_base, weight_dtype
from siliang.secrets import HIDDEN
from siliang.tasks import Reader, Task
from siliang.tasks.measures import check_measures, measuring
from siliang.types import DataError
from siliang.use.positions import check_positions


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a run on some rows.

    Attributes:
        metrics: rows; loss (mean over rows for classes and answers, over labelled tokens for text and tags); and the
            task's own metrics: accuracy and f1; f1, precision and recall over spans, and f1_TYPE of each type of span;
            perplexity, byte_perplexity and bits_per_byte; rouge_l; exact_match and f1. `dropped`, where data.too_long =
            "drop" left out rows; `skipped`, where data.skip_bad_rows left out rows that cannot be used; `written`, the
            number of texts that the measures of texts are computed from.
        signatures: How each measure of texts was computed.
        report: The rows by class, for labels and numbers of rows.
        skipped: Every row that data.skip_bad_rows left out, with its place and the reason.
    """

    metrics: dict[str, float]
    signatures: dict[str, str] = field(default_factory=dict[str, str])
    report: ClassReport | None = None
    skipped: list[str] = field(default_factory=list[str])


def evaluate(run: OpenedRun, data: str | None = None, *, batch_size: int | None = None) -> dict[str, float]:
    """The metrics of `evaluation`."""
    return evaluation(run, data, batch_size=batch_size).metrics


def evaluation(run: OpenedRun, data: str | None = None, *, batch_size: int | None = None) -> Evaluation:
    """Metrics on the run's held-out rows, or on other data, as they are measured in training and in its precision.

    Args:
        data: A file, or a name on the hub. None: the held-out rows, or, where the run has none, its training rows.
        batch_size: Rows that go through the model at once; metrics depend on it by rounding only. None: the run's
            own.

    Raises:
        DataError: There is no row to measure, or none has a label.
        ConfigError: A measure needs a package that is not installed, or does not suit the run's task.
    """
    task = run.task
    if not task.measures:
        task = measuring(task, task.usual_measures)
    check_measures(task, run.config)
    rows = eval_rows(run, data)
    with engine_of(run) as engine:
        _take_reference(run, engine, rows.tokens, batch_size)
        sums = sums_of(run, engine, rows.tokens, task.read, batch_size)
    metrics = {"rows": float(len(rows.examples) - rows.tokens.dropped)}
    metrics |= {"dropped": float(rows.tokens.dropped)} if rows.tokens.dropped else {}
    metrics |= {"skipped": float(len(rows.skipped))} if rows.skipped else {}
    metrics |= metrics_of(task, sums, rows)
    metrics |= task.of_loss(metrics["loss"], rows)
    measured = measures_of_texts(run, rows, task, batch_size=batch_size)
    metrics |= {"written": float(measured.rows), **measured.values} if measured.rows else {}
    report = None if task.labels is None else task.labels.report(sums.found, rows)
    return Evaluation(metrics, dict(measured.signatures), report, rows.skipped)


def with_evaluation(run: OpenedRun, settings: Mapping[str, object]) -> OpenedRun:
    """The run with other settings of its evaluations.

    Args:
        settings: Some of the section `evaluation`, by their names.

    Raises:
        ConfigError: There is no such setting, or it has a value that is not allowed.
    """
    values = run.config.model_dump(mode="json")
    merged = {**(values["evaluation"] or {}), **settings}
    return replace(run, config=RunConfig.build(values | {"evaluation": merged}))


@contextmanager
def engine_of(run: OpenedRun) -> Iterator[Engine]:
    """The engine that measured the run in training. The run keeps it for the next block, without its hooks."""
    t = run.config.train

    def make() -> Engine:
        # outside of autocast, as in training: what it tries has to come to the same decisions
        share = Sharing(evaluation=t.share_beginnings)
        return Engine(run.model, run.task, packing=t.packing, share=share, gradients=False)

    learned = run.record.classification
    # what the task follows from; as text, for a setting may be changed in its place
    settings = (
        run.config.model_dump_json(),
        run.record.layout,
        learned and learned.model_dump_json(),
        run.prompt_name,
        run.task_id,
        run.precision,
    )
    with run.engine.of(run.model, settings, make) as engine, run.of_task():
        yield engine


def sums_of(
    run: OpenedRun,
    engine: Engine,
    tokens: TokenSet,
    reader: Reader | None = None,
    batch_size: int | None = None,
    *,
    tokens_at_once: int | None = None,
) -> Sums:
    """The sums of an evaluation in training, over the same batches.

    Args:
        batch_size: Rows of a batch; None: the run's own.
        tokens_at_once: The most tokens of a batch, where neither the run nor the device has a limit.
    """
    collator = _collator(run, engine, batch_size)
    collator.tokens_at_once = collator.tokens_at_once or tokens_at_once
    computing = partial(autocast, run.precision, run.model.device)
    return measure(run.model, engine, tokens, collator, reader=reader, autocast=computing)


def _collator(run: OpenedRun, engine: Engine, batch_size: int | None) -> StepCollator:
    t = run.config.train
    return StepCollator(
        PadCollator(run.tokenizer.pad_token_id),
        engine.task,
        batch_size or t.batch_size,
        most_tokens(t.tokens_at_once, run.model.device.type, run.precision.dtype),
        packed=engine.padding is not None,
        shares=engine.shares,
    )


def _take_reference(run: OpenedRun, engine: Engine, tokens: TokenSet, batch_size: int | None) -> None:
    """Of a run that tuned the whole model, the values of the base model, which is loaded for them.

    Raises:
        ModelError: The base model is missing or was replaced.
    """
    store = engine.reference_store
    if store is None or not store.only_before or run.trained is None:
        return
    run.trained.check_base()
    device, dtype = run.model.device, weight_dtype(find_method(run.config.method.name), run.precision)
    with torch.random.fork_rng(devices=[]):
        base = load_base(run.config, run.record.labels, run.tokenizer, dtype=dtype).to(device).eval()
    with engine_of(replace(run, model=base, engine=KeptEngine())) as before:
        collator = _collator(run, before, batch_size)
        batches = evaluation_batches(tokens, collator)
        keep_reference(before, base, batches, partial(autocast, run.precision, device))
        assert before.reference_store is not None
        store.load_state_dict(before.reference_store.state_dict())


def measures_of_texts(run: OpenedRun, rows: EvalRows, task: Task, *, batch_size: int | None = None) -> MeasuredTexts:
    """The task's measures of the texts that the model writes for the rows, compared with the right ones."""
    computing = partial(autocast, run.precision, run.model.device)
    with run.of_task():
        return measure_texts(
            run.model, run.tokenizer, run.config, task, rows, batch_size=batch_size, autocast=computing
        )


def eval_rows(run: OpenedRun, data: str | None, limit: int | None = None, *, same: bool = True) -> EvalRows:
    """The rows of `data`, or the run's own held-out rows, or, where it has none, its training rows.

    Args:
        limit: Of the rows, the first so many; None for all.
        same: They have to be those of the training.

    Raises:
        DataError: There are none, all are longer than data.max_length where these are dropped, or the run's own data is
            not what it was.
    """
    settings, spec = run.config.data, run.task.data
    if data is None and same and run.trained is not None:
        run.trained.check_data()
    if data is not None:
        settings = settings.model_copy(update={"labels": run.record.labels, "encoding": "auto"})
        loaded = load_rows(settings, spec, data, run.record.layouts or None)
        rows, bad = loaded.eval, loaded.skipped
    else:
        if any(HIDDEN in label for label in run.labels):  # classes that are secrets have no other names there
            settings = settings.model_copy(update={"labels": run.record.labels})
        examples = load_examples(settings, spec, seed=run.config.train.seed)
        rows, bad = (examples.eval if len(examples.eval) else examples.train), []
    rows = rows if limit is None else rows[:limit]
    tokens = tokenize(rows, run.tokenizer, settings, spec, labels=run.record.labels, keep_going=True)
    rows, tokens = usable(rows, tokens)
    if tokens.skipped and not settings.skip_bad_rows:
        raise DataError(bad_rows_message(tokens.skipped, trained=True))
    if not len(tokens) and tokens.dropped:
        raise DataError(
            Bilingual(
                f"there is nothing to measure: all {tokens.dropped:,} rows are longer than data.max_length = "
                f'{settings.max_length:,}, and data.too_long = "drop" leaves them out.\n'
                "Raise data.max_length, or set data.too_long=cut.",
                f"没有可评估的样本：全部 {tokens.dropped:,} 条都超过 data.max_length = "
                f'{settings.max_length:,}，而 data.too_long = "drop" 会丢弃它们。\n'
                "请增大 data.max_length，或设置 data.too_long=cut。",
            )
        )
    if not len(tokens):
        none = Bilingual("not one row can be used.", "没有一条样本可用。")
        why = together(Bilingual(" ", ""), named_bad_rows(tokens.skipped)) if tokens.skipped else ""
        raise DataError(together(none, why))
    check_positions(run, tokens, Bilingual("a row", "有样本"))
    unanswered = run.record.unanswered or has_unanswered(rows)
    skipped = [*bad, *tokens.skipped]
    return EvalRows(tokens, rows, run.labels, unanswered, run.config.train.rows_per_step, skipped)
