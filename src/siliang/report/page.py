"""The page: one self-contained HTML file, made from records only."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from siliang.files import write_text
from siliang.next_steps import next_steps
from siliang.records import Answer, Answers, Classification, ClassReport
from siliang.report import plots
from siliang.report.gather import Group, ReportData
from siliang.report.plots import Axis, Curve, Point
from siliang.report.summary import Mean, MethodSummary, pareto, recommend, summarize
from siliang.report.table import differences, notes, sentences, table
from siliang.report.words import words
from siliang.secrets import shortened
from siliang.terminal import shell_command, shown

SHOWN_ROWS = 12  # rows shown of those on which methods disagree
COLOURS = 10  # series colours of the page
LONG = 400  # characters shown of a text
PARTS = ("overhead", "weights", "trained", "gradients", "optimizer", "activations", "frozen", "logits", "workspace")


@dataclass(frozen=True)
class Figure:
    """A plot with its heading."""

    title: str
    note: str
    svg: Markup
    legend: bool = False
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question and its answers.

    Attributes:
        where: The source of the row, such as "reviews.csv:2".
        expected: The expected answer, if there is one.
        answers: (text, correct or not or unknown) of each method.
    """

    where: str
    text: str
    expected: str | None
    answers: list[tuple[str, bool | None]]


def render(data: ReportData, *, language: str = "en") -> str:
    """The page's HTML.

    Raises:
        ConfigError: The language is neither en nor zh.
    """
    w = words(language)
    methods = summarize(data)
    columns, cells = table(methods, data, w)
    environment = Environment(
        loader=PackageLoader("siliang.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_clean,
    )
    script = environment.get_template("page.js").render()
    disagreed, n_disagreed, counts = disagreements(data)
    first = data.records[0] if data.records else None
    return environment.get_template("page.html").render(
        w=w | {name: w[f"{name}_alone"] for name in ("title", "table_note") if len(methods) == 1},
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        question=_question(data, w),
        answer=sentences(recommend(methods, data), data, w),
        complete=data.complete,
        columns=columns,
        rows=cells,
        differences=differences(data, w),
        notes=[(i % COLOURS, method.label, text) for i, method in enumerate(methods) for text in notes(method, w)],
        cpu=first is None or first.device.kind == "cpu",
        figures=figures(methods, data, w),
        series=[(i, group.label) for i, group in enumerate(data.groups)],
        swatch=plots.swatch,
        labels=[group.label for group in data.groups],
        prompts=prompts(data),
        with_base=data.base_answers is not None,
        disagreed=disagreed,
        n_disagreed=n_disagreed,
        counts=counts,
        n_checked=max((len(_rows(group)) for group in data.groups), default=0),
        by_class=by_class(data),
        settings=data.settings,
        all_settings=data.all_settings,
        command=data.command,
        comparison=data.is_comparison,
        first=first,
        seeds=sorted({run.seed for group in data.groups for run in group.runs}),
        commands=commands(methods, data, w),
        version=version("siliang"),
        shorten=_shorten,
    )


def write_page(data: ReportData, path: Path, *, language: str = "en") -> None:
    """Writes the page, atomically."""
    text = render(data, language=language)
    write_text(path, text)


def figures(methods: list[MethodSummary], data: ReportData, w: dict[str, str]) -> list[Figure]:
    """The plots whose metrics the records have."""
    quality = data.task_row.quality
    metric, way = w.get(quality.name, quality.name), w["up" if quality.higher else "down"]
    costs: list[tuple[str, str, Callable[[MethodSummary], Mean | None], bool]] = []
    peaks = [method.peak.value for method in methods if method.peak]
    unit, scale = ("GB", 1e9) if max(peaks, default=0) >= 1e9 else ("MB", 1e6)
    costs.append(("against_memory", w["memory_axis"].format(unit=unit), lambda m: _scaled(m.peak, scale), False))
    costs.append(("against_time", w["minutes_axis"], lambda m: m.minutes, False))
    costs.append(("against_trained", w["trained_axis"], lambda m: Mean(float(m.trained), None, 1), True))
    shown: list[Figure] = []
    for key, axis, cost, log in costs:
        points = {
            method.label: Point(method.label, i % COLOURS, c.value, method.score.value, c.std, method.score.std)
            for i, method in enumerate(methods)
            if method.score and method.total and (c := cost(method))
        }
        if not points:
            continue
        ys = [p.y + s * (p.y_std or 0) for p in points.values() for s in (-1, 1)]
        xs = [p.x for p in points.values()]
        front = [points[method.label] for method in pareto(methods, quality, cost) if method.label in points]
        front = front if len(methods) > 1 else []
        svg = plots.scatter(
            list(points.values()), Axis.over(axis, xs, log=log), Axis.over(f"{metric} ({way})", ys), front=front
        )
        shown.append(Figure(w[key].format(metric=metric), w["front"] if front else "", svg))
    if drawn := _loss_curves(data):
        xs = [x for curve in drawn for x, _ in curve.points]
        ys = [y for curve in drawn for _, y in curve.points]
        svg = plots.curves(drawn, Axis.over(w["step_axis"], xs, zero=True, room=0.02), Axis.over(w["loss_axis"], ys))
        shown.append(Figure(w["curves"], w["curves_note"], svg, legend=True))
    if predicted := _predicted(data, scale):
        both = [v for p in predicted for v in (p.x, p.y)]
        x = Axis.over(w["predicted_axis"].format(unit=unit), both)
        svg = plots.scatter(predicted, x, Axis.over(w["measured_axis"].format(unit=unit), both), diagonal=True)
        shown.append(Figure(w["predicted"], "", svg))
    if bars := _memory_parts(data, scale, w):
        x = Axis.over(w["predicted_axis"].format(unit=unit), [sum(v for _, v in parts) for _, parts in bars], zero=True)
        names = tuple(name for name, _ in bars[0][1])
        shown.append(Figure(w["memory_parts"], "", plots.stacked(bars, x), parts=names))
    return shown


def prompts(data: ReportData) -> list[Question]:
    """The questions that the base model and every method answered."""
    of_methods = [_answers(group).prompts for group in data.groups]
    base = data.base_answers.prompts if data.base_answers else []
    if data.task_row.writes:
        of_methods = [[*a, *_rows(g)] for a, g in zip(of_methods, data.groups, strict=True)]
        base = [*base, *(data.base_answers.rows if data.base_answers else [])]
    questions: list[Question] = []
    for answers in zip_longest(base, *of_methods):
        one = next(a for a in answers if a is not None)
        texts: list[tuple[str, bool | None]] = [(_answer_text(a), None) for a in (answers if base else answers[1:])]
        questions.append(Question(one.where, one.input, one.expected, texts))
    return questions


def disagreements(data: ReportData) -> tuple[list[Question], int, list[int]]:
    """(the rows to show, the number of rows on which methods disagree, the number of wrong rows of each method)."""
    by_row = [{a.where: a for a in _rows(group) if a.correct is not None} for group in data.groups]
    if not any(by_row):
        return [], 0, []
    places = list(dict.fromkeys(place for rows in by_row for place in rows))
    n_wrong = [sum(not a.correct for a in rows.values()) for rows in by_row]
    split: list[Question] = []
    for place in places:
        answers = [rows.get(place) for rows in by_row]
        correct = [None if a is None else a.correct for a in answers]
        if True in correct and False in correct:
            one = next(a for a in answers if a is not None)
            texts = [(_answer_text(a), ok) for a, ok in zip(answers, correct, strict=True)]
            split.append(Question(place, one.input, one.expected, texts))
    # the most evenly divided rows first
    split.sort(key=lambda question: abs(sum(1 if ok else -1 for _, ok in question.answers if ok is not None)))
    return split[:SHOWN_ROWS], len(split), n_wrong


def by_class(data: ReportData) -> list[tuple[str, ClassReport, Classification | None]]:
    """(method, its rows by class, what it has chosen for predictions) of each method's first finished run."""
    runs = [(group.label, run.record) for group in data.groups for run in group.finished[:1]]
    return [
        (label, record.class_report, record.classification)
        for label, record in runs
        if record is not None and record.class_report is not None
    ]


def commands(methods: list[MethodSummary], data: ReportData, w: dict[str, str]) -> list[tuple[str, str]]:
    """(purpose, command) of what can be done with the best run."""
    best = recommend(methods, data).best
    group = next((g for g in data.groups if best and g.label == best.label), None)
    if group is None or not group.finished:
        return []
    run = group.finished[0]
    assert run.record is not None
    steps = next_steps(run.folder, data.task, run.record.config["method"], of_texts=run.record.of_texts)
    steps["measure"] = (*steps["measure"], "--data", "other.csv")
    names = {"chat": "try", "use": "use", "measure": "measure", "merge": "merge"}
    found = [(w[name], shell_command("siliang", *steps[what])) for what, name in names.items() if what in steps]
    if data.is_comparison:
        n = len({r.seed for g in data.groups for r in g.runs})
        again = ("siliang", "compare", data.folder / "compare.yaml", "--seeds", max(5, n + 2))
        found.append((w["more_seeds"], shell_command(*again)))
    return found


def _question(data: ReportData, w: dict[str, str]) -> str:
    record = data.records[0] if data.records else None
    if record is None:
        return ""
    train = record.config["data"]["train"]
    sources = train if isinstance(train, list) else [train]
    names = [Path(s if isinstance(s, str) else s["path"]).name for s in sources]
    return w["question" if len(data.groups) > 1 else "question_alone"].format(
        methods=len(data.groups),
        label=data.groups[0].label,
        data=", ".join(names),
        rows=f"{record.rows.train:,}",
        held=f"{record.rows.eval:,}",
        model=Path(record.config["model"]).name,
        task=data.task.lower(),
    )


def _scaled(mean: Mean | None, scale: float) -> Mean | None:
    if mean is None:
        return None
    return Mean(mean.value / scale, None if mean.std is None else mean.std / scale, mean.n)


def _loss_curves(data: ReportData) -> list[Curve]:
    """Training loss by step: the mean over seeds."""
    drawn = []
    for i, group in enumerate(data.groups):
        by_step: defaultdict[int, list[float]] = defaultdict(list)
        for run in group.finished:
            for step in run.record.steps if run.record else []:
                if step.loss is not None and math.isfinite(step.loss):
                    by_step[step.step].append(step.loss)
        if len(by_step) > 1:
            points = tuple((float(step), sum(v) / len(v)) for step, v in sorted(by_step.items()))
            drawn.append(Curve(group.label, i % COLOURS, points))
    return drawn


def _predicted(data: ReportData, scale: float) -> list[Point]:
    points = []
    for i, group in enumerate(data.groups):
        memory = [r.record.memory for r in group.finished if r.record and r.record.memory.predicted_bytes is not None]
        predicted = Mean.from_values(m.predicted_bytes / scale for m in memory if m.predicted_bytes is not None)
        measured = Mean.from_values(m.peak_bytes / scale for m in memory)
        if predicted and measured:
            points.append(Point(group.label, i % COLOURS, predicted.value, measured.value, None, measured.std))
    return points


def _memory_parts(data: ReportData, scale: float, w: dict[str, str]) -> list[tuple[str, list[tuple[str, float]]]]:
    """The parts of the predicted memory of each method's first run, in one order."""
    by_method = []
    for group in data.groups:
        parts = next((r.record.memory.predicted_parts for r in group.finished if r.record), {})
        if parts:
            by_method.append((group.label, [(w[f"part_{name}"], parts.get(name, 0) / scale) for name in PARTS]))
    return by_method


def _answers(group: Group) -> Answers:
    """The answers of the first finished run of a method."""
    return next((run.answers for run in group.finished if run.answers is not None), Answers())


def _rows(group: Group) -> list[Answer]:
    return _answers(group).rows


def _answer_text(answer: Answer | None) -> str:
    if answer is None:
        return "–"
    return f"{answer.predicted} ({answer.probability:.2f})" if answer.probability is not None else answer.predicted


def _clean(value: object) -> object:
    """Removes terminal escapes and secrets from a value of the page: the file may be printed in a terminal."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _shorten(text: str) -> str:
    return shortened(text, LONG, " …")
