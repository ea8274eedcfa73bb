"""Limits on time and memory for untrusted input: chat templates, patterns of module names, tokenizers.

They run in a separate process (limited/process.py) under limits of the operating system, because an alarm in this
process would not interrupt one long operation in C. The process starts on first use and stays, so that a request costs
one message there and one back. Each process that sends requests has its own; it ends with its owner.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import hashlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from siliang.language import Bilingual

T = TypeVar("T")

TOO_LONG = Bilingual("it runs for too long", "运行时间过长")

SECONDS = 4.0  # of CPU time for one request
PATTERN_SECONDS = 1.5  # for patterns of module names, which take milliseconds, and come in several requests
WAIT = 2 if sys.platform == "win32" else 10  # wall time over CPU time: the machine may be busy
START_SECONDS = 60.0
MOST_BYTES = 2**30  # of an answer
LARGE = 2**20  # characters: after a larger tokenizer the process ends, to free its memory
PASSED_ON = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")  # of the environment


class RefusedError(Exception):
    """The untrusted input cannot be used; the message is that of the error that it raised."""


class LimitError(RefusedError):
    """It took more time or memory than allowed."""


class TimeLimitError(LimitError):
    """It took more time than allowed."""


class LimitedProcess:
    """A process under limits that runs the functions of limited/process.py. Threads take turns.

    Attributes:
        templates: Hashes of the chat templates in the process's cache.
        tokenizers: Hashes of the tokenizers that have passed the check.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.templates: set[str] = set()
        self.tokenizers: set[str] = set()

    def call(self, name: str, *arguments: object, seconds: float | None = None) -> Any:
        """The function's result, as JSON returns it.

        Args:
            name: A function of limited/process.py.
            arguments: Values of JSON.
            seconds: Limit of CPU time; None for SECONDS.

        Raises:
            LimitError: It took more time or memory than allowed.
            RefusedError: It raised another error.
        """
        seconds = SECONDS if seconds is None else seconds
        with self._lock:
            try:
                process = self._started()
                until = time.monotonic() + WAIT * seconds
                _send(process, [name, seconds, arguments], until)
                kind, value = _receive(process, until)
            except TimeoutError:
                self._end()
                raise TimeLimitError(TOO_LONG) from None
            except (OSError, EOFError, ValueError, RecursionError):
                code = self._end()
                late = code is not None and -code == getattr(signal, "SIGXCPU", None)
                if late:
                    raise TimeLimitError(TOO_LONG) from None
                raise LimitError(Bilingual("it needs too much memory", "占用内存过多")) from None
            except BaseException:  # Ctrl-C before the answer: the next request would read it as its own
                self._end()
                raise
            if kind == "limit":
                self._end()
        if kind == "limit":
            raise LimitError(_bilingual(value))
        if kind == "error":
            raise RefusedError(_bilingual(value))
        return value

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            program = Path(__file__).with_name("limited") / "process.py"
            process = subprocess.Popen(
                [sys.executable, "-I", str(program), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ}
                | {"TOKENIZERS_PARALLELISM": "false"},
                # in a separate process group, so that Ctrl-C reaches only the calling process
                process_group=None if sys.platform == "win32" else 0,
            )
            self._process = process
            try:
                _receive(process, time.monotonic() + START_SECONDS)
            except (OSError, EOFError, ValueError) as error:
                self._end()
                raise RuntimeError(
                    Bilingual(
                        f"The process for templates and patterns does not start: {error!r}.",
                        f"处理模板和正则表达式的进程无法启动：{error!r}。",
                    )
                ) from error
            return process
        return self._process

    def _end(self) -> int | None:
        """Ends the process. Returns its exit code if it had ended by itself."""
        process, self._process = self._process, None
        self.templates.clear()
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2 if process.poll() is None and _hung_up(process) else 0)
        code = process.poll()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return code

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        with self._lock:
            self._end()

    def after_fork(self) -> None:
        """Drops the process in a forked child, since it belongs to the parent."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        self.templates = set()
        if process is not None:
            process.returncode = 0  # so that the child does not wait for it; the parent does
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _bilingual(texts: Sequence[str]) -> Bilingual:
    """A message of the process, which sends the English text and the Chinese one."""
    en, zh = texts
    return Bilingual(en, zh)


def _hung_up(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has closed its output: it is ending, and its exit code will follow."""
    if sys.platform == "win32" or process.stdout is None:
        return False
    poll = select.poll()
    poll.register(process.stdout, select.POLLHUP)
    return bool(poll.poll(0))


def _send(process: subprocess.Popen[bytes], message: object, until: float) -> None:
    assert process.stdin is not None
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    data = memoryview(len(data).to_bytes(4, "big") + data)
    if sys.platform == "win32":
        process.stdin.write(data)
        return
    pipe = process.stdin.fileno()
    os.set_blocking(pipe, False)
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    while data:
        try:
            data = data[os.write(pipe, data) :]
        except BlockingIOError:
            if not poll.poll(1000 * max(0.0, until - time.monotonic())):
                raise TimeoutError from None


def _receive(process: subprocess.Popen[bytes], until: float) -> tuple[str, Any]:
    """An answer of the process, as (kind, value).

    Raises:
        TimeoutError: It does not come in time.
        EOFError: The process has ended.
        ValueError: It is not an answer.
    """
    length = int.from_bytes(_read(process, 4, until), "big")
    if length > MOST_BYTES:
        raise ValueError(f"an answer of {length:,} bytes")
    kind, value = json.loads(_read(process, length, until).decode("utf-8", "surrogatepass"))
    return kind, value


def _read(process: subprocess.Popen[bytes], length: int, until: float) -> bytes:
    assert process.stdout is not None
    if sys.platform == "win32":  # which has no poll for pipes
        timer = threading.Timer(max(0.0, until - time.monotonic()), process.kill)
        timer.start()
        try:
            data = process.stdout.read(length) or b""
        finally:
            timer.cancel()
        if len(data) < length:
            raise TimeoutError if time.monotonic() >= until else EOFError
        return data
    pipe = process.stdout.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    parts = bytearray()
    while len(parts) < length:
        if not poll.poll(1000 * max(0.0, until - time.monotonic())):
            raise TimeoutError
        part = os.read(pipe, length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


_PROCESS = LimitedProcess()
atexit.register(_PROCESS.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.after_fork)


def render(
    template: str, names: Mapping[str, object], jobs: Sequence[tuple[object, object, bool, bool]]
) -> list[tuple[str, list[tuple[int, int]]] | str]:
    """Texts of a chat template: for each job (text, spans), or why it is refused; see limited/templates.py.

    Raises:
        LimitError: It takes too much time or memory, or writes too much.
        RefusedError: It is not a template.
    """
    key = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    results = _PROCESS.call("render", key, None, names, jobs) if key in _PROCESS.templates else None
    if results is None:  # the template is not in the process's cache
        results = _PROCESS.call("render", key, template, names, jobs)
        _PROCESS.templates.add(key)
    return [one if isinstance(one, str) else (one[0], [(start, end) for start, end in one[1]]) for one in results]


def check_tokenizer_rules(text: str) -> None:
    """Checks a tokenizer.json and tries its rules; each text is checked once.

    Raises:
        LimitError: It takes too much time or memory.
        RefusedError: It cannot be used; the message says why.
    """
    key = hashlib.sha256(text.encode()).hexdigest()
    if key in _PROCESS.tokenizers:
        return
    why = _PROCESS.call("check_tokenizer_rules", text, seconds=SECONDS + len(text) / 2**20)
    if len(text) > LARGE:
        _PROCESS.close()  # which frees its memory
    if why is not None:
        raise RefusedError(_bilingual(why))
    _PROCESS.tokenizers.add(key)


def run_in_time(function: Callable[[], T], seconds: float) -> T:
    """The result of a function that may run for too long, such as a tokenizer with untrusted patterns.

    It runs in a thread. A thread that takes too long is abandoned, and ends with this process.

    Args:
        function: The function. The limit assumes that this process computes little besides.
        seconds: Limit of CPU time of all threads of this process; the limit of wall time is WAIT times as long.

    Raises:
        LimitError: It takes longer.
        RefusedError: It ended in a panic of the tokenizers library, which is not an Exception.
    """
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    computed, until = time.process_time() + seconds, time.monotonic() + WAIT * seconds
    while True:
        try:
            result, error = results.get(timeout=min(0.5, seconds))
            break
        except queue.Empty:
            if time.process_time() > computed or time.monotonic() > until:
                raise TimeLimitError(Bilingual("it takes too long", "用时过长")) from None
    if error is not None and type(error).__name__ == "PanicException":
        raise RefusedError(str(error))
    if error is not None:
        raise error
    return cast(T, result)


def match(
    patterns: Iterable[str], texts: Sequence[str], *, whole: bool
) -> list[list[tuple[str | None, ...] | None] | str]:
    """For each pattern: the groups of each text, None without a match; or why it is not a pattern.

    Args:
        whole: The pattern must match the whole text, not only its beginning.

    Raises:
        LimitError: It takes too much time or memory.
    """
    results = _PROCESS.call("match", list(patterns), texts, whole, seconds=PATTERN_SECONDS)
    return [one if isinstance(one, str) else [None if g is None else tuple(g) for g in one] for one in results]
