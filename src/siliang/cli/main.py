"""`siliang`: the table of commands, and the display of errors. Only the commands themselves import torch."""

from __future__ import annotations

import itertools
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from siliang.cli import (
    chat,
    check,
    compare,
    config,
    demo,
    eval,
    explain,
    generate,
    merge,
    methods,
    plan,
    predict,
    report,
    train,
    used_run,
)
from siliang.cli.console import prepared_console
from siliang.cli.help_page import in_the_readers_language
from siliang.cli.own_code import may_run
from siliang.environment import bound_kernel_caches, quieten_libraries
from siliang.import_index import keep_index
from siliang.language import Bilingual, both, language, local, together
from siliang.secrets import shortened
from siliang.terminal import shown
from siliang.types import (
    ConfigError,
    DeviceMemoryError,
    InterruptedRunError,
    OutputError,
    OwnCodeError,
    RankError,
    SiliangError,
    message_of,
    nearest,
)

app = typer.Typer(
    name="siliang",
    help=both(
        "Parameter-efficient fine-tuning of transformers on the machine you have.",
        "在自己的机器上对 transformers 模型进行参数高效微调。",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("train")(train.train)
app.command("compare", cls=compare.RayOption)(compare.compare)
app.command("report")(report.report)
app.command("eval")(eval.evaluate)
app.command("predict")(predict.predict)
app.command("generate", cls=used_run.BaseOption)(generate.generate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("methods")(methods.methods)
app.command("config")(config.config)
app.command("explain")(explain.explain)


# the messages of the parser in Chinese
USAGE_ZH = {
    "Missing argument '(.+)'": "缺少参数 '{}'",
    "Missing option '(.+)'": "缺少选项 '{}'",
    r"Got unexpected extra arguments? \((.+)\)": "多余的参数：{}",
    "Option '(.+)' requires an argument": "选项 '{}' 后面缺少值",
    "Option '(.+)' does not take a value": "选项 '{}' 不带值",
    "(.+) is not a value for '(.+?)': .*": "{} 不能作为 '{}' 的值",
}
# Names of these commands in other tools.
OTHER_COMMANDS = {
    "sft": "train",
    "finetune": "train",
    "fine-tune": "train",
    "resume": "train --resume",
    "export": "merge",
    "infer": "generate",
    "inference": "generate",
    "evaluate": "eval",
    "test": "eval",
    "classify": "predict",
    "doctor": "check",
    "version": "--version",
    "help": "--help",
}


def _version(wanted: bool) -> None:
    if not wanted:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def find(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    print(f"siliang {find('siliang')}, torch {find('torch')}, transformers {find('transformers')}")
    print(f"Python {platform.python_version()}, {platform.platform(terse=True)}")
    raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(
        False, "--debug", help=both("Show the whole traceback of an error.", "显示错误的完整调用栈。")
    ),
    allow_code: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-code",
            metavar="SHA256",
            help=both(
                "Allow the model's custom code with this hash to run; the error message shows the hash.",
                "允许具有此哈希值的模型自带代码运行；错误信息会给出该值。",
            ),
        ),
    ] = None,
    version: bool = typer.Option(
        False,
        "--version",
        help=both("Show the versions of siliang and its main dependencies.", "显示 siliang 及其主要依赖库的版本。"),
        callback=_version,
        is_eager=True,
    ),
) -> None:
    """Parameter-efficient fine-tuning of transformers on the machine you have.

    --allow-code and --debug may also be written after the command.
    """
    from siliang.safety.permissions import allow_code as allow

    for sha256 in allow_code or ():
        allow(sha256)


def main() -> None:
    """The entry point: runs a command. An error is shown in one or two lines. Exit codes: 2 for an error, 130 for
    Ctrl-C, 1 for a bug in siliang, whose traceback is written to a file, or shown with --debug."""
    with prepared_console():
        _quieten_libraries()
        bound_kernel_caches()
        keep_index()
        given, rest = sys.argv[1:], []
        if "--" in given:
            given, rest = given[: given.index("--")], given[given.index("--") :]
        words = _options_first([word for word in given if word != "--debug"]) + rest
        sys.exit(_run(words, debug="--debug" in given))


def _options_first(words: list[str]) -> list[str]:
    """Moves each --allow-code to the front, where the parser expects the options of all commands."""
    first: list[str] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--allow-code":
            first += [word, *itertools.islice(left, 1)]
        else:
            (first if word.startswith("--allow-code=") else others).append(word)
    return first + others


def _run(words: list[str], *, debug: bool) -> int:
    """Runs a command and returns its exit code."""
    try:
        code = in_the_readers_language(get_command(app)).main(words, prog_name="siliang", standalone_mode=False)
    except OwnCodeError as error:
        return _run(words, debug=debug) if may_run(error) else _print_siliang_error(error)
    except KeyboardInterrupt:
        code = _print_error(both("Stopped.", "已停止。"), 130)
    except BrokenPipeError:  # the reader of the pipe has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(getattr(error, "message", ""))
            code = 2
        elif type(error).__name__ == "Abort":
            code = _print_error(both("Stopped.", "已停止。"), 130)
        elif (known := error if isinstance(error, SiliangError) else _as_siliang_error(error, words)) is not None:
            code = _print_siliang_error(known)
        else:
            code = _unexpected(error)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> int:
    """Reports a bug in siliang: one line, with the traceback in a file."""
    details = Bilingual("siliang --debug shows the traceback", "siliang --debug 显示调用栈")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="siliang-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(shown(traceback.format_exc()))
            details = Bilingual(f"the traceback is in {file.name}", f"调用栈在 {file.name} 中")
    except OSError:
        pass
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = shortened(" ".join(str(error).split()), 300)
    what = f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
    return _print_error(
        both(
            f"error: internal error: {what}.\nThis is a bug in siliang; {details}. Please report it.",
            f"错误：内部错误：{what}。\n这是 siliang 的缺陷；{details.zh}。请反馈给我们。",
        ),
        1,
    )


def _print_error(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _print_siliang_error(error: SiliangError) -> int:
    from siliang.errors import as_shown

    of_one_rank = isinstance(error, RankError | DeviceMemoryError)  # other errors are on all ranks: rank 0 prints them
    if os.environ.get("RANK", "0") != "0" and not of_one_rank:
        return error.exit_code
    stopped = isinstance(error, InterruptedRunError)  # stopped by the user: not shown as an error
    return _print_error(local(error.text) if stopped else as_shown(error, language()), error.exit_code)


def _as_siliang_error(error: Exception, words: list[str]) -> SiliangError | None:
    """Converts an error of the system or of the command line to a SiliangError; None for a bug."""
    from siliang.disk_errors import SAVED_BEFORE, disk_error

    if hasattr(error, "format_message"):  # of typer's parser
        return _usage_error(error, words)
    name = _short(getattr(error, "filename", None))
    if isinstance(error, PermissionError):
        return OutputError(Bilingual(f"{name}: permission denied.", f"{name}：没有权限。"))
    if not isinstance(error, FileNotFoundError) and (message := disk_error(error)) is not None:
        return OutputError(together(message, SAVED_BEFORE))
    if isinstance(error, OSError) and name and not isinstance(error, FileNotFoundError):
        # such as a folder instead of a file, a name that is too long, or a link to itself
        reason = error.strerror or str(error)
        return ConfigError(Bilingual(f"{name}: {reason[0].lower()}{reason[1:]}.", f"{name}：{local(reason, 'zh')}。"))
    if isinstance(error, UnicodeEncodeError) and error.encoding in (sys.getfilesystemencoding(), "utf-8"):
        return ConfigError(
            Bilingual(
                f"{_short(error.object)!r} cannot be a name in this system's encoding, {sys.getfilesystemencoding()}: "
                "set PYTHONUTF8=1, or choose other letters.",
                f"{_short(error.object)!r} 无法用系统编码 {sys.getfilesystemencoding()} 表示为名称："
                "请设置 PYTHONUTF8=1，或改用其他字符。",
            )
        )
    if isinstance(error, ValueError) and "null byte" in str(error):
        return ConfigError(
            Bilingual(
                "a name has a NUL byte, which is not allowed in file names.", "名称中含有 NUL 字节，文件名不能含有它。"
            )
        )
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return DeviceMemoryError(
            Bilingual(
                "the memory is full. `siliang explain SLE08` explains what to change.",
                "内存已满。`siliang explain SLE08` 说明应如何修改。",
            )
        )
    return None


def _short(name: object) -> str:
    text = str(name if name is not None else "")
    return text if len(text) <= 120 else shortened(text, 100, f"... ({len(text):,} characters)")


def _usage_error(error: Any, words: list[str]) -> ConfigError:
    """Converts an error of the parser."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "siliang"
    message = " ".join(str(error.format_message()).split())
    message = shortened(message, 300, " ...")
    if (option := getattr(error, "option_name", None)) and message.startswith("No such option"):
        wrong = _no_option(option, error, words)
        return ConfigError(
            Bilingual(
                f"{path}: {wrong} `{path} --help` lists its options.",
                f"{path}：{wrong.zh}`{path} --help` 列出全部选项。",
            )
        )
    if message.startswith("No such command"):
        name = next((word for word in words if not word.startswith("-")), "")
        names = [command.name or "" for command in app.registered_commands]
        near = nearest(name, names)
        if command := OTHER_COMMANDS.get(name):
            near = Bilingual(f" Did you mean `siliang {command}`?", f"是不是 `siliang {command}`？")
        shown = _short(name)
        return ConfigError(
            Bilingual(
                f"no such command: {shown!r}.{near} `siliang --help` lists the commands.",
                f"没有命令 {shown!r}。{near.zh}`siliang --help` 列出全部命令。",
            )
        )
    value = _given(getattr(getattr(error, "param", None), "opts", ()), words)
    if message.startswith("Invalid value") and value is not None and repr(value) not in message:
        message = message.replace("Invalid value for", f"{_short(value)!r} is not a value for", 1)
    message = message.rstrip(".")
    message_zh = _usage_zh(message)
    return ConfigError(
        Bilingual(
            f"{path}: {message}. `{path} --help` shows the usage.",
            f"{path}：{message_zh}。用法见 `{path} --help`。",
        )
    )


def _usage_zh(message: str) -> str:
    for pattern, chinese in USAGE_ZH.items():
        if found := re.fullmatch(pattern, message):
            return chinese.format(*found.groups())
    return message


def _given(options: Sequence[str], words: list[str]) -> str | None:
    """The value of an option in the command line; None without the option, or without a value."""
    for i, word in enumerate(words):
        if word.partition("=")[0] in options:
            return word.partition("=")[2] if "=" in word else next(iter(words[i + 1 : i + 2]), None)
    return None


def _no_option(option: str, error: Any, words: list[str]) -> Bilingual:
    """The message for an unknown option, with the matching setting or similar options."""
    from siliang.config import RunConfig, name_hint
    from siliang.safety.safe_yaml import YamlError, parse_yaml

    name = _short(option)
    wrong = Bilingual(f"No such option: {name}.", f"没有选项 {name}。")
    given = _given([option], words)
    # `--bf16` alone is `--bf16 true`
    value: object = "true" if given is None or given.startswith("--") else given
    with suppress(YamlError):
        value = parse_yaml(value)
    takes_settings = any("--set" in getattr(p, "opts", ()) for p in error.ctx.command.params)
    if takes_settings and (found := name_hint(option.lstrip("-"), RunConfig, value)):
        as_option = [re.sub(r"`(?=[\w.]+=)", "`--set ", text) for text in (found, local(found, "zh"))]
        return together(wrong, Bilingual(as_option[0], as_option[1]))
    options = [name for p in error.ctx.command.params for name in (*p.opts, *p.secondary_opts) if name[:2] == "--"]
    return together(wrong, nearest(option, options))


def _quieten_libraries() -> None:
    """Turns off the libraries' messages, unless the user has turned them on, and their telemetry."""
    quieten_libraries()
    # a warning about a missing kernel from the Hub, which 4-bit training does not use (models/quantized.py)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # the traceback of a step that cannot run on fake tensors: the plan has its own message
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.showwarning = partial(_show_warning, set())


def _show_warning(
    shown: set[str], message: Warning | str, category: type[Warning], filename: str, *rest: object
) -> None:
    """Prints a warning once: the plan and the run have the same of one setting."""
    line = f"{both('warning: ', '警告：')}{local(message_of(message))}"
    if line not in shown:
        shown.add(line)
        print(line, file=sys.stderr)
