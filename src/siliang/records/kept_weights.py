"""What it saves that frozen weights stay in the format of the model's files: in a plan, and in a run's record."""

from __future__ import annotations

from typing import Literal

from siliang.language import Bilingual
from siliang.records.saved import Count, Part
from siliang.units import show_bytes


class KeptWeights(Part):
    """Frozen matrices that are not converted to fp32 when they are loaded."""

    format: Literal["bf16", "fp16"]
    """That of the model's files."""
    matrices: Count
    """How many they are."""
    saved_bytes: Count
    """What they would take more in fp32."""

    @property
    def in_words(self) -> Bilingual:
        """The same in a sentence without its end."""
        n, saved = self.matrices, show_bytes(self.saved_bytes)
        return Bilingual(
            f"{n:,} frozen matrices stay in {self.format}, as in the model's files: {saved} less than in fp32 "
            "(train.frozen_weights)",
            f"{n:,} 个冻结矩阵保持模型文件中的 {self.format}，比转换为 fp32 少占 {saved}（train.frozen_weights）",
        )
