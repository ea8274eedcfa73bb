"""LoRA on an embedding.

    y = W[x] + s (A[:, x])^T B^T        A = 0 and B normal at the start

With MiCA, B is that of W^T and is not trained; LoftQ works too. The other initializations are for linear layers: as in
PEFT, an embedding among the targets has the usual one.

Shapes: W (V, D), A (R, V), B (D, R); V rows of the table, D columns, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.methods.layer import BaseForward, Layer, trained_dtype
from siliang.methods.lora_initialization import Factors
from siliang.methods.low_rank import LoraSpec, LowRank, factors_of


class LoraEmbedding(LowRank):
    """A low-rank update of an embedding: `lora_embedding_A.<adapter>` (R, V), `lora_embedding_B.<adapter>` (D, R)."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        weight = layer.base_layer.weight
        place = {"device": weight.device, "dtype": trained_dtype(weight)}
        init, r = spec.init, spec.r
        if init.of_table is not None:
            r = init.rank(r, min(weight.shape), str(init.name))
        A, B = torch.zeros(r, weight.shape[0], **place), torch.empty(weight.shape[1], r, **place)
        nn.init.normal_(B)
        if init.draw_b is not None:
            nn.init.normal_(A)
        factors = Factors(A, B)
        if init.of_table is not None and weight.device.type != "meta":
            factors = factors_of(spec, layer.base_layer, r)
        assert factors.B is not None
        first = {"lora_embedding_A": factors.A, "lora_embedding_B": factors.B}
        super().__init__(layer, name, spec, {key: nn.Parameter(t.to(A.dtype)) for key, t in first.items()})
        if factors.W is not None:
            self._keep_residual(factors.W)

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    @property
    def A(self) -> Tensor:
        return self.part("lora_embedding_A")

    @property
    def B(self) -> Tensor:
        return self.part("lora_embedding_B")

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        return y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """s (A[:, x])^T B^T, in A's dtype."""
        base = self.layer.base_layer
        update = self.s * (F.embedding(x, self.A.T, padding_idx=base.padding_idx) @ self.B.T)
        # BART's and Gemma's embeddings multiply their output by a constant
        scale = getattr(base, "embed_scale", None)
        return update if scale is None else update * scale

    def merged(self) -> dict[str, Tensor]:
        weight = self.layer.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return {"weight": weight.to(wide) + self.delta().T}
