"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv:2106.09685).

    y = W x + s B A x        s = alpha / r,  A ~ U(kaiming), B = 0: at the start y = W x exactly

rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732): s = alpha / sqrt(r).
DoRA (Liu et al., 2024, arXiv:2402.09353): y = m / |W + s B A| * (W + s B A) x, m trained, the norm taken per output and
held constant in the gradient; m starts as |W|. Beside other adapters, in the order in which they are active:
y_k = m_k / |W + s_k B_k A_k| * (y_k-1 + s_k B_k A_k x), with y_0 = W x, which is also what merging one after the other
makes of W.
On an embedding: y = W[x] + s (A[:, x])^T B^T, with A = 0 and B normal at the start.
Starts other than zero (PiSSA, OLoRA, LoftQ) live in lora_init.py.

Shapes: W (O, I), A (R, I), B (O, R), m (O,); I in, O out, R = r. Of an embedding: A (R, V), B (D, R).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.methods.base import CONFIG_NAME, LayerConfig, WrappedLayer, trained_dtype
from siliang.methods.lora_init import RESIDUAL_STARTS, start
from siliang.methods.targets import LORA_TARGETS
from siliang.models.introspect import as_stored, features, is_linear, out_by_in
from siliang.models.quantized import float_weight
from siliang.ops.lora_linear import Impl, lora_linear
from siliang.patterns import find
from siliang.secrets import short_repr
from siliang.types import AdapterError, ConfigError, MergeError, PeftType, nearest

INITS = ("gaussian", "pissa", "olora", "loftq")
MOST_ROUNDS = 100  # of PiSSA's and LoftQ's iterations; the papers have 16 and 5
# Starts of PEFT that siliang does not have. The former set A and B alone, which are in the file.
STARTS_IN_PLACE = ("eva", "orthogonal", "mica")
STARTS_BY_DATA = ("corda", "lora_ga")


@dataclass(kw_only=True)
class LoraConfig(LayerConfig):
    """LoRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank of the update.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Probability of zeroing an input of A during training.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: Base biases trained along: none, all, or those of the wrapped layers.
        use_rslora: Scale by alpha / sqrt(r).
        use_dora: Train the weight's magnitude apart from its direction.
        lora_bias: Give B a bias of its own.
        init_lora_weights: True: A kaiming uniform, B zero. "gaussian": A normal with deviation 1/r, B zero. False: both
            random, for tests. "pissa" (or "pissa_niter_4", faster), "olora": A and B take the weight's main directions,
            and the base weight keeps the rest. "loftq": the base weight is rounded to few bits, A and B make up for it.
        loftq_config: For "loftq": {"loftq_bits": 4 or 8, "loftq_iter": 1}.
        layers_to_transform: Indices of the blocks to tune; None for all.
        layers_pattern: Name of the list that the indices count in ("layers", "h"); None for any.
        rank_pattern: r for layers whose name ends in, or matches, the key: the first that does, in the order given.
        alpha_pattern: lora_alpha likewise.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, Any] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    peft_type: ClassVar[PeftType] = PeftType.LORA
    DEFAULT_TARGETS: ClassVar[dict[str, tuple[str, ...]]] = LORA_TARGETS
    UNSUPPORTED: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }

    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.lora_dropout <= 1.0:
            raise ConfigError(f"lora_dropout = {self.lora_dropout!r}: must be at least 0 and less than 1.")
        if low := [key for key, r in self.rank_pattern.items() if r < 1]:
            raise ConfigError(f"rank_pattern: {low[0]!r} = {self.rank_pattern[low[0]]}: must be at least 1.")
        if high := [key for key, r in self.rank_pattern.items() if r > self.MOST]:
            raise ConfigError(
                f"rank_pattern: {high[0]!r} = {self.rank_pattern[high[0]]:,}: must be at most {self.MOST:,}."
            )
        init = self.init_lora_weights
        if isinstance(init, str):
            init = self.init_lora_weights = init.lower()
            named = re.fullmatch(r"pissa_niter_(\d{1,9})", init, re.ASCII)
            if named is not None and int(named[1]) > MOST_ROUNDS:
                raise ConfigError(f"init_lora_weights = {init!r}: must be at most {MOST_ROUNDS} iterations.")
            if init not in INITS and named is None:
                raise ConfigError(
                    f"init_lora_weights = {short_repr(init)}: must be true, false, {', '.join(map(repr, INITS))} or "
                    f"'pissa_niter_4'.{nearest(init, INITS)}"
                )
        if init == "loftq":
            self.loftq_config = {"loftq_bits": 4, "loftq_iter": 1} | self.loftq_config
            bits, rounds = self.loftq_config["loftq_bits"], self.loftq_config["loftq_iter"]
            if bits not in (4, 8) or type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS:
                raise ConfigError(
                    f"loftq_config = {short_repr(self.loftq_config)}: loftq_bits is 4 or 8, loftq_iter 1 to "
                    f"{MOST_ROUNDS}."
                )
        if self.use_dora and self.lora_bias:
            raise ConfigError("use_dora and lora_bias do not go together: DoRA scales a weight, and has no bias of B.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is set without layers_to_transform: say which layers, or leave both out.")
        targets = self.target_modules
        if self.layers_to_transform is not None and isinstance(targets, str) and targets.lower() != "all-linear":
            raise ConfigError(
                "layers_to_transform is for target_modules by name: with a regular expression, as here, write the "
                "layers' numbers into it."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = CONFIG_NAME) -> Self:
        """As for every method; starts that siliang does not have are no matter where they left the base weights alone.

        Raises:
            AdapterError: As for every method, or the start changed the base weights in a way that is not in the file.
        """
        init = str(values.get("init_lora_weights")).lower()
        if init in STARTS_IN_PLACE:
            values = values | {"init_lora_weights": True}
        elif init in STARTS_BY_DATA:
            raise AdapterError(
                f"{source}: init_lora_weights = {init!r} changed the base model's weights by data that the file does "
                "not hold. Let PEFT convert it: save_pretrained(path_initial_model_for_weight_conversion=...)."
            )
        return super().from_dict(values, source=source)

    @classmethod
    def has_effect(cls, key: str, values: dict[str, Any]) -> bool:
        """Whether the field that switches the one called `key` on is set."""
        init = str(values.get("init_lora_weights")).lower()
        switched_by = {
            "megatron_core": values.get("megatron_config"),
            "qalora_group_size": values.get("use_qalora"),
            "eva_config": False,  # a start: the file holds what came of it
            "runtime_config": False,  # PEFT ignores it in a file
            "corda_config": init == "corda",
            "lora_ga_config": init == "lora_ga",
        }
        return bool(switched_by.get(key, True))

    def layer_arguments(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """What `add_adapter` needs for the layer at each path, the patterns resolved."""
        ranks = Patterns("rank_pattern", self.rank_pattern, paths).values
        alphas = Patterns("alpha_pattern", self.alpha_pattern, paths).values
        found = []
        for path in paths:
            r, alpha = ranks.get(path, self.r), alphas.get(path, self.lora_alpha)
            found.append(
                {
                    "r": r,
                    "scaling": alpha / math.sqrt(r) if self.use_rslora else alpha / r,
                    "dropout_p": self.lora_dropout,
                    "init": self.init_lora_weights,
                    "dora": self.use_dora,
                    "lora_bias": self.lora_bias,
                    "bits": self.loftq_config.get("loftq_bits", 4),
                    "iterations": self.loftq_config.get("loftq_iter", 1),
                }
            )
        return found


class _LoraLayer(WrappedLayer):
    """What a linear layer and an embedding with LoRA share: scaling, and starts that leave a residual behind."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scaling: dict[str, float] = {}
        # With PiSSA and its kin the base weight is not the model's own any more: each such adapter has a weight to go
        # with it. A dict, so that it is not listed among the layer's parameters.
        self._residuals: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def standing(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """The base weight less what every one of the adapters took out of it."""
        found = [self._residuals[name] for name in names if name in self._residuals]
        if len(found) < 2:
            return {"weight": found[0]} if found else {}
        own = self._pristine
        rest = own + sum((weight - own for weight in found), torch.zeros_like(own))
        return {"weight": nn.Parameter(rest, requires_grad=False)}

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.scaling.pop(name, None)
        self._residuals.pop(name, None)

    def aside(self) -> Iterator[nn.Parameter]:
        yield from super().aside()
        yield from self._residuals.values()

    def _leave(self, name: str, residual: Tensor) -> None:
        """Remembers the base weight that goes with adapter `name`."""
        self._residuals[name] = nn.Parameter(residual.to(self._pristine.dtype), requires_grad=False)

    @property
    def _pristine(self) -> Tensor:
        return self.beneath("weight")


class LoraLinear(_LoraLayer):
    """A linear layer (or GPT-2's Conv1D) with low-rank updates beside it.

    Parameter names are PEFT's: `lora_A.<adapter>.weight` (R, I), `lora_B.<adapter>.weight` (O, R) and `.bias` (O,), and
    `lora_magnitude_vector.<adapter>.weight` (O,), which the file calls `lora_magnitude_vector`.
    """

    ADAPTER_ATTRIBUTES = ("lora_A", "lora_B", "lora_magnitude_vector")
    impl: Impl = "fused"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.dropout_p: dict[str, float] = {}

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_linear(layer)

    def add_adapter(  # type: ignore[override]
        self,
        name: str,
        *,
        r: int,
        scaling: float,
        dropout_p: float = 0.0,
        init: bool | str = True,
        dora: bool = False,
        lora_bias: bool = False,
        bits: int = 4,
        iterations: int = 1,
    ) -> None:
        """Makes A and B for adapter `name`, beside the base weight: on its device, in fp32 where it is half."""
        weight = self.base_layer.weight
        in_features, out_features = features(self.base_layer)
        if isinstance(init, str) and init.startswith(RESIDUAL_STARTS):
            directions = min(in_features, out_features)
            if init.startswith("pissa_niter") and r > directions:
                raise ConfigError(
                    f"init_lora_weights = {init!r}: r = {r}, and a layer has {directions} rows or columns. "
                    "Use a smaller r, or 'pissa'."
                )
            r = min(r, directions)
        place = {"device": weight.device, "dtype": trained_dtype(weight)}
        A, B = _empty(in_features, r, **place), _empty(r, out_features, bias=lora_bias, **place)
        if init == "gaussian":
            nn.init.normal_(A.weight, std=1 / r)
        else:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(B.weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(B.weight)
        if lora_bias:
            nn.init.zeros_(B.bias)
        self.lora_A[name], self.lora_B[name] = A, B
        self.scaling[name], self.dropout_p[name] = scaling, dropout_p
        if isinstance(init, str) and init.startswith(RESIDUAL_STARTS) and weight.device.type != "meta":
            W_OI = out_by_in(self.base_layer, self._pristine)
            A.weight.data, B.weight.data, residual = start(
                init, W_OI, r=r, scaling=scaling, bits=bits, iterations=iterations
            )
            self._leave(name, as_stored(self.base_layer, residual))
        if dora:
            holder = nn.Module()
            holder.weight = nn.Parameter(self._norm(name).to(place["dtype"]))
            self.lora_magnitude_vector[name] = holder

    @classmethod
    def rank(cls, layer: nn.Module, *, r: int, init: bool | str = True, **arguments: Any) -> int:
        """Where the start takes a weight's directions, no more than it has."""
        return min(r, *features(layer)) if isinstance(init, str) and init.startswith(RESIDUAL_STARTS) else r

    @classmethod
    def numbers(cls, layer: nn.Module, **arguments: Any) -> int:
        in_features, out_features = features(layer)
        once = int(arguments["dora"]) + int(arguments["lora_bias"])
        return cls.rank(layer, **arguments) * (in_features + out_features) + once * out_features

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.dropout_p.pop(name, None)

    def adapted(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        alone = True
        for name in names:
            if name not in self.lora_A:
                continue
            if name in self.lora_magnitude_vector:
                y = y + self._dora(name, x, y, alone)
            else:
                y = lora_linear(
                    y,
                    x,
                    *self._factors(name),
                    self.scaling[name],
                    bias_O=self.lora_B[name].bias,  # type: ignore[arg-type]
                    dropout_p=self.dropout_p[name],
                    training=self.training,
                    impl=self.impl,
                )
            alone = False
        return y

    def merged_parameters(self, name: str) -> dict[str, Tensor]:
        weight = self.base_layer.weight
        # one rounding, at the end: the sum is formed in the wider dtype
        merged_OI = float_weight(self.base_layer).to(torch.promote_types(weight.dtype, torch.float32)) + self.delta(
            name
        )
        base_O, bias_O, own_O = self.base_layer.bias, self.lora_B[name].bias, self._own.get("bias")
        found: dict[str, Tensor] = {}
        if name in self.lora_magnitude_vector:
            scale_O = self._magnitude(name) / self._norm(name)
            merged_OI = merged_OI * scale_O.unsqueeze(1)
            if own_O is not None:  # the biases that were merged before are part of y_k-1, the layer's own is not scaled
                found["bias"] = own_O + scale_O * (base_O - own_O)
        if bias_O is not None:
            if base_O is None:
                raise MergeError(
                    "The adapter's lora_bias cannot be merged: the base model's layer has no bias to add it to. "
                    "Keep the adapter, or train it without lora_bias."
                )
            update_O = self.scaling[name] * bias_O  # type: ignore[operator]
            found["bias"] = base_O.to(update_O.dtype) + update_O
        return {"weight": as_stored(self.base_layer, merged_OI)} | found

    def delta(self, name: str) -> Tensor:
        """s B A, (O, I), in A's dtype."""
        A, B = self._factors(name)
        return self.scaling[name] * (B @ A)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        # in the file the magnitude stands without ".weight"
        return {k.replace("vector.weight", "vector"): p for k, p in super().adapter_parameters(name).items()}

    def _dora(self, name: str, x_BI: Tensor, y_BO: Tensor, alone: bool) -> Tensor:
        """What DoRA adds to the output so far, y, the layer's own bias left out: (m/|.| - 1) y + m/|.| s B A x.

        Args:
            alone: y is the base layer's output, which dropout then reaches as well.
        """
        dropout_p = self.dropout_p[name] if self.training else 0.0
        x_BI = F.dropout(x_BI, dropout_p)
        bias_O = self.base_layer.bias
        if dropout_p and alone:
            base_BO = F.linear(x_BI, float_weight(self.base_layer).to(x_BI.dtype))
        else:
            base_BO = y_BO if bias_O is None else y_BO - bias_O.to(y_BO.dtype)  # a trained bias is wider
        scale_O = self._magnitude(name) / self._norm(name)
        update_BO = lora_linear(
            torch.zeros_like(base_BO), x_BI, *self._factors(name), self.scaling[name], impl=self.impl
        )
        # near 1 the difference is small, and is rounded as such in half precision
        return (scale_O - 1).to(base_BO.dtype) * base_BO + scale_O.to(base_BO.dtype) * update_BO

    @torch.no_grad()
    def _norm(self, name: str) -> Tensor:
        """|W + s B A| of each output, (O,), a constant in the gradient as the paper says (section 4.3)."""
        A, _ = self._factors(name)
        if A.device.type == "meta":
            return A.new_empty(features(self.base_layer)[1])
        # the weight without what others put into it: the norm is the same beside any, merged and unmerged
        base = self._residuals.get(name, self._own.get("weight"))
        W_OI = float_weight(self.base_layer) if base is None else out_by_in(self.base_layer, base)
        return torch.linalg.norm(W_OI.to(A.dtype) + self.delta(name), dim=1)

    def _magnitude(self, name: str) -> Tensor:
        return self.lora_magnitude_vector[name].weight  # type: ignore[return-value]

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]


class LoraEmbedding(_LoraLayer):
    """An embedding with a low-rank update: `lora_embedding_A.<adapter>` (R, V), `lora_embedding_B.<adapter>` (D, R)."""

    ADAPTER_ATTRIBUTES = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    def add_adapter(  # type: ignore[override]
        self,
        name: str,
        *,
        r: int,
        scaling: float,
        init: bool | str = True,
        bits: int = 4,
        iterations: int = 1,
        **rest: Any,
    ) -> None:
        """Makes A and B for adapter `name`.

        Raises:
            ConfigError: A setting that an embedding cannot have.
        """
        if rest.get("dora") or rest.get("lora_bias"):
            raise ConfigError(
                "use_dora and lora_bias are for linear layers: leave the embedding out of target_modules."
            )
        weight = self.base_layer.weight
        place = {"device": weight.device, "dtype": trained_dtype(weight)}
        A, B = torch.zeros(r, weight.shape[0], **place), torch.empty(weight.shape[1], r, **place)
        nn.init.normal_(B)
        if init is False:
            nn.init.normal_(A)
        elif isinstance(init, str) and init == "loftq" and weight.device.type != "meta":
            # (V, D) is this layer's (O, I): the factors change places
            B_right, A_right, residual = start(
                init, self._pristine, r=r, scaling=scaling, bits=bits, iterations=iterations
            )
            A, B = A_right.T.contiguous(), B_right.T.contiguous()
            self._leave(name, residual)
        self.lora_embedding_A[name], self.lora_embedding_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.scaling[name] = scaling

    @classmethod
    def numbers(cls, layer: nn.Module, *, r: int, **arguments: Any) -> int:
        return r * sum(layer.weight.shape)  # type: ignore[union-attr]

    def adapted(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in names:
            if name in self.lora_embedding_A:
                A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
                update = F.embedding(x, A.T, padding_idx=self.base_layer.padding_idx) @ B.T
                # BART's and Gemma's embeddings multiply their output by a constant
                scale = getattr(self.base_layer, "embed_scale", None)
                update = update if scale is None else update * scale
                y = y + (self.scaling[name] * update).to(y.dtype)
        return y

    def merged_parameters(self, name: str) -> dict[str, Tensor]:
        weight = self.base_layer.weight
        A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
        return {"weight": weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.scaling[name] * (B @ A).T}


def _empty(in_features: int, out_features: int, *, bias: bool = False, device: Any, dtype: torch.dtype) -> nn.Linear:
    """A linear layer whose weights are still to be set: nn.Linear itself would draw, and throw away, random numbers."""
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta")
    for name, p in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.empty(p.shape, device=device, dtype=dtype)))
    return layer


class Patterns:
    """rank_pattern or alpha_pattern, matched against the layers' paths: each key means the whole or the ending, as in
    PEFT, and the first that matches counts.

    Args:
        field: Its name.
        patterns: Its keys and values.
        paths: Of the layers.

    Raises:
        TargetError: A key cannot be matched.
    """

    def __init__(self, field: str, patterns: Mapping[str, Any], paths: Sequence[str]) -> None:
        self._patterns, self._paths = patterns, paths
        found = find(field, list(patterns), paths, around=(r"(.*\.)?(", ")$"))
        self._hits = {
            key: {path for path, groups in zip(paths, one, strict=True) if groups is not None}
            for key, one in zip(patterns, found, strict=True)
        }

    @property
    def without_effect(self) -> list[str]:
        """The keys that match none of the layers."""
        return [key for key, hits in self._hits.items() if not hits]

    @property
    def values(self) -> dict[str, Any]:
        """The value of each path that a key matches."""
        return self._in_order(self._patterns)

    def in_any_order(self) -> dict[str, Any]:
        """Patterns that say the same whichever comes first in the file: its keys are sorted, by PEFT as well.

        Where several match one layer and sorting changes which is the first, each layer has a key of its own.
        """
        wanted = self.values
        if self._in_order(sorted(self._patterns)) == wanted:
            return dict(self._patterns)
        return {f"^{re.escape(path)}": wanted[path] for path in self._paths if path in wanted}

    def _in_order(self, keys: Iterable[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in keys:
            for path in self._hits[key]:
                found.setdefault(path, self._patterns[key])
        return found
