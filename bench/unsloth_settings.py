"""How Unsloth's CPU backend is told its settings: by environment variables, which it reads when it is imported."""

from __future__ import annotations

from bench.record import Job


def variables_of(job: Job, *, native_bf16: bool) -> dict[str, str]:
    """The environment of a setting; Unsloth reads it when it is imported."""
    return {
        "UNSLOTH_CPU_BF16": str(int(native_bf16)),
        "UNSLOTH_CPU_FROZEN_BF16": str(int(job.setting.dtype == "bf16 storage")),
        "UNSLOTH_CPU_COMPILE": str(int("compiled" in job.setting.options)),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
