"""The vocabulary: methods, tasks, and the errors that a user can meet."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from siliang.language import Bilingual
from siliang.secrets import LONGEST, shortened, without_secrets

MOST_CHARACTERS = 4000  # of an error
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name of it
ALIKE = 0.7  # share of two words' letters that agree


class PeftType(StrEnum):
    """A method's name in adapter_config.json; the values are those of PEFT, but for BITFIT and HEAD, which are ours."""

    LORA = "LORA"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LOHA = "LOHA"
    OFT = "OFT"
    MISS = "MISS"
    VERA = "VERA"
    BITFIT = "BITFIT"
    HEAD = "HEAD"


class TaskType(StrEnum):
    """What the base model is trained to do; the values are those of Hugging Face PEFT."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# Task types of an adapter's config that siliang does not train. tasks/ has a row for each of the others.
NOT_TRAINED = (TaskType.FEATURE_EXTRACTION,)
TRAINED_TASKS = tuple(task for task in TaskType if task not in NOT_TRAINED)

# The heads that PEFT trains and saves with an adapter of a task type: new ones, whatever the base model's files hold.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
OTHER_HEADS = ("classification_head",)  # BART's and T5's, which PEFT leaves untrained


class TextError(ValueError):
    """A text, such as that of a file, that cannot be read, or not by the limits of its kind.

    Attributes:
        line: Where, from 1; None where that is not known.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line

    def place(self, path: Path) -> str:
        """The file and, where it is known, the line."""
        return f"{path}:{self.line}" if self.line else str(path)


class SiliangError(Exception):
    """What every error for the user derives from: a line or two on what, where, what is allowed, what to do.

    Attributes:
        code: Under which errors.py says the cause and the remedy, in English and in Chinese.
        exit_code: Of the command that ends with it.
        zh: The message in Chinese, where it was given in both languages; str(error) is English.
    """

    code: ClassVar[str] = "SLE00"
    exit_code: ClassVar[int] = 2

    def __init__(self, message: object = "") -> None:
        """What it says; of more than MOST_CHARACTERS, such as of a value of a stranger's, the beginning and the end."""
        super().__init__(_bounded(str(message)))
        self.zh = _bounded(message.zh) if isinstance(message, Bilingual) else None

    @property
    def text(self) -> str:
        """The message, with its Chinese where it has one."""
        return str(self) if self.zh is None else Bilingual(str(self), self.zh)


def _bounded(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    end = without_secrets(text[-(LONGEST + 300) :])[-300:]
    return f"{shortened(text, MOST_CHARACTERS - 400)} ... ({len(text):,} characters) ... {end}"


class ConfigError(SiliangError, ValueError):
    """A setting, or a combination of settings, is wrong."""

    code = "SLE01"


class TargetError(ConfigError):
    """The modules or parameters that a method should tune are not in the model."""

    code = "SLE02"


class DataError(SiliangError, ValueError):
    """The user's data cannot be read, or is not what was said."""

    code = "SLE03"


class ModelError(SiliangError, ValueError):
    """A base model or its tokenizer cannot be loaded."""

    code = "SLE04"


class AdapterError(SiliangError, ValueError):
    """An adapter's files are damaged, foreign, or do not fit the model."""

    code = "SLE05"


class MergeError(SiliangError, RuntimeError):
    """A merged model does not answer as the unmerged one."""

    code = "SLE06"


class TrainingError(SiliangError, ArithmeticError):
    """Training cannot go on: its loss or gradient is not a number, or nothing is learned."""

    code = "SLE07"


class DeviceMemoryError(SiliangError, MemoryError):
    """A step does not fit the memory of the device."""

    code = "SLE08"


class OutputError(SiliangError, OSError):
    """The output folder cannot be used: it holds something already, it is gone, or the disk is full."""

    code = "SLE09"


class InterruptedRunError(SiliangError):
    """The run was stopped by the user or by its time limit; what can be resumed has been saved."""

    code = "SLE10"
    exit_code = 130


class PlanError(SiliangError):
    """The run needs more memory than there is."""

    code = "SLE11"


class RankError(SiliangError, RuntimeError):
    """Another process of a training on several devices is gone."""

    code = "SLE12"


class ClusterError(SiliangError, RuntimeError):
    """Ray is not installed, or its cluster cannot be used."""

    code = "SLE13"


class OwnCodeError(ModelError):
    """A model brings Python code of its own, which this user has not allowed.

    Attributes:
        model: Its name, as it was given.
        folder: Where the code lies.
        files: The names of the files of code.
        sha256: Of the folder, by which it can be allowed.
    """

    code = "SLE14"
    model: str = ""
    folder: str = ""
    files: tuple[str, ...] = ()
    sha256: str = ""


class RecordError(ConfigError):
    """A record (run.json, comparison.json, answers.json, the state of a checkpoint) is damaged, or not what siliang
    writes.

    Attributes:
        later: It is sound, and was written by a later siliang.
    """

    code = "SLE15"

    def __init__(self, message: str, *, later: bool = False) -> None:
        super().__init__(message)
        self.later = later


def message_of(error: object) -> str:
    """What an error says, or a text itself; with its Chinese where it has one, which str(error) loses."""
    if isinstance(error, SiliangError):
        return error.text
    arguments = error.args if isinstance(error, BaseException) else (error,)
    return arguments[0] if arguments and isinstance(arguments[0], Bilingual) else str(error)


def first_line(error: object, *, kind: bool = False) -> str:
    """What an error says, in a line, with its Chinese where it has one; the name of its kind where it says nothing.

    Args:
        error: Or its text.
        kind: With the name of its kind in front.
    """
    name, text = "" if isinstance(error, str) else type(error).__name__, message_of(error)
    en = _first_line(str(text), name, kind=kind)
    return Bilingual(en, _first_line(text.zh, name, kind=kind)) if isinstance(text, Bilingual) else en


def _first_line(text: str, name: str, *, kind: bool) -> str:
    said, _, more = text.strip().partition("\n")
    if said.rstrip().endswith((":", "：")) and more:  # what is wrong stands in the next line
        said += f" {more.strip().splitlines()[0]}"
    said = said.rstrip()
    return ": ".join(part for part in (name if kind or not said else "", said) if part)


def near(word: str, words: Iterable[str], n: int = 3) -> list[str]:
    """Those of `words` that look like `word`, the likest first.

    Alike are words most of whose letters agree, or of which one holds the other whole: a far-off proposal misleads.
    """
    word = word.casefold()[:200]
    known = {name: name.casefold() for name in sorted(set(words))}
    like = {name: difflib.SequenceMatcher(None, word, low).ratio() for name, low in known.items()}
    part = {name for name, low in known.items() if min(len(low), len(word)) > 3 and (low in word or word in low)}
    return sorted((name for name in known if like[name] >= ALIKE or name in part), key=lambda name: -like[name])[:n]


def nearest(word: str, words: Iterable[str], n: int = 3) -> Bilingual:
    """Says which of `words` look like `word`: " Did you mean 'a' or 'b'?", or nothing if none does."""
    return did_you_mean(near(word, words, n))


def did_you_mean(found: Iterable[str]) -> Bilingual:
    """Proposes names; nothing where there are none."""
    names = [repr(name) for name in found]
    if not names:
        return Bilingual("", "")
    return Bilingual(f" Did you mean {' or '.join(names)}?", f"是不是 {' 或 '.join(names)}？")
