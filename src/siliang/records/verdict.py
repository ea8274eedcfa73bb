"""Why a finished run has learned nothing."""

from typing import Literal

Verdict = Literal["one class", "majority", "not below the base", "no spans", "no number"]
