"""Plans of earlier runs, kept by what they depend on: the settings, the model's config, the tokens, the code.

A plan also depends on the memory that is free, which is never twice the same. So a plan is kept, and used again, only
where memory is ample: then no layer recomputes, and the cache of frozen layers is whole, with more memory or with less.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

import siliang
from siliang.check import CheckInput
from siliang.config import RunConfig
from siliang.data.cache import cache_folder, prune, used
from siliang.files import write_text
from siliang.hardware import versions
from siliang.models.own_code import code_of
from siliang.plan.device import Device
from siliang.records import MethodPlan
from siliang.run_folder import stored_format

AMPLE = 8  # times the memory of a step: the shares of a budget (engine/budget.py) are above an eighth
MORE_BYTES = 2**31  # ... and what the engine sets aside for any model
FOLDER = "plans"
NOT_IN_KEY = {"output": True, "train": {"seed"}}


class KeptPlan(BaseModel):
    """A plan in the cache.

    Attributes:
        process_bytes: The process's memory at the time of planning.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    plan: MethodPlan
    process_bytes: int


def run_key(config: RunConfig) -> str:
    """The settings that a plan depends on. Runs that differ only in their seed have one plan."""
    return config.model_dump_json(exclude=NOT_IN_KEY)


def content_key(config: RunConfig, subject: CheckInput, device: Device) -> str:
    """All that a plan depends on besides the free memory, as a hash."""
    code, data = code_of(subject.model_config), subject.prepared
    known = [
        run_key(config),
        subject.model_config.to_json_string(use_diff=False),
        code.sha256 if code else None,
        str(stored_format(config.model, config.revision)),
        subject.invented,
        data.labels,
        data.in_windows,
        len(data.tokenizer),
        [device.kind, device.precision.precision, device.here, device.best.precision],
        versions(),
        _code_state(),
    ]
    digest = hashlib.sha256(json.dumps(known).encode())
    if not config.data.streaming:
        for part in _tokens(subject):
            digest.update(part)
    return digest.hexdigest()[:40]


def _tokens(subject: CheckInput) -> Iterator[bytes]:
    """The tokens of the training rows, and how many of them are learned."""
    train = subject.train
    yield train.lengths.tobytes()
    yield train.sequence_lengths.tobytes()
    yield train.learned.tobytes()
    for row in train.lists("input_ids"):
        yield row.tobytes()


@cache
def _code_state() -> str:
    """The state of siliang's own files, which a developer changes without changing the version."""
    folder = Path(siliang.__file__).parent
    states = ((path.relative_to(folder).as_posix(), path.stat()) for path in sorted(folder.rglob("*.py")))
    lines = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_plan(key: str, device: Device) -> KeptPlan | None:
    """The plan that was kept; None if there is none, if its file is damaged, or if memory is not ample now."""
    with suppress(OSError, ValueError, ValidationError):
        path = cache_folder() / FOLDER / f"{key}.json"
        kept = KeptPlan.model_validate_json(path.read_text(encoding="utf-8"))
        used(path.parent, path.name)
        return kept if _is_ample(kept.plan, device) else None
    return None


def keep_plan(key: str, plan: MethodPlan, device: Device) -> None:
    """Keeps a plan, if memory was ample. Does nothing if the disk is full or read-only."""
    if plan.error or plan.fits is not True or not _is_ample(plan, device):
        return
    with suppress(OSError):
        folder = cache_folder() / FOLDER
        folder.mkdir(exist_ok=True)
        prune(folder)
        kept = KeptPlan(plan=plan, process_bytes=device.process_bytes)
        write_text(folder / f"{key}.json", kept.model_dump_json())


def _is_ample(plan: MethodPlan, device: Device) -> bool:
    if device.memory_bytes is None or 0 < plan.recomputed_layers < plan.layers:
        return False
    tensors = max(plan.tensor_bytes, plan.loading_bytes - plan.overhead_bytes) + plan.frozen_bytes
    free = device.memory_bytes - device.overhead_bytes
    return plan.frozen_disk_bytes == 0 and free >= AMPLE * tensors + MORE_BYTES
