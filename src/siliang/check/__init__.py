"""The doctor: looks at data, template and settings, trains nothing, and lists every way in which the run would go
wrong.

`gather_input` gathers what there is to see, `find` runs the rules over it. A rule is one function with one code (SL001
...) in one of the rules_*.py, and one line in `table.RULES`; its docstring is the page that `siliang check --explain`
prints, in both languages.
"""

from siliang.check.finding import RATE_FACTOR, SEVERITIES, Finding, Problem, Rule
from siliang.check.input import CheckInput, gather_input
from siliang.check.table import RULES, find, find_rule, stop_on_errors

__all__ = [
    "RATE_FACTOR",
    "RULES",
    "SEVERITIES",
    "CheckInput",
    "Finding",
    "Problem",
    "Rule",
    "find",
    "find_rule",
    "gather_input",
    "stop_on_errors",
]
