"""Regular expressions of a config, matched against the names of modules.

A config may be untrusted, and a short expression can take forever to match, or gigabytes to compile. So only plain
names are matched in this process; all other expressions are matched in the limited process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from siliang.language import Bilingual, local
from siliang.safety.limits import LimitError, TimeLimitError, match
from siliang.secrets import short_repr
from siliang.types import TargetError

# plain names, with escaped signs: without groups and repetitions there is no backtracking
PLAIN = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])*\$?", re.ASCII)
MOST_HERE = 1_000_000  # names times plain expressions that are matched in this process

Groups = tuple[str | None, ...]


def find(
    field: str,
    patterns: Sequence[str],
    texts: Sequence[str],
    *,
    around: tuple[str, str] = ("", ""),
    whole: bool = False,
) -> list[list[Groups | None]]:
    """For each pattern and each text, the pattern's groups; None without a match.

    Args:
        field: The setting with the patterns, for errors.
        around: Expressions before and after each pattern.
        whole: The pattern must match the whole text, not only its beginning.

    Raises:
        TargetError: A pattern is not a regular expression, or takes too much time or memory.
    """
    before, after = around
    full = [f"{before}{pattern}{after}" for pattern in patterns]
    if len(patterns) * len(texts) <= MOST_HERE and all(PLAIN.fullmatch(p) for p in patterns):
        return [[_groups(re.compile(p), text, whole) for text in texts] for p in full]
    try:
        matches: list[list[Groups | None]] = []
        for pattern, result in zip(patterns, match(full, texts, whole=whole), strict=True):
            if isinstance(result, str):
                (alone,) = match([pattern], [], whole=whole)  # its message has the position within the pattern itself
                why = alone if isinstance(alone, str) else result
                raise TargetError(
                    Bilingual(
                        f"{field}: {short_repr(pattern)} is not a regular expression: {why}.",
                        f"{field}：{short_repr(pattern)} 不是正则表达式：{local(why, 'zh')}。",
                    )
                )
            matches.append(result)
    except LimitError as error:
        which = short_repr(patterns[0]) if len(patterns) == 1 else Bilingual("a pattern", "有一个表达式")
        why = (
            Bilingual("takes too long to match", "匹配时间过长")
            if isinstance(error, TimeLimitError)
            else Bilingual("takes too much memory", "占用内存过多")
        )
        raise TargetError(
            Bilingual(
                f"{field}: {which} {why}: simplify it.",
                f"{field}：{local(which, 'zh')} {why.zh}：请简化它。",
            )
        ) from None
    return matches


def _groups(pattern: re.Pattern[str], text: str, whole: bool) -> Groups | None:
    result = pattern.fullmatch(text) if whole else pattern.match(text)
    return None if result is None else result.groups()
