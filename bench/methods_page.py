"""The tables of docs/methods.md, made from the record of `python -m bench.methods_table`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "methods.md"
RECORD = ROOT / "docs" / "benchmarks" / "2026-11-26-methods" / "results.jsonl"
BEGIN, END = "<!-- made by make methods-table -->\n", "<!-- end of what make methods-table makes -->\n"
CAPTIONS = {
    "classes": "SST-2's reviews classified, MiniLM (22.7 million parameters): steps of 16 rows, all 872 rows of dev.",
    "text": "The same reviews as text, stories260K (260,032 parameters): steps of 8 rows, loss per token of 300 rows.",
}
HEAD = (
    "| method | trained | learning rate | {metric} | memory | step |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
)

Kind = Literal["search", "test", "costs"]


@dataclass(frozen=True)
class Line:
    """A run in the record.

    Attributes:
        kind: search: measured on the validation rows; test: on the test rows; costs: a few steps, timed.
        error: Why there is no run; "" for none.
    """

    kind: Kind
    question: str
    label: str
    rate: float
    seed: int
    values: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return self.kind, self.question, self.label, self.rate, self.seed

    @property
    def loss(self) -> float:
        """On the validation rows; infinite where the run failed."""
        loss = self.values.get("eval_loss", math.inf)
        return loss if math.isfinite(loss) else math.inf


def read_lines(record: Path) -> list[Line]:
    """The record, in the order of its runs."""
    if not record.is_file():
        return []
    return [Line(**json.loads(line)) for line in record.read_text(encoding="utf-8").splitlines()]


def write_docs(docs: Path, lines: Sequence[Line], labels: Sequence[str]) -> None:
    """Puts the tables between their marks in the page."""
    before, _, rest = docs.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    docs.write_text(before + BEGIN + tables(lines, labels) + END + after, encoding="utf-8")


def tables(lines: Sequence[Line], labels: Sequence[str]) -> str:
    """A table for each question that has runs, the best method first."""
    classes = _table(lines, labels, "classes", "accuracy", "accuracy, %", scale=100, digits=1)
    text = _table(lines, labels, "text", "loss", "loss", scale=1, digits=3)
    return "\n" + classes + text


def _table(
    lines: Sequence[Line], labels: Sequence[str], question: str, metric: str, title: str, *, scale: int, digits: int
) -> str:
    own = [line for line in lines if line.question == question]
    costs = {line.label: line.values for line in own if line.kind == "costs" and not line.error}  # the newest
    reference = costs.get("lora", {}).get("step_s")
    rows: list[tuple[float, str]] = []
    for label in labels:
        tests = [line for line in own if (line.kind, line.label) == ("test", label)]
        if not tests:
            continue
        found = [scale * line.values[metric] for line in tests]
        trained = next(v for line in own if line.label == label and (v := line.values.get("trained")) is not None)
        took, above = costs.get(label, {}).get("step_s"), costs.get(label, {}).get("above_bytes")
        cells = (
            f"`{label}`".replace(", ", "`, `"),
            f"{trained:,.0f}",
            f"{tests[0].rate:g}",
            _spread(found, digits),
            f"{above / 1e6:,.0f} MB" if above is not None else "–",
            f"{took / reference:.2f}" if took and reference else "–",
        )
        rows.append((mean(found) if metric == "loss" else -mean(found), "| " + " | ".join(cells) + " |"))
    if not rows:
        return ""
    head = HEAD[0].format(metric=title), HEAD[1]
    return "\n".join((CAPTIONS[question], "", *head, *(row for _, row in sorted(rows)))) + "\n\n"


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
