"""Merges an adapter into its base model, and proves that the merged model has the outputs of the unmerged one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siliang.callable_packages import make_callable
from siliang.language import Bilingual
from siliang.peft_api.model import PeftModel
from siliang.types import MergeError

# The largest difference of two logits, relative to the spread of the logits, that rounding to the dtype explains.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
LEAST_AGREEMENT = 0.99
LAST_POSITIONS = 32


@dataclass(frozen=True)
class MergeProof:
    """The difference between the merged and the unmerged model.

    Attributes:
        samples: Number of texts.
        positions: Number of compared outputs: of tokens, or, for a classifier, of texts.
        largest_difference: Largest difference of two logits, or, without logits, of two numbers of the last hidden
            states.
        spread: Standard deviation of the unmerged model's outputs, to which the difference is relative.
        top1_agreement: Share of predictions with the same first choice; None for hidden states.
        dtype: The saved dtype, in which both models computed.
    """

    samples: int
    positions: int
    largest_difference: float
    spread: float
    top1_agreement: float | None
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the outputs are the same, except for rounding."""
        limit = TOLERANCE[getattr(torch, self.dtype)] * max(self.spread, 1e-6)
        agrees = self.top1_agreement is None or self.top1_agreement >= LEAST_AGREEMENT
        return self.largest_difference <= limit and agrees

    def __str__(self) -> str:
        return str(self.in_words)

    @property
    def in_words(self) -> Bilingual:
        if self.top1_agreement is None:
            return Bilingual(
                f"largest difference of the last hidden states {self.largest_difference:.2e} (their spread "
                f"{self.spread:.2f}), at {self.positions:,} positions on {self.samples} samples, in {self.dtype}",
                f"最后一层隐藏状态的最大差异 {self.largest_difference:.2e}（标准差 {self.spread:.2f}），"
                f"{self.samples} 条样本、{self.positions:,} 个位置，精度 {self.dtype}",
            )
        share = 100 * self.top1_agreement
        return Bilingual(
            f"largest logit difference {self.largest_difference:.2e} (spread of the logits {self.spread:.2f}), "
            f"same first choice {share:.2f}% of {self.positions:,} predictions "
            f"on {self.samples} samples, in {self.dtype}",
            f"logits 的最大差异 {self.largest_difference:.2e}（logits 的标准差 {self.spread:.2f}），"
            f"{self.samples} 条样本、{self.positions:,} 个预测中首选一致的占 {share:.2f}%，精度 {self.dtype}",
        )


@torch.no_grad()
def merge_with_proof(model: PeftModel, samples: Sequence[dict[str, Tensor]]) -> tuple[nn.Module, MergeProof]:
    """Merges the active adapter, and compares the merged model with the unmerged one.

    Args:
        samples: Inputs of one text each, from the run's data: `input_ids` and `attention_mask` of shape (1, length).

    Returns:
        The plain merged base model, and the proof, which may not hold.

    Raises:
        MergeError: There are no samples.
    """
    if not samples:
        raise MergeError(
            Bilingual(
                "A merge is proved on samples of the data, and there are none.",
                "合并要用数据中的样本来验证，而这里没有样本。",
            )
        )
    model.eval()
    dtype = next(p.dtype for p in model.get_base_model().parameters() if p.is_floating_point())
    unmerged = [_compared(model(**sample)) for sample in samples]
    before, has_logits = [output for output, _ in unmerged], all(is_logits for _, is_logits in unmerged)
    merged = model.merge_and_unload().to(dtype).eval()  # trained heads are in fp32
    after = [_compared(merged(**sample))[0] for sample in samples]
    pairs = list(zip(before, after, strict=True))
    agreeing = sum(int((b.argmax(-1) == a.argmax(-1)).sum()) for b, a in pairs)
    positions = sum(b[..., 0].numel() for b in before)
    values = torch.cat([b.flatten() for b in before])
    proof = MergeProof(
        samples=len(samples),
        positions=positions,
        largest_difference=_nan_is_worst(max((float((b - a).abs().max()) for b, a in pairs), default=0.0)),
        spread=float(values.std() if values.numel() > 1 else values.abs().clamp(min=1.0).sum()),  # one alone
        top1_agreement=agreeing / positions if has_logits else None,
        dtype=str(dtype).removeprefix("torch."),
    )
    return merged, proof


def _compared(output: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
    """The compared outputs, and whether they are logits.

    The logits of a classifier, or of the last positions of a text, since all positions would not fit in memory; or the
    last hidden states of a model without logits.
    """
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], 1).float(), True
    is_logits = "logits" in output
    values = output["logits"] if is_logits else output["last_hidden_state"]
    return (values[:, -LAST_POSITIONS:] if values.dim() == 3 else values).float(), is_logits


def _nan_is_worst(value: float) -> float:
    return float("inf") if value != value else value


make_callable(__name__)
