"""Rules, and the problems that they find."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

from siliang.data.example_set import first_rows
from siliang.language import Bilingual, both, joined, local

if TYPE_CHECKING:
    from pydantic import JsonValue

    from siliang.check.input import CheckInput

Severity = Literal["error", "warning"]
SHOWN_ROWS = 5
RATE_FACTOR = 10.0  # between a learning rate and the method's default; from here on it suits another method
SEVERITIES: dict[Severity, Bilingual] = {"error": Bilingual("error", "错误"), "warning": Bilingual("warning", "警告")}
PARTS = {"train": Bilingual("training", "训练"), "eval": Bilingual("held-out", "验证")}


@dataclass(frozen=True)
class Problem:
    """A problem that a rule's function yields; its texts are bilingual.

    Attributes:
        message: The problem, with its numbers.
        rows: The first rows that have it: file and line.
        count: Number of rows that have it; 0 for the length of `rows`.
        fix: The remedy in this case; None for the rule's own.
        severity: None for the rule's own.
    """

    message: str
    rows: tuple[str, ...] = ()
    count: int = 0
    fix: str | None = None
    severity: Severity | None = None


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        function: The rule. Its docstring is the rule's page, in six paragraphs: title, cause and fix, in English and in
            Chinese.
        reads: Its input; rules on "rows" need no tokens, and run first.
        fatal: An error would end the run, so it cannot be accepted.
    """

    code: str
    severity: Severity
    function: Callable[[CheckInput], Iterable[Problem]]
    reads: Literal["rows", "tokens", "model", "run"] = "tokens"
    fatal: bool = False

    @property
    def paragraphs(self) -> list[str]:
        """The paragraphs of the function's docstring: title, cause and fix in English, then in Chinese."""
        return inspect.cleandoc(self.function.__doc__ or "").split("\n\n")

    @property
    def page(self) -> Bilingual:
        """The rule's page: title, cause and fix."""
        return Bilingual("\n\n".join(self.paragraphs[:3]), "\n\n".join(self.paragraphs[3:]))

    @property
    def shown_page(self) -> str:
        """The page with the rule's code, in the reader's language."""
        severity, severity_zh = self.severity, SEVERITIES[self.severity].zh
        return both(f"{self.code} ({severity}): ", f"{self.code}（{severity_zh}）：") + local(self.page)

    @property
    def title(self) -> Bilingual:
        return Bilingual(self.paragraphs[0].rstrip("."), self.paragraphs[3])

    @property
    def cause(self) -> Bilingual:
        return Bilingual(_unwrapped(self.paragraphs[1], "Cause: "), _unwrapped(self.paragraphs[4], "原因："))

    @property
    def fix(self) -> Bilingual:
        return Bilingual(_unwrapped(self.paragraphs[2], "Fix: "), _unwrapped(self.paragraphs[5], "办法："))


def _unwrapped(paragraph: str, label: str) -> str:
    """The paragraph as one line, without its label."""
    assert paragraph.startswith(label), paragraph
    return joined(paragraph.removeprefix(label))


@dataclass(frozen=True)
class Finding:
    """A problem with the texts of its rule, ready to be shown."""

    code: str
    severity: Severity
    title: str
    message: str
    cause: str
    fix: str
    rows: list[str] = field(default_factory=list)
    count: int = 0
    accepted: bool = False

    @property
    def headline(self) -> str:
        """Title and message in the reader's language."""
        return both(f"{self.title}: {self.message}", f"{local(self.title, 'zh')}：{local(self.message, 'zh')}")

    @classmethod
    def of(cls, rule: Rule, problem: Problem, accepted: bool) -> Finding:
        severity = problem.severity or rule.severity
        fix: str = problem.fix or rule.fix
        if accepted and rule.fatal and severity == "error":
            accepted = False
            fix = Bilingual(
                f"{fix} It cannot be accepted: the run would end with an error.",
                f"{local(fix, 'zh')}此项不能用 accept 接受：训练必定会因此中止。",
            )
        return cls(
            rule.code,
            "warning" if accepted else severity,
            rule.title,
            problem.message,
            rule.cause,
            fix,
            list(problem.rows[:SHOWN_ROWS]),
            problem.count or len(problem.rows),
            accepted,
        )

    def as_dict(self) -> dict[str, JsonValue]:
        """The finding as JSON; its texts are English in every locale."""
        return asdict(self)


def not_usable(s: CheckInput, bad: list[str], number: Bilingual) -> Problem:
    """The problem of rows that cannot be used: an error, or a warning if data.skip_bad_rows skips them.

    Args:
        bad: Each row, with the reason.
        number: The number of these rows, in words.
    """
    shown = first_rows(bad, 3)
    message = Bilingual(f"{number}: {shown}", f"{number.zh}：{shown.zh}")
    skipped = Bilingual("Skipped, because of data.skip_bad_rows.", "已按 data.skip_bad_rows 跳过。")
    fix, severity = (skipped, "warning") if s.data.skip_bad_rows else (None, None)
    return Problem(message, tuple(bad[:6]), len(bad), fix, severity)


def rows_with(s: CheckInput, pattern: re.Pattern[str]) -> tuple[Counter[str], list[int]]:
    """The matches of a pattern in the texts of the training rows, counted, and the numbers of the rows with a match."""
    counts: Counter[str] = Counter()
    rows: list[int] = []
    for i, line in enumerate(s.examples.train.lines()):
        if matches := pattern.findall(line):
            counts.update(matches)
            rows.append(i)
    return counts, rows


def class_counts(s: CheckInput, *parts: str) -> Counter[str]:
    """The number of rows of each class in these parts; without parts, in the training rows."""
    counts: Counter[str] = Counter()
    for example in chain.from_iterable(getattr(s.examples, part) for part in parts or ("train",)):
        counts.update(example.classes)
    return counts
