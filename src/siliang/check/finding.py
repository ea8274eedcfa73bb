"""What a rule says."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from siliang.data.example_set import first_rows
from siliang.language import Bilingual, both, joined, local

if TYPE_CHECKING:
    from pydantic import JsonValue

    from siliang.check.input import CheckInput

Severity = Literal["error", "warning"]
SHOWN_ROWS = 5
RATE_FACTOR = 10.0  # between a learning rate and the method's usual one; from here on it is another method's
SEVERITIES: dict[Severity, Bilingual] = {"error": Bilingual("error", "错误"), "warning": Bilingual("warning", "警告")}
PARTS = {"train": Bilingual("training", "训练"), "eval": Bilingual("held-out", "留出")}


@dataclass(frozen=True)
class Problem:
    """What a rule's function yields; its texts are English that carries its Chinese.

    Attributes:
        message: What was found, with its figures.
        rows: The places it was found in.
        count: Of the places, where there are more than `rows` holds.
        fix: What to do in this very case; None for the rule's own advice.
        severity: Where it is another than the rule's.
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
        reads: What it looks at: "rows" needs no tokens, and runs first.
        function: Its docstring is the rule's page, in six paragraphs: title, cause and fix, in English and in Chinese.
        fatal: An error of it ends the run in any case, and so cannot be accepted.
    """

    code: str
    severity: Severity
    function: Callable[[CheckInput], Iterable[Problem]]
    reads: Literal["rows", "tokens", "model", "run"] = "tokens"
    fatal: bool = False

    @property
    def paragraphs(self) -> list[str]:
        """Title, cause and fix in English, and the same in Chinese: the paragraphs of the function's docstring."""
        return inspect.cleandoc(self.function.__doc__ or "").split("\n\n")

    @property
    def page(self) -> Bilingual:
        """The rule's page: what it is, why it happens, what to do."""
        return Bilingual("\n\n".join(self.paragraphs[:3]), "\n\n".join(self.paragraphs[3:]))

    @property
    def shown_page(self) -> str:
        """The page under its code, in the reader's language."""
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
    """The paragraph in one line, without its label."""
    assert paragraph.startswith(label), paragraph
    return joined(paragraph.removeprefix(label))


@dataclass(frozen=True)
class Finding:
    """What a rule found, ready to be shown."""

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
    def of(cls, rule: Rule, found: Problem, accepted: bool) -> Finding:
        severity = found.severity or rule.severity
        fix: str = found.fix or rule.fix
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
            found.message,
            rule.cause,
            fix,
            list(found.rows[:SHOWN_ROWS]),
            found.count or len(found.rows),
            accepted,
        )

    def as_dict(self) -> dict[str, JsonValue]:
        """As JSON, whose texts are English in every locale."""
        return asdict(self)


def not_usable(s: CheckInput, bad: list[str], what: Bilingual) -> Problem:
    """What is found where rows cannot be used: an error, or a warning where data.skip_bad_rows leaves them out.

    Args:
        bad: Each row, with its reason.
        what: How many there are, in words.
    """
    shown = first_rows(bad, 3)
    said = Bilingual(f"{what}: {shown}", f"{what.zh}：{shown.zh}")
    skipped = Bilingual("Left out, as data.skip_bad_rows says.", "已按 data.skip_bad_rows 跳过。")
    fix, severity = (skipped, "warning") if s.data.skip_bad_rows else (None, None)
    return Problem(said, tuple(bad[:6]), len(bad), fix, severity)


def rows_with(s: CheckInput, pattern: re.Pattern[str]) -> tuple[Counter[str], list[int]]:
    """What a pattern finds in the texts of the training rows, counted, and the numbers of the rows that have it."""
    found: Counter[str] = Counter()
    rows: list[int] = []
    for i, line in enumerate(s.examples.train.lines()):
        if here := pattern.findall(line):
            found.update(here)
            rows.append(i)
    return found, rows
