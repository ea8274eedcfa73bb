"""The sources of the data: names, or names with a weight and a layout of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError

from siliang.config.explaining import wrong_value
from siliang.config.section import Name, Section, as_name
from siliang.language import Bilingual, local
from siliang.secrets import short_repr
from siliang.types import ConfigError

LayoutName = Literal[
    "chosen-rejected",
    "messages-rejected",
    "rejected-messages",
    "responses",
    "output-list",
    "rated-answer",
    "rated-messages",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "input-output",
    "text",
    "text-label",
    "sentence-pair",
    "tokens-tags",
    "squad",
    "source-target",
    "anchor-positive",
    "scored-pair",
    "positive-messages",
    "scored-messages",
    "prepared",
]
LAYOUT_NAMES: tuple[LayoutName, ...] = get_args(LayoutName)  # data/layouts.py reads each


class Source(Section):
    """One of several sources, with its weight."""

    path: Name
    """A file, a folder, a pattern such as data/*.jsonl, or a name on the Hub.

    文件、文件夹、data/*.jsonl 这样的通配模式，或 Hub 上的名称。"""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used in an epoch: 2 for twice, 0.5 for a random half, by the seed the same in each epoch.
    Held-out rows have no weight.

    每条样本在一轮中使用的次数：2 是两次，0.5 是随机的一半，由种子决定，各轮相同。对验证集无效。"""
    layout: LayoutName | None = None
    """The layout of this source's rows. None: data.layout.

    此来源的样本格式。None：data.layout。"""


def read_sources(value: object) -> object:
    """A name, or a list of names and sources; a source alone is a list of one.

    Raises:
        ConfigError: A setting of a source is wrong.
    """
    if isinstance(value, Mapping | Source):
        value = [value]
    if not isinstance(value, list | tuple):
        return as_name(value)
    return [_source(part) if isinstance(part, Mapping) else as_name(part) for part in value]


def _source(value: Mapping[str, object]) -> Source:
    try:
        return Source.model_validate(dict(value))
    except ValidationError as error:
        found = error.errors()[0]
        name, shown = ".".join(map(str, found["loc"])), short_repr(dict(value))
        if isinstance(inner := found.get("ctx", {}).get("error"), ConfigError):
            wrong = Bilingual(f"{name}: {inner}", f"{name}：{local(inner.text, 'zh')}")
        elif found["type"] == "extra_forbidden":
            wrong = Bilingual(f"{name} is not a setting of a source", f"来源没有 {name} 这个配置项")
        elif found["type"] == "missing":
            wrong = Bilingual(f"{name} is missing", f"缺少 {name}")
        else:
            problem = wrong_value(found)
            wrong = Bilingual(f"{name}: {problem}", f"{name}：{local(problem, 'zh')}")
        raise ConfigError(
            Bilingual(
                f"{shown}: {wrong.rstrip('.')}. A source is a name, or {{path, weight, layout}} with a weight above 0.",
                f"{shown}：{wrong.zh.rstrip('。')}。来源是名称，或 {{path, weight, layout}}，其中 weight 大于 0。",
            )
        ) from None


def as_sources(value: str | list[str | Source]) -> list[Source]:
    """The sources of a setting, each with its weight."""
    values = value if isinstance(value, list) else [value]
    return [Source(path=v) if isinstance(v, str) else v for v in values]
