"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (Li et al., 2024, arXiv:2405.15179).

    y = W x + B A x        each piece of A and B a mixture of k vectors of one bank V, which all layers share

The k largest logits of a piece choose its vectors, and their softmax is the mixture.

Shapes: A (R, I) in pieces of L numbers in a row, B (O, R) in pieces of L in a column; logits_A (R, I / L, N), logits_B
(O / L, R, N), V (N, L); I in, O out, R = r, N = num_vectors, L = vector_length, k = topk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Factored
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_divides
from siliang.methods.method import SharedSpec
from siliang.methods.targets import VBLORA_TARGETS
from siliang.models.introspect import features
from siliang.types import AdapterError, ConfigError, PeftType

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"  # the file's form of logits: the choices, and the mixture


@dataclass(kw_only=True)
class VBLoRAConfig(BlocksConfig):
    """VB-LoRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank.
        num_vectors: Vectors of the bank; more for larger models.
        vector_length: Their length, which divides the inputs and outputs of each layer.
        topk: Vectors of a mixture.
        save_only_topk_weights: The file holds the mixtures in place of the logits. It is far smaller, and the adapter
            cannot be trained on, also not from a checkpoint.
        vblora_dropout: Probability of zeroing an input of A during training.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("vblora_only").
        init_vector_bank_bound: The bank is uniform between its negative and it at the start; 0 would stay 0.
        init_logits_std: Standard deviation of the logits at the start.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    peft_type: ClassVar[str] = PeftType.VBLORA
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r", "num_vectors", "vector_length", "topk")
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("vblora_dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ConfigError(
                Bilingual(
                    f"topk = {self.topk} and num_vectors = {self.num_vectors}: the bank has too few vectors.",
                    f"topk = {self.topk}，num_vectors = {self.num_vectors}：向量库中的向量不够。",
                )
            )
        for name in ("init_vector_bank_bound", "init_logits_std"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(
                    Bilingual(f"{name} = {value}: must be at least 0.", f"{name} = {value}：须大于等于 0。")
                )


class VBLoRALayer(Factored):
    """VB-LoRA on a linear layer: `vblora_logits_A.<adapter>` (R, I / L, N) and `vblora_logits_B` (O / L, R, N)."""

    def __init__(self, config: VBLoRAConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> None:
        in_features, out_features = features(layer.base_layer)
        N, L = config.num_vectors, config.vector_length
        check_divides("vector_length", L, in_features, "inputs")
        check_divides("vector_length", L, out_features, "outputs")
        new = partial(new_parameter, layer, start=partial(nn.init.normal_, std=config.init_logits_std))
        parts = {
            "vblora_logits_A": new(config.r, in_features // L, N),
            "vblora_logits_B": new(out_features // L, config.r, N),
        }
        super().__init__(layer, name, parts)
        self.topk, self.dropout_p, self.shared = config.topk, config.vblora_dropout, shared
        self.settings = {"r": config.r, "topk": config.topk}
        self._may_train = not config.save_only_topk_weights

    def factors(self) -> tuple[Tensor, Tensor]:
        """
        Raises:
            AdapterError: It is trained, and its logits are from a file that holds only the mixtures.
        """
        if self.layer.training and not self._may_train:
            if self.part("vblora_logits_A").isinf().any():
                raise AdapterError(
                    Bilingual(
                        "save_only_topk_weights: the file holds no logits, and VB-LoRA cannot be trained on without "
                        "them. Train from the start, or from an adapter that was saved without that setting.",
                        "save_only_topk_weights：文件中没有 logits，VB-LoRA 无法继续训练。请从头训练，"
                        "或从未用该设置保存的适配器开始。",
                    )
                )
            self._may_train = True
        pieces_A, pieces_B = (self._mixtures(self.part(f"vblora_logits_{key}")) for key in "AB")
        return pieces_A.flatten(1), pieces_B.transpose(1, 2).flatten(0, 1)

    def _mixtures(self, logits: Tensor) -> Tensor:
        """The pieces (..., L) that logits (..., N) choose."""
        bank_NL = self.shared["vblora_vector_bank"].to(logits.device)
        largest, chosen = logits.topk(self.topk, dim=-1)
        return torch.einsum("...k,...kl->...l", largest.softmax(-1), bank_NL[chosen])


class VBLoRA(LayerMethod[VBLoRAConfig]):
    """Low-rank updates whose pieces are mixtures of the vectors of one bank."""

    name = "vblora"
    config = VBLoRAConfig
    learning_rate = 1e-3
    learning_rate_source = Bilingual(
        "PEFT's documentation: 1e-3 for the bank, and 1e-2 for the logits", "PEFT 文档：向量库 1e-3，logits 1e-2"
    )
    has_smaller_files = True
    trains = Bilingual(
        "a bank of vectors, and which of them make up each low-rank update", "向量库，以及各低秩更新由哪些向量组成"
    )
    default_targets = VBLORA_TARGETS

    def make(self, config: VBLoRAConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> VBLoRALayer:
        return VBLoRALayer(config, layer, name, shared)

    def shared(self, config: VBLoRAConfig, layers: Mapping[str, nn.Module]) -> Mapping[str, SharedSpec]:
        shape, bound = (config.num_vectors, config.vector_length), config.init_vector_bank_bound
        return {
            "vblora_vector_bank": SharedSpec(
                shape, lambda device: torch.empty(shape, device=device).uniform_(-bound, bound)
            )
        }

    def to_file(self, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With `save_only_topk_weights` the choices and the mixtures, whose last weight follows from the others."""
        if not config.save_only_topk_weights:
            return tensors
        sizes = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}
        dtype = next(dtype for dtype, size in sizes.items() if config.num_vectors < size)
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if ".vblora_logits_" in key:
                largest, chosen = tensor.topk(config.topk, dim=-1)
                found[key + INDICES] = chosen.to(dtype)
                found[key + WEIGHTS] = largest.softmax(-1)[..., :-1].contiguous()
            else:
                found[key] = tensor
        return found

    def from_file(self, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits that give the file's mixtures: minus infinity for vectors that are not chosen."""
        found = {key: t for key, t in tensors.items() if not key.endswith((INDICES, WEIGHTS))}
        for key in (key.removesuffix(INDICES) for key in tensors if key.endswith(INDICES)):
            weights, chosen = tensors.get(key + WEIGHTS), tensors[key + INDICES].long()
            known = not chosen.numel() or 0 <= int(chosen.min()) <= int(chosen.max()) < config.num_vectors
            if not known or weights is None or weights.shape != chosen[..., :-1].shape:
                raise AdapterError(
                    Bilingual(
                        f"{key}{INDICES} and {key}{WEIGHTS} are no mixtures of a bank of {config.num_vectors} "
                        "vectors: is the file damaged?",
                        f"{key}{INDICES} 与 {key}{WEIGHTS} 不是大小为 {config.num_vectors} 的向量库的混合："
                        "文件是否已损坏？",
                    )
                )
            mixture = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
            logits = torch.full((*chosen.shape[:-1], config.num_vectors), float("-inf"))
            found[key] = logits.scatter(-1, chosen, mixture.float().log())
        return found
