"""Settings by the layers' names: rank_pattern and alpha_pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from siliang.language import Bilingual
from siliang.methods.find_targets import samples
from siliang.safety.patterns import find
from siliang.types import TargetError, nearest

T = TypeVar("T")

ENDINGS = (r"(.*\.)?(", ")$")  # as PEFT matches these keys, but for one method's


class LayerPatterns(Generic[T]):
    """rank_pattern or alpha_pattern, matched against the layers' paths: the first key that matches counts.

    Args:
        field: Its name.
        patterns: Its keys and values.
        paths: Of the layers.
        around: Expressions before and after each key; of these a key means a whole path, or its ending.

    Raises:
        TargetError: A key cannot be matched.
    """

    def __init__(
        self, field: str, patterns: Mapping[str, T], paths: Sequence[str], around: tuple[str, str] = ENDINGS
    ) -> None:
        self._field, self._patterns, self._paths = field, patterns, paths
        found = find(field, list(patterns), paths, around=around)
        self._hits = {
            key: {path for path, groups in zip(paths, one, strict=True) if groups is not None}
            for key, one in zip(patterns, found, strict=True)
        }

    def check_effect(self) -> None:
        """
        Raises:
            TargetError: A key matches none of the layers.
        """
        unused = next((key for key, hits in self._hits.items() if not hits), None)
        if unused is not None:
            hint = nearest(unused, {p.rpartition(".")[2] for p in self._paths}) or nearest(unused, self._paths)
            raise TargetError(
                Bilingual(
                    f"{self._field}: {unused!r} matches none of the layers that are tuned.{hint} "
                    f"They are like {samples(self._paths)}.",
                    f"{self._field}：{unused!r} 与所微调的层都不匹配。{hint.zh}层名形如 {samples(self._paths)}。",
                )
            )

    @property
    def values(self) -> dict[str, T]:
        """The value of each path that a key matches."""
        return self._in_order(self._patterns)

    def in_any_order(self) -> dict[str, T]:
        """Patterns that have the same effect in any order: siliang and PEFT sort the keys of the file.

        Where several match one layer and sorting changes which is the first, each layer has a key of its own.
        """
        wanted = self.values
        if self._in_order(sorted(self._patterns)) == wanted:
            return dict(self._patterns)
        return {f"^{re.escape(path)}$": wanted[path] for path in self._paths if path in wanted}

    def _in_order(self, keys: Iterable[str]) -> dict[str, T]:
        found: dict[str, T] = {}
        for key in keys:
            for path in self._hits[key]:
                found.setdefault(path, self._patterns[key])
        return found
