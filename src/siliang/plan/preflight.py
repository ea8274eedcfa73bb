"""The plan before a run starts. It is shown, and a run that does not fit is refused or, if allowed, changed."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.distributed.device_mesh import DeviceMesh

from siliang.check import Subject
from siliang.config import RunConfig
from siliang.plan import plan
from siliang.plan.device import Device, find_target, in_this_process, shared_by
from siliang.plan.history import record_work
from siliang.records import Change, MethodPlan, Predicted, Record
from siliang.safe_yaml import parse_yaml
from siliang.types import PlanError
from siliang.units import show_bytes

SAME_RESULT = ("train.batch_size", "train.gradient_accumulation", "train.memory_budget")


class Planner:
    """Plans runs that are about to start in this process; for one that differs by its seed alone, once.

    Attributes:
        device: The device to plan for; None for the one that is here.
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
        """Says what the run will take.

        Args:
            subject: The run's data, which has been read already.
            mesh: The ranks of the run, where it has several.

        Returns:
            The config, changed where it has to be and `train.fit` allows it, and with the strategy of several ranks;
            the prediction, as the record will measure it. Where no plan can be made, that is said, the run continues,
            and the prediction is empty.

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
            found = plan(
                config, device, data=subject.prepared, invented=subject.invented, timed=False, mesh=mesh
            ).methods[0]
        if found.error:
            say(f"memory     {found.error}")  # what is the run's own fault stops it soon
            return config, Predicted()
        found = self.found = self._known[key] = _rebased(found, device)
        if found.strategy:
            config = config.with_strategy(found.strategy)
        config = apply_plan(config, found, device, say)
        parts = {**found.parts, "overhead": found.overhead_bytes - uncounted}
        return config, Predicted(parts, found.loading_bytes - uncounted)

    def calibrate(self, record: Record) -> None:
        """Keeps what this run really took, for later plans."""
        if self.found is not None:
            record_work(record.device.name, record.memory.steps_bytes - self._before_bytes - self.found.tensor_bytes)


def _rebased(found: MethodPlan, device: Device) -> MethodPlan:
    """A plan that was made before, with what the process holds by now."""
    more = device.overhead_bytes - found.overhead_bytes
    changed = {"overhead_bytes": device.overhead_bytes, "peak_bytes": found.peak_bytes + more}
    changed["loading_bytes"] = found.loading_bytes + more
    return found.model_copy(update=changed)


def apply_plan(config: RunConfig, found: MethodPlan, device: Device, say: Callable[[str], None]) -> RunConfig:
    """Says that a run fits, or makes it fit.

    Raises:
        PlanError: It does not, and may not be changed.
    """
    there = f"{show_bytes(device.memory_bytes)} {device.memory_source}" if device.memory_bytes else "of unknown size"
    twice = f", {found.recomputed_layers} of {found.layers} layers recomputing" if found.recomputed_layers else ""
    each = " on each device" if found.strategy else ""
    where = f"{each}, weights sharded (fsdp)" if found.strategy == "fsdp" else each
    loading = f"loading {show_bytes(found.loading_bytes)}"
    if found.fits is not False:
        larger = f"{loading}, the steps {show_bytes(found.peak_bytes)}: "
        larger = larger if found.loading_bytes > found.peak_bytes else ""
        say(f"memory     about {show_bytes(found.needed_bytes)} of {there}{where}{twice} ({larger}{_parts(found)})")
        return config
    harmless = found.fit is not None and all(c.setting in SAME_RESULT for c in found.fit.changes)
    if config.train.fit and found.fit is not None and harmless:
        changed = with_changes(config, found.fit.changes)
        slower = f", {100 * (found.fit.time_factor - 1):.0f}% more time" if found.fit.time_factor > 1.005 else ""
        say(
            f"memory     about {show_bytes(found.peak_bytes)} of {there} do not fit; "
            f"{in_words(found.fit.changes)}: {show_bytes(found.fit.peak_bytes)}{slower}, with the same result"
        )
        found.peak_bytes, found.parts = found.fit.peak_bytes, found.fit.parts
        return changed
    what = f"{loading}, the steps {show_bytes(found.peak_bytes)}" if found.loading_bytes > found.peak_bytes else ""
    raise PlanError(
        f"This run needs about {show_bytes(found.needed_bytes)}{where}, and {there} are there: "
        f"{what or _parts(found)}.\n" + _advice(found, harmless=harmless)
    )


def with_changes(config: RunConfig, changes: list[Change]) -> RunConfig:
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
