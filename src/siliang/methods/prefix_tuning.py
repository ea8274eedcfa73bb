"""Prefix tuning: Optimizing Continuous Prompts for Generation (Li and Liang, 2021, arXiv:2101.00190), and P-tuning v2
(Liu et al., 2021, arXiv:2110.07602), which is the same for understanding tasks.

    attention(Q, [P_k ; K], [P_v ; V])   in every layer
    P = E                                 or, with projection,  P = W2 tanh(W1 E + b1) + b2

Shapes: P (T, L * 2 * D): a row is (L layers, key and value, heads, head_dim); T virtual tokens, D = heads * head_dim of
the key/value heads. With projection E (T, D) and W1 (H, D), W2 (L * 2 * D, H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.prefix_heads import attention_heads
from siliang.methods.prefix_hooks import PrefixHooks
from siliang.methods.prompt import Prompt, PromptConfig, config_number
from siliang.methods.prompt_hooks import prompted_embeddings
from siliang.methods.prompt_method import PromptMethod
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptConfig):
    """Prefix tuning's settings, with PEFT's names and defaults.

    Attributes:
        encoder_hidden_size: H of the projection; None: D.
        prefix_projection: Train the prefix through a small network, which is not needed after training.
        init_weights: "zero": start from a prefix of zeros. None: at random.
    """

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: Literal["zero"] | None = None

    peft_type: ClassVar[str] = PeftType.PREFIX_TUNING
    is_prefix: ClassVar[bool] = True
    AT_LEAST_1: ClassVar[tuple[str, ...]] = (*PromptConfig.AT_LEAST_1, "encoder_hidden_size")

    NEEDED: ClassVar[tuple[str, ...]] = ("token_dim", "num_attention_heads", "num_layers")

    def complete(self, model_config: object, *, width: int | None = None, heads: tuple[int, int] | None = None) -> None:
        """As for every prompt, but its width is that of the keys, not of the hidden states.

        Args:
            heads: The key/value heads of the model's attention and their size, where that is known.
        """
        open_ = self.token_dim is None and self.num_attention_heads is None
        if open_ and heads is not None:
            self.num_attention_heads, self.token_dim = heads[0], heads[0] * heads[1]
        super().complete(model_config)
        assert self.token_dim is not None and self.num_attention_heads is not None
        if open_ and heads is None:
            number = config_number(model_config, ("num_key_value_heads",)) or self.num_attention_heads
            size = config_number(model_config, ("head_dim", "d_kv")) or self.token_dim // self.num_attention_heads
            self.num_attention_heads, self.token_dim = number, number * size

    def check_heads(self, heads: tuple[int, int] | None, model: str) -> None:
        """Whether a finished prefix fits the attention of a model.

        Args:
            heads: As for `complete`.
            model: What to call it.

        Raises:
            ConfigError: Its heads are others.
        """
        assert self.token_dim is not None and self.num_attention_heads is not None
        own = self.num_attention_heads, self.token_dim // self.num_attention_heads
        if heads is not None and heads != own:
            raise ConfigError(
                Bilingual(
                    f"The prefix is made for {own[0]} key/value heads of {own[1]}, and {model} has {heads[0]} of "
                    f"{heads[1]}: train it for this model. In PEFT set token_dim={heads[0] * heads[1]} and "
                    f"num_attention_heads={heads[0]} there.",
                    f"这个前缀用于 {own[0]} 个大小为 {own[1]} 的键/值头，而 {model} 有 {heads[0]} 个大小为 "
                    f"{heads[1]} 的头：请为该模型训练前缀。在 PEFT 中请设置 token_dim={heads[0] * heads[1]} 和"
                    f" num_attention_heads={heads[0]}。",
                )
            )

    @property
    def rows(self) -> int:
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens

    @property
    def width(self) -> int:
        assert self.token_dim is not None and self.num_layers is not None
        return self.num_layers * 2 * self.token_dim

    @property
    def encoder_elements(self) -> int:
        if not self.prefix_projection:
            return super().encoder_elements
        assert self.token_dim is not None
        D = self.token_dim
        H = self.encoder_hidden_size or D
        return self.rows * D + (D * H + H) + (H * self.width + self.width)

    def make_prompt(self, word_embeddings: nn.Embedding) -> Prefix:
        """A new prefix, which does not depend on the word embeddings."""
        assert self.token_dim is not None and self.num_layers is not None and self.num_virtual_tokens is not None
        H = self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim
        width = self.num_layers * 2 * self.token_dim
        projected = self.prefix_projection and not self.inference_mode
        prefix = Prefix(self.num_virtual_tokens, self.token_dim, H, width, projected)
        if self.init_weights == "zero":
            for p in prefix.last_layer.parameters():
                nn.init.zeros_(p)
        return prefix


class PrefixTuning(PromptMethod[PrefixTuningConfig]):
    """Trained keys and values before those of every layer."""

    name = "prefix_tuning"
    config = PrefixTuningConfig
    learning_rate = 1e-2
    learning_rate_source = Bilingual(
        "PEFT's example for prefix tuning: 1e-2; Liu et al. 2021b, table 5: 5e-3 to 1e-2",
        "PEFT 的前缀微调示例：1e-2；Liu 等 2021b，表 5：5e-3 至 1e-2",
    )
    trains = Bilingual("keys and values before every layer's own", "加在各层自身键值之前的键和值")
    hooks = PrefixHooks

    def complete(self, model: nn.Module, config: PrefixTuningConfig, *, from_file: bool) -> None:
        prompted_embeddings(model)  # every model of text has them
        config.complete(model.config, heads=None if from_file else attention_heads(model))
        if from_file:
            config.check_heads(attention_heads(model), type(model).__name__)


class Prefix(Prompt):
    """E and its projection: `embedding` and `transform`, as PEFT names them."""

    def __init__(self, T: int, D: int, H: int, width: int, projected: bool) -> None:
        super().__init__()
        self.flat = not projected
        self.embedding = nn.Embedding(T, D if projected else width)
        if projected:
            self.transform = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, width))

    @property
    def last_layer(self) -> nn.Module:
        """What the prefix comes out of: zeros in it make a prefix of zeros."""
        return self.embedding if self.flat else self.transform[-1]

    def forward(self) -> Tensor:
        E = self.embedding.weight
        return E if self.flat else self.transform(E)
