"""The parts of a base model: its backbone, embeddings, layers, attentions, norms and linear layers.

transformers has methods for few of these. The others are recognized by the name of a class, of an attribute or of a
forward argument. These names are only in this file: if a release renames one, change it here (tests/contracts reports
which name). Quantized weights are in quantized.py.

Nothing here changes a model or runs it. Importing this file imports torch, and of transformers nothing until it is
asked.

Shapes: O features out, I features in.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.module_paths import outermost

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.bloom.modeling_bloom import BloomAttention

CROSS_ATTENTION = ("key_value_states", "encoder_hidden_states")  # arguments that hold another text's states
# arguments that hold the cache: of BLOOM's and Falcon's attentions; all others from transformers 5.24 on; and before
CACHES = ("layer_past", "cache", "past_key_values")
CACHED_LENGTHS = (
    "cache_length",
    "past_key_values_length",
)  # tokens in the cache: from 5.24 on; before
RMS_EPS = ("variance_epsilon", "eps", "epsilon")


class NoLayerStackError(Exception):
    """A model has no stack of layers, or more than one."""


# ---- the model as a whole ----


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads a source with an encoder and writes with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder(model: nn.Module) -> nn.Module:
    """The encoder of an encoder-decoder."""
    return cast("PreTrainedModel", model).get_encoder()


def decoder(model: nn.Module) -> nn.Module:
    """The decoder of an encoder-decoder."""
    return cast("PreTrainedModel", model).get_decoder()


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where it has none."""
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix, model) if prefix else model


def text_parts(model: nn.Module) -> list[str]:
    """The paths of what reads and writes text in a model that reads images or sounds too; [""] where that is all of it.

    transformers has the config of such a part in that of the whole (`get_text_config`).
    """
    from transformers import PreTrainedModel

    config = getattr(model, "config", None)
    try:
        text = config.get_text_config() if config is not None else None
    except (AttributeError, ValueError):  # not a config of transformers, or one with several texts
        return [""]
    if text is None or text is config or text is getattr(config, "decoder", None):  # whose encoder counts too
        return [""]
    inner = (path for path, m in model.named_modules() if path and isinstance(m, PreTrainedModel))
    found = outermost(p for p in inner if type(model.get_submodule(p).config) is type(text))
    return found or [""]


def is_routed(model: nn.Module, path: str) -> bool:
    """Whether a module may read any tokens of the batch, in any order: it is in one of several modules of a class that
    a transformer layer holds in a list, such as the experts of a mixture, and a router chooses their tokens.
    """
    lists, module = 0, model
    for name in path.split("."):
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            children = list(module.values() if isinstance(module, nn.ModuleDict) else module)
            lists += 1
            if lists > 1 and len(children) > 1 and len({type(child) for child in children}) == 1:
                return True
        module = module.get_submodule(name)
    return False


def layer_stack(model: nn.Module) -> list[nn.Module]:
    """The model's transformer layers, the lowest first.

    Raises:
        NoLayerStackError: There is no stack of layers, or more than one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    stacks = [
        m
        for m in backbone(model).modules()
        if isinstance(m, nn.ModuleList) and len(m) and all(isinstance(c, GradientCheckpointingLayer) for c in m)
    ]
    if len(stacks) != 1:
        raise NoLayerStackError(
            Bilingual(
                f"{type(model).__name__} has {len(stacks)} stacks of layers, and one is wanted",
                f"{type(model).__name__} 有 {len(stacks)} 组层，而这里只能有一组",
            )
        )
    return list(stacks[0])


def transformer_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Every transformer layer, of all stacks: modules of the class that can recompute its activations."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def word_embeddings(model: nn.Module) -> nn.Embedding | None:
    """The embeddings of the input tokens; None where the model reads something else, as a vision model does."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if getter is not None else None
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(found, "weight", None)
    return found if isinstance(weight, Tensor) and weight.dim() == 2 else None


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits of a language model; None where the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


# ---- the arguments of a forward ----


def parameters_of(module: object) -> Mapping[str, inspect.Parameter]:
    """The arguments of a module's forward by name; empty if it is not a module."""
    return inspect.signature(module.forward).parameters if isinstance(module, nn.Module) else {}


def named_arguments(module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Any]:
    """The arguments of a call of `module`'s forward, all by name."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    return {k: v for k, v in bound.items() if k not in ("args", "kwargs")} | bound.get("kwargs", {})


def takes_tokens(module: nn.Module) -> bool:
    """Whether the module's forward takes the tokens of a text, or their embeddings."""
    return not {"input_ids", "inputs_embeds"}.isdisjoint(parameters_of(module))


def cache_in(named: Mapping[str, Any]) -> Any:
    """The cache of keys and values among a model's arguments, or in its output; None for none."""
    return next((named[name] for name in CACHES if named.get(name) is not None), None)


def cached_tokens(named: Mapping[str, Any]) -> int:
    """How many tokens the cache among a model's arguments holds."""
    cache = cache_in(named)
    return int(cache.get_seq_length()) if cache is not None else 0


def cache_argument(module: nn.Module) -> str:
    """What the forward of a model, or of an attention, calls its cache."""
    parameters = parameters_of(module)
    return next((name for name in CACHES if name in parameters), CACHES[-1])


# ---- attention ----


def is_cached_attention(module: nn.Module) -> bool:
    """Whether `module` is an attention itself, not something around one, and asks a cache for its keys and values."""
    if layer_number(module) is None or any(isinstance(child, nn.Conv1d) for child in module.children()):
        return False  # a state-space mixer, as Mamba's, has a convolution
    parameters = parameters_of(module)
    has_projections = any(is_linear(unwrapped(child)) for child in module.children())
    return has_projections and not set(CACHES).isdisjoint(parameters) and "hidden_states" in parameters


def cached_length_argument(module: nn.Module) -> str | None:
    """What an embedding that counts positions by itself calls the number of tokens in the cache; None for others."""
    if "Embedding" not in type(module).__name__:
        return None
    parameters = parameters_of(module)
    return next((name for name in CACHED_LENGTHS if name in parameters), None)


def mask_argument(attention: nn.Module) -> str:
    """What the forward of an attention calls its mask."""
    return "mask" if "mask" in parameters_of(attention) else "attention_mask"


def is_cross_attention(named: Mapping[str, object]) -> bool:
    """Whether a call of an attention, its arguments by name, looks at another text."""
    return any(named.get(name) is not None for name in CROSS_ATTENTION)


def layer_number(attention: nn.Module) -> int | None:
    """The number of the layer that an attention belongs to; None for other modules. GPT-Neo has its own name for it."""
    return getattr(attention, "layer_idx", getattr(attention, "layer_id", None))


def attention_kind(attention: nn.Module) -> str | None:
    """What a config says of the layer's attention: sliding_attention, chunked_attention, ...; None where it says
    nothing."""
    number, kinds = layer_number(attention), getattr(getattr(attention, "config", None), "layer_types", None)
    return kinds[number] if kinds and isinstance(number, int) and number < len(kinds) else None


def sliding_window(attention: nn.Module) -> int | None:
    """How many tokens an attention looks back at, its own among them; None for all. Each family says it elsewhere."""
    config = getattr(attention, "config", None)
    if (kind := attention_kind(attention)) is not None:
        return getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    if not hasattr(sys.modules[type(attention).__module__], "create_sliding_window_causal_mask"):
        return None  # the config may name a window that the model does not have
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


def attention_host(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The module that takes the tokens of a whole text and holds every cached attention, and those attentions.

    It is the innermost such module: BartForCausalLM and OPT's classes call it past the modules around it.
    """
    host = decoder(model) if is_encoder_decoder(model) else backbone(model)
    attentions = [m for m in host.modules() if is_cached_attention(m)]
    inside, found = True, host
    while attentions and inside:
        inside = False
        for child in found.children():
            held = set(child.modules())
            if all(m in held for m in attentions):
                found, inside = child, True
                if takes_tokens(child):
                    host = child
                break
    return host, attentions


def is_disentangled_attention(module: nn.Module) -> bool:
    """DeBERTa's attention, which has no cache, and a table of relative positions in addition to its keys."""
    return type(module).__name__ == "DisentangledSelfAttention"


def relative_positions(attention: nn.Module, hidden_BND: Tensor) -> Tensor:
    """DeBERTa's relative positions of N tokens to one another, as the attention's own module builds them."""
    build = sys.modules[type(attention).__module__].build_relative_position
    wanted = inspect.signature(build).parameters
    settings = {
        "bucket_size": getattr(attention, "position_buckets", -1),
        "max_position": attention.max_relative_positions,
        "device": hidden_BND.device,
    }
    found = build(hidden_BND, hidden_BND, **{k: v for k, v in settings.items() if k in wanted})
    return found.to(hidden_BND.device)


def is_bloom_attention(module: nn.Module) -> TypeGuard[BloomAttention]:
    """BLOOM's attention, the only common one that does not go through transformers' attention interface."""
    return type(module).__name__ == "BloomAttention"


def is_multihead_attention(module: nn.Module) -> bool:
    """torch's attention, which reads the weight of its `out_proj` and does not call that."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def fused_layers(module: nn.Module) -> list[str]:
    """The layers of a state-space mixer (Mamba's and its like) whose weights it passes to its kernels: where these
    compute, the layers are not called.
    """
    if "A_log" not in module._parameters:
        return []
    source = _source_of(type(module))
    return [name for name in ("conv1d", "out_proj") if name in module._modules and f"self.{name}.weight" in source]


@functools.cache
def _source_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


# ---- norms and activations ----


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm with parameters."""
    return "Norm" in type(module).__name__ and next(module.parameters(recurse=False), None) is not None


def is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether the name of a class is that of a root-mean-square norm."""
    return kind.__name__.endswith("RMSNorm")


def is_gelu(kind: type[nn.Module]) -> bool:
    """Whether the name of a class is that of a GELU, of any kind."""
    return "gelu" in kind.__name__.lower()


SILU = ("SiLU", "SiLUActivation")  # of torch and of transformers


def is_gated(module: nn.Module) -> bool:
    """Whether it has the parts of Llama's feed-forward layer, gated by SiLU."""
    parts = module._modules
    return type(parts.get("act_fn")).__name__ in SILU and {"gate_proj", "up_proj", "down_proj"} <= parts.keys()


def rms_eps(module: nn.Module) -> float:
    """The epsilon of a root-mean-square norm."""
    return next(getattr(module, name) for name in RMS_EPS if hasattr(module, name))


# ---- linear layers ----


def is_linear(layer: nn.Module) -> bool:
    """nn.Linear, its quantized kin, or GPT-2's Conv1D."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (I, O), as GPT-2's Conv1D does."""
    return type(layer).__name__ == "Conv1D"


def features(layer: Any) -> tuple[int, int]:
    """(I, O) of a linear layer. A quantized weight's own shape would be that of its storage."""
    if is_transposed(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def is_convolution(layer: nn.Module) -> bool:
    """nn.Conv1d, nn.Conv2d or nn.Conv3d; no subclass that computes something else with its weight."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)


def is_whole_convolution(layer: nn.Module) -> bool:
    """A convolution whose outputs read all channels: in one group."""
    return is_convolution(layer) and getattr(layer, "groups", 1) == 1


def flat_features(layer: nn.Module) -> tuple[int, int]:
    """(I, O) of the weight as a matrix: a convolution's I counts the places of its window too."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.weight[0].numel(), layer.weight.shape[0]
    return features(layer)


def apply_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What `layer` would give with another weight, (O, I) or a convolution's, and without its bias."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return F.linear(x, weight)
    forward = cast(Callable[[Tensor, Tensor, None], Tensor], layer._conv_forward)  # pads as the layer does
    return forward(x, weight, None)


def out_by_in(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as `layer` stores it, turned to (O, I)."""
    return weight.T if is_transposed(layer) else weight


def as_stored(layer: nn.Module, weight_OI: Tensor) -> Tensor:
    """The way back: (O, I) as `layer` stores it."""
    return weight_OI.T.contiguous() if is_transposed(layer) else weight_OI


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model's own layer below the methods that wrap it."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module
