"""The base classes and field types of the config. Unknown keys are errors; values are not converted between types."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from siliang.files import restore_name
from siliang.language import Bilingual
from siliang.secrets import shortened
from siliang.types import ConfigError

RECORDED = {"recorded": True}  # the context of a validation
THE_SETTINGS = Bilingual("the settings", "配置项")  # the default source in errors


class Section(BaseModel):
    """A section of the config: unknown keys are errors, and values are not converted between types."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # quicker to import
    )


class Settings(Section):
    """The top level of the settings. Hints are checked with it: only valid settings are proposed."""

    @classmethod
    @abstractmethod
    def build(cls, values: Mapping[str, object], *, source: str = THE_SETTINGS) -> Self:
        """Checks `values` and fills in the defaults.

        Raises:
            ConfigError: A key is unknown or missing, or has a value that is not allowed.
        """


def is_recorded(info: ValidationInfo) -> bool:
    """Whether the settings are from a record: the files that they name may have moved, and are not read."""
    return info.context == RECORDED


def as_names(value: object) -> object:
    """Converts `a,b` to [a, b]: a list of names on the command line."""
    return split_names(value) if isinstance(value, str) else value


def split_names(text: str) -> list[str]:
    """The names of `a,b`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def as_name(value: object) -> object:
    """A file, a folder, or a name on the Hub.

    Raises:
        ConfigError: The name is empty, or has a control character.
    """
    if isinstance(value, os.PathLike):
        value = os.fsdecode(value)
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ConfigError(Bilingual("the name is empty.", "名称为空。"))
    if any(ord(c) < 32 or c == "\x7f" for c in value):
        # such as "C:\\new", where \\n is read as a line break
        raise ConfigError(
            Bilingual(
                f"the name {shortened(value, 200)!r} has a control character. In YAML's double quotes, a backslash "
                "begins an escape: write a Windows path in single quotes, without quotes, or with forward slashes.",
                f"名称 {shortened(value, 200)!r} 含有控制字符。在 YAML 的双引号中，反斜杠表示转义："
                "Windows 路径请用单引号、不加引号，或用正斜杠。",
            )
        )
    name = os.path.expanduser(value) if value.startswith("~/") else value  # noqa: PTH111
    return restore_name(name)


@dataclass(frozen=True)
class Verbatim:
    """Marks a text whose blanks at its beginning and its end count, also in `--set field=text`."""


Name = Annotated[str, BeforeValidator(as_name)]
Names = Annotated[list[str], BeforeValidator(as_names)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as numpy takes it
