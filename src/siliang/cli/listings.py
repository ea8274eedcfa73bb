"""What `siliang config` and `siliang methods` print, as files: to ask the classes themselves takes torch's two seconds.

`make docs` writes them; a test holds them to the classes.
"""

from __future__ import annotations

from pathlib import Path

SETTINGS = Path(__file__).with_name("settings.txt")
METHODS = Path(__file__).with_name("methods.txt")


def show(listing: Path) -> None:
    """Prints one of the files."""
    print(listing.read_text(encoding="utf-8"), end="")


def settings() -> str:
    """Every setting of run.yaml and compare.yaml, and the fields of the methods."""
    import dataclasses
    import textwrap

    from siliang.config import OWN_FIELDS, RunConfig, describe
    from siliang.config.comparison import describe_settings
    from siliang.methods import METHODS as TABLE

    def filled(text: str) -> str:
        return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")

    lines: list[str] = []
    for rows, title in ((describe(RunConfig), ""), (describe_settings(), "\ncompare.yaml has, in place of `method`:")):
        lines += [title] if title else []
        for name, kind, default, meaning in rows:
            lines += [f"{name}: {default}    # {kind}", filled(" ".join(meaning.split()))]
    for method in TABLE.values():
        if method.config is not None:
            fields = [f.name for f in dataclasses.fields(method.config) if f.name not in OWN_FIELDS]
            values = method.config()
            lines.append(f"\nmethod: {{name: {method.name}, ...}} may also hold, with PEFT's names and defaults:")
            lines.append(filled(", ".join(f"{name}: {getattr(values, name)}" for name in fields)))
    return "\n".join(lines) + "\n"


def methods() -> str:
    """The methods: what each trains, and its default learning rate with its source."""
    from siliang.methods import METHODS as TABLE

    lines: list[str] = []
    for method in TABLE.values():
        lines.append(f"{method.name:<14} trains {method.trains}")
        lines.append(f"{'':<14} learning rate {method.learning_rate:g} ({method.learning_rate_source})")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    SETTINGS.write_text(settings(), encoding="utf-8")
    METHODS.write_text(methods(), encoding="utf-8")
