"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv:2106.09685).

    y = W x + s B A x        s = alpha / r,  A ~ U(kaiming), B = 0: at the start y = W x exactly

rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732): s = alpha / sqrt(r).
Other files of it: lora_config.py (the settings), lora_linear.py, lora_embedding.py, lora_conv.py, lora_attention.py and
lora_parameters.py (on a linear layer, an embedding, a convolution, an nn.MultiheadAttention, a parameter), dora.py
(magnitude, direction), lora_variants.py (the other variants), lora_init.py (starts from the weight), lora_start.py
(starts by data), low_rank.py (A and B themselves).

Shapes: W (O, I), A (R, I), B (O, R), b (O,); T tokens, I in, O out, R = r.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods import lora_start
from siliang.methods.bitfit import chosen_biases
from siliang.methods.blocks import Blocks
from siliang.methods.config import CONFIG_NAME
from siliang.methods.dora import DORA
from siliang.methods.find_targets import find_targets
from siliang.methods.kasa import NOT_QUANTIZED
from siliang.methods.layer import MakeAdapter
from siliang.methods.layer_patterns import LayerPatterns
from siliang.methods.lora_attention import LoraInProjection, from_keys_of_peft, on_attention, to_keys_of_peft
from siliang.methods.lora_config import BY_DATA, OUT_OF_THE_WEIGHT, LoraConfig
from siliang.methods.lora_conv import LoraConv
from siliang.methods.lora_embedding import LoraEmbedding
from siliang.methods.lora_init import RESIDUAL_STARTS, not_quantized
from siliang.methods.lora_linear import LoraLinear
from siliang.methods.lora_parameters import find_parameters, from_nested_keys, on_parameters, to_nested_keys
from siliang.methods.lora_start import Start, start_for, started, state_of
from siliang.methods.lora_variants import VARIANTS, variant_of
from siliang.methods.low_rank import LoraSpec, LowRank, MakeLowRank
from siliang.methods.method import Adapter, Method, Parts
from siliang.methods.start import StartData
from siliang.methods.targets import LORA_TARGETS
from siliang.methods.tied_ends import Tied, on_both, targets_with, tied_for, with_head, without_head
from siliang.methods.trainable_tokens import named_rows
from siliang.types import ConfigError

GPU = torch.device("cuda")
IN_FILE = ("orthogonal", "mica")  # starts that cost time, and of which a file holds all


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
        tied = config.tied = _tied(model, config, from_file=from_file)
        if tied is not None and config.target_modules:
            config.target_modules = targets_with(tied, config.target_modules)
        held = find_parameters(model, config.target_parameters or (), outside=saved, lenient=from_file)
        layers: list[str] = []
        if not held or config.target_modules or (config.target_modules is None and LORA_TARGETS.find(model).paths):
            layers = find_targets(
                model,
                config,
                lambda layer: any(kind.supports(layer) for kind in kinds),
                defaults=self.default_targets,
                outside=saved,
                lenient=from_file,
                blocks=Blocks.of(config.layers_to_transform, config.layers_pattern),
            )
        tied = tied if tied is not None and tied.embedding in layers else None
        layers = [path for path in layers if tied is None or path != tied.head]
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
                stacklevel=2,
            )
        if (variant := variant_of(config)) is not None and variant.check is not None:
            variant.check(model, config)
        parameters = [f"{module}.{own}" for module, names in held.items() for own in names]
        named = [*layers, *([] if tied is None else [tied.head]), *parameters]
        ranks = LayerPatterns("rank_pattern", config.rank_pattern, named)
        alphas = LayerPatterns("alpha_pattern", config.alpha_pattern, named)
        if not from_file:
            ranks.check_effect()
            alphas.check_effect()
        config.rank_pattern, config.alpha_pattern = ranks.in_any_order(), alphas.in_any_order()
        r_of, alpha_of = ranks.values, alphas.values
        adapters: dict[str, MakeAdapter] = {}
        starts: dict[str, Start | None] = {}
        for path in layers:
            layer = model.get_submodule(path)
            kind = _variant(config, next(kind for kind in kinds if kind.supports(layer)), path)
            r, alpha = r_of.get(path, config.r), alpha_of.get(path, config.lora_alpha)
            spec = _spec(config, kind, r, alpha, from_file=from_file)
            starts[path] = None if from_file else start_for(layer, path, config)
            if kind is LoraInProjection:
                adapters |= on_attention(path, layer, spec, config)
            elif tied is not None and path == tied.embedding:
                r, alpha = r_of.get(tied.head, config.r), alpha_of.get(tied.head, config.lora_alpha)
                adapters |= on_both(tied, spec, _spec(config, kind, r, alpha, from_file=from_file))
            else:
                adapters[path] = spec.make if from_file else started(spec.make, starts[path], config)
        specs = {
            path: _spec(
                config, LoraLinear, r_of.get(path, config.r), alpha_of.get(path, config.lora_alpha), from_file=from_file
            )
            for path in parameters
        }
        return Parts(
            layers=adapters | on_parameters(held, specs, layers),
            parameters=chosen_biases(model, config.bias, adapters, outside=saved),
            table_rows=named_rows(model, config.trainable_token_indices, saved=saved),
            state=state_of(starts),
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
        init = str(config.init_lora_weights)
        if config.kasa_config is not None:
            return NOT_QUANTIZED
        changes = init in OUT_OF_THE_WEIGHT or init.partition("_niter_")[0] in RESIDUAL_STARTS
        return not_quantized(init) if changes else None

    def before_its_start(self, config: LoraConfig) -> LoraConfig | None:
        return lora_start.plain(config) if config.init_lora_weights in BY_DATA else None

    def start_by_data(
        self, model: nn.Module, config: LoraConfig, adapter: Adapter[LoraConfig], data: StartData
    ) -> LoraConfig:
        return lora_start.learn(model, config, lora_start.Tuned.of(adapter), data)

    def learning_bytes(self, adapter: Adapter[LoraConfig]) -> int:
        return lora_start.learning_bytes(adapter)

    def needs_state(self, config: LoraConfig) -> bool:
        return config.init_lora_weights in OUT_OF_THE_WEIGHT

    def check_state(self, adapter: Adapter[LoraConfig], state: Mapping[str, Tensor], source: str) -> None:
        if self.needs_state(adapter.config):
            lora_start.check_state(adapter, state, source)

    def restore(self, adapter: Adapter[LoraConfig]) -> None:
        if self.needs_state(adapter.config):
            lora_start.restore(adapter)

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


def _spec(config: LoraConfig, kind: MakeLowRank, r: int, alpha: float, *, from_file: bool) -> LoraSpec:
    init = config.init_lora_weights
    return LoraSpec(
        kind=kind,
        r=r,
        alpha=alpha,
        scaling=alpha / math.sqrt(r) if config.use_rslora else alpha / r,
        dropout_p=config.lora_dropout,
        init=True if from_file and init in IN_FILE else init,
        bias=config.lora_bias,
        bits=config.loftq_config.get("loftq_bits", 4),
        iterations=config.loftq_config.get("loftq_iter", 1),
        frozen_b=init == "mica",
        norms_on=_offload(config),
    )


def _tied(model: nn.Module, config: LoraConfig, *, from_file: bool) -> Tied | None:
    """What `ensure_weight_tying` ties among the targets."""
    if not config.ensure_weight_tying:
        return None
    targets, saved = tied_for(model, config.target_modules, config.modules_to_save)
    if targets is None and saved is None and not from_file and not config.trainable_token_indices:
        warnings.warn(
            Bilingual(
                "ensure_weight_tying has no effect: the model's embedding and head are not tied, or neither "
                "target_modules nor modules_to_save names embed_tokens or lm_head.",
                "ensure_weight_tying 不起作用：模型的嵌入层与输出头没有绑定，或者 target_modules 和 modules_to_save"
                " 都没有写 embed_tokens 或 lm_head。",
            ),
            stacklevel=3,
        )
    return targets


def _offload(config: LoraConfig) -> torch.device | None:
    """Where DoRA's norms are computed at the start, as `runtime_config` has it.

    Raises:
        ConfigError: There is no GPU.
    """
    if not config.runtime_config.ephemeral_gpu_offload or not config.use_dora:
        return None
    if not torch.cuda.is_available():
        raise ConfigError(
            Bilingual(
                "runtime_config.ephemeral_gpu_offload needs a GPU, and there is none: leave it out.",
                "runtime_config.ephemeral_gpu_offload 需要 GPU，而这里没有：请去掉它。",
            )
        )
    return GPU
