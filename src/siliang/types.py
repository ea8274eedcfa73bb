"""Common names: methods, tasks, and the errors for users."""

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
SIMILAR = 0.7  # share of the letters of two words that agree


class PeftType(StrEnum):
    """A method's name in adapter_config.json. The values are PEFT's, except for BITFIT and HEAD, which PEFT lacks."""

    LORA = "LORA"
    IA3 = "IA3"
    LN_TUNING = "LN_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    CPT = "CPT"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LOHA = "LOHA"
    C3A = "C3A"
    FOURIERFT = "FOURIERFT"
    LOKR = "LOKR"
    SHIRA = "SHIRA"
    OFT = "OFT"
    BOFT = "BOFT"
    MISS = "MISS"
    VERA = "VERA"
    HIRA = "HIRA"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    BEFT = "BEFT"
    RANDLORA = "RANDLORA"
    VBLORA = "VBLORA"
    HRA = "HRA"
    POLY = "POLY"
    XLORA = "XLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    WAVEFT = "WAVEFT"
    ADALORA = "ADALORA"
    ROAD = "ROAD"
    OSF = "OSF"
    LILY = "LILY"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BITFIT = "BITFIT"
    HEAD = "HEAD"


class TaskType(StrEnum):
    """The task that the base model is trained for. The values are PEFT's, except for the last four: an adapter's config
    has CAUSAL_LM for PREFERENCE, SEQ_CLS for REWARD and RERANKER, and FEATURE_EXTRACTION for EMBEDDING."""

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
    PREFERENCE = "PREFERENCE"
    REWARD = "REWARD"
    EMBEDDING = "EMBEDDING"
    RERANKER = "RERANKER"


# Task types of adapter configs that siliang does not train; tasks/ has a row for each other one.
NOT_TRAINED = (TaskType.FEATURE_EXTRACTION,)
TRAINED_TASKS = tuple(task for task in TaskType if task not in NOT_TRAINED)

# The heads that PEFT trains and saves with an adapter of a task type; they are new, even if the base model's files have
# such heads.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
OTHER_HEADS = ("classification_head",)  # BART's and T5's, which PEFT leaves untrained


class TextError(ValueError):
    """A text that cannot be parsed, or that exceeds a limit.

    Attributes:
        line: The line of the error, from 1; None if unknown.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line

    def place(self, path: Path) -> str:
        """The file and, if it is known, the line."""
        return f"{path}:{self.line}" if self.line else str(path)


class SiliangError(Exception):
    """The base class of all errors for users: one or two lines on what, where, what is allowed, and what to do.

    Attributes:
        code: The code of its page in errors.py, with cause and remedy in English and Chinese.
        exit_code: The exit code of the command that ends with it.
        zh: The message in Chinese, if it is bilingual; str(error) is English.
    """

    code: ClassVar[str] = "SLE00"
    exit_code: ClassVar[int] = 2

    def __init__(self, message: object = "") -> None:
        """message: Beyond MOST_CHARACTERS, such as with a long untrusted value, only its beginning and end are kept."""
        super().__init__(_bounded(str(message)))
        self.zh = _bounded(message.zh) if isinstance(message, Bilingual) else None

    @property
    def text(self) -> str:
        """The message, bilingual if it has a Chinese text."""
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


class KindError(ConfigError, TypeError):
    """A function does not work on a model, a module or a value of this kind, where PEFT raises TypeErrors."""


class DataError(SiliangError, ValueError):
    """The user's data cannot be read, or does not fit the settings."""

    code = "SLE03"


class ModelError(SiliangError, ValueError):
    """A base model or its tokenizer cannot be loaded."""

    code = "SLE04"


class AdapterError(SiliangError, ValueError):
    """An adapter's files are damaged, unknown, or do not fit the model."""

    code = "SLE05"


class MergeError(SiliangError, ValueError):
    """A merged model does not have the outputs of the unmerged one."""

    code = "SLE06"


class TrainingError(SiliangError, ArithmeticError):
    """Training cannot continue: its loss or gradient is not a number, or nothing is learned."""

    code = "SLE07"


class DeviceMemoryError(SiliangError, MemoryError):
    """A step does not fit the memory of the device."""

    code = "SLE08"


class OutputError(SiliangError, OSError):
    """The output folder cannot be used: it is not empty, it was removed, or the disk is full."""

    code = "SLE09"


class InterruptedRunError(SiliangError):
    """The run was stopped by the user or by its time limit; it has been saved, and can be resumed."""

    code = "SLE10"
    exit_code = 130


class PlanError(SiliangError):
    """The run needs more memory than there is."""

    code = "SLE11"


class RankError(SiliangError, RuntimeError):
    """Another process of a training on several devices has ended."""

    code = "SLE12"


class ClusterError(SiliangError, RuntimeError):
    """Ray is not installed, or its cluster cannot be used."""

    code = "SLE13"


class OwnCodeError(ModelError):
    """A model has its own Python code, which this user has not allowed.

    Attributes:
        model: The model's name, as given.
        folder: The folder with the code.
        files: The names of the files with code.
        sha256: The folder's hash, with which it can be allowed.
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
        later: It is not damaged, but written by a later siliang.
    """

    code = "SLE15"

    def __init__(self, message: str, *, later: bool = False) -> None:
        super().__init__(message)
        self.later = later


def message_of(error: object) -> str:
    """The message of an error, or a text unchanged; bilingual if it has a Chinese text, which str(error) loses."""
    if isinstance(error, SiliangError):
        return error.text
    arguments = error.args if isinstance(error, BaseException) else (error,)
    return arguments[0] if arguments and isinstance(arguments[0], Bilingual) else str(error)


def first_line(error: object, *, kind: bool = False) -> str:
    """The first line of an error's message, bilingual if the message is; without a message, the name of its class.

    Args:
        error: An error, or its message.
        kind: Put the name of its class in front.
    """
    name, text = "" if isinstance(error, str) else type(error).__name__, message_of(error)
    en = _first_line(str(text), name, kind=kind)
    return Bilingual(en, _first_line(text.zh, name, kind=kind)) if isinstance(text, Bilingual) else en


def _first_line(text: str, name: str, *, kind: bool) -> str:
    line, _, more = text.strip().partition("\n")
    if line.rstrip().endswith((":", "：")) and more:  # the next line says what is wrong
        line += f" {more.strip().splitlines()[0]}"
    line = line.rstrip()
    return ": ".join(part for part in (name if kind or not line else "", line) if part)


def near(word: str, words: Iterable[str], n: int = 3) -> list[str]:
    """The `words` that look like `word`, the most similar first.

    Words are similar if most of their letters agree, or if one contains the other; other proposals would mislead.
    """
    word = word.casefold()[:200]
    known = {name: name.casefold() for name in sorted(set(words))}
    like = {name: difflib.SequenceMatcher(None, word, low).ratio() for name, low in known.items()}
    part = {name for name, low in known.items() if min(len(low), len(word)) > 3 and (low in word or word in low)}
    return sorted((name for name in known if like[name] >= SIMILAR or name in part), key=lambda name: -like[name])[:n]


def nearest(word: str, words: Iterable[str], n: int = 3) -> Bilingual:
    """Proposes the `words` that look like `word`: " Did you mean 'a' or 'b'?"; empty if none does."""
    return did_you_mean(near(word, words, n))


def did_you_mean(found: Iterable[str]) -> Bilingual:
    """Proposes names; empty if there are none."""
    names = [repr(name) for name in found]
    if not names:
        return Bilingual("", "")
    return Bilingual(f" Did you mean {' or '.join(names)}?", f"是不是 {' 或 '.join(names)}？")
