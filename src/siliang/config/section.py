"""What the parts of the config have in common: unknown keys are errors, and no value is guessed into another type."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from siliang.files import restore_name
from siliang.language import Bilingual
from siliang.secrets import shortened
from siliang.types import ConfigError

RECORDED = {"recorded": True}  # the context of a validation


class Section(BaseModel):
    """A part of the config: unknown keys are errors, and values are not guessed into other types."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # quicker to import
    )


class Settings(Section):
    """All settings of something, from the top; what a hint proposes is tried on them."""

    @classmethod
    @abstractmethod
    def build(cls, values: Mapping[str, object], *, source: str = "the settings") -> Self:
        """Checks `values` and fills in the defaults.

        Raises:
            ConfigError: A key is unknown or missing, or has a value that is not allowed.
        """


def is_recorded(info: ValidationInfo) -> bool:
    """The settings stand in a record: what they name may lie elsewhere by now, or nowhere, and is not looked at."""
    return info.context == RECORDED


def as_list(value: object) -> object:
    """`a,b` as [a, b], for what is a list of names: so the command line's user writes one."""
    return split_names(value) if isinstance(value, str) else value


def split_names(text: str) -> list[str]:
    """The names of `a,b`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def as_name(value: object) -> object:
    """A file, a folder, or a name on the hub.

    Raises:
        ConfigError: It is empty, or holds a control character.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ConfigError(Bilingual("it is an empty name.", "名称为空。"))
    if any(ord(c) < 32 or c == "\x7f" for c in value):
        # as of "C:\\new", with a line's end for the \\n
        raise ConfigError(
            Bilingual(
                f"{shortened(value, 200)!r} is a name with a control character in it. In yaml's double quotes "
                "a backslash "
                "begins an escape: write a Windows path in single quotes, without quotes, or with forward slashes.",
                f"{shortened(value, 200)!r} 这个名称含有控制字符。在 yaml 的双引号中反斜杠表示转义："
                "Windows 路径请用单引号、不加引号，或用正斜杠。",
            )
        )
    name = os.path.expanduser(value) if value.startswith("~/") else value  # noqa: PTH111
    return restore_name(name)


Name = Annotated[str, BeforeValidator(as_name)]
Names = Annotated[list[str], BeforeValidator(as_list)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as numpy takes it
