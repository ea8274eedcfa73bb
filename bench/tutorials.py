"""The memory that tutorials report, and the plan of it, as they ran and as siliang runs.

python -m bench.tutorials            the table of docs/memory.md
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from siliang.config import RunConfig
from siliang.hardware import Choice
from siliang.plan import SHAPES, Baseline, Device, FakeRun
from siliang.plan.device import CUDA_CONTEXT_BYTES, CUDA_WORK_BYTES
from siliang.plan.rows import synthetic_row

GIB = 2**30  # what both Windows' task manager and nvidia-smi call a GB


@dataclass(frozen=True)
class Seen:
    """A peak that a tutorial reports.

    Attributes:
        gib: On the card, everything included.
        idle_gib: Of it, what was in use before.
        rows: Of a batch; 0: the model is only loaded.
        tokens: Of its longest row, which is where the run was cut.
    """

    what: str
    model: str
    method: str
    gib: float
    idle_gib: float
    rows: int
    tokens: int
    precision: Literal["fp32", "fp16"] = "fp32"
    checkpointing: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


_LORA = {"target_modules": ["q_proj", "v_proj"]}
_GLM = {"target_modules": ["query_key_value"]}
_PROMPT = {"num_virtual_tokens": 20}
SEEN = (
    Seen("full, batch 1", "bloom-1b4-zh", "full", 22.6, 1.1, 1, 256),
    Seen("BitFit, batch 1", "bloom-1b4-zh", "bitfit", 8.6, 1.1, 1, 256),
    Seen("LoRA, loaded", "Llama-2-7b", "lora", 14.9, 1.5, 0, 0, "fp16", arguments=_LORA),
    Seen("LoRA, batch 1", "Llama-2-7b", "lora", 19.1, 1.5, 1, 384, "fp16", arguments=_LORA),
    Seen("LoRA, batch 2", "Llama-2-7b", "lora", 23.4, 1.5, 2, 384, "fp16", arguments=_LORA),
    Seen("LoRA, batch 2, checkpointing", "Llama-2-7b", "lora", 15.8, 1.5, 2, 384, "fp16", True, _LORA),
    Seen("LoRA, loaded", "chatglm3-6b", "lora", 13.5, 1.2, 0, 0, "fp16", arguments=_GLM),
    Seen("LoRA, batch 2", "chatglm3-6b", "lora", 17.7, 1.2, 2, 384, "fp16", arguments=_GLM),
    Seen("full, 64 x 86", "chinese-roberta-wwm-ext", "full", 5.5, 0.0, 64, 86),
    Seen("prefix tuning, 64 x 86", "chinese-roberta-wwm-ext", "prefix_tuning", 4.5, 0.0, 64, 86, arguments=_PROMPT),
    Seen("prompt tuning, 64 x 86", "chinese-roberta-wwm-ext", "prompt_tuning", 5.0, 0.0, 64, 86, arguments=_PROMPT),
    Seen(
        "P-tuning, 64 x 86",
        "chinese-roberta-wwm-ext",
        "p_tuning",
        5.1,
        0.0,
        64,
        86,
        arguments=_PROMPT | {"encoder_hidden_size": 128},
    ),
    Seen(
        "LoRA, 64 x 86",
        "chinese-roberta-wwm-ext",
        "lora",
        4.8,
        0.0,
        64,
        86,
        arguments={"r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
    ),
)


def predict(seen: Seen, *, as_it_ran: bool) -> float:
    """GiB on the card, without what was in use before.

    Args:
        as_it_ran: As the tutorial ran it: padded, eager attention, all logits, its format; otherwise as siliang runs
            it, in the format of today's GPUs.
    """
    shape = SHAPES[seen.model]
    precision = Choice(seen.precision if as_it_ran else "bf16", "")
    config = RunConfig.build(
        {
            "model": seen.model,
            "task": shape.task.title,
            "method": {"name": seen.method, **seen.arguments},
            "data": {"train": "-", "max_length": max(seen.tokens, 8)},
            "train": {"batch_size": max(seen.rows, 1)},
            "output": "-",
        }
    )
    device = Device("cuda", None, "unknown", precision, CUDA_CONTEXT_BYTES, CUDA_WORK_BYTES, here=False)
    base_config = shape.config()
    base_config.num_labels = 2
    fake_run = FakeRun(config, base_config, device, baseline=Baseline("eager") if as_it_ran else None)
    if seen.rows == 0:
        loaded = fake_run.measure(fake_run.batches([synthetic_row(config, 8)]), phases=("loaded",))
        return (loaded.peaks["loaded"].nbytes + device.overhead_bytes) / GIB
    batches = fake_run.batches([synthetic_row(config, seen.tokens) for _ in range(seen.rows)])
    found = fake_run.measure(batches, recomputed=fake_run.layers if seen.checkpointing else 0)
    return (found.peaks["train"].nbytes + device.overhead_bytes) / GIB


def main() -> int:
    """Prints the table."""
    print("| model | what | seen | less idle | as it ran | error | as siliang runs it |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for seen in SEEN:
        there = seen.gib - seen.idle_gib
        as_it_ran, ours = predict(seen, as_it_ran=True), predict(seen, as_it_ran=False)
        print(
            f"| {seen.model} | {seen.what} | {seen.gib:.1f} | {there:.1f} | {as_it_ran:.1f} | "
            f"{100 * (as_it_ran / there - 1):+.0f}% | {ours:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
