"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al., 2023, arXiv:2303.10512).

    y = W x + s B (E * A) x        s = lora_alpha / init_r,  E = 0: at the start y = W x exactly

A and B are kept near to orthogonal by a term of the loss, so that E is like singular values:

    orth_reg_weight * mean over all A and B of ||A A^T - 1||, ||B^T B - 1||        (Frobenius)

A triplet is a row of A, its value of E and its column of B. Training begins with init_r triplets a layer, and E is set
to zero for the least important ones, until target_r a layer are left on average. Importance of a number w with gradient
g, smoothed over the steps t:

    I_t = beta1 I_t-1 + (1 - beta1) |w g|        U_t = beta2 U_t-1 + (1 - beta2) ||w g| - I_t|        importance = I U

That of a triplet is that of its E, and the means of its A's and of its B's.

Shapes: W (O, I), A (R, I), E (R, 1), B (O, R); I in, O out, R = init_r. The file holds the triplets that are left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Factored
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod
from siliang.methods.method import Adapter, Parts
from siliang.methods.targets import ADALORA_TARGETS
from siliang.models.introspect import features
from siliang.types import AdapterError, ConfigError, PeftType

TRIPLET = ("lora_A", "lora_B", "lora_E")
AXES = {"lora_A": 0, "lora_B": 1, "lora_E": 0}  # along which the triplets lie


@dataclass(kw_only=True)
class AdaLoraConfig(BlocksConfig):
    """AdaLoRA's settings, with PEFT's names and defaults.

    Attributes:
        target_r: Rank of a layer at the end, on average.
        init_r: Rank of each layer at the start.
        tinit: Steps before ranks are taken away.
        tfinal: Steps at the end in which the ranks stay as they are.
        deltaT: Ranks are taken away every so many steps.
        beta1, beta2: Of the moving averages of importance and of its uncertainty.
        orth_reg_weight: Weight of the term that keeps A and B orthogonal.
        total_step: Optimizer steps of the training. A run fills it in; a loop of your own needs it.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Probability of zeroing an input of A during training.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        init_lora_weights: The update is zero at the start. False: random, for tests.
        rank_pattern: For each layer's `lora_E` which of its init_r values are left. Training writes it.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815, PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_lora_weights: bool = True
    rank_pattern: dict[str, list[bool]] | None = None

    peft_type: ClassVar[str] = PeftType.ADALORA
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("target_r", "init_r", "deltaT", "total_step")
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("lora_dropout",)
    UNSUPPORTED: ClassVar[dict[str, object]] = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }
    # Of these fields, which PEFT's AdaLoRA has from LoRA, those that change something.
    WITH_EFFECT: ClassVar[tuple[str, ...]] = (
        "bias",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r > self.init_r:
            raise ConfigError(
                Bilingual(
                    f"target_r = {self.target_r} and init_r = {self.init_r}: target_r must be at most init_r, from "
                    "which the ranks come down.",
                    f"target_r = {self.target_r}，init_r = {self.init_r}：target_r 不得大于 init_r。",
                )
            )
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    Bilingual(
                        f"{name} = {getattr(self, name)}: must be at least 0.",
                        f"{name} = {getattr(self, name)}：至少为 0。",
                    )
                )
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(
                    Bilingual(
                        f"{name} = {getattr(self, name)}: must be more than 0 and less than 1.",
                        f"{name} = {getattr(self, name)}：须大于 0 且小于 1。",
                    )
                )
        if not self.lora_alpha > 0:
            raise ConfigError(
                Bilingual(
                    f"lora_alpha = {self.lora_alpha}: must be more than 0.",
                    f"lora_alpha = {self.lora_alpha}：须大于 0。",
                )
            )
        if self.total_step is not None and self.tinit >= self.last_step:
            raise ConfigError(
                Bilingual(
                    f"tinit = {self.tinit}, tfinal = {self.tfinal} and {self.total_step} steps: no step is left "
                    "between them in which ranks are taken away. Choose less, or train for more steps.",
                    f"tinit = {self.tinit}，tfinal = {self.tfinal}，共 {self.total_step} 步："
                    "两者之间没有可以降秩的步数。请减小它们，或增加训练步数。",
                )
            )

    @classmethod
    def has_effect(cls, key: str, values: dict[str, object]) -> bool:
        return key in cls.WITH_EFFECT

    @property
    def last_step(self) -> int:
        """The step after which the ranks stay as they are.

        Raises:
            ConfigError: How many steps there will be is not known.
        """
        if self.total_step is None:
            raise ConfigError(
                Bilingual(
                    "total_step: AdaLoRA must know how many optimizer steps there will be. Set it in AdaLoraConfig.",
                    "total_step：AdaLoRA 须知道一共有多少优化步。请在 AdaLoraConfig 中设置。",
                )
            )
        return self.total_step - self.tfinal

    def triplets_left(self, step: int, layers: int) -> int:
        """How many triplets all layers have together after a step, by the paper's cubic schedule."""
        first, last = self.init_r * layers, self.target_r * layers
        if step <= self.tinit:
            return first
        to_go = max(1 - (step - self.tinit) / (self.last_step - self.tinit), 0.0)
        return int((first - last) * to_go**3 + last)


class AdaLoraLayer(Factored):
    """AdaLoRA on a linear layer: `lora_A.<adapter>`, `lora_B.<adapter>`, `lora_E.<adapter>`, and `ranknum.<adapter>`
    (1,), which is R and not in the file.
    """

    def __init__(self, config: AdaLoraConfig, layer: Layer, name: str) -> None:
        in_features, out_features = features(layer.base_layer)
        r, zero = config.init_r, config.init_lora_weights
        normal = partial(nn.init.normal_, std=0.02 if zero else 1.0)
        parts: dict[str, nn.Module | Tensor] = {
            "lora_A": new_parameter(layer, r, in_features, start=normal),
            "lora_B": new_parameter(layer, out_features, r, start=normal),
            "lora_E": new_parameter(layer, r, 1, start=nn.init.zeros_ if zero else normal),
            "ranknum": torch.full((1,), float(r), device=layer.base_layer.weight.device),
        }
        super().__init__(layer, name, parts)
        self.settings = {"r": r, "lora_alpha": config.lora_alpha, "lora_dropout": nn.Dropout(config.lora_dropout)}
        self.dropout_p = config.lora_dropout
        self.set_scaling(config.lora_alpha / (r + 1e-5))  # as PEFT divides

    def factors(self) -> tuple[Tensor, Tensor]:
        """s E * A, and B."""
        return self.s * self.part("lora_E") * self.part("lora_A"), self.part("lora_B")


class AdaLora(LayerMethod[AdaLoraConfig]):
    """Low-rank updates whose ranks are found in training."""

    name = "adalora"
    config = AdaLoraConfig
    learning_rate = 5e-3
    learning_rate_source = Bilingual(
        "Zhang et al. 2023, appendix: 5e-4 to 2.2e-3 on GLUE; measured: 62% on SST-2 after 100 steps with 9e-3",
        "Zhang 等 2023，附录：GLUE 上为 5e-4 至 2.2e-3；实测：SST-2 训练 100 步，用 9e-3 得 62%",
    )
    trains = Bilingual("low-rank updates, whose ranks go where they matter", "低秩更新，秩按重要性分给各层")
    default_targets = ADALORA_TARGETS
    learned = ("rank_pattern",)
    has_smaller_files = True

    def prepare(self, config: AdaLoraConfig, steps: int) -> AdaLoraConfig:
        found = config if config.total_step is not None else dataclasses.replace(config, total_step=steps)
        if found.last_step > steps:
            raise ConfigError(
                Bilingual(
                    f"total_step = {found.total_step}: the training has {steps} steps, and the ranks would not come "
                    "down to target_r. Leave total_step out.",
                    f"total_step = {found.total_step}：训练只有 {steps} 步，秩降不到 target_r。请去掉 total_step。",
                )
            )
        return found

    def attach(self, model: nn.Module, config: AdaLoraConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        if not from_file:
            config.rank_pattern = None  # of an adapter that was trained
        return super().attach(model, config, saved=saved, from_file=from_file)

    def make(self, config: AdaLoraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> AdaLoraLayer:
        return AdaLoraLayer(config, layer, name)

    # ---- training ----

    def extra_loss(self, adapter: Adapter[AdaLoraConfig]) -> Tensor:
        distances: list[Tensor] = []
        for layer in adapter.layers.values():
            A_RI, B_OR = layer.part("lora_A"), layer.part("lora_B")
            one = torch.eye(len(A_RI), device=A_RI.device, dtype=A_RI.dtype)
            distances += (torch.linalg.norm(product - one).float() for product in (A_RI @ A_RI.T, B_OR.T @ B_OR))
        return adapter.config.orth_reg_weight * sum(distances[1:], distances[0]) / len(distances)

    @torch.no_grad()
    def after_step(self, adapter: Adapter[AdaLoraConfig], step: int) -> None:
        config, state = adapter.config, adapter.state
        last, layers = config.last_step, len(adapter.layers)
        if step < last:
            _update_importance(adapter)
        if (config.tinit < step < last and step % config.deltaT == 0) or step == last:
            _keep(adapter, config.triplets_left(step, layers))
        if step == last:
            for path, key, _ in _tensors(adapter):
                state.pop(f"{path}.{key}.importance", None)
                state.pop(f"{path}.{key}.uncertainty", None)
        elif step > last and config.rank_pattern is not None:
            for path, layer in adapter.layers.items():
                E = layer.part("lora_E")
                E.masked_fill_(~_mask(config.rank_pattern, f"{path}.lora_E", E), 0.0)
        # what the file leaves out is trained further
        for path, key, tensor in _tensors(adapter):
            if config.rank_pattern is not None and step != config.total_step:
                state[f"{path}.{key}"] = tensor
            else:
                state.pop(f"{path}.{key}", None)

    @torch.no_grad()
    def restore(self, adapter: Adapter[AdaLoraConfig]) -> None:
        for path, key, tensor in _tensors(adapter):
            whole = adapter.state.get(f"{path}.{key}")
            if whole is not None and whole.shape == tensor.shape:
                tensor.copy_(whole)

    # ---- the file ----

    def to_file(self, config: AdaLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The triplets that are left."""
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            path, _, part = key.rpartition(".")
            if part == "ranknum":
                continue
            mask = None if part not in AXES else _left(config, path)
            found[key] = tensor if mask is None else tensor[mask] if AXES[part] == 0 else tensor[:, mask]
        return found

    def from_file(self, config: AdaLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All triplets, those that the file leaves out with zeros."""
        found = dict(tensors)
        for key, tensor in tensors.items():
            path, _, part = key.rpartition(".")
            if part not in AXES or tensor.ndim != 2:
                continue
            found[f"{path}.ranknum"] = torch.full((1,), float(config.init_r))
            mask, axis = _left(config, path), AXES[part]
            if mask is None or tensor.shape[axis] == config.init_r:
                continue
            if len(mask) != config.init_r or sum(mask) != tensor.shape[axis]:
                raise AdapterError(
                    Bilingual(
                        f"{key} has {tensor.shape[axis]} ranks, and rank_pattern says {sum(mask)} of {len(mask)} "
                        f"(init_r = {config.init_r}): was adapter_config.json changed?",
                        f"{key} 的秩为 {tensor.shape[axis]}，而 rank_pattern 为 {len(mask)} 中的 {sum(mask)} 个"
                        f"（init_r = {config.init_r}）：adapter_config.json 是否被改过？",
                    )
                )
            places = torch.tensor(mask, device=tensor.device).nonzero().flatten()
            shape = [config.init_r if d == axis else n for d, n in enumerate(tensor.shape)]
            found[key] = tensor.new_zeros(shape).index_copy(axis, places, tensor)
        return found


def _tensors(adapter: Adapter[AdaLoraConfig]) -> Iterator[tuple[str, str, Tensor]]:
    """Each layer's path with the names of its A, B and E and the tensors."""
    for path, layer in adapter.layers.items():
        for key in TRIPLET:
            yield path, key, layer.part(key)


def _update_importance(adapter: Adapter[AdaLoraConfig]) -> None:
    """Takes this step's gradients into the moving averages.

    Raises:
        ConfigError: There are no gradients.
    """
    beta1, beta2, state = adapter.config.beta1, adapter.config.beta2, adapter.state
    if all(p.grad is None for _, _, p in _tensors(adapter)):
        raise ConfigError(
            Bilingual(
                "AdaLoRA reads the gradients of a step: call update_and_allocate before zero_grad.",
                "AdaLoRA 要读取这一步的梯度：请在 zero_grad 之前调用 update_and_allocate。",
            )
        )
    for path, key, p in _tensors(adapter):
        if p.grad is None:  # the layer takes no part in the forward: its ranks are the first to go
            continue
        now = (p * p.grad).abs()
        one, other = f"{path}.{key}.importance", f"{path}.{key}.uncertainty"
        state[one] = beta1 * state[one].to(now) + (1 - beta1) * now if one in state else (1 - beta1) * now
        apart = (1 - beta2) * (now - state[one]).abs()
        state[other] = beta2 * state[other].to(now) + apart if other in state else apart


def _keep(adapter: Adapter[AdaLoraConfig], left: int) -> None:
    """Sets E to zero but for the most important triplets of all layers, as many as `left` says."""
    worth: dict[str, Tensor] = {}
    for path, key, p in _tensors(adapter):
        one, other = (adapter.state.get(f"{path}.{key}.{what}") for what in ("importance", "uncertainty"))
        own = torch.zeros_like(p) if one is None or other is None else one.to(p) * other.to(p)
        mean = own.mean(1 - AXES[key])
        worth[path] = worth[path] + mean if path in worth else mean
    device = next(iter(worth.values())).device
    every = torch.cat([own.to(device) for own in worth.values()])
    drop = len(every) - left
    limit = every.kthvalue(drop).values if drop > 0 else every.new_tensor(-1.0)
    pattern: dict[str, list[bool]] = {}
    for path, own in worth.items():
        keep = own > limit.to(own.device)
        adapter.layers[path].part("lora_E").masked_fill_(~keep[:, None], 0.0)
        pattern[f"{path}.lora_E"] = keep.tolist()
    adapter.config.rank_pattern = pattern


def _mask(pattern: Mapping[str, list[bool]], key: str, E: Tensor) -> Tensor:
    """Which values of E are left, in its shape."""
    mask = pattern.get(key)
    return torch.ones_like(E, dtype=torch.bool) if mask is None else torch.tensor(mask, device=E.device)[:, None]


def _left(config: AdaLoraConfig, path: str) -> list[bool] | None:
    """Which triplets of a layer are left; None for all.

    Args:
        path: The layer's, as the keys of a file have it.
    """
    return (config.rank_pattern or {}).get(f"{path.removeprefix('base_model.model.')}.lora_E")
