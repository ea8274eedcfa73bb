"""The settings of the peers, and the search for the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.record import Option, Setting
from bench.workloads import Layout, Library, Method, Workload
from siliang.types import TaskType

DEFAULT = Setting(dtype="fp32", layout="padded")  # of the libraries, without settings
DTYPES: dict[Library, tuple[str, ...]] = {"unsloth": ("fp32", "bf16 storage", "bf16 weights", "bf16 autocast")}
OTHERS = ("fp32", "bf16 weights", "bf16 autocast")
WITHOUT_BF16 = ("fp32", "bf16 storage")
Tried = tuple[float, Library, Setting]  # tokens per second


def search(
    library: Library, workload: Workload, speed: Callable[[Setting], float | None], *, bf16: bool
) -> list[Tried]:
    """The settings that work, the fastest first. One part of the setting is chosen after another: the number format,
    the layout of batches, then each option.

    Args:
        speed: Tokens per second with a setting; None where the library cannot do it.
        bf16: Try formats that only compute well where the processor has bf16.
    """
    tried: list[Tried] = []

    def best_of(settings: Iterator[Setting]) -> None:
        for setting in settings:
            found = speed(setting)
            if found is not None:
                tried.append((found, library, setting))
        tried.sort(key=lambda t: -t[0])

    first: Layout = "grouped" if "grouped" in workload.layouts[library] else "padded"
    dtypes: Any = [d for d in DTYPES.get(library, OTHERS) if bf16 or d in WITHOUT_BF16]
    best_of(Setting(dtype=d, layout=first) for d in dtypes)
    best = tried[0][2] if tried else DEFAULT
    best_of(_changed(best, layout=layout) for layout in workload.layouts[library] if layout != first)
    for option in options(library, workload):
        if tried:
            best_of(iter([_changed(tried[0][2], options=[*tried[0][2].options, option])]))
    return tried


def trains(library: Library, method: Method) -> bool:
    """Whether a library has a method; what it has not is left out."""
    if library == "unsloth":
        return method.peft == "LoraConfig"
    return library != "swift" or (method.peft == "LoraConfig" and not method.quantized)


def options(library: Library, workload: Workload) -> tuple[Option, ...]:
    """What else can be switched on."""
    if library == "unsloth":
        return ("compiled",)
    return ("reference first",) if workload.task is TaskType.PREFERENCE else ()


def chosen(workload: Workload, tried: list[Tried], peers: list[Library]) -> list[tuple[Library, Setting]]:
    """What is timed: each peer's two fastest settings, since a search has few steps, the fastest of each layout that a
    target names, and a peer without settings.

    Args:
        tried: The fastest first.
        peers: The first of them is timed without settings, too; none if empty.
    """
    found: list[tuple[Library, Setting]] = []
    for _, peer, setting in tried:
        if sum(p == peer for p, _ in found) < 2:
            found.append((peer, setting))
    entries: list[tuple[Library, Setting]] = [(peer, setting) for _, peer, setting in tried]
    for layout in (t.against for t in workload.targets):
        found += [entry for entry in entries if entry[1].layout == layout][:1]
    without: list[tuple[Library, Setting]] = [(peer, DEFAULT) for peer in peers[:1]]
    found += without
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def _changed(setting: Setting, **values: Any) -> Setting:
    return setting.model_copy(update=values)
