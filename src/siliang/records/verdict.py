"""Why a finished run has learned nothing."""

from typing import Literal

Verdict = Literal["one class", "majority", "not below the base", "not above chance", "no spans", "no number"]
