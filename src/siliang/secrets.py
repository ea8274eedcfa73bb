"""Keeps passwords and access tokens out of what is written or printed."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
_SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}"),  # OpenAI and others
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"),
    re.compile(r"\bAKIA[A-Z0-9]{16}\b"),  # Amazon
    re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?<=://)[^/\s:@\"']+:[^/\s@\"']+(?=@)"),  # https://user:password@host
)
_NAMES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE)


def redacted(value: Any) -> Any:
    """A structure with each of its texts `without_secrets`. Numbers stay as they are: in a text made of the whole, a
    password of digits would take digits out of a number."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return value


def without_secrets(text: str) -> str:
    """The text with tokens and passwords hidden: by their shape, and those of this process's environment."""
    for shape in _SHAPES:
        text = shape.sub(HIDDEN, text)
    for name, value in os.environ.items():
        # shorter ones would hide parts of ordinary words
        if len(value) >= 8 and value in text and _NAMES.search(name):
            text = text.replace(value, HIDDEN)
    return text
