"""siliang config: every setting of run.yaml."""

from __future__ import annotations

from siliang.cli import listings


def config() -> None:
    """List every setting with its type, default and meaning."""
    listings.show(listings.SETTINGS)
