"""The table: what stands in each cell, and by what it is sorted; the same for the terminal and the page."""

from __future__ import annotations

from dataclasses import dataclass

from siliang.report.gather import Material
from siliang.report.summary import Answer, Line, Mean
from siliang.tasks import TASKS
from siliang.units import show_bytes

STAR, MARK = "★", "⚠"
ORDER = ("accuracy", "f1", "precision", "recall", "exact_match", "rouge_l", "perplexity")


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        order: What the column is sorted by; None last.
    """

    text: str
    order: float | str | None


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        number: It holds metrics, and stands to the right.
        higher: Its best metrics are the highest; None where neither end is the better one.
    """

    key: str
    title: str
    number: bool = True
    higher: bool | None = None


def table(found: list[Line], material: Material, w: dict[str, str]) -> tuple[list[Column], list[list[Cell]]]:
    """The columns, and a row of cells for each method."""
    task = TASKS[material.task]
    quality = task.quality
    names = {name for line in found for name in line.others} - {quality.name}
    extra = [name for name in ORDER if name in names] + sorted(names.difference(ORDER))
    columns = [
        Column("method", w["method"], number=False),
        Column(quality.name, w.get(quality.name, quality.name), higher=quality.higher),
        *(Column(name, w.get(name, name), higher=task.metric(name).higher) for name in extra),
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
    return columns, [[_cell(column.key, line, quality.name, w) for column in columns] for line in found]


def _cell(key: str, line: Line, score: str, w: dict[str, str]) -> Cell:
    if key == "method":
        marked = line.label
        if line.on_front:
            marked += f" {STAR}"
        if line.verdicts or line.errors:
            marked += f" {MARK}"
        return Cell(marked, line.label)
    if line.total == 0:  # nothing but failures
        return Cell(w["no_metrics"] if key == score else "–", None)
    if key == score:
        return _mean(line.score, 4)
    if key in line.others:
        return _mean(line.others[key], 2 if key == "perplexity" else 4)
    match key:
        case "loss":
            return _mean(line.loss, 4)
        case "minutes":
            return _mean(line.minutes, 2)
        case "peak" | "above":
            found = line.peak if key == "peak" else line.above
            return Cell(show_bytes(found.value), found.value) if found else Cell("–", None)
        case "total":
            return Cell(f"{line.total:,}", line.total)
        case "trained":
            return Cell(f"{line.trained:,}", line.trained)
        case "share":
            return Cell(f"{100 * line.share:.4g}%", line.share)
        case "saved":
            return Cell(show_bytes(line.saved_bytes), line.saved_bytes)
        case "train_speed" | "eval_speed":
            found = line.train_speed if key == "train_speed" else line.eval_speed
            return Cell(f"{found.value:,.0f}", found.value) if found else Cell("–", None)
        case "rate":
            return Cell(f"{line.learning_rate:g}", line.learning_rate)
        case _:
            return Cell("–", None)


def notes(line: Line, w: dict[str, str]) -> list[str]:
    """What has to be said of a method: runs that learned nothing, runs that failed."""
    found = []
    for verdict in dict.fromkeys(line.verdicts):
        n = line.verdicts.count(verdict)
        text = w[verdict]
        found.append(text if n == line.runs else w["of_runs"].format(what=text, n=n, of=line.runs))
    errors: dict[str, list[int]] = {}
    for seed, error in line.errors:
        errors.setdefault(error, []).append(seed)
    found += [w["failed"].format(seed=", ".join(map(str, seeds)), error=error) for error, seeds in errors.items()]
    return found


def differences(material: Material, w: dict[str, str]) -> list[str]:
    """Where a comparison's own file and its runs' records do not say the same, a line each."""
    found = []
    for one in material.differing:
        label = w["base"] if one.label is None else w["run"].format(label=one.label, seed=one.seed)
        what = w.get(f"field_{one.what}") or w.get(one.what) or one.what
        if one.what == "folder":
            found.append(w["folder_missing"].format(run=label, folder=one.there))
        elif one.here is None and one.there is None:
            found.append(w["differs_at_all"].format(run=label, what=what))
        else:
            here, there = (_written(value) for value in (one.here, one.there))
            found.append(w["differs"].format(run=label, what=what, here=here, there=there))
    return found


def _written(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def show_mean(found: Mean | None, digits: int) -> str:
    """0.8462 ± 0.0031, or 0.8462 of one run."""
    if found is None:
        return "–"
    spread = f" ± {found.spread:.{digits}f}" if found.spread is not None else ""
    return f"{found.value:.{digits}f}{spread}"


def _mean(found: Mean | None, digits: int) -> Cell:
    return Cell(show_mean(found, digits), found.value if found else None)


def sentences(answer: Answer, material: Material, w: dict[str, str]) -> list[str]:
    """The answer in two sentences, and what it has to be held against."""
    quality = TASKS[material.task].quality
    best, said = answer.best, []
    alone = len(material.groups) == 1
    if best is None or best.score is None or best.minutes is None or best.peak is None:
        said.append(w["none_alone" if alone else "none"])
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
            "others": _listed([line.label for line in answer.tied], w),
        }
        said.append(w["alone" if alone else "best_tied" if answer.tied else "best"].format(**values))
        suffix = "" if quality.higher else "_loss"
        if answer.small is not None:
            said.append(
                w[f"small{suffix}"].format(
                    label=answer.small.label,
                    share=f"{100 * answer.share:.0f}%",
                    fewer=f"1/{answer.fewer:,.0f}",
                    saved=show_bytes(answer.small.saved_bytes),
                )
            )
        elif not alone and (quality.higher or "eval_loss" in material.base):
            said.append(w[f"no_small{suffix}"])
    if material.majority is not None:
        said.append(w["majority_note"].format(share=f"{material.majority:.4f}"))
    if "eval_loss" in material.base:
        base = material.base
        said.append(w["base_note"].format(loss=f"{base['eval_loss']:.4f}", perplexity=f"{base['perplexity']:.2f}"))
    return said


def minutes(value: float, w: dict[str, str]) -> str:
    """A time for people."""
    return w["min"].format(n=f"{value:.1f}") if value >= 1 else w["second"].format(n=f"{60 * value:.0f}")


def _listed(names: list[str], w: dict[str, str]) -> str:
    return w["and"].join(part for part in (w["comma"].join(names[:-1]), names[-1]) if part) if names else ""
