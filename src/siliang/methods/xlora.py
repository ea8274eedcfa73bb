"""X-LoRA: Mixture of Low-Rank Adapter Experts (Buehler and Buehler, 2024, arXiv:2402.07148).

    y = W x + sum_e w_e s_e B_e A_e x        w = g softmax(h(z) / T)

The experts (A_e, B_e, s_e) are LoRA adapters that were trained before and stay. Two passes: the first computes the
states z of each token, without the experts; h, a small network that is trained, makes the experts' weights of them,
with which the second pass computes. z has no gradient.

Shapes: z (B, N, D), w (B, N, L, E), L = 1 where all layers have the same weights; A (R, I), B (O, R) of all experts on
a layer, one behind the other, R the sum of their ranks; E experts, L layers, D hidden size, I in, O out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.language import Bilingual
from siliang.methods.batch_rows import BatchRows
from siliang.methods.config import PeftConfig
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, trained_dtype
from siliang.methods.method import Adapter, Method, Parts, SharedSpec
from siliang.methods.xlora_experts import Expert, read_expert
from siliang.models.introspect import (
    backbone,
    cached_tokens,
    is_encoder_decoder,
    named_arguments,
    parameters_of,
)
from siliang.types import ConfigError, MergeError, PeftType

MOST_LAYERS = 64  # of the classifier
NETWORK = "internal_xlora_classifier"  # its name in PEFT's files
WHY_NOT_MERGED = Bilingual(
    "The experts are mixed anew for each token, and no weight can hold that: keep the adapter.",
    "每个词元的专家组合都不同，无法用一个权重表示：请保留适配器。",
)


@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    """X-LoRA's settings, with PEFT's names and defaults.

    Attributes:
        hidden_size: D; None: the model's.
        adapters: The experts, LoRA adapters by names of your own: folders, or names on the hub. A file does not hold
            them: they are read again.
        enable_softmax: The experts' weights are a softmax.
        enable_softmax_topk: The weights of the top_k_lora largest are the softmax of them. For enable_softmax = False:
            with it this is a softmax of the softmax, as in PEFT, and makes the weights nearly equal.
        layerwise_scalings: Each layer has weights of its own.
        xlora_depth: Layers of h.
        xlora_size: Its hidden size, with a depth of 2 or more.
        xlora_dropout_p: Its dropout, likewise.
        use_trainable_adapters: False, the one that siliang has: PEFT trains the experts, and saves no trained ones.
        softmax_temperature: T.
        top_k_lora: Only so many experts compute at each token; None for all.
        scaling_pass_value: The experts' weights in the first pass.
        global_scaling_weight: g.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    peft_type: ClassVar[str] = PeftType.XLORA
    FILES: ClassVar[tuple[str, ...]] = ("adapters.*",)
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("hidden_size", "xlora_depth", "xlora_size", "top_k_lora")
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("xlora_dropout_p",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_trainable_adapters:
            raise ConfigError(
                Bilingual(
                    "use_trainable_adapters = True: the experts stay as they are here (PEFT saves no trained ones). "
                    "Leave it out.",
                    "use_trainable_adapters = True：这里的专家保持不变（PEFT 也不保存训练后的专家）。请去掉它。",
                )
            )
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise ConfigError(
                Bilingual("enable_softmax_topk needs top_k_lora as well.", "enable_softmax_topk 还需要 top_k_lora。")
            )
        if self.enable_softmax_topk and self.enable_softmax:
            twice = Bilingual(
                "enable_softmax_topk takes the softmax of the softmax: set enable_softmax = False.",
                "enable_softmax_topk 会对 softmax 的结果再做一次 softmax：请设置 enable_softmax = False。",
            )
            warnings.warn(twice, stacklevel=3)
        if self.top_k_lora is not None and self.adapters and self.top_k_lora > len(self.adapters):
            raise ConfigError(
                Bilingual(
                    f"top_k_lora = {self.top_k_lora}: there are {len(self.adapters)} adapters.",
                    f"top_k_lora = {self.top_k_lora}：只有 {len(self.adapters)} 个适配器。",
                )
            )
        T, depth = self.softmax_temperature, self.xlora_depth
        if T <= 0:
            raise ConfigError(
                Bilingual(f"softmax_temperature = {T}: must be more than 0.", f"softmax_temperature = {T}：须大于 0。")
            )
        if depth > MOST_LAYERS:
            raise ConfigError(
                Bilingual(
                    f"xlora_depth = {depth:,}: must be at most {MOST_LAYERS}.",
                    f"xlora_depth = {depth:,}：最大为 {MOST_LAYERS}。",
                )
            )

    def network_sizes(self, layers: int) -> list[int]:
        """The widths of h, from its input to its output."""
        assert self.hidden_size is not None
        outputs = len(self.adapters) * (layers if self.layerwise_scalings else 1)
        return [self.hidden_size, *[self.xlora_size] * (self.xlora_depth - 1), outputs]

    def keys(self) -> list[str]:
        """What the linear layers of h are called in PEFT's files, where ReLU and dropout are counted too."""
        step = 3 if self.xlora_dropout_p > 0 else 2
        return [f"{NETWORK}.layers.{k * step}" for k in range(self.xlora_depth)]


class Mixture(BatchRows):
    """The weights w of the batch at hand, which its first pass makes.

    Attributes:
        w: (B, N, L, E); (1, 1, 1, E) while the first pass computes.
        latest: What h made of the last batch, before top_k_lora and g; None before the first.
        logs: Each of them goes into `log`.
    """

    mixes_layers: ClassVar[bool] = True

    def __init__(self, config: XLoraConfig) -> None:
        super().__init__("adapters")
        self.config = config
        self.w: Tensor | None = None
        self.latest: Tensor | None = None
        self.logs, self.log = False, list[Tensor]()

    def change(self, **settings: object) -> None:
        """Gives the config other settings, which are checked."""
        replace(self.config, **settings)
        vars(self.config).update(settings)

    def learn(self, w: Tensor) -> None:
        """Takes what h has made of a batch."""
        self.w, self.latest = self.chosen(w), w.detach()
        if self.logs:
            self.log.append(self.latest)

    def weights(self, layer: int, x: Tensor, *, routed: bool) -> Tensor:
        """The experts' weights on a layer, at the places of its input: (..., E)."""
        assert self.w is not None, "a layer computes outside of its model's forward"
        w = self.w[:, :, layer if self.w.shape[2] > 1 else 0]
        if w.shape[:2] == (1, 1) or w.shape[:2] == x.shape[:-1]:
            return w
        if routed:
            raise self.unknown(x)
        if self.layout is not None and w.shape[1] == self.layout.width and x.shape[:-1] == (1, self.layout.tokens):
            return self.layout.pack(w)
        if self.layout is not None and w.shape[:2] == (1, self.layout.tokens) and x.shape[1] == self.layout.width:
            return self.layout.unpack(w)
        if x.dim() == 2 and len(x) == w.shape[0] * w.shape[1]:
            return w.flatten(0, 1)
        raise ConfigError(
            Bilingual(
                f"An expert's layer reads {tuple(x.shape)} where the batch has {tuple(w.shape[:2])} tokens, and which "
                "weights each is to have is unknown: train the experts on the layers that read every token.",
                f"专家所在的一层读入 {tuple(x.shape)}，而批次有 {tuple(w.shape[:2])} 个词元，无法知道各自的权重："
                "请让专家只作用于读入每个词元的层。",
            )
        )

    def chosen(self, w: Tensor) -> Tensor:
        """w with those of top_k_lora alone."""
        k = self.config.top_k_lora
        if k is not None:
            w = w * torch.zeros_like(w).scatter(-1, w.topk(k, -1).indices, 1.0)
        if self.config.enable_softmax_topk:
            w = torch.where(w != 0, w.masked_fill(w == 0, -math.inf).softmax(-1), 0.0)
        return w * self.config.global_scaling_weight


class ExpertsLayer(LayerAdapter):
    """The experts on a linear layer. Its file holds none of them."""

    def __init__(
        self, mixture: Mixture, number: int, experts: Sequence[Expert], layer: Layer, name: str, shared: object
    ) -> None:
        weight = layer.base_layer.weight
        to = {"device": weight.device, "dtype": trained_dtype(weight)}
        super().__init__(
            layer,
            name,
            {
                "xlora_A": torch.cat([expert.A.to(**to) for expert in experts]),
                "xlora_B": torch.cat([expert.B.to(**to) for expert in experts], 1),
            },
        )
        self._mixture, self._number = mixture, number
        self._owners = [expert.number for expert in experts for _ in range(len(expert.A))]

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """y + sum_e w_e s_e B_e A_e x"""
        y = base_forward(x)
        w = self._mixture.weights(self._number, x, routed=self.layer.routed)[..., self._owners]
        A, B = self.part("xlora_A").to(x.dtype), self.part("xlora_B").to(x.dtype)
        return y + F.linear((F.linear(x, A) * w).to(x.dtype), B).to(y.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def merged(self) -> dict[str, Tensor]:
        raise MergeError(WHY_NOT_MERGED)


class XLora(Method[XLoraConfig]):
    """A small network that mixes trained LoRA adapters anew for each token."""

    name = "xlora"
    config = XLoraConfig
    learning_rate = 3e-3
    learning_rate_source = Bilingual(
        "measured: on stories260K 3e-3, 9e-3 and 2.7e-2 differ by less than 0.01 in loss after 100 steps",
        "实测：在 stories260K 上训练 100 步，3e-3、9e-3 与 2.7e-2 的损失相差不到 0.01",
    )
    trains = Bilingual("a small network that mixes trained LoRA adapters", "组合已训练 LoRA 适配器的小网络")
    why_not_mergeable = WHY_NOT_MERGED
    needs_settings = True

    def attach(self, model: nn.Module, config: XLoraConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        if not config.adapters:
            raise ConfigError(
                Bilingual(
                    "XLoraConfig needs adapters, the trained LoRA adapters by name (in a run: method.adapters), such "
                    'as {"law": "runs/law/adapter"}.',
                    "XLoraConfig 需要 adapters，即已训练的 LoRA 适配器（在运行中是 method.adapters），例如 "
                    '{"law": "runs/law/adapter"}。',
                )
            )
        if not isinstance(model, PreTrainedModel) or is_encoder_decoder(model):
            raise ConfigError(
                Bilingual(
                    f"X-LoRA reads the last states of a decoder or an encoder, and {type(model).__name__} is neither.",
                    f"X-LoRA 读取解码器或编码器的最后一层状态，而 {type(model).__name__} 不是这类模型。",
                )
            )
        D, asked = model.config.get_text_config().hidden_size, config.hidden_size
        if asked not in (None, D):
            raise ConfigError(
                Bilingual(f"hidden_size = {asked}: the model's is {D}.", f"hidden_size = {asked}：模型为 {D}。")
            )
        config.hidden_size = D
        found: dict[str, list[Expert]] = {}
        for number, (name, folder) in enumerate(config.adapters.items()):
            for path, expert in read_expert(model, name, folder, number).items():
                found.setdefault(path, []).append(expert)
        paths = [path for path, _ in model.named_modules() if path in found]
        mixture = Mixture(config)
        shared: dict[str, SharedSpec] = {}
        for k, (inputs, outputs) in enumerate(pairwise(config.network_sizes(len(paths)))):
            for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
                shared[f"{NETWORK}_{k}_{kind}"] = SharedSpec(shape, partial(_start, shape, inputs))
        layers = {path: partial(ExpertsLayer, mixture, i, found[path]) for i, path in enumerate(paths)}
        return Parts(layers=layers, shared=shared, rows=mixture)

    def add_hooks(self, model: nn.Module, adapter: Adapter[XLoraConfig]) -> Callable[[], None]:
        assert isinstance(adapter.rows, Mixture)
        hook = model.register_forward_pre_hook(partial(_first_pass, adapter.rows, adapter.shared), with_kwargs=True)
        settings: Any = getattr(model, "generation_config", None)
        before = getattr(settings, "use_cache", None)
        if settings is not None:
            settings.use_cache = False  # the first pass needs every token

        def remove() -> None:
            hook.remove()
            if settings is not None:
                settings.use_cache = before

        return remove

    def to_file(self, config: XLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._in_file(config, key): t for key, t in tensors.items()}

    def from_file(self, config: XLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = [f"base_model.{NETWORK}_{k}_{kind}" for k in range(config.xlora_depth) for kind in ("weight", "bias")]
        back = {self._in_file(config, key): key for key in own}
        return {back.get(key, key): t for key, t in tensors.items()}

    def _in_file(self, config: XLoraConfig, key: str) -> str:
        start, _, end = key.partition(f"base_model.{NETWORK}_")
        if start or not end:
            return key
        k, kind = end.split("_")
        return f"base_model.{config.keys()[int(k)]}.{kind}"


def _first_pass(
    mixture: Mixture, shared: Mapping[str, Tensor], model: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
) -> None:
    """Computes the states of each token, and of them the experts' weights for the pass that follows."""
    config, inner = mixture.config, backbone(model)
    named = named_arguments(model, args, kwargs)
    if cached_tokens(named):
        raise ConfigError(
            Bilingual(
                "X-LoRA reads all tokens each time, and cannot compute with a cache: call with use_cache=False.",
                "X-LoRA 每次都要读入所有词元，不能使用缓存：请设置 use_cache=False。",
            )
        )
    wanted = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
    taken = parameters_of(inner)
    inputs = {name: named[name] for name in wanted if name in taken and named.get(name) is not None}
    inputs |= {"use_cache": False} if "use_cache" in taken else {}
    E, device = len(config.adapters), next(model.parameters()).device
    mixture.w = mixture.chosen(torch.full((1, 1, 1, E), config.scaling_pass_value, device=device))
    with torch.no_grad():
        z = inner(**inputs).last_hidden_state
    for k in range(config.xlora_depth):
        weight, bias = shared[f"{NETWORK}_{k}_weight"], shared[f"{NETWORK}_{k}_bias"]
        z = F.linear(z.to(weight.dtype), weight, bias)
        if k + 1 < config.xlora_depth:
            z = F.dropout(z.relu(), config.xlora_dropout_p, model.training)
    w = z.unflatten(-1, (-1, E))
    if config.enable_softmax:
        w = (w / config.softmax_temperature).softmax(-1)
    mixture.learn(w)


def _start(shape: tuple[int, ...], inputs: int, device: torch.device) -> Tensor:
    """Random numbers, as nn.Linear with so many inputs starts."""
    return torch.empty(shape, device=device).uniform_(-(inputs**-0.5), inputs**-0.5)
