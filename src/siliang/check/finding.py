"""What a rule says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from siliang.check.subject import Subject

Severity = Literal["error", "warning"]
SHOWN_ROWS = 5
RATE_FACTOR = 10.0  # between a learning rate and the method's usual one, from where on it is another method's


@dataclass(frozen=True)
class Found:
    """What a rule's function yields.

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
        ends: An error of it ends the run in any case, and so cannot be accepted.
    """

    code: str
    severity: Severity
    function: Callable[[Subject], Iterable[Found]]
    reads: Literal["rows", "tokens", "model", "run"] = "tokens"
    ends: bool = False

    @property
    def page(self) -> str:
        """The rule's page: what it is, why it happens, what to do."""
        return inspect.cleandoc(self.function.__doc__ or "")

    @property
    def title(self) -> str:
        return self.page.partition("\n")[0].rstrip(".")

    def part(self, name: str) -> str:
        """The paragraph of the page that begins with "Cause:" or "Fix:", in one line."""
        found = re.search(rf"^{name}: (.*?)(?:\n\n|\Z)", self.page, re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""


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

    @classmethod
    def of(cls, rule: Rule, found: Found, accepted: bool) -> Finding:
        severity = found.severity or rule.severity
        fix = found.fix or rule.part("Fix")
        if accepted and rule.ends and severity == "error":
            accepted, fix = False, f"{fix} It cannot be accepted: the run would end in it."
        return cls(
            rule.code,
            "warning" if accepted else severity,
            rule.title,
            found.message,
            rule.part("Cause"),
            fix,
            list(found.rows[:SHOWN_ROWS]),
            found.count or len(found.rows),
            accepted,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
