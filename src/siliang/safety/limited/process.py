"""The program of the process that runs untrusted input under limits of the operating system. See limits.py.

It imports the standard library, Jinja, `tokenizers`, language.py and this folder. So it starts in a tenth of a second,
and holds nothing of the calling process: no model, no data, no tokens in its environment.

It reads requests from its standard input and writes an answer to each: the length in 4 bytes, then JSON. An answer is
["result", value], ["error", texts] or ["limit", texts], where texts are the message in English and in Chinese.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the option -I starts Python without a path
    sys.path[:] = [path for path in sys.argv[1:] if Path(path).is_absolute()]

from siliang.language import Bilingual
from siliang.safety.limited.refused import LimitError, both_texts, error_line
from siliang.safety.limited.templates import compiled_template, render
from siliang.safety.limited.tokenizer_rules import check_tokenizer_rules

EXTRA_BYTES = 900 * 2**20  # of address space, beyond that at the start of the process

Groups = tuple[str | None, ...]


def match(patterns: list[str], texts: list[str], whole: bool) -> list[list[Groups | None] | str]:
    """For each pattern: the groups of each text, None without a match; or why it is not a pattern.

    Args:
        whole: The pattern must match the whole text, not only its beginning.
    """
    return [_match(pattern, texts, whole) for pattern in patterns]


def _match(pattern: str, texts: list[str], whole: bool) -> list[Groups | None] | str:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return error_line(error)
    match_text = compiled.fullmatch if whole else compiled.match
    return [None if (found := match_text(text)) is None else found.groups() for text in texts]


def _limit_the_process() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    pages = statm.read_text().split() if (statm := Path("/proc/self/statm")).is_file() else []
    if pages:  # Linux
        wanted = int(pages[0]) * os.sysconf("SC_PAGESIZE") + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))
    # no file can be opened or written and no process started, even by code that escapes Jinja's sandbox
    for name in ("RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC"):
        if (number := getattr(resource, name, None)) is not None:
            resource.setrlimit(number, (0, 0))


def _limit_the_time(seconds: float) -> None:
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def _preload() -> None:
    """Imports all modules, also those that Jinja imports on demand; later no file can be opened."""
    time.localtime()
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401
    import tokenizers  # noqa: F401

    compiled_template("{% generation %}{{ 1 | tojson }}{% endgeneration %}").render()
    compiled_template("{{ strftime_now('%Y') }}").render()


def _read(length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.read(0, length - len(parts))
        if not part:
            os._exit(0)  # the calling process is gone
        parts += part
    return bytes(parts)


def _write(answer: object) -> None:
    data = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    data = memoryview(len(data).to_bytes(4, "big") + data)
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    _preload()
    _limit_the_process()
    functions = {"render": partial(render, cache={}), "match": match, "check_tokenizer_rules": check_tokenizer_rules}
    _write(["result", None])
    while True:
        name, seconds, arguments = json.loads(_read(int.from_bytes(_read(4), "big")).decode("utf-8", "surrogatepass"))
        _limit_the_time(seconds)
        try:
            answer = ["result", functions[name](*arguments)]
        except LimitError as error:
            answer = ["limit", both_texts(error.message)]
        except MemoryError:
            most = EXTRA_BYTES // 2**20
            answer = [
                "limit",
                both_texts(Bilingual(f"it needs more than {most} MiB of memory", f"占用内存超过 {most} MiB")),
            ]
        except BaseException as error:  # an error of tokenizers is not an Exception
            answer = ["error", both_texts(error_line(error))]
        _write(answer)
        if answer[0] == "limit":
            os._exit(0)  # which frees the memory


if __name__ == "__main__":
    main()
