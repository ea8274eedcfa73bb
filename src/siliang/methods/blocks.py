"""Which of a model's numbered layers are tuned: layers_to_transform and layers_pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from siliang.language import Bilingual
from siliang.safety.patterns import find
from siliang.types import TargetError, nearest


@dataclass(frozen=True)
class Blocks:
    """Which of the model's numbered layers are tuned.

    Attributes:
        numbers: Their numbers; None or empty for all.
        lists: The names of the lists that the numbers count in, such as "layers"; empty for any.
    """

    numbers: frozenset[int] | None = None
    lists: tuple[str, ...] = ()

    @classmethod
    def of(cls, numbers: list[int] | int | None, lists: list[str] | str | None) -> Blocks:
        """As `layers_to_transform` and `layers_pattern` have them."""
        chosen = None if numbers in (None, []) else frozenset([numbers] if isinstance(numbers, int) else numbers or ())
        return cls(chosen, (lists,) if lists and isinstance(lists, str) else tuple(lists or ()))

    def among(self, paths: Sequence[str]) -> list[str]:
        """Those of `paths` that are in one of these layers."""
        if self.numbers is None:
            return list(paths)
        return [p for p, number in zip(paths, self._numbers(paths), strict=True) if number in self.numbers]

    def check(self, paths: Sequence[str]) -> None:
        """
        Args:
            paths: Of all modules.

        Raises:
            TargetError: The model has no layer of a number, or layers_pattern names no list of layers.
        """
        if self.numbers is None:
            return
        for pattern, found in zip(self.lists, _numbers_after(self.lists, paths), strict=True):
            if all(number is None for number in found):
                lists = {path.split(".")[-2] for path in paths if path.rpartition(".")[2].isdigit() and "." in path}
                there_are = Bilingual(
                    f" There are {', '.join(sorted(lists)) or 'none'}.", f"现有：{'、'.join(sorted(lists)) or '无'}。"
                )
                hint = nearest(pattern, lists) or there_are
                raise TargetError(
                    Bilingual(
                        f"layers_pattern: {pattern!r} is the name of no list of layers in this model.{hint}",
                        f"layers_pattern：{pattern!r} 不是这个模型中任何层列表的名称。{hint.zh}",
                    )
                )
        there = {number for number in self._numbers(paths) if number is not None}
        if missing := sorted(self.numbers - there):
            known = (
                Bilingual(f"they go from {min(there)} to {max(there)}", f"层号从 {min(there)} 到 {max(there)}")
                if there
                else Bilingual("its layers have no numbers", "它的层没有编号")
            )
            raise TargetError(
                Bilingual(
                    f"layers_to_transform: the model has no layer {', '.join(map(str, missing))}: {known}.",
                    f"layers_to_transform：模型没有第 {'、'.join(map(str, missing))} 层：{known.zh}。",
                )
            )

    def _numbers(self, paths: Sequence[str]) -> list[int | None]:
        """The number of the model's layer that each path is in: the first number of the path, because later ones count
        experts and similar parts; with layers_pattern the first after the pattern's name.
        """
        found = _numbers_after(self.lists or [r"[^.]*"], paths)
        return [next((n for n in of_path if n is not None), None) for of_path in zip(*found, strict=True)]


ALL_BLOCKS = Blocks()


def _numbers_after(lists: Iterable[str], paths: Sequence[str]) -> list[list[int | None]]:
    """For each list's name, or pattern, the number that follows it in each path."""
    found = find("layers_pattern", list(lists), ["." + p for p in paths], around=(r".*?\.(?:", r")\.(\d+)(\.|$)"))
    return [[None if groups is None else int(groups[-2] or 0) for groups in one] for one in found]
