"""Checks data, template and settings before training, and lists the problems that the run would have.

`gather_input` reads the input, and `find` runs the rules on it. A rule is a function in one of the rules_*.py with a
code (SL001 ...) and a line in `table.RULES`. Its docstring is the page of `siliang check --explain`, in both languages.
"""

from siliang.callable_packages import make_callable
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

make_callable(__name__)
