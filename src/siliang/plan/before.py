"""The plan in front of a run: told, and a run that would not fit refused or, where the user wants it, adapted."""

from __future__ import annotations

from collections.abc import Callable

from siliang.check import Subject
from siliang.config import RunConfig
from siliang.memory.size import show_bytes
from siliang.plan import plan
from siliang.plan.device import Device, find_target
from siliang.plan.record import Change, MethodPlan
from siliang.types import PlanError, SiliangError

SAME_RESULT = ("train.batch_size", "train.gradient_accumulation", "train.memory_budget")


def before_training(
    config: RunConfig, say: Callable[[str], None], *, subject: Subject | None = None, device: Device | None = None
) -> tuple[RunConfig, MethodPlan | None]:
    """Tells what the run will take.

    Args:
        subject: The run's data, where it has been read already.
        device: Instead of the one that is here.

    Returns:
        The config, changed where `train.fit` is on and it has to be; the plan, or None where none could be made, which
        is said and stops nothing.

    Raises:
        PlanError: The run will not fit.
    """
    device = device or find_target(config)
    try:
        found = plan(config, device, subject=subject, timed=False).methods[0]
        if found.error:
            raise PlanError(found.error)
    except SiliangError:
        raise  # the run itself would end with it
    except Exception as error:  # whatever a model of any kind does when its tensors have no values
        say(f"memory     not planned: {type(error).__name__}: {error}".partition("\n")[0])
        return config, None
    there = f"{show_bytes(device.memory_bytes)} {device.memory_source}" if device.memory_bytes else "of unknown size"
    twice = f", {found.recomputed_layers} of {found.layers} layers computing twice" if found.recomputed_layers else ""
    if found.fits is not False:
        say(f"memory     about {show_bytes(found.peak_bytes)} of {there}{twice} ({_parts(found)})")
        return config, found
    harmless = found.fit is not None and all(c.setting in SAME_RESULT for c in found.fit.changes)
    if config.train.fit and found.fit is not None and harmless:
        changed = apply(config, found.fit.changes)
        slower = f", {100 * (found.fit.time_factor - 1):.0f}% more time" if found.fit.time_factor > 1.005 else ""
        say(
            f"memory     about {show_bytes(found.peak_bytes)} of {there} do not fit; "
            f"{in_words(found.fit.changes)}: {show_bytes(found.fit.peak_bytes)}{slower}, with the same result"
        )
        found.peak_bytes = found.fit.peak_bytes
        return changed, found
    raise PlanError(
        f"This run needs about {show_bytes(found.peak_bytes)}, and {there} are there: {_parts(found)}.\n"
        + _advice(found, harmless=harmless)
    )


def apply(config: RunConfig, changes: list[Change]) -> RunConfig:
    """The config with these changes made."""
    import yaml

    values = config.model_dump(mode="json")
    for change in changes:
        *sections, last = change.setting.split(".")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[last] = yaml.safe_load(change.after)
    return RunConfig.build(values)


def in_words(changes: list[Change]) -> str:
    """The changes as --set takes them."""
    return " ".join(f"{change.setting}={change.after}" for change in changes)


def _parts(found: MethodPlan) -> str:
    parts = sorted(found.parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {show_bytes(nbytes)}" for name, nbytes in parts if nbytes)


def _advice(found: MethodPlan, *, harmless: bool) -> str:
    if found.fit is None:
        return "Nothing that can be changed makes it fit: take a smaller model, or another method (`siliang plan --method all`)."
    same = ", with the same result; or let train.fit=true do it" if harmless else ""
    return f"It fits ({show_bytes(found.fit.peak_bytes)}) with {in_words(found.fit.changes)}{same}."
