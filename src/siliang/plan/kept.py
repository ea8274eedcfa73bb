"""Plans of earlier runs, kept by what they depend on: the settings, the model's config, the tokens, the code.

A plan also depends on the memory that is free, which is never twice the same. So a plan is kept, and used again, only
where memory is ample: then no layer recomputes, and the cache of frozen layers is whole, with more memory or with less.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

import siliang
from siliang.check import CheckInput
from siliang.config import RunConfig
from siliang.data.cache import cache_folder, prune, used
from siliang.data.token_key import code_folders, code_hash
from siliang.files import write_text
from siliang.hardware import versions
from siliang.models.own_code import code_of
from siliang.plan.device import Device
from siliang.records import MethodPlan
from siliang.run_folder import kept_format, weight_dtype

AMPLE = 8  # times the memory of a step: the shares of a budget (engine/budget.py) are above an eighth
MORE_BYTES = 2**31  # ... and what the engine sets aside for any model
FOLDER = "plans"
NOT_IN_KEY = {"output": True, "train": {"seed"}}


class KeptPlan(BaseModel):
    """A plan in the cache.

    Attributes:
        process_bytes: The process's memory at the time of planning.
        seed: Of the run that was planned. With another one other rows are in the heaviest step.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    plan: MethodPlan
    process_bytes: int
    seed: int


def run_key(config: RunConfig) -> str:
    """The settings that a plan depends on. Runs that differ only in their seed have one plan."""
    return config.model_dump_json(exclude=NOT_IN_KEY)


def content_key(config: RunConfig, subject: CheckInput, device: Device) -> str | None:
    """All that a plan depends on besides the free memory and the seed, as a hash; None where some of it is code in no
    file, as of a notebook."""
    if (folders := _folders_outside(subject)) is None:
        return None
    code, data = code_of(subject.model_config), subject.prepared
    kept = kept_format(config, subject.method, weight_dtype(subject.method, device.precision), device.kind)
    known = [
        run_key(config),
        subject.model_config.to_json_string(use_diff=False),
        code.sha256 if code else None,
        str(kept),
        subject.invented,
        data.labels,
        data.in_windows,
        len(data.tokenizer),
        [device.kind, device.precision.precision, device.here, device.best.precision],
        versions(),
        _version("bitsandbytes") if config.quantization else None,
        _code_state(),
        [code_hash(folder) for folder in folders],
    ]
    digest = hashlib.sha256(json.dumps(known).encode())
    if not config.data.streaming:
        for part in _tokens(subject):
            digest.update(part)
    return digest.hexdigest()[:40]


def _tokens(subject: CheckInput) -> Iterator[bytes]:
    """The tokens of the training rows with their types, and how many of them are learned."""
    train = subject.train
    yield train.lengths.tobytes()
    yield train.sequence_lengths.tobytes()
    yield train.learned.tobytes()
    for name in ("input_ids", "token_type_ids"):
        if name in train.table.column_names:
            yield from (part.tobytes() for piece in train.pieces(name) for part in piece)


def _version(library: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(library)
    return None


def _folders_outside(subject: CheckInput) -> list[Path] | None:
    """Where the code of the method and of the task lies that is not siliang's; None where some is in no file."""
    kinds = [*type(subject.method).__mro__, *(subject.method.config.__mro__ if subject.method.config else ())]
    folders = set(code_folders(subject.task.data))
    for kind in kinds:
        if kind.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
            continue
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if file is None:
            return None
        folders.add(Path(file).parent)
    own = Path(siliang.__file__).parent
    return sorted(folder for folder in folders if not folder.is_relative_to(own))


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


def keep_plan(key: str, made: KeptPlan, device: Device) -> None:
    """Keeps a plan, if memory was ample. Does nothing if the disk is full or read-only."""
    plan = made.plan
    if plan.error or plan.fits is not True or not _is_ample(plan, device):
        return
    with suppress(OSError):
        folder = cache_folder() / FOLDER
        folder.mkdir(exist_ok=True)
        prune(folder)
        write_text(folder / f"{key}.json", made.model_dump_json())


def may_be_ample(device: Device, tensors: int = 0) -> bool:
    """Whether memory is ample for a plan of so many bytes of tensors."""
    if device.memory_bytes is None:
        return False
    return device.memory_bytes - device.overhead_bytes >= AMPLE * tensors + MORE_BYTES


def _is_ample(plan: MethodPlan, device: Device) -> bool:
    if 0 < plan.recomputed_layers < plan.layers or plan.frozen_disk_bytes:
        return False
    tensors = max(plan.tensor_bytes, plan.loading_bytes - plan.overhead_bytes) + plan.frozen_bytes
    return may_be_ample(device, tensors)
