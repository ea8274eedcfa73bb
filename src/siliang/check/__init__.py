"""The doctor: looks at data, template and settings, trains nothing, and lists every way in which the run would go
wrong.

`look_at` gathers what there is to see, `find` runs the rules over it. A rule is one function with one code (SL001
...) in one of the rules_*.py, and one line in `table.RULES`; its docstring is the page that `siliang check --explain`
prints, in both languages.
"""

from siliang.check.finding import RATE_FACTOR, SEVERITIES, Finding, Found, Rule
from siliang.check.subject import Subject, look_at
from siliang.check.table import RULES, find, find_rule, stop_on_errors

__all__ = [
    "RATE_FACTOR",
    "RULES",
    "SEVERITIES",
    "Finding",
    "Found",
    "Rule",
    "Subject",
    "find",
    "find_rule",
    "look_at",
    "stop_on_errors",
]
