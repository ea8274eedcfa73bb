"""Which layers a method tunes when the user names none: found among the base model's own, by what each layer makes.

An attention is a module whose layers make queries and values; a state-space mixer makes all that it needs from its
input with one layer, as many attentions do. LoRA takes what makes queries and values, IA3 what makes keys and values
and what a feed-forward ends with, LN tuning the norms of the hidden state. What a layer makes is seen in its name: the
names that transformers' models have are below. Of a model that reads images or sounds too, its text part counts.

For the model types that PEFT 0.21 lists, the layers are PEFT's: where its choice is not the rule's, it is below too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from torch import nn

from siliang.models.introspect import is_linear, is_norm, text_parts
from siliang.module_paths import ends_with, inside, plain_modules

# What the layers of an attention are called that make queries, keys and values.
ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_head", "k_head", "v_head"),
    ("Wq", "Wk", "Wv"),
    ("linear_q", "linear_k", "linear_v"),
    ("project_q", "project_k", "project_v"),
    ("query_key", "query_key", "value"),  # Reformer's
    ("q_b_proj", "kv_b_proj", "kv_b_proj"),  # from a latent of few features, as DeepSeek's
    ("q_proj", "kv_b_proj", "kv_b_proj"),
    ("q_b_proj", "kv_proj", "kv_proj"),
    ("to_q", "to_kv", "to_kv"),
)
# And one that makes all of them, or keys and values where no linear layer makes queries.
FUSED = (
    "query_key_value",
    "qkv_proj",
    "qkv",
    "Wqkv",
    "c_attn",
    "in_proj",
    "in_proj_qkv",
    "in_proj_qkvz",
    "kv_proj",
)
# What a feed-forward ends with. A layer of such a name inside the module that makes queries does not count. BERT's
# attention.output.dense is outside of it, and counts, as in PEFT.
FEEDFORWARD = (
    "down_proj",
    "fc2",
    "wo",
    "w2",
    "dense_4h_to_h",
    "c_proj",
    "fc_out",
    "lin2",
    "output.dense",
    "ffn_output",
    "w_out",
    "Wo",
    "proj_down",
    "linear2",
)


@dataclass(frozen=True)
class BaseLayers:
    """The layers of a base model among which default targets are found: those of its text part.

    Attributes:
        linear: The paths of its linear layers.
        norms: The paths of its norms.
    """

    linear: tuple[str, ...]
    norms: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> BaseLayers:
        """Those of a bare base model."""
        parts = text_parts(model)
        modules = [(p, m) for p, m in plain_modules(model) if parts == [""] or inside(p, parts)]
        return cls(tuple(p for p, m in modules if is_linear(m)), tuple(p for p, m in modules if is_norm(m)))

    @cached_property
    def attentions(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """By the path of each attention, or mixer, the names of what makes queries and values, and keys and values."""
        made: dict[str, set[str]] = {}
        for path in self.linear:
            module, _, name = path.removesuffix(".linear").rpartition(".")  # some linear layers are wrapped
            made.setdefault(module, set()).add(name)
        found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for module, names in made.items():
            for query, key, value in ATTENTIONS:
                if {query, key, value} <= names:
                    found[module] = ((query, value), (key, value))
                    break
            else:
                if fused := tuple(name for name in FUSED if name in names):
                    found[module] = (fused, fused)
        return found

    def named(self, names: Iterable[str]) -> list[str]:
        """Names of what an attention makes, as endings of the layers' paths."""
        ends = [end for name in dict.fromkeys(names) for end in (name, f"{name}.linear")]
        return [end for end in ends if any(ends_with(p, end) for p in self.linear)]


Rule: TypeAlias = Callable[[BaseLayers], Sequence[str]]


def queries_and_values(layers: BaseLayers) -> list[str]:
    """LoRA's rule, as Hu et al. have it."""
    return layers.named(name for names, _ in layers.attentions.values() for name in names)


def values(layers: BaseLayers) -> list[str]:
    """What makes values and nothing else: not a layer that makes keys and values, or all three."""
    alone = [names[1] for names, keys in layers.attentions.values() if names != keys and names[1] != keys[0]]
    return layers.named(alone)


def feedforwards(layers: BaseLayers) -> list[str]:
    """What feed-forwards end with."""
    found: dict[str, None] = {}
    for name in FEEDFORWARD:
        paths = [path for path in layers.linear if ends_with(path, name)]
        outer = [path for path in paths if not inside(path, layers.attentions)]
        for path in outer:
            parent = path.removesuffix(name).rstrip(".").rpartition(".")[2]
            found[name if len(outer) == len(paths) else f"{parent}.{name}"] = None
    return list(found)


def keys_values_and_feedforwards(layers: BaseLayers) -> list[str]:
    """IA3's rule, as Liu et al. have it."""
    keys = layers.named(name for _, names in layers.attentions.values() for name in names)
    return keys + feedforwards(layers) if keys else []


def queries_values_and_feedforwards(layers: BaseLayers) -> list[str]:
    """PEFT's for IA3 on some models, in place of keys."""
    return queries_and_values(layers) + feedforwards(layers)


def all_of_blocks(layers: BaseLayers) -> list[str]:
    """Every linear layer of the model's numbered layers."""
    inner = [path for path in layers.linear if any(part.isdigit() for part in path.split(".")[:-1])]
    return list(dict.fromkeys(path if (name := path.rpartition(".")[2]).isdigit() else name for path in inner))


def norms(layers: BaseLayers) -> list[str]:
    """LN tuning's rule: the norms of the hidden state, not those within an attention or of the embeddings alone."""
    found: dict[str, None] = {}
    for path in layers.norms:
        name = path.rpartition(".")[2]
        if "emb" not in name and not inside(path, layers.attentions):
            found[path if name.isdigit() else name] = None
    return list(found)


@dataclass(frozen=True)
class FoundTargets:
    """Default targets of one base model.

    Attributes:
        names: Endings of the layers' paths.
        paths: The layers.
    """

    names: list[str]
    paths: list[str]


@dataclass(frozen=True)
class DefaultTargets:
    """What a method tunes where the user names nothing.

    Attributes:
        rule: Endings of the layers' paths.
        by_type: For some model types another rule, or the endings themselves.
    """

    rule: Rule = lambda layers: ()
    by_type: Mapping[str, Rule | Sequence[str]] = field(default_factory=dict)

    def find(self, model: nn.Module) -> FoundTargets:
        """Those of a bare base model; none where it has nothing of the kind."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        chosen = self.by_type.get(str(model_type), self.rule)
        if callable(chosen):
            layers = BaseLayers.of(model)
            wanted, paths = chosen(layers), layers.linear + layers.norms
        else:
            wanted, paths = chosen, tuple(path for path, _ in plain_modules(model))
        names = [name for name in wanted if any(ends_with(path, name) for path in paths)]
        return FoundTargets(names, [path for path in paths if any(ends_with(path, name) for name in names)])

    def but(self, by_type: Mapping[str, Rule | Sequence[str]]) -> DefaultTargets:
        """The same with others for some model types."""
        return DefaultTargets(self.rule, {**self.by_type, **by_type})


# ---- each method's, and where PEFT's choice is not the rule's ----

_T5 = ("q", "k", "v", "o", "wi", "wo")
_MT5 = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
_OPT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_DEBERTA = ("query_proj", "key_proj", "value_proj", "dense")
_QUERIES_SCALED = ("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "phi", "qwen2", "qwen3")

LORA_TARGETS = DefaultTargets(
    queries_and_values,
    {
        "llama4": ("q_proj", "v_proj"),  # in what reads images too
        "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "phi": ("q_proj", "v_proj", "fc1", "fc2"),
        "rwkv": ("key", "value", "receptance", "output"),
    },
)
VBLORA_TARGETS = LORA_TARGETS.but({"bart": _OPT, "deberta-v2": _DEBERTA, "mt5": _MT5, "opt": _OPT, "t5": _T5})
ADALORA_TARGETS = VBLORA_TARGETS.but({"roberta": ("query", "key", "value", "dense")})
VERA_TARGETS = LORA_TARGETS.but({"phi": queries_and_values})  # and SHiRA's
FOURIERFT_TARGETS = LORA_TARGETS.but(dict.fromkeys(("gpt2", "gpt_bigcode"), feedforwards))  # and C3A's, and WaveFT's
BEFT_TARGETS = DefaultTargets(values, {"llama4": ("v_proj",)})
IA3_TARGETS = DefaultTargets(
    keys_values_and_feedforwards,
    dict.fromkeys(_QUERIES_SCALED, queries_values_and_feedforwards)
    | {
        "llama4": ("q_proj", "v_proj", "down_proj"),  # in what reads images too
        "mt5": ("k", "v", "wi_1"),
        "opt": ("q_proj", "k_proj", "fc2"),
    },
)
# Those of IA3's targets whose input is scaled instead of their output.
IA3_FEEDFORWARD = DefaultTargets(feedforwards, {"mt5": ()})
_OSF: dict[str, Rule | Sequence[str]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gptj", "llama", "mistral"), all_of_blocks),
    **dict.fromkeys(("mixtral", "opt", "qwen2", "qwen3"), all_of_blocks),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), ("query_key_value", "dense_4h_to_h")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj")),
    **dict.fromkeys(("llama4", "phi"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")),
}
OSF_TARGETS = DefaultTargets(by_type=_OSF)
LN_TARGETS = DefaultTargets(
    norms,
    {
        "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
        "qwen2": ("post_attention_layernorm",),
        "qwen3": ("post_attention_layernorm",),
    },
)
