"""BD-LoRA: block-diagonal LoRA (Wang et al., 2025, arXiv:2510.23346), a variant of LoRA.

    y = W x + s B A x        A or B is block-diagonal, of N blocks

A server that cuts a layer over N devices then keeps that layer's adapter where its weights are, without exchanging what
is between A and B: A belongs in blocks where the inputs are cut (o_proj, down_proj), B where the outputs are (q_proj,
k_proj, v_proj, up_proj, gate_proj).

Shapes: A (R, I), stored (R, I / N); B (O, R), stored (O, R / N); I in, O out, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.fields import check_fields
from siliang.methods.layer import Layer, Weight, new_parameter
from siliang.methods.layer_method import check_divides
from siliang.methods.lora_linear import LoraLinear
from siliang.methods.low_rank import LoraSpec, MakeLowRank
from siliang.models.introspect import features
from siliang.types import ConfigError


@dataclass
class BdLoraConfig:
    """BD-LoRA's settings, with PEFT's names and defaults.

    Attributes:
        target_modules_bd_a: A is block-diagonal where one of these is in the layer's own name.
        target_modules_bd_b: B likewise.
        nblocks: How many blocks: the devices of the server.
        match_strict: Refuse layers that neither names. Otherwise they have LoRA.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.nblocks < 1:
            raise ConfigError(
                Bilingual(f"nblocks = {self.nblocks}: must be at least 1.", f"nblocks = {self.nblocks}：至少为 1。")
            )
        if both := sorted({*(self.target_modules_bd_a or [])} & {*(self.target_modules_bd_b or [])}):
            raise ConfigError(
                Bilingual(
                    f"target_modules_bd_a and target_modules_bd_b both have {both[0]!r}: choose one for it.",
                    f"target_modules_bd_a 和 target_modules_bd_b 都有 {both[0]!r}：请只放在其中一个。",
                )
            )


class BdLoraLinear(LoraLinear):
    """LoRA with A or B in blocks."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec, side: Literal["A", "B"], blocks: int) -> None:
        super().__init__(layer, name, spec)
        in_features, out_features = features(layer.base_layer)
        size = in_features if side == "A" else out_features
        check_divides("use_bdlora: nblocks", blocks, size, "inputs" if side == "A" else "outputs")
        if spec.r % blocks:
            raise ConfigError(
                Bilingual(
                    f"use_bdlora: nblocks = {blocks} must divide r = {spec.r} of each layer.",
                    f"use_bdlora：nblocks = {blocks} 须整除各层的 r = {spec.r}。",
                )
            )
        self._side, self._blocks = side, blocks
        shape = (spec.r, in_features // blocks) if side == "A" else (out_features, spec.r // blocks)
        zero = side == "B" and spec.init.draw_b is None
        start = nn.init.zeros_ if zero else nn.init.kaiming_uniform_
        layer.add_part(f"lora_{side}", name, Weight(new_parameter(layer, *shape, start=start)))

    @property
    def b(self) -> None:
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, one of them with zeros outside its blocks."""
        if self._side == "A":
            return torch.block_diag(*self.A.chunk(self._blocks)), self.B
        return self.A, torch.block_diag(*self.B.chunk(self._blocks))


def bdlora_on(settings: BdLoraConfig, path: str) -> MakeLowRank:
    """What makes BD-LoRA on the layer of this path; LoRA where no setting names it.

    Raises:
        ConfigError: Both settings name it, or none, with `match_strict`.
    """
    own = path.rpartition(".")[2]
    sides = (settings.target_modules_bd_a, settings.target_modules_bd_b)
    in_a, in_b = (any(part in own for part in names or ()) for names in sides)
    if in_a and in_b:
        raise ConfigError(
            Bilingual(
                f"use_bdlora: target_modules_bd_a and target_modules_bd_b both match {path}: it can have one.",
                f"use_bdlora：target_modules_bd_a 和 target_modules_bd_b 都匹配 {path}：只能匹配其中一个。",
            )
        )
    if not (in_a or in_b):
        if settings.match_strict:
            raise ConfigError(
                Bilingual(
                    f"use_bdlora: neither target_modules_bd_a nor target_modules_bd_b matches {path}: add it to one, "
                    "or set match_strict to false.",
                    f"use_bdlora：target_modules_bd_a 和 target_modules_bd_b 都不匹配 {path}："
                    "请加入其中一个，或把 match_strict 设为 false。",
                )
            )
        return LoraLinear
    return partial(BdLoraLinear, side="A" if in_a else "B", blocks=settings.nblocks)
