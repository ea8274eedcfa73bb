"""siliang config: every setting of run.yaml."""

from __future__ import annotations

from siliang.cli import listings
from siliang.language import language


def config() -> None:
    """List every setting with its type, default and meaning."""
    listings.show(listings.SETTINGS_ZH if language() == "zh" else listings.SETTINGS)
