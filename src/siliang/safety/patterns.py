"""Regular expressions in a config, matched against the names of modules. A config may be a stranger's, and a short
expression can take for ever to match, or gigabytes to be compiled: those with anything but names in them are matched in
the process under limits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from siliang.language import Bilingual, local
from siliang.safety.limits import LimitError, TimeLimitError, match
from siliang.secrets import short_repr
from siliang.types import TargetError

# names, with escaped signs: without groups and repetitions there is nothing to go back to
PLAIN = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])*\$?", re.ASCII)
MOST_HERE = 1_000_000  # names times expressions that are matched in this process

Groups = tuple[str | None, ...]


def find(
    field: str,
    patterns: Sequence[str],
    texts: Sequence[str],
    *,
    around: tuple[str, str] = ("", ""),
    whole: bool = False,
) -> list[list[Groups | None]]:
    """For each pattern and each text the pattern's groups; None where it does not match.

    Args:
        field: Where the patterns stand, for errors.
        around: What is matched before and behind each pattern.
        whole: The pattern must match the whole text, not only its beginning.

    Raises:
        TargetError: One is not a regular expression, or takes too long, or too much memory.
    """
    before, behind = around
    full = [f"{before}{pattern}{behind}" for pattern in patterns]
    if len(patterns) * len(texts) <= MOST_HERE and all(PLAIN.fullmatch(p) for p in patterns):
        return [[_groups(re.compile(p), text, whole) for text in texts] for p in full]
    try:
        found = match(full, texts, whole=whole)
        bad = next((i for i, one in enumerate(found) if isinstance(one, str)), None)
        if bad is not None:
            (alone,) = match([patterns[bad]], [], whole=whole)  # says where in the pattern itself
            why = alone if isinstance(alone, str) else found[bad]
            raise TargetError(
                Bilingual(
                    f"{field}: {short_repr(patterns[bad])} is not a regular expression: {why}.",
                    f"{field}：{short_repr(patterns[bad])} 不是正则表达式：{local(why, 'zh')}。",
                )
            )
    except LimitError as error:
        which = short_repr(patterns[0]) if len(patterns) == 1 else Bilingual("a pattern", "有一个表达式")
        why = (
            Bilingual("takes too long to match", "匹配时间过长")
            if isinstance(error, TimeLimitError)
            else Bilingual("takes too much memory", "占用内存过多")
        )
        raise TargetError(
            Bilingual(
                f"{field}: {which} {why}: write it more simply.",
                f"{field}：{local(which, 'zh')} {why.zh}：请写得简单些。",
            )
        ) from None
    return [[None if groups is None else tuple(groups) for groups in one] for one in found]


def _groups(pattern: re.Pattern[str], text: str, whole: bool) -> Groups | None:
    found = pattern.fullmatch(text) if whole else pattern.match(text)
    return None if found is None else found.groups()
