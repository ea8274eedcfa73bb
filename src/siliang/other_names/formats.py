"""What others call number formats."""

from __future__ import annotations

DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "float": "fp32", "no": "fp32",
    "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32",
}  # fmt: skip


def dtypes(setting: str) -> dict[str, str | None]:
    """Others' number formats, as values of a setting."""
    return {theirs: f"{setting}={ours}" for theirs, ours in DTYPES.items()}
