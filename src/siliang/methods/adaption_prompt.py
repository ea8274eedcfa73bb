"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention (Zhang et al., 2023,
arXiv:2303.16199). PEFT calls it adaption prompt.

    y = W_o (attention(Q, K, V) + g softmax(Q K_P^T / sqrt(d)) V_P)        K_P = W_k P,  V_P = W_v P

Each of the last layers has its own prompt P. The gate g is 0 at the start. K_P has no position. In GPT-2, as in PEFT,
the part of the prompt is added after W_o.

Shapes: x, y (B, T, D), P (1, N, D), g (1,), Q (B, H, T, d), K_P and V_P (1, H, N, d), fewer heads repeated to H;
N = adapter_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, MakeAdapter, new_parameter
from siliang.methods.method import Method, Parts
from siliang.models.introspect import features
from siliang.module_paths import ends_with, inside, plain_modules
from siliang.types import ConfigError, MergeError, PeftType, TargetError

ATTENTIONS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}  # by model_type, as PEFT has them
LENGTH = 10  # of a prompt, in the paper's experiments
WHY_NOT_MERGEABLE = Bilingual(
    "The prompts work inside the attention and cannot become a part of its weights.",
    "提示作用于注意力内部，无法并入其权重。",
)


@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter's settings, with PEFT's names.

    Attributes:
        target_modules: What the attentions are called; None: as the model's type has it.
        adapter_len: Length of a layer's prompt; None: 10, as in the paper. PEFT needs one.
        adapter_layers: How many layers have prompts, counted from the last; None: all. PEFT needs one.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    peft_type: ClassVar[str] = PeftType.ADAPTION_PROMPT
    is_adaption_prompt: ClassVar[bool] = True
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("adapter_len", "adapter_layers")
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("modules_to_save",)


class AttentionPrompt(LayerAdapter):
    """A prompt on an attention: `adaption_prompt.<adapter>` (1, N, D) and `adaption_gate` (1,)."""

    def __init__(self, length: int, width: int, layer: Layer, name: str) -> None:
        parts = {
            "adaption_prompt": new_parameter(layer, 1, length, width, start=nn.init.normal_),
            "adaption_gate": new_parameter(layer, 1),
        }
        super().__init__(layer, name, parts)

    def answer(self, q_BTD: Tensor, k_1NC: Tensor, v_1NC: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """g softmax(Q K_P^T / sqrt(d)) V_P, (B, T, H d), in the dtype of the queries.

        Args:
            q_BTD: (B, T, H d), without positions.
            rotary: The cosines and sines of their positions, (B, T, d); None where queries have none.
        """
        d = self.layer.base_layer.head_dim
        q_BHTd, k_1HNd, v_1HNd = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q_BTD, k_1NC, v_1NC))
        if rotary is not None:
            cos, sin = (t[:, None] for t in rotary)
            first, second = q_BHTd.chunk(2, dim=-1)
            q_BHTd = q_BHTd * cos + torch.cat((-second, first), dim=-1) * sin
        B, H, _, _ = q_BHTd.shape
        both = (t.to(q_BHTd.dtype).repeat_interleave(H // t.shape[1], 1) for t in (k_1HNd, v_1HNd))
        k_BHNd, v_BHNd = (t.expand(B, -1, -1, -1) for t in both)
        z_BTD = F.scaled_dot_product_attention(q_BHTd, k_BHNd, v_BHNd).transpose(1, 2).flatten(2)
        return self.part("adaption_gate").to(z_BTD.dtype) * z_BTD

    def prompt(self, like: Tensor) -> Tensor:
        """P, (1, N, D), where and as `like` is."""
        return self.part("adaption_prompt").to(like.device, like.dtype)

    def merged(self) -> dict[str, Tensor]:
        raise MergeError(WHY_NOT_MERGEABLE)


class LlamaPrompt(AttentionPrompt):
    """Before W_o, of an attention as Llama's."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        attention = self.layer.base_layer
        rotary = cast(tuple[Tensor, Tensor], base_forward.named("position_embeddings"))

        def add(o_proj: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            P = self.prompt(x)
            return inputs[0] + self.answer(queries[0], attention.k_proj(P), attention.v_proj(P), rotary), *inputs[1:]

        with _outputs_of(attention.q_proj) as queries:
            hook = attention.o_proj.register_forward_pre_hook(add)
            try:
                return base_forward(x)
            finally:
                hook.remove()


class GPT2Prompt(AttentionPrompt):
    """Added after W_o of GPT-2's attention, which makes queries, keys and values in one layer."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        c_attn = self.layer.base_layer.c_attn
        with _outputs_of(c_attn) as found:
            y, *rest = cast(tuple[Tensor, ...], base_forward(x))
        q, _, _ = found[0].chunk(3, dim=-1)
        _, k, v = c_attn(self.prompt(x)).chunk(3, dim=-1)
        return cast(Tensor, (y + self.answer(q, k, v, None).to(y.dtype), *rest))


class AdaptionPrompt(Method[AdaptionPromptConfig]):
    """Prompts inside the attention of the last layers, each scaled by a gate that is 0 at the start."""

    name = "adaption_prompt"
    config = AdaptionPromptConfig
    learning_rate = 5e-3
    learning_rate_source = Bilingual(
        "PEFT's comparison on MetaMathQA: 5e-3 with adapter_len = 100",
        "PEFT 在 MetaMathQA 上的对比：5e-3，adapter_len = 100",
    )
    trains = Bilingual("a prompt inside each layer's attention, scaled by a gate", "各层注意力内部的提示，由门控加入")
    why_not_mergeable = WHY_NOT_MERGEABLE

    def attach(self, model: nn.Module, config: AdaptionPromptConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in ATTENTIONS:
            raise ConfigError(
                Bilingual(
                    f"LLaMA-Adapter knows the attention of {', '.join(ATTENTIONS)}, not that of {model_type!r}: choose "
                    "prefix_tuning, which works inside the attention too.",
                    f"LLaMA-Adapter 支持 {'、'.join(ATTENTIONS)} 的注意力，不支持 {model_type!r}："
                    "请改用同样作用于注意力内部的 prefix_tuning。",
                )
            )
        name = config.target_modules = config.target_modules or ATTENTIONS[model_type]
        parts_of_it = ("c_attn",) if model_type == "gpt2" else ("q_proj", "k_proj", "v_proj", "o_proj")
        found = [path for path, _ in plain_modules(model) if ends_with(path, name) and not inside(path, saved)]
        modules = [model.get_submodule(path) for path in found]
        if not found or not all(hasattr(module, part) for module in modules for part in parts_of_it):
            raise TargetError(
                Bilingual(
                    f"target_modules = {name!r}: must be the name of the model's attentions, "
                    f"{ATTENTIONS[model_type]!r}.",
                    f"target_modules = {name!r}：应为模型的注意力模块名 {ATTENTIONS[model_type]!r}。",
                )
            )
        length, layers = config.adapter_len or LENGTH, config.adapter_layers or len(found)
        config.adapter_len, config.adapter_layers = length, layers
        if layers > len(found):
            raise ConfigError(
                Bilingual(
                    f"adapter_layers = {layers}: the model has {len(found)} layers. Choose at most as many.",
                    f"adapter_layers = {layers}：模型只有 {len(found)} 层。请至多设为此数。",
                )
            )
        kind = GPT2Prompt if model_type == "gpt2" else LlamaPrompt
        make: MakeAdapter = partial(_make, kind, length, parts_of_it[0])
        return Parts(layers=dict.fromkeys(found[-layers:], make))


def _make(
    kind: type[AttentionPrompt], length: int, projection: str, layer: Layer, name: str, shared: Mapping[str, Tensor]
) -> AttentionPrompt:
    width, _ = features(getattr(layer.base_layer, projection))
    return kind(length, width, layer, name)


@contextmanager
def _outputs_of(module: Any) -> Iterator[list[Tensor]]:
    """Within the block a module's outputs are put into the list too."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        hook.remove()
