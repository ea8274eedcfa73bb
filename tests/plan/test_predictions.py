"""What the plan says, beside what torch's own allocator counts in a real step."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.memory import Case, measure, predict
from siliang.memory.track import Tracker
from siliang.plan.fake import fake_mode, make_fake_base
from siliang.plan.shapes import SHAPES
from siliang.tasks import SEQ_CLS

# of the table of docs/memory.md, each model, method, layout and format at least once
SAMPLE = [
    Case("llama", "prefix_tuning", True, True, "bf16"),
    Case("llama", "full", False, False, "bf16"),
    Case("bloom", "bitfit", True, True, "bf16"),
    Case("bloom", "lora", False, True, "nf4"),
    Case("bert", "ia3", False, True, "bf16"),
    Case("bert", "head", False, False, "fp32"),
    Case("t5", "ln_tuning", True, False, "fp32"),
    Case("chatglm", "p_tuning", False, True, "nf4"),
    Case("chatglm", "prompt_tuning", True, False, "fp32"),
    Case("mixtral", "lora", False, True, "fp32", settings="experts"),
    Case("convbert", "lora", False, False, "fp32", settings="pointwise"),
    Case("llama", "lora", False, True, "fp32", settings="corda"),
    Case("bert", "full", False, True, "fp32", ranks=2),
    Case("llama", "lora", False, True, "fp32", shared=True),
    Case("bloom", "lora", True, True, "bf16", shared=True),
    Case("embedder", "lora", False, True, "fp32"),
    Case("llama", "lora", False, True, "kept"),
    *(Case(f"bert-{problem}", "lora", False, True, "fp32") for problem in ("several_labels", "number", "ordered")),
]
# and in `make test-long`
MORE = [
    Case("llama", "prefix_tuning", False, True, "bf16", shared=True),
    Case("llama", "prompt_tuning", False, True, "fp32", shared=True),
    Case("bloom", "bitfit", False, True, "nf4", shared=True),
    Case("qwen3_moe", "lora", True, True, "bf16", settings="experts"),
    Case("convbert", "lora", True, False, "bf16", settings="pointwise-dora"),
    Case("llama", "lora", False, True, "fp32", settings="pissa"),
    Case("llama", "lora", False, True, "bf16", settings="mica"),
    Case("llama", "lora", False, True, "fp32", settings="lora_ga"),
    Case("llama", "lora", False, True, "int8"),
    Case("llama", "lora", False, True, "fp32"),
    Case("bloom", "prefix_tuning", True, True, "kept"),
    Case("bert", "ia3", False, False, "kept"),
    Case("t5", "lora", False, False, "kept"),
    Case("bloom", "prefix_tuning", True, True, "nf4"),
    Case("llama", "lora", True, True, "fp32", ranks=2),
    Case("bloom", "lora", False, True, "nf4", ranks=2),
    Case("embedder", "full", False, False, "fp32"),
    Case("embedder-llama", "lora", False, True, "bf16"),
    Case("reranker", "lora", False, True, "fp32"),
]


@pytest.mark.parametrize("case", [*SAMPLE, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)], ids=str)
def test_within_two_per_cent(case: Case, tmp_path: Path) -> None:
    assert predict(case, tmp_path) == pytest.approx(measure(case, tmp_path), rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_parameters(name: str) -> None:
    import torch
    from transformers import AutoModel

    shape = SHAPES[name]
    with fake_mode():
        if shape.task is SEQ_CLS:
            model = AutoModel.from_config(shape.config())  # an encoder's are counted with its pooler, without a head
        else:
            model = make_fake_base(shape.config(), shape.task.model, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_what_is_counted() -> None:
    """By hand: what lives, what has gone, what a block is rounded up to."""
    import torch

    tracker = Tracker(block_bytes=512)
    with tracker:
        a = torch.zeros(1000)  # 4000 bytes, 8 blocks
        b = a + 1
        view = b[10:]
        del a, b
        c = view * 2
    assert tracker.peak_bytes == 3 * 4096 - 4096 + 0 * len(c)  # a is gone before c comes
    assert tracker.live_bytes == 2 * 4096
    assert sum(tracker.peak().parts.values()) == tracker.peak_bytes
