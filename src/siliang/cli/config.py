"""siliang config: every setting of run.yaml."""

from __future__ import annotations

import textwrap


def config() -> None:
    """List every setting with its type, default and meaning."""
    import dataclasses

    from siliang.compare.config import describe_settings
    from siliang.config import OWN_FIELDS, RunConfig, describe
    from siliang.methods import METHODS

    for name, kind, default, meaning in describe(RunConfig):
        print(f"{name}: {default}    # {kind}")
        print(textwrap.fill(" ".join(meaning.split()), 100, initial_indent="    ", subsequent_indent="    "))
    print("\ncompare.yaml has, in place of `method`:")
    for name, kind, default, meaning in describe_settings():
        print(f"{name}: {default}    # {kind}")
        print(textwrap.fill(" ".join(meaning.split()), 100, initial_indent="    ", subsequent_indent="    "))
    for method in METHODS.values():
        if method.config is None:
            continue
        fields = [f for f in dataclasses.fields(method.config) if f.name not in OWN_FIELDS]
        values = method.config()
        print(f"\nmethod: {{name: {method.name}, ...}} may also hold, with PEFT's names and defaults:")
        print(
            textwrap.fill(
                ", ".join(f"{f.name}: {getattr(values, f.name)}" for f in fields),
                100,
                initial_indent="    ",
                subsequent_indent="    ",
            )
        )
