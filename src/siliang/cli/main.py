"""`siliang`: the commands in one table, and what becomes of errors. Imports of torch stay inside the commands."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings

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
)
from siliang.environment import bound_kernel_caches
from siliang.types import DeviceMemoryError, InterruptedRunError, OutputError, RankError, SiliangError

app = typer.Typer(
    name="siliang",
    help="Parameter-efficient fine-tuning of transformers on the machine you have.",
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
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("merge")(merge.merge)
app.command("methods")(methods.methods)
app.command("config")(config.config)
app.command("explain")(explain.explain)


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
) -> None:
    """Parameter-efficient fine-tuning of transformers on the machine you have."""


def main() -> None:
    """The entry point: runs a command; errors become one or two lines and an exit code (2, or 130 for Ctrl-C)."""
    _quieten_libraries()
    bound_kernel_caches()
    debug = "--debug" in sys.argv
    try:
        code = get_command(app).main(standalone_mode=False)
    except KeyboardInterrupt:
        code = _say("Stopped.", 130)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except SiliangError as error:
        if debug:
            traceback.print_exc()
        code = _tell(error)
    except Exception as error:
        show = getattr(error, "show", None)  # an error of usage, from click
        if show is not None:
            show()
            code = getattr(error, "exit_code", 2)
        elif type(error).__name__ == "Abort":
            code = _say("Stopped.", 130)
        elif debug or not (known := _as_ours(error)):
            traceback.print_exc()
            code = 1
        else:
            code = _tell(known)
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _tell(error: SiliangError) -> int:
    from siliang.errors import language, shown
    from siliang.secrets import without_secrets

    alone = isinstance(error, RankError | DeviceMemoryError)  # not every rank may have it
    if os.environ.get("RANK", "0") != "0" and not alone:
        return error.exit_code
    stopped = isinstance(error, InterruptedRunError) and language() == "en"  # what the user asked for is no error
    return _say(without_secrets(str(error) if stopped else shown(error, language())), error.exit_code)


def _as_ours(error: Exception) -> SiliangError | None:
    """An error that is the machine's and not the program's, in our words."""
    from siliang.files import disk_error

    if isinstance(error, PermissionError):
        return OutputError(f"{error.filename}: permission denied.")
    if not isinstance(error, FileNotFoundError) and (message := disk_error(error)) is not None:
        return OutputError(f"{message}. What was saved before is whole.")
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return DeviceMemoryError("the memory is full. `siliang explain SLE08` says what to change.")
    return None


def _quieten_libraries() -> None:
    """Libraries' chatter off, unless the user turned it on: what matters we say ourselves. And no telemetry."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # that a kernel of the hub's is not installed, which 4-bit training would not use (models/few_bits.py)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
