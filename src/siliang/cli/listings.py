"""The output of `siliang config` and `siliang methods`, as files: making it from the classes would import torch (2 s).

`make docs` writes the files. A test compares them with the classes.
"""

from __future__ import annotations

from pathlib import Path

from siliang.language import Bilingual, Language, filled, local

SETTINGS = Path(__file__).with_name("settings.txt")
SETTINGS_ZH = Path(__file__).with_name("settings-zh.txt")
METHODS = Path(__file__).with_name("methods.txt")
METHODS_ZH = Path(__file__).with_name("methods-zh.txt")


def show(listing: Path) -> None:
    """Prints one of the files."""
    print(listing.read_text(encoding="utf-8"), end="")


def settings(language: Language = "en") -> str:
    """Every setting of run.yaml and compare.yaml, and the fields of the methods."""
    import dataclasses

    from siliang.config import OWN_FIELDS, RunConfig, describe
    from siliang.config.comparison import describe_settings
    from siliang.methods import METHODS as TABLE

    lines: list[str] = []
    of_compare = Bilingual("compare.yaml has these settings instead of `method`:", "compare.yaml 没有 `method`，另有：")
    for rows, title in ((describe(RunConfig), ""), (describe_settings(), of_compare)):
        lines += ["\n" + local(title, language)] if title else []
        for name, kind, default, meaning in rows:
            lines += [f"{name}: {default}    # {kind}", filled(local(meaning, language), 100, "    ")]
    for method in TABLE.values():
        if method.config is not None:
            fields = [
                f.name
                for f in dataclasses.fields(method.config)
                if f.name not in (*OWN_FIELDS, *method.config.NOT_IN_RUNS)
            ]
            plain = method.config()
            values = {name: getattr(plain, name) for name in fields}
            groups = {name: v for name, v in values.items() if dataclasses.is_dataclass(v) and not isinstance(v, type)}
            values |= {name: dataclasses.asdict(group) for name, group in groups.items()}
            entry = f"method: {{name: {method.name}, ...}}"
            title = Bilingual(
                f"{entry} has these fields, with PEFT's names and defaults:",
                f"{entry} 有下列字段，名称和默认值与 PEFT 相同：",
            )
            lines += ["\n" + local(title, language)]
            lines += [filled(", ".join(f"{name}: {value}" for name, value in values.items()), 100, "    ")]
    return "\n".join(lines) + "\n"


def settings_zh() -> str:
    """The same in Chinese."""
    return settings("zh")


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
    SETTINGS_ZH.write_text(settings_zh(), encoding="utf-8")
    METHODS.write_text(methods(), encoding="utf-8")
    METHODS_ZH.write_text(methods_zh(), encoding="utf-8")
