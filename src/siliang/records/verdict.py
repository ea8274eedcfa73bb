"""Why a finished run has learned nothing."""

from typing import Literal

Verdict = Literal[
    "one class",
    "majority",
    "not below the base",
    "not above chance",
    "not above the mean",
    "no spans",
    "no number",
]
