"""The page: one self-contained HTML file, from records alone."""

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
from siliang.records import Answer as Said
from siliang.records import Answers
from siliang.report import plots
from siliang.report.gather import Group, Material
from siliang.report.plots import Axis, Curve, Point
from siliang.report.summary import Line, Mean, answer, lines, pareto
from siliang.report.table import differences, notes, sentences, table
from siliang.report.words import words
from siliang.secrets import shortened
from siliang.tasks import TASKS
from siliang.terminal import shell_command, shown

SHOWN_ROWS = 12  # on which methods disagree
COLOURS = 10  # of the page
LONG = 400  # characters of a text; the rest is left out


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
class Asked:
    """A question, the right answer where there is one, and what each method says: (text, right or not or unknown)."""

    where: str
    asked: str
    right: str | None
    given: list[tuple[str, bool | None]]


def render(material: Material, *, language: str = "en") -> str:
    """The page's HTML.

    Raises:
        ConfigError: The language is none of siliang's.
    """
    w = words(language)
    found = lines(material)
    columns, cells = table(found, material, w)
    environment = Environment(
        loader=PackageLoader("siliang.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_clean,
    )
    script = environment.get_template("page.js").render()
    disagreed, n_disagreed, counts = disagreements(material)
    first = material.records[0] if material.records else None
    return environment.get_template("page.html").render(
        w=w | {name: w[f"{name}_alone"] for name in ("title", "table_note") if len(found) == 1},
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        question=_question(material, w),
        answer=sentences(answer(found, material), material, w),
        complete=material.complete,
        columns=columns,
        rows=cells,
        differing=differences(material, w),
        notes=[(i % COLOURS, line.label, text) for i, line in enumerate(found) for text in notes(line, w)],
        cpu=first is None or first.device.kind == "cpu",
        figures=figures(found, material, w),
        series=[(i, group.label) for i, group in enumerate(material.groups)],
        swatch=plots.swatch,
        labels=[group.label for group in material.groups],
        prompts=prompts(material),
        with_base=material.base_answers is not None,
        disagreed=disagreed,
        n_disagreed=n_disagreed,
        counts=counts,
        looked_at=max((len(_rows(group)) for group in material.groups), default=0),
        settings=material.settings,
        all_settings=material.all_settings,
        command=material.command,
        comparison=material.is_comparison,
        first=first,
        seeds=sorted({run.seed for group in material.groups for run in group.runs}),
        commands=commands(found, material, w),
        version=version("siliang"),
        shorten=_shorten,
    )


def write_page(material: Material, path: Path, *, language: str = "en") -> None:
    """Writes the page, never half of it."""
    text = render(material, language=language)
    write_text(path, text)


def figures(found: list[Line], material: Material, w: dict[str, str]) -> list[Figure]:
    """The plots for which there are figures."""
    quality = TASKS[material.task].quality
    metric, way = w.get(quality.name, quality.name), w["up" if quality.higher else "down"]
    costs: list[tuple[str, str, Callable[[Line], Mean | None], bool]] = []
    peaks = [line.peak.value for line in found if line.peak]
    unit, scale = ("GB", 1e9) if max(peaks, default=0) >= 1e9 else ("MB", 1e6)
    costs.append(("against_memory", w["memory_axis"].format(unit=unit), lambda line: _scaled(line.peak, scale), False))
    costs.append(("against_time", w["minutes_axis"], lambda line: line.minutes, False))
    costs.append(("against_trained", w["trained_axis"], lambda line: Mean(float(line.trained), None, 1), True))
    shown: list[Figure] = []
    for key, axis, cost, log in costs:
        points = {
            line.label: Point(line.label, i % COLOURS, c.value, line.score.value, c.spread, line.score.spread)
            for i, line in enumerate(found)
            if line.score and line.total and (c := cost(line))
        }
        if not points:
            continue
        ys = [p.y + s * (p.y_spread or 0) for p in points.values() for s in (-1, 1)]
        xs = [p.x for p in points.values()]
        front = [points[line.label] for line in pareto(found, quality, cost) if line.label in points]
        front = front if len(found) > 1 else []
        svg = plots.scatter(
            list(points.values()), Axis.over(axis, xs, log=log), Axis.over(f"{metric} ({way})", ys), front=front
        )
        shown.append(Figure(w[key].format(metric=metric), w["front"] if front else "", svg))
    if drawn := _loss_curves(material):
        xs = [x for curve in drawn for x, _ in curve.points]
        ys = [y for curve in drawn for _, y in curve.points]
        svg = plots.curves(drawn, Axis.over(w["step_axis"], xs, zero=True, room=0.02), Axis.over(w["loss_axis"], ys))
        shown.append(Figure(w["curves"], w["curves_note"], svg, legend=True))
    if predicted := _predicted(material, scale):
        both = [v for p in predicted for v in (p.x, p.y)]
        x = Axis.over(w["predicted_axis"].format(unit=unit), both)
        svg = plots.scatter(predicted, x, Axis.over(w["measured_axis"].format(unit=unit), both), diagonal=True)
        shown.append(Figure(w["predicted"], "", svg))
    if made_of := _made_of(material, scale, w):
        x = Axis.over(
            w["predicted_axis"].format(unit=unit), [sum(v for _, v in parts) for _, parts in made_of], zero=True
        )
        names = tuple(name for name, _ in made_of[0][1])
        shown.append(Figure(w["made_of"], "", plots.stacked(made_of, x), parts=names))
    return shown


def prompts(material: Material) -> list[Asked]:
    """The questions that the base and every method answered."""
    said = [_answers(group).prompts for group in material.groups]
    base = material.base_answers.prompts if material.base_answers else []
    if TASKS[material.task].writes:
        said = [[*a, *_rows(g)] for a, g in zip(said, material.groups, strict=True)]
        base = [*base, *(material.base_answers.rows if material.base_answers else [])]
    found: list[Asked] = []
    for answers in zip_longest(base, *said):
        one = next(a for a in answers if a is not None)
        given: list[tuple[str, bool | None]] = [(_given(a), None) for a in (answers if base else answers[1:])]
        found.append(Asked(one.where, one.asked, one.right, given))
    return found


def disagreements(material: Material) -> tuple[list[Asked], int, list[int]]:
    """(the rows to show, all rows on which methods disagree, each method's wrong rows)."""
    said = [{a.where: a for a in _rows(group) if a.correct is not None} for group in material.groups]
    if not any(said):
        return [], 0, []
    places = list(dict.fromkeys(place for rows in said for place in rows))
    wrong = [sum(not a.correct for a in rows.values()) for rows in said]
    split: list[Asked] = []
    for place in places:
        answers = [rows.get(place) for rows in said]
        judged = [None if a is None else a.correct for a in answers]
        if True in judged and False in judged:
            one = next(a for a in answers if a is not None)
            given = [(_given(a), right) for a, right in zip(answers, judged, strict=True)]
            split.append(Asked(place, one.asked, one.right, given))
    split.sort(key=lambda asked: abs(sum(1 if ok else -1 for _, ok in asked.given if ok is not None)))  # most divided
    return split[:SHOWN_ROWS], len(split), wrong


def commands(found: list[Line], material: Material, w: dict[str, str]) -> list[tuple[str, str]]:
    """(what for, command) of what can be done with the best run."""
    best = answer(found, material).best
    group = next((g for g in material.groups if best and g.label == best.label), None)
    if group is None or not group.finished:
        return []
    run = group.finished[0]
    assert run.record is not None
    steps = next_steps(run.folder, material.task, run.record.config["method"]["name"])
    steps["measure"] = (*steps["measure"], "--data", "other.csv")
    names = {"chat": "try", "use": "use", "measure": "measure", "merge": "merge"}
    said = [(w[name], shell_command("siliang", *steps[what])) for what, name in names.items() if what in steps]
    if material.is_comparison:
        n = len({r.seed for g in material.groups for r in g.runs})
        again = ("siliang", "compare", material.folder / "compare.yaml", "--seeds", max(5, n + 2))
        said.append((w["more_seeds"], shell_command(*again)))
    return said


def _question(material: Material, w: dict[str, str]) -> str:
    record = material.records[0] if material.records else None
    if record is None:
        return ""
    train = record.config["data"]["train"]
    sources = train if isinstance(train, list) else [train]
    names = [Path(s if isinstance(s, str) else s["path"]).name for s in sources]
    return w["question" if len(material.groups) > 1 else "question_alone"].format(
        methods=len(material.groups),
        label=material.groups[0].label,
        data=", ".join(names),
        rows=f"{record.rows.train:,}",
        held=f"{record.rows.eval:,}",
        model=Path(record.config["model"]).name,
        task=material.task.lower(),
    )


def _scaled(found: Mean | None, scale: float) -> Mean | None:
    if found is None:
        return None
    return Mean(found.value / scale, None if found.spread is None else found.spread / scale, found.n)


def _loss_curves(material: Material) -> list[Curve]:
    """Training loss by step, the mean of the seeds."""
    drawn = []
    for i, group in enumerate(material.groups):
        by_step: defaultdict[int, list[float]] = defaultdict(list)
        for run in group.finished:
            for step in run.record.steps if run.record else []:
                if step.loss is not None and math.isfinite(step.loss):
                    by_step[step.step].append(step.loss)
        if len(by_step) > 1:
            points = tuple((float(step), sum(v) / len(v)) for step, v in sorted(by_step.items()))
            drawn.append(Curve(group.label, i % COLOURS, points))
    return drawn


def _predicted(material: Material, scale: float) -> list[Point]:
    found = []
    for i, group in enumerate(material.groups):
        memory = [r.record.memory for r in group.finished if r.record and r.record.memory.predicted_bytes is not None]
        predicted = Mean.of(m.predicted_bytes / scale for m in memory if m.predicted_bytes is not None)
        measured = Mean.of(m.peak_bytes / scale for m in memory)
        if predicted and measured:
            found.append(Point(group.label, i % COLOURS, predicted.value, measured.value, None, measured.spread))
    return found


def _made_of(material: Material, scale: float, w: dict[str, str]) -> list[tuple[str, list[tuple[str, float]]]]:
    """The parts of each method's predicted memory, in one order; of its first run, for the others differ by seed."""
    found = []
    for group in material.groups:
        parts = next((r.record.memory.predicted_parts for r in group.finished if r.record), {})
        if parts:
            found.append((group.label, [(w[f"part_{name}"], parts.get(name, 0) / scale) for name in PARTS]))
    return found


def _answers(group: Group) -> Answers:
    """What the first finished run of a method says."""
    return next((run.answers for run in group.finished if run.answers is not None), Answers())


def _rows(group: Group) -> list[Said]:
    return _answers(group).rows


def _given(said: Said | None) -> str:
    if said is None:
        return "–"
    return f"{said.given} ({said.probability:.2f})" if said.probability is not None else said.given


def _clean(value: object) -> object:
    """What the page says, as a terminal may have it too: whoever prints the file there sees no escapes, no secrets."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _shorten(text: str) -> str:
    return shortened(text, LONG, " …")
