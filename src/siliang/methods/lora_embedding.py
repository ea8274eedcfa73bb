"""LoRA on an embedding.

    y = W[x] + s (A[:, x])^T B^T        A = 0 and B normal at the start

With MiCA, B is that of W^T and is not trained; LoftQ works too. The other starts are for linear layers: as in PEFT, an
embedding among the targets has the usual one.

Shapes: W (V, D), A (R, V), B (D, R); V rows of the table, D columns, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.methods.layer import BaseForward, Layer, trained_dtype
from siliang.methods.lora_init import check_rank, initialize, minor_directions
from siliang.methods.low_rank import LoraSpec, LowRank


class LoraEmbedding(LowRank):
    """A low-rank update of an embedding: `lora_embedding_A.<adapter>` (R, V), `lora_embedding_B.<adapter>` (D, R)."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        weight = layer.base_layer.weight
        place = {"device": weight.device, "dtype": trained_dtype(weight)}
        A, B = torch.zeros(spec.r, weight.shape[0], **place), torch.empty(weight.shape[1], spec.r, **place)
        nn.init.normal_(B)
        residual: Tensor | None = None
        if spec.init is False:
            nn.init.normal_(A)
        elif spec.init == "mica":
            check_rank("mica", spec.r, min(weight.shape))
            B = B if weight.device.type == "meta" else minor_directions(weight.T, spec.r).to(B.dtype)
        elif spec.init == "loftq" and weight.device.type != "meta":
            # (V, D) is this layer's (O, I): the factors change places
            W = layer.base_parameter("weight")
            B_right, A_right, residual = initialize(
                "loftq", W, r=spec.r, scaling=spec.scaling, bits=spec.bits, iterations=spec.iterations
            )
            A, B = A_right.T.contiguous(), B_right.T.contiguous()
        parts = {"lora_embedding_A": nn.Parameter(A), "lora_embedding_B": nn.Parameter(B)}
        super().__init__(layer, name, spec, parts)
        if residual is not None:
            self._keep_residual(residual)

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
