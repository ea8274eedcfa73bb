"""The rows by class on the terminal: a line for each class, the confusion matrix, the most confident mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from siliang.language import both, padded, width
from siliang.secrets import shortened
from siliang.terminal import one_line

if TYPE_CHECKING:
    from siliang.records import Classification, ClassReport

WIDEST = 24  # characters of a name
MOST_COLUMNS = 12  # of the confusion matrix
TEXT = 80  # characters of a mistake


def show_classes(report: ClassReport, learned: Classification | None) -> None:
    """Prints the report, and what was chosen for predictions."""
    if learned is not None and learned.ece_before is not None and learned.ece_after is not None:
        before, after, t = learned.ece_before, learned.ece_after, learned.temperature or 1.0
        print(
            both(
                f"calibrated, temperature {t:.3f}: expected calibration error {before:.4f} before, {after:.4f} after",
                f"已用温度 {t:.3f} 校准：期望校准误差之前为 {before:.4f}，之后为 {after:.4f}",
            )
        )
    if report.classes:
        head = [both("class", "类别"), both("rows", "样本"), both("predicted", "预测为"), "precision", "recall", "F1"]
        rows = [
            [_name(c.name), f"{c.rows:,}", f"{c.predicted:,}", *(f"{x:.4f}" for x in (c.precision, c.recall, c.f1))]
            for c in report.classes
        ]
        print()
        _print_table([head, *rows])
    if report.confusion is not None and len(report.classes) <= MOST_COLUMNS:
        names = [_name(c.name) for c in report.classes]
        cells = [[name, *map(str, row)] for name, row in zip(names, report.confusion, strict=True)]
        print()
        print(both("confusion: a row a right class, a column a predicted one", "混淆矩阵：每行是正确类别，每列是预测"))
        _print_table([["", *names], *cells])
    if report.mistakes:
        print()
        print(both("the most confident mistakes (expected -> predicted)", "置信度最高的错误（正确 -> 预测）"))
    for m in report.mistakes:
        sure = "" if m.probability is None else f" {m.probability:.2f}"
        text = shortened(one_line(m.text), TEXT)
        print(f"  {one_line(m.expected)} -> {one_line(m.predicted)}{sure}  {text}  {one_line(m.where)}")


def _name(name: str) -> str:
    return shortened(one_line(name), WIDEST)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns of one width, the first to the left."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [" " * (columns - width(cell)) + cell for columns, cell in zip(widths[1:], row[1:], strict=True)]
        print("  ".join([padded(row[0], widths[0]), *cells]))
