"""Head only: the encoder is frozen, the task's new head is trained. The baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from siliang.methods.base import PeftConfig
from siliang.types import PeftType


@dataclass(kw_only=True)
class HeadConfig(PeftConfig):
    """Trains `modules_to_save`, which for a task with a head is that head, and nothing else."""

    peft_type: ClassVar[PeftType] = PeftType.HEAD
