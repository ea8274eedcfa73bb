"""LoRA's settings, with PEFT's names, defaults and refusals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from siliang.language import Bilingual
from siliang.methods.arrow import WHY_NOT_TRAINED, ArrowConfig
from siliang.methods.bdlora import BdLoraConfig
from siliang.methods.config import CONFIG_NAME
from siliang.methods.corda import CordaConfig
from siliang.methods.eva import EvaConfig
from siliang.methods.fields import check_fields
from siliang.methods.kasa import KasaConfig
from siliang.methods.layer_method import BlocksConfig
from siliang.methods.lora_ga import LoraGAConfig
from siliang.methods.lora_initialization import ANY_VARIANT, Initialization
from siliang.methods.lora_initializations import INITIALIZATIONS, find_initialization, with_settings
from siliang.methods.tied_ends import Tied
from siliang.methods.velora import VeloraConfig
from siliang.secrets import short_repr
from siliang.types import ConfigError, PeftType, TaskType

MOST_LAYERS = 1000  # of layer_replication; the deepest models have under 200


@dataclass
class LoraRuntimeConfig:
    """How an adapter is made on this machine, which its file does not hold.

    Attributes:
        ephemeral_gpu_offload: DoRA's norms at the start, of linear layers in CPU memory, are computed on the GPU.
    """

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


def check_ranges(ranges: list[list[int]] | None) -> None:
    """
    Raises:
        ConfigError: `layer_replication` holds something else than ranges of layers, or too many.
    """
    if wrong := next((r for r in ranges or () if len(r) != 2 or not 0 <= r[0] < r[1]), None):
        raise ConfigError(
            Bilingual(
                f"layer_replication: {short_repr(wrong)} must be [first, end], with 0 <= first < end.",
                f"layer_replication：{short_repr(wrong)} 应为 [first, end]，且 0 <= first < end。",
            )
        )
    if (total := sum(end - start for start, end in ranges or ())) > MOST_LAYERS:
        raise ConfigError(
            Bilingual(
                f"layer_replication makes {total:,} layers: at most {MOST_LAYERS:,}.",
                f"layer_replication 会得到 {total:,} 层：最多 {MOST_LAYERS:,} 层。",
            )
        )


@dataclass(kw_only=True)
class LoraConfig(BlocksConfig):
    """LoRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank of the update.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Probability of zeroing an input of A during training.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: Base biases that are trained too: none, all, or those of the wrapped layers.
        use_rslora: Scale by alpha / sqrt(r).
        use_dora: Train the weight's magnitude separately from its direction.
        lora_bias: Give B a bias of its own.
        init_lora_weights: True: A kaiming uniform, B zero. "gaussian": A normal with deviation 1/r, B zero. False: both
            random, for tests. "pissa" (or "pissa_niter_4", faster), "olora": A and B take the weight's main directions,
            and the base weight keeps the rest. "loftq": the base weight is quantized, A and B correct the error.
            "orthogonal": both random, with B A = 0; r is even. "mica": A zero; B, which is not trained, the weight's
            smallest directions. Learned from data before training: "eva": A the main directions of the layer's input,
            ranks by the variance that they explain; "corda": those of the weight times the input's covariance,
            "lora_ga": those of the weight's gradient; the base weight keeps the rest.
        eva_config, corda_config, lora_ga_config: Of these initializations; None for PEFT's defaults.
        alora_invocation_tokens: aLoRA: the ids of a sequence of tokens, from whose last occurrence in a row on the
            update is added. What comes before it is computed by the base model alone.
        kasa_config: KaSA: learned singular values between A and B, on a base weight without its r smallest ones.
        use_bdlora: BD-LoRA: A or B of a layer is block-diagonal, for servers that cut layers over devices.
        arrow_config: Arrow: trained LoRA adapters are mixed for each token. create_arrow_model sets it.
        velora_config: VeLoRA: the inputs of A are compressed for the backward pass, which takes less memory.
        loftq_config: For "loftq": {"loftq_bits": 4 or 8, "loftq_iter": 1}.
        rank_pattern: r for layers whose name ends in, or matches, the key: the first that does, in the order given.
        alpha_pattern: lora_alpha likewise.
        trainable_token_indices: The ids of tokens whose embeddings are trained too, row by row: those of the input
            embeddings, or lists of them by the endings of the names of embeddings and heads. Tied ones stay tied.
        layer_replication: The base model's layers are stacked anew: [[0, 4], [2, 5]] makes 0, 1, 2, 3, 2, 3, 4 of them,
            which share their weights and have adapters of their own.
        ensure_weight_tying: Where embed_tokens or lm_head is among the targets or modules_to_save and they are tied,
            both are changed, and stay tied.
        runtime_config: How the adapter is made on this machine. It is not saved.
        target_parameters: Parameters that are no linear layer's, such as the weights of a mixture's experts, by the
            endings of their paths: "experts.gate_up_proj". Added to the layers of target_modules, of which [] is none.
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
    alora_invocation_tokens: list[int] | None = None
    kasa_config: KasaConfig | None = None
    use_bdlora: BdLoraConfig | None = None
    velora_config: VeloraConfig | None = None
    arrow_config: ArrowConfig | None = None
    loftq_config: dict[str, int] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[list[int]] | None = None
    ensure_weight_tying: bool = False
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    target_parameters: list[str] | None = None

    peft_type: ClassVar[str] = PeftType.LORA
    FILES: ClassVar[tuple[str, ...]] = ("corda_config.cache_file", "corda_config.covariance_file")
    UNSUPPORTED: ClassVar[dict[str, object]] = {
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "use_qalora": False,
    }

    NOT_IN_RUNS: ClassVar[Mapping[str, Bilingual]] = {"arrow_config": WHY_NOT_TRAINED}
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)
    VARIANTS: ClassVar[tuple[str, ...]] = (  # of which one may be set
        *("use_dora", "alora_invocation_tokens", "kasa_config", "use_bdlora", "velora_config", "arrow_config"),
    )
    # What does not go together with a variant, and why.
    APART: ClassVar[tuple[tuple[str, str, Bilingual], ...]] = (
        (
            "use_dora",
            "lora_bias",
            Bilingual("DoRA scales a weight, and has no bias of B", "DoRA 缩放权重，不含 B 的偏置"),
        ),
        ("use_bdlora", "lora_bias", Bilingual("B in blocks has no bias", "分块的 B 没有偏置")),
        ("arrow_config", "lora_bias", Bilingual("nothing of the router is trained", "路由没有可训练的参数")),
    )

    @property
    def variant(self) -> str | None:
        """The setting of the variant that is switched on; None for LoRA itself."""
        return next((name for name in self.VARIANTS if getattr(self, name)), None)

    @property
    def initialization(self) -> Initialization:
        """What A, B and the base weight begin with."""
        return with_settings(find_initialization(self.init_lora_weights), self.initialization_settings)

    @property
    def initialization_settings(self) -> object:
        """The settings of the initialization; None where it has none."""
        settings = find_initialization(self.init_lora_weights).settings
        return None if settings is None else getattr(self, settings.field)

    @property
    def tied(self) -> Tied | None:
        """What ensure_weight_tying ties among the targets, on the adapter's model. No field: `vars(config)` may be the
        arguments of another config."""
        return self.__dict__.get("_tied")

    @tied.setter
    def tied(self, found: Tied | None) -> None:
        self.__dict__.pop("_tied", None)
        if found is not None:
            self.__dict__["_tied"] = found

    def __post_init__(self) -> None:
        if isinstance(self.layer_replication, list | tuple):
            self.layer_replication = [list(r) if isinstance(r, tuple) else r for r in self.layer_replication]
        super().__post_init__()
        check_ranges(self.layer_replication)
        if not 0.0 <= self.lora_dropout <= 1.0:
            raise ConfigError(
                Bilingual(
                    f"lora_dropout = {self.lora_dropout!r}: must be at least 0 and less than 1.",
                    f"lora_dropout = {self.lora_dropout!r}：须大于等于 0 且小于 1。",
                )
            )
        if low := [key for key, r in self.rank_pattern.items() if r < 1]:
            raise ConfigError(
                Bilingual(
                    f"rank_pattern: {low[0]!r} = {self.rank_pattern[low[0]]}: must be at least 1.",
                    f"rank_pattern：{low[0]!r} = {self.rank_pattern[low[0]]}：至少为 1。",
                )
            )
        if high := [key for key, r in self.rank_pattern.items() if r > self.MOST]:
            raise ConfigError(
                Bilingual(
                    f"rank_pattern: {high[0]!r} = {self.rank_pattern[high[0]]:,}: must be at most {self.MOST:,}.",
                    f"rank_pattern：{high[0]!r} = {self.rank_pattern[high[0]]:,}：最大为 {self.MOST:,}。",
                )
            )
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        self._complete_initialization()
        self._check_variant()
        self._check_invocation()
        self._check_parameters()

    def _check_parameters(self) -> None:
        """
        Raises:
            ConfigError: target_parameters is combined with a setting that does not work on a parameter.
        """
        settings = ("lora_dropout", "fan_in_fan_out", "lora_bias", *self.VARIANTS)
        wrong = [name for name in settings if getattr(self, name)]
        if self.layers_to_transform not in (None, []):
            wrong.append("layers_to_transform")
        if not self.initialization.on_any_layer:
            wrong.append(f"init_lora_weights = {self.init_lora_weights!r}")
        if self.target_parameters and wrong:
            raise ConfigError(
                Bilingual(
                    f"target_parameters and {wrong[0]} do not go together: {wrong[0]} does not work on parameters "
                    "that are no layer's. Leave out one of them.",
                    f"target_parameters 与 {wrong[0]} 不能同时使用：后者不适用于不属于任何层的参数。请去掉其中一个。",
                )
            )

    def _check_variant(self) -> None:
        """
        Raises:
            ConfigError: Several variants are switched on, or one does not go with another setting.
        """
        row, init = self.initialization, f"init_lora_weights = {self.init_lora_weights!r}"
        on = [name for name in self.VARIANTS if getattr(self, name)]
        apart = [(on[0], other, Bilingual("each is a LoRA of its own", "各是一种 LoRA")) for other in on[1:]]
        for name, why in row.apart.items():
            refused = on if name == ANY_VARIANT else [name] if getattr(self, name) else []
            apart += [(init, other, why) for other in refused]
        if self.use_bdlora and not row.on_any_layer:
            blocks = Bilingual(
                "this initialization is that of an A and B without blocks", "这种初始化针对不分块的 A 和 B"
            )
            apart.append((init, "use_bdlora", blocks))
        if self.arrow_config and not row.on_any_layer:
            nothing = Bilingual("nothing of the router is trained", "路由没有可训练的参数")
            apart.append((init, "arrow_config", nothing))
        apart += [(one, other, why) for one, other, why in self.APART if getattr(self, one) and getattr(self, other)]
        for one, other, why in apart[:1]:
            raise ConfigError(
                Bilingual(f"{one} and {other} do not go together: {why}.", f"{one} 与 {other} 不能同时使用：{why.zh}。")
            )

    def _check_invocation(self) -> None:
        """
        Raises:
            ConfigError: aLoRA has no invocation, or none that a row could have.
        """
        tokens = self.alora_invocation_tokens
        if tokens is None:
            return
        if not tokens or min(tokens) < 0:
            raise ConfigError(
                Bilingual(
                    f"alora_invocation_tokens = {short_repr(tokens)}: must be token ids, such as "
                    "tokenizer.encode(text, add_special_tokens=False).",
                    f"alora_invocation_tokens = {short_repr(tokens)}：应为 token 编号，"
                    "例如 tokenizer.encode(text, add_special_tokens=False)。",
                )
            )
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ConfigError(
                Bilingual(
                    f"alora_invocation_tokens is for task_type CAUSAL_LM, not {self.task_type}.",
                    f"alora_invocation_tokens 只用于 task_type CAUSAL_LM，不能用于 {self.task_type}。",
                )
            )

    def _complete_initialization(self) -> None:
        """Checks the initialization and its settings, and fills in PEFT's defaults; those of another are dropped.

        Raises:
            ConfigError: There is no such initialization, or a setting of it is not allowed.
        """
        row = find_initialization(self.init_lora_weights)
        if row.check_ranks is not None:
            row.check_ranks([self.r, *self.rank_pattern.values()])
        for other in INITIALIZATIONS.values():
            if other.settings is None:
                continue
            name = other.settings.field
            if other.name == row.name:
                setattr(self, name, other.settings.complete(getattr(self, name)))
            elif other.from_data is not None and getattr(self, name) is not None:
                setattr(self, name, None)
                message = Bilingual(
                    f"{name} is ignored: it is for init_lora_weights = {other.name!r}.",
                    f"{name} 不起作用：它用于 init_lora_weights = {other.name!r}。",
                )
                warnings.warn(message, stacklevel=4)

    def to_dict(self) -> dict[str, object]:
        values = super().to_dict()
        del values["runtime_config"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, object], *, source: str = CONFIG_NAME) -> Self:
        """As for every method. What is of another machine, or of an initialization that is not the file's, is left out:
        PEFT's files have it.
        """
        init = str(values.get("init_lora_weights")).lower()
        learned = [row for row in INITIALIZATIONS.values() if row.from_data and row.settings and row.name != init]
        unused = {"runtime_config", *(row.settings.field for row in learned if row.settings)}
        return super().from_dict({key: v for key, v in values.items() if key not in unused}, source=source)

    @classmethod
    def has_effect(cls, key: str, values: dict[str, object]) -> bool:
        """Whether the field that switches the one called `key` on is set."""
        switched_by = {
            "megatron_core": values.get("megatron_config"),
            "qalora_group_size": values.get("use_qalora"),
        }
        return bool(switched_by.get(key, True))
