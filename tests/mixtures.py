"""Small mixtures of experts, and adapters on them as transformers 4 named their layers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tiny import VOCABULARY
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_HEADS: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
ONE_EXPERT: dict[str, Any] = {**SMALL, "num_experts_per_tok": 1}
MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=20
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=12),
    "olmoe": lambda: OlmoeConfig(**SMALL, num_experts=4),
    "deepseek_v3": lambda: DeepseekV3Config(
        **ALL_HEADS,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=12,
        q_lora_rank=6,
        kv_lora_rank=6,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(**SMALL, num_local_experts=4, head_dim=8),
    "llama4": lambda: Llama4TextConfig(**ONE_EXPERT, num_local_experts=4, intermediate_size_mlp=24, head_dim=8),
}


def make_mixture(name: str, seed: int = 0) -> Any:
    """A causal model with random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(MODELS[name]())
    for p in model.parameters():
        if p.dim() == 3:
            nn.init.normal_(p, std=0.1)  # some experts are not initialized
    return model.eval()


# ---- adapters of transformers 4, where each expert had layers of its own ----


def former_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model's linear layers, (O, I), by the layers' paths in transformers 4."""
    for path, module in model.named_modules():
        mixtral = "Mixtral" in type(module).__name__
        former = path.replace(".mlp.", ".block_sparse_moe.") if mixtral else path
        own, kind = cast(Any, module), type(module).__name__
        if isinstance(module, nn.Linear) or kind.endswith("Router"):
            yield former, own.weight.data
        elif kind.endswith("Experts"):
            names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            for e, (both, down) in enumerate(zip(own.gate_up_proj.data, own.down_proj.data, strict=True)):
                for name, W in zip(names, (*both.chunk(2), down), strict=True):
                    yield f"{former}.{e}.{name}", W


def write_former(folder: Path, model: nn.Module, targets: list[str] | str, **settings: Any) -> None:
    """Writes an adapter as PEFT did with transformers 4, and adds its updates to the model's weights."""
    config: dict[str, Any] = {"r": 3, "lora_alpha": 6, "rank_pattern": {}, "alpha_pattern": {}} | settings
    g, tensors = torch.Generator().manual_seed(3), dict[str, Tensor]()

    def own(field: str, path: str, usual: float) -> float:
        patterns = config[field].items()
        return next((value for key, value in patterns if re.fullmatch(rf"(.*\.)?({key})", path)), usual)

    for path, W in former_weights(model):
        by_name = isinstance(targets, list) and path.rpartition(".")[2] in targets
        if not by_name and not (isinstance(targets, str) and re.fullmatch(targets, path)):
            continue
        r, alpha = int(own("rank_pattern", path, config["r"])), own("alpha_pattern", path, config["lora_alpha"])
        A, B = torch.randn(r, W.shape[1], generator=g) / 4, torch.randn(W.shape[0], r, generator=g) / 4
        W += alpha / (r**0.5 if config.get("use_rslora") else r) * B @ A
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
