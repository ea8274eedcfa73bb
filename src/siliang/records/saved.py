"""What all records have in common: strict fields, and a file that is whole or not there and holds no secret."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from siliang.config.explaining import wrong_value
from siliang.files import write_text
from siliang.language import Bilingual, local
from siliang.paths import inside
from siliang.safety.safe_json import dump_json, read_values
from siliang.secrets import redacted, short_repr, shortened
from siliang.types import ConfigError, RecordError, message_of

MAX_BYTES = 128 * 2**20  # about a million lines of the log

# The values of these texts in a file: JSON has no such numbers.
NO_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _number(value: object) -> object:
    return NO_NUMBERS.get(value, value) if isinstance(value, str) else value


def _date(value: str) -> str:
    try:
        datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(
            Bilingual(
                "must be a date and a time, as 2026-01-31T12:00:00+00:00",
                "应为日期和时间，例如 2026-01-31T12:00:00+00:00",
            )
        ) from None
    return value


Count = Annotated[int, Field(ge=0, lt=2**63)]  # of anything, bytes too
Number = Annotated[float, BeforeValidator(_number)]  # or NaN, or infinite
Positive = Annotated[float, Field(ge=0, lt=1e15, allow_inf_nan=False)]  # seconds, epochs
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of learning, as large as settings may have it
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(max_length=1000)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Date = Annotated[str, Field(max_length=40), AfterValidator(_date)]


def _sentence(value: object, check: ValidatorFunctionWrapHandler) -> str:
    return value if isinstance(value, Bilingual) else check(value)


Sentence = Annotated[str, WrapValidator(_sentence)]  # English in a file; in memory it may carry its Chinese


class Part(BaseModel):
    """A part of the record."""

    model_config = ConfigDict(extra="forbid", defer_build=True)  # quicker to import


class Saved(Part):
    """A part that is a separate file.

    Attributes:
        newest: The version of its schema that this siliang reads.
    """

    newest: ClassVar[int] = 1

    def save(self, path: Path) -> None:
        """Writes the file, never half of it, with no secret in it."""
        write_text(path, dump_json(_finite(self.model_dump(mode="json")), indent=1) + "\n")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the file, strictly: it may be anybody's.

        Raises:
            ConfigError: It is missing.
            RecordError: It is damaged, is a link that leads out of its folder, or is not what siliang writes: which
                field, its value, and what is allowed; or a later siliang has written it.
        """
        inside(path.parent, path.name, kind=RecordError)
        missing = ConfigError(Bilingual(f"{path.parent} holds no {path.name}.", f"{path.parent} 中没有 {path.name}。"))
        values = read_values(path, RecordError, missing=missing, most_bytes=MAX_BYTES)
        try:
            if isinstance(values, dict):
                _check_version(values.get("schema_version"), cls.newest, path)
            found = cls.model_validate(values, strict=True)
            found.check()
        except ValidationError as error:
            raise RecordError(
                Bilingual(
                    f"{path} is damaged: {explained(error)}.", f"{path} 已损坏：{local(explained(error), 'zh')}。"
                )
            ) from None
        except RecordError:
            raise
        except ConfigError as error:
            raise RecordError(
                Bilingual(f"{path} is damaged: {error}", f"{path} 已损坏：{local(message_of(error), 'zh')}")
            ) from None
        return found

    def check(self) -> None:
        """Checks that concern several fields.

        Raises:
            ConfigError: Two of them do not go together.
        """


def explained(error: ValidationError) -> str:
    """The first finding in one line: the field, its value, and what is allowed."""
    first = error.errors()[0]
    field = shortened(".".join(map(str, first["loc"])), 200) or Bilingual("it", "它")
    field_zh = local(field, "zh")
    if first["type"] == "missing":
        return Bilingual(f"{field} is missing", f"缺少 {field_zh}")
    if first["type"] == "extra_forbidden":
        return Bilingual(f"{field} is not a field of such a record", f"{field_zh} 不是这种记录的字段")
    inner = first.get("ctx", {}).get("error")
    wrong = message_of(inner) if isinstance(inner, Exception) else wrong_value(first)
    message = f"{wrong[:1].lower()}{wrong[1:]}"
    message_zh = local(wrong, "zh")
    value = short_repr(first["input"])
    return Bilingual(f"{field} = {value}: {message}", f"{field_zh} = {value}：{message_zh}")


def _check_version(version: object, newest: int, path: Path) -> None:
    if type(version) is int and version > newest:
        raise RecordError(
            Bilingual(
                f"{path} was written by a later siliang: its schema_version is {short_repr(version)}, and "
                "this one reads "
                f"up to {newest}. Update siliang.",
                f"{path} 由更新版本的 siliang 写成：它的 schema_version 是 {short_repr(version)}，"
                f"而这个版本最高读到 {newest}。请更新 siliang。",
            ),
            later=True,
        )


def plain(value: Any) -> Any:
    """Values as a record's file holds them: no secrets, and as text the numbers that JSON does not have, NaN and
    Infinity, which the record's fields read back as numbers."""
    return redacted(_finite(value))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
