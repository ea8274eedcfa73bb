"""What `siliang config` and `siliang methods` print, as files: the classes would take torch's two seconds.

`make docs` writes them; a test holds them to the classes.
"""

from __future__ import annotations

from pathlib import Path

from siliang.language import Bilingual, Language, local

SETTINGS = Path(__file__).with_name("settings.txt")
METHODS = Path(__file__).with_name("methods.txt")
METHODS_ZH = Path(__file__).with_name("methods-zh.txt")


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


def methods(language: Language = "en") -> str:
    """The methods: what each trains, and its default learning rate with its source."""
    from siliang.methods import METHODS as TABLE

    lines: list[str] = []
    for method in TABLE.values():
        trains, rate, source = method.trains, method.learning_rate, method.learning_rate_source
        line = Bilingual(f"trains {trains}", f"训练{local(trains, 'zh')}")
        lines.append(f"{method.name:<14} {local(line, language)}")
        line = Bilingual(f"learning rate {rate:g} ({source})", f"学习率 {rate:g}（{local(source, 'zh')}）")
        lines.append(f"{'':<14} {local(line, language)}")
    return "\n".join(lines) + "\n"


def methods_zh() -> str:
    """The same in Chinese."""
    return methods("zh")


if __name__ == "__main__":
    SETTINGS.write_text(settings(), encoding="utf-8")
    METHODS.write_text(methods(), encoding="utf-8")
    METHODS_ZH.write_text(methods_zh(), encoding="utf-8")
