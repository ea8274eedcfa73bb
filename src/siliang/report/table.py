"""The table: the text and the sort key of each cell, for the terminal and the page; the sentences of the answer."""

from __future__ import annotations

from dataclasses import dataclass

from siliang.report.gather import ReportData
from siliang.report.summary import Mean, MethodSummary, Recommendation
from siliang.units import show_bytes

STAR, MARK = "★", "⚠"
METRICS = (
    *("accuracy", "f1", "precision", "recall", "exact_match", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf"),
    *("perplexity", "byte_perplexity", "bits_per_byte"),
    *("recall_at_1", "recall_at_10", "mrr_at_10"),
    *("mse", "mae"),
)


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        sort_key: The column is sorted by it; cells with None come last.
    """

    text: str
    sort_key: float | str | None


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        numeric: The column holds numbers and is right-aligned.
        higher: Whether higher is better; None if neither is.
    """

    key: str
    title: str
    numeric: bool = True
    higher: bool | None = None


def table(methods: list[MethodSummary], data: ReportData, w: dict[str, str]) -> tuple[list[Column], list[list[Cell]]]:
    """The columns, and one row of cells per method."""
    task, less = data.task_row, data.less_is_better
    quality = task.quality
    names = {name for method in methods for name in method.others} - {quality.name}
    extra = [name for name in METRICS if name in names] + sorted(names.difference(METRICS))
    columns = [
        Column("method", w["method"], numeric=False),
        Column(quality.name, w.get(quality.name, quality.name), higher=quality.higher),
        *(Column(name, w.get(name, name), higher=task.metric(name).higher and name not in less) for name in extra),
        *([] if quality.name == "eval_loss" else [Column("loss", w["loss"], higher=False)]),
        Column("minutes", w["minutes"], higher=False),
        Column("peak", w["peak"], higher=False),
        Column("above", w["above"], higher=False),
        Column("total", w["total"]),
        Column("trained", w["trained"], higher=False),
        Column("share", w["share"], higher=False),
        Column("saved", w["saved"], higher=False),
        Column("train_speed", w["train_speed"], higher=True),
        Column("eval_speed", w["eval_speed"], higher=True),
        Column("rate", w["rate"]),
    ]
    return columns, [[_cell(column.key, method, quality.name, w) for column in columns] for method in methods]


def _cell(key: str, method: MethodSummary, score: str, w: dict[str, str]) -> Cell:
    if key == "method":
        marked = method.label
        if method.on_front:
            marked += f" {STAR}"
        if method.verdicts or method.errors:
            marked += f" {MARK}"
        return Cell(marked, method.label)
    if method.total == 0:  # all runs failed
        return Cell(w["no_metrics"] if key == score else "–", None)
    if key == score:
        return _mean_cell(method.score, 4)
    if key in method.others:
        return _mean_cell(method.others[key], 2 if key in ("perplexity", "bleu", "chrf") else 4)
    match key:
        case "loss":
            return _mean_cell(method.loss, 4)
        case "minutes":
            return _mean_cell(method.minutes, 2)
        case "peak" | "above":
            memory = method.peak if key == "peak" else method.above
            return Cell(show_bytes(memory.value), memory.value) if memory else Cell("–", None)
        case "total":
            return Cell(f"{method.total:,}", method.total)
        case "trained":
            return Cell(f"{method.trained:,}", method.trained)
        case "share":
            return Cell(f"{100 * method.share:.4g}%", method.share)
        case "saved":
            return Cell(show_bytes(method.saved_bytes), method.saved_bytes)
        case "train_speed" | "eval_speed":
            speed = method.train_speed if key == "train_speed" else method.eval_speed
            return Cell(f"{speed.value:,.0f}", speed.value) if speed else Cell("–", None)
        case "rate":
            return Cell(f"{method.learning_rate:g}", method.learning_rate)
        case _:
            return Cell("–", None)


def notes(method: MethodSummary, w: dict[str, str]) -> list[str]:
    """The notes on a method: runs that learned nothing, runs that failed, metrics that only some runs have."""
    notes = []
    for verdict in dict.fromkeys(method.verdicts):
        n = method.verdicts.count(verdict)
        text = w[verdict]
        notes.append(text if n == method.runs else w["of_runs"].format(what=text, n=n, of=method.runs))
    errors: dict[str, list[int]] = {}
    for seed, error in method.errors:
        errors.setdefault(error, []).append(seed)
    notes += [w["failed"].format(seed=", ".join(map(str, seeds)), error=error) for error, seeds in errors.items()]
    of_few = [(name, mean.n) for name, mean in method.others.items() if mean.n < method.seeds]
    return notes + [w["of_seeds"].format(what=w.get(name, name), n=n, of=method.seeds) for name, n in of_few]


def differences(data: ReportData, w: dict[str, str]) -> list[str]:
    """One line for each difference between comparison.json and the records of its runs."""
    lines = []
    for found in data.differences:
        run = w["base"] if found.label is None else w["run"].format(label=found.label, seed=found.seed)
        field = w.get(f"field_{found.field}") or w.get(found.field) or found.field
        if found.field == "folder":
            lines.append(w["folder_missing"].format(run=run, folder=found.in_record))
        elif found.in_comparison is None and found.in_record is None:
            lines.append(w["differs"].format(run=run, field=field))
        else:
            a, b = _show(found.in_comparison), _show(found.in_record)
            lines.append(w["differs_by"].format(run=run, field=field, in_comparison=a, in_record=b))
    return lines


def _show(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def show_mean(mean: Mean | None, digits: int) -> str:
    """0.8462 ± 0.0031, or 0.8462 for one run."""
    if mean is None:
        return "–"
    std = f" ± {mean.std:.{digits}f}" if mean.std is not None else ""
    return f"{mean.value:.{digits}f}{std}"


def _mean_cell(mean: Mean | None, digits: int) -> Cell:
    return Cell(show_mean(mean, digits), mean.value if mean else None)


def sentences(answer: Recommendation, data: ReportData, w: dict[str, str]) -> list[str]:
    """The answer in two sentences, then the baselines: the most frequent class and the base model."""
    quality = data.task_row.quality
    best, texts = answer.best, []
    alone = len(data.groups) == 1
    if best is None or best.score is None or best.minutes is None or best.peak is None:
        measured = any(quality.name in record.final for record in data.records)
        word = "none_alone" if alone else "none"
        texts.append(w[word] if measured else w["not_measured"].format(metric=w[quality.name]))
    else:
        digits = 3
        over = w["over"].format(n=best.score.n) if best.score.n > 1 else w["one_run"]
        values = {
            "label": best.label,
            "metric": w[quality.name],
            "score": show_mean(best.score, digits),
            "over": over,
            "over_alone": w["over_alone"].format(n=best.score.n) if best.score.n > 1 else "",
            "minutes": minutes(best.minutes.value, w),
            "memory": show_bytes(best.peak.value),
            "others": _join_names([method.label for method in answer.tied], w),
        }
        texts.append(w["alone" if alone else "best_tied" if answer.tied else "best"].format(**values))
        suffix = "" if quality.higher else "_loss"
        if answer.small is not None:
            texts.append(
                w[f"small{suffix}"].format(
                    label=answer.small.label,
                    share=f"{100 * answer.share:.0f}%",
                    fewer=f"1/{answer.fewer:,.0f}",
                    saved=show_bytes(answer.small.saved_bytes),
                )
            )
        elif not alone and (quality.higher or "eval_loss" in data.base):
            texts.append(w[f"no_small{suffix}"])
    if data.majority is not None:
        texts.append(w["majority_note"].format(share=f"{data.majority:.4f}"))
    if "eval_loss" in data.base:
        base = data.base
        shown = {name: f"{value:.{4 if name == 'eval_loss' else 2}f}" for name, value in base.items()}
        texts.append(w["base_note" if "perplexity" in base else "base_loss_note"].format_map(shown))
    return texts


def minutes(value: float, w: dict[str, str]) -> str:
    """A training time as text."""
    return w["min"].format(n=f"{value:.1f}") if value >= 1 else w["second"].format(n=f"{60 * value:.0f}")


def _join_names(names: list[str], w: dict[str, str]) -> str:
    return w["and"].join(part for part in (w["comma"].join(names[:-1]), names[-1]) if part) if names else ""
