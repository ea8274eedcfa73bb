"""The plan in front of a run: told, and a run that would not fit refused or, where the user wants it, adapted."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.distributed.device_mesh import DeviceMesh

from siliang.check import Subject
from siliang.config import RunConfig
from siliang.plan import plan
from siliang.plan.device import Device, find_target, in_this_process, shared_by
from siliang.plan.history import remember
from siliang.records import Change, MethodPlan, Record
from siliang.safe_yaml import parse_yaml
from siliang.train.run import Predicted
from siliang.types import PlanError
from siliang.units import show_bytes

SAME_RESULT = ("train.batch_size", "train.gradient_accumulation", "train.memory_budget")


class Planner:
    """Plans runs that are about to start in this process; for one that differs by its seed alone, once.

    Attributes:
        device: For which; None for the one that is here.
        found: The last plan.
    """

    def __init__(self, device: Device | None = None) -> None:
        self.device = device
        self.found: MethodPlan | None = None
        self._before_bytes = 0
        self._known: dict[str, MethodPlan] = {}

    def __call__(
        self, config: RunConfig, subject: Subject, say: Callable[[str], None], mesh: DeviceMesh | None = None
    ) -> tuple[RunConfig, Predicted]:
        """Tells what the run will take.

        Args:
            subject: The run's data, which has been read already.
            mesh: The ranks of the run, where it has several.

        Returns:
            The config, changed where `train.fit` is on and it has to be, and with the strategy of several ranks; what
            was predicted, as the record will measure it. Nothing where no plan could be made, which is said and stops
            nothing.

        Raises:
            PlanError: The run will not fit.
        """
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = self.device or in_this_process(shared_by(find_target(config), processes))
        # a card's context is there before its allocator counts
        uncounted = device.beside_bytes if device.kind == "cuda" else 0
        self._before_bytes, self.found = device.beside_bytes - uncounted, None
        key = config.model_dump_json(exclude={"output": True, "train": {"seed"}})
        found = self._known.get(key)
        if found is None or found.fits is False:
            found = plan(config, device, subject=subject, timed=False, mesh=mesh).methods[0]
        if found.error:
            say(f"memory     {found.error}")  # what is the run's own fault stops it soon
            return config, Predicted()
        found = self.found = self._known[key] = _on(found, device)
        if found.strategy:
            config = config.with_strategy(found.strategy)
        config = settle(config, found, device, say)
        parts = {**found.parts, "overhead": found.overhead_bytes - uncounted}
        return config, Predicted(parts, found.loading_bytes - uncounted)

    def remember(self, record: Record) -> None:
        """Lets later plans know what this run really took."""
        if self.found is not None:
            remember(record.device.name, record.memory.steps_bytes - self._before_bytes - self.found.tensor_bytes)


def _on(found: MethodPlan, device: Device) -> MethodPlan:
    """A plan that was made before, on what the process holds by now."""
    more = device.overhead_bytes - found.overhead_bytes
    changed = {"overhead_bytes": device.overhead_bytes, "peak_bytes": found.peak_bytes + more}
    changed["loading_bytes"] = found.loading_bytes + more
    return found.model_copy(update=changed)


def settle(config: RunConfig, found: MethodPlan, device: Device, say: Callable[[str], None]) -> RunConfig:
    """Says that a run fits, or makes it fit.

    Raises:
        PlanError: It does not, and may not be changed.
    """
    there = f"{show_bytes(device.memory_bytes)} {device.memory_source}" if device.memory_bytes else "of unknown size"
    twice = f", {found.recomputed_layers} of {found.layers} layers computing twice" if found.recomputed_layers else ""
    each = " on each device" if found.strategy else ""
    dealt = f"{each}, weights dealt out (fsdp)" if found.strategy == "fsdp" else each
    loading = f"loading {show_bytes(found.loading_bytes)}"
    if found.fits is not False:
        larger = f"{loading}, the steps {show_bytes(found.peak_bytes)}: "
        larger = larger if found.loading_bytes > found.peak_bytes else ""
        say(f"memory     about {show_bytes(found.needed_bytes)} of {there}{dealt}{twice} ({larger}{_parts(found)})")
        return config
    harmless = found.fit is not None and all(c.setting in SAME_RESULT for c in found.fit.changes)
    if config.train.fit and found.fit is not None and harmless:
        changed = apply(config, found.fit.changes)
        slower = f", {100 * (found.fit.time_factor - 1):.0f}% more time" if found.fit.time_factor > 1.005 else ""
        say(
            f"memory     about {show_bytes(found.peak_bytes)} of {there} do not fit; "
            f"{in_words(found.fit.changes)}: {show_bytes(found.fit.peak_bytes)}{slower}, with the same result"
        )
        found.peak_bytes, found.parts = found.fit.peak_bytes, found.fit.parts
        return changed
    what = f"{loading}, the steps {show_bytes(found.peak_bytes)}" if found.loading_bytes > found.peak_bytes else ""
    raise PlanError(
        f"This run needs about {show_bytes(found.needed_bytes)}{dealt}, and {there} are there: "
        f"{what or _parts(found)}.\n" + _advice(found, harmless=harmless)
    )


def apply(config: RunConfig, changes: list[Change]) -> RunConfig:
    """The config with these changes made."""
    values = config.model_dump(mode="json")
    for change in changes:
        *sections, last = change.setting.split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = parse_yaml(change.after)
    return RunConfig.build(values)


def in_words(changes: list[Change]) -> str:
    """The changes as --set takes them."""
    return " ".join(f"{change.setting}={change.after}" for change in changes)


def _parts(found: MethodPlan) -> str:
    parts = sorted(found.parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {show_bytes(nbytes)}" for name, nbytes in parts if nbytes)


def _advice(found: MethodPlan, *, harmless: bool) -> str:
    if found.fit is None:
        return "No setting makes it fit: take a smaller model, or another method (`siliang plan --method all`)."
    same = ", with the same result; or let train.fit=true do it" if harmless else ""
    return f"It fits ({show_bytes(found.fit.peak_bytes)}) with {in_words(found.fit.changes)}{same}."
