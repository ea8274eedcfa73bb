"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv:2106.09685).

    y = W x + s B A x        s = alpha / r,  A ~ U(kaiming), B = 0: at the start y = W x exactly

rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732): s = alpha / sqrt(r).
Other files of it: lora_config.py (the settings), lora_linear.py, lora_embedding.py, lora_conv.py, lora_attention.py and
lora_parameters.py (on a linear layer, an embedding, a convolution, an nn.MultiheadAttention, a parameter), dora.py
(magnitude, direction), lora_variants.py (the other variants), lora_initializations.py (what A, B and W begin with),
lora_layers.py (where it is, and R and s there), low_rank.py (A and B themselves).

Shapes: W (O, I), A (R, I), B (O, R), b (O,); T tokens, I in, O out, R = r.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods import learned_initialization
from siliang.methods.bitfit import chosen_biases
from siliang.methods.config import CONFIG_NAME
from siliang.methods.dora import DORA
from siliang.methods.initialization import InitializationData
from siliang.methods.kasa import NOT_QUANTIZED
from siliang.methods.layer import MakeAdapter
from siliang.methods.learned_initialization import initialized, learned_for, state_of
from siliang.methods.lora_attention import LoraInProjection, from_keys_of_peft, on_attention, to_keys_of_peft
from siliang.methods.lora_config import LoraConfig
from siliang.methods.lora_conv import LoraConv
from siliang.methods.lora_embedding import LoraEmbedding
from siliang.methods.lora_initialization import Factors, not_quantized
from siliang.methods.lora_layers import Specs, choose
from siliang.methods.lora_linear import LoraLinear
from siliang.methods.lora_parameters import from_nested_keys, on_parameters, to_nested_keys
from siliang.methods.lora_variants import VARIANTS, variant_of
from siliang.methods.low_rank import LowRank, MakeLowRank
from siliang.methods.method import Adapter, Method, Parts
from siliang.methods.targets import LORA_TARGETS
from siliang.methods.tied_ends import on_both, with_head, without_head
from siliang.methods.trainable_tokens import named_rows
from siliang.types import ConfigError

KINDS: tuple[type[LowRank], ...] = (LoraLinear, LoraEmbedding, LoraConv, LoraInProjection)
DORA_KINDS: tuple[type[LowRank], ...] = (*DORA, LoraInProjection)  # which says that it has no DoRA


class Lora(Method[LoraConfig]):
    """Low-rank updates of linear layers, embeddings and convolutions, and base biases as `bias` has it."""

    name = "lora"
    config = LoraConfig
    learning_rate = 5e-4
    learning_rate_source = Bilingual(
        "Hu et al. 2021, table 9: 4e-4 to 5e-4 for RoBERTa-base on GLUE",
        "Hu 等 2021，表 9：RoBERTa-base 在 GLUE 上为 4e-4 至 5e-4",
    )
    trains = Bilingual("low-rank updates of chosen linear layers", "所选线性层的低秩更新")
    default_targets = LORA_TARGETS
    has_lora_factors = True

    def attach(self, model: nn.Module, config: LoraConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        kinds = DORA_KINDS if config.use_dora else KINDS
        chosen = choose(model, config, kinds, saved=saved, from_file=from_file)
        _check_settings(model, config, from_file=from_file)
        specs = Specs.of(config, chosen.names, from_file=from_file)

        base = {path: model.get_submodule(path) for path in chosen.layers}
        kind_of = {path: next(kind for kind in kinds if kind.supports(layer)) for path, layer in base.items()}
        spec_of = {path: specs.at(path, _variant(config, kind, path)) for path, kind in kind_of.items()}
        learned = {} if from_file else _learned(base, config)

        layers: dict[str, MakeAdapter] = {}
        for path, spec in spec_of.items():
            if kind_of[path] is LoraInProjection:
                layers |= on_attention(path, base[path], spec, config)
            elif chosen.tied is not None and path == chosen.tied.embedding:
                layers |= on_both(chosen.tied, spec, specs.at(chosen.tied.head, spec.kind))
            else:
                layers[path] = spec.make if from_file else initialized(spec.make, learned.get(path), spec.init)
        on_modules = {path: specs.at(path, LoraLinear) for path in chosen.parameter_paths}
        return Parts(
            layers=layers | on_parameters(chosen.parameters, on_modules, chosen.layers),
            parameters=chosen_biases(model, config.bias, layers, outside=saved),
            table_rows=named_rows(model, config.trainable_token_indices, saved=saved),
            state=state_of(learned),
        )

    def mixes_rows(self, config: LoraConfig) -> str | None:
        variant = variant_of(config)
        mixes = variant is not None and variant.mixes_rows is not None and variant.mixes_rows(config)
        return config.variant if mixes else None

    def adds_to_the_loss(self, config: LoraConfig) -> bool:
        variant = variant_of(config)
        return variant is not None and variant.loss is not None

    def extra_loss(self, adapter: Adapter[LoraConfig]) -> Tensor | None:
        variant = variant_of(adapter.config)
        return None if variant is None or variant.loss is None else variant.loss(adapter.layers.values())

    def add_hooks(self, model: nn.Module, adapter: Adapter[LoraConfig]) -> Callable[[], None] | None:
        variant = variant_of(adapter.config)
        if variant is None or variant.add_hooks is None:
            return None
        return variant.add_hooks(model, adapter.config, adapter.layers.values())

    def why_not_merged(self, settings: Mapping[str, object]) -> str | None:
        return next((v.why_not_merged for name, v in VARIANTS.items() if settings.get(name) and v.why_not_merged), None)

    def why_not_quantized(self, config: LoraConfig) -> str | None:
        if config.kasa_config is not None:
            return NOT_QUANTIZED
        return not_quantized(str(config.init_lora_weights)) if config.initialization.changes_weight else None

    def uninitialized(self, config: LoraConfig) -> LoraConfig | None:
        return None if config.initialization.from_data is None else learned_initialization.plain(config)

    def initialize_from_data(
        self, model: nn.Module, config: LoraConfig, adapter: Adapter[LoraConfig], data: InitializationData
    ) -> LoraConfig:
        return learned_initialization.learn(model, config, adapter, data)

    def initialization_bytes(self, adapter: Adapter[LoraConfig]) -> int:
        return learned_initialization.learning_bytes(adapter)

    def needs_state(self, config: LoraConfig) -> bool:
        return config.initialization.state_needed

    def check_state(self, adapter: Adapter[LoraConfig], state: Mapping[str, Tensor], source: str) -> None:
        if self.needs_state(adapter.config):
            learned_initialization.check_state(adapter, state, source)

    def restore(self, adapter: Adapter[LoraConfig]) -> None:
        if self.needs_state(adapter.config):
            learned_initialization.restore(adapter)

    def from_file(self, config: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # what PEFT calls an embedding that was resized, and of which rows are trained
        tensors = {key.replace(".token_adapter.base_layer.", ".base_layer."): t for key, t in tensors.items()}
        tensors = {from_nested_keys(from_keys_of_peft(key)): t for key, t in tensors.items()}
        return tensors if config.tied is None else without_head(config.tied, tensors)

    def to_file(self, config: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {to_nested_keys(key): t for key, t in to_keys_of_peft(tensors).items()}
        return tensors if config.tied is None else with_head(config.tied, tensors)

    def shape_hint(self, key: str, found: Sequence[int], needed: Sequence[int]) -> str:
        for side, rank in (("A", 0), ("B", 1)):
            of_lora = f".lora_{side}." in key or key.endswith(f".lora_embedding_{side}")
            if of_lora and len(found) == len(needed) >= 2 and found[1 - rank] == needed[1 - rank]:
                return Bilingual(
                    f"The file's rank is {found[rank]}, and its {CONFIG_NAME} has {needed[rank]} for this layer: "
                    "were r or rank_pattern changed there, or their order?",
                    f"文件中的秩是 {found[rank]}，而 {CONFIG_NAME} 中这一层是 {needed[rank]}："
                    "是否改过其中的 r 或 rank_pattern，或它们的顺序？",
                )
        return ""


def _variant(config: LoraConfig, kind: type[LowRank], path: str) -> MakeLowRank:
    """What makes LoRA, or the variant that the config has, on the layer of this path.

    Raises:
        ConfigError: The layer is not of a kind for what the config has.
    """
    variant = variant_of(config)
    if variant is not None and kind is LoraLinear:
        return variant.kind(config, path)
    if variant is not None:
        raise ConfigError(
            Bilingual(
                f"{config.variant} is for linear layers: leave {path} out of target_modules.",
                f"{config.variant} 只用于线性层：请从 target_modules 中去掉 {path}。",
            )
        )
    if issubclass(kind, LoraEmbedding) and config.lora_bias:
        raise ConfigError(
            Bilingual(
                "lora_bias is not for embeddings: leave the embedding out of target_modules.",
                "lora_bias 不能用于嵌入层：请从 target_modules 中去掉它。",
            )
        )
    return kind


def _learned(base: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, Factors]:
    """What was learned from data for these layers, and waits for the adapter."""
    found = {path: learned_for(layer, path, config) for path, layer in base.items()}
    return {path: factors for path, factors in found.items() if factors is not None}


def _check_settings(model: nn.Module, config: LoraConfig, *, from_file: bool) -> None:
    """
    Raises:
        ConfigError: A setting would train nothing, or a variant cannot work on this model.
    """
    if config.lora_dropout == 1.0 and not from_file:
        raise ConfigError(
            Bilingual(
                "lora_dropout = 1.0: must be less than 1, or nothing is trained.",
                "lora_dropout = 1.0：须小于 1，否则什么也训练不了。",
            )
        )
    if config.runtime_config.ephemeral_gpu_offload and not config.use_dora:
        warnings.warn(
            Bilingual(
                "runtime_config.ephemeral_gpu_offload has no effect without use_dora.",
                "没有 use_dora 时，runtime_config.ephemeral_gpu_offload 不起作用。",
            ),
            stacklevel=3,
        )
    if (variant := variant_of(config)) is not None and variant.check is not None:
        variant.check(model, config)
