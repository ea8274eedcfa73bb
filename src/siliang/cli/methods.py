"""siliang methods: what can be tuned."""

from __future__ import annotations

from siliang.cli import listings
from siliang.language import language


def methods() -> None:
    """List the methods: what each trains, and its default learning rate with its source."""
    listings.show(listings.METHODS_ZH if language() == "zh" else listings.METHODS)
