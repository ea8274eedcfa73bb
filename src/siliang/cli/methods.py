"""siliang methods: what can be tuned."""

from __future__ import annotations


def methods() -> None:
    """List the methods: what each trains, and its default learning rate with its source."""
    from siliang.methods import METHODS

    for method in METHODS.values():
        print(f"{method.name:<14} trains {method.trains}")
        print(f"{'':<14} learning rate {method.learning_rate:g} ({method.learning_rate_source})")
