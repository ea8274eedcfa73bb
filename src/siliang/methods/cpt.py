"""CPT: Context-aware Prompt Tuning (Blau et al., 2024, arXiv:2410.17222).

    model(E(c) + m * d ; E(x))        |d_i| <= e_i sqrt(D / 2048)

c is a context of examples, and d the change of its embeddings, which is projected onto its bounds before each forward.
Labels in the context keep their embeddings (m = 0 there), and are learned like those of the text: those of the last
example by the factor f, of the one before it by f^2, and so on.

The type of each token says what it is: 0 nothing, 1 + 4k a template of the input of example k, 2 + 4k its input, 3 + 4k
a template of its output, 4 + 4k its label.

Shapes: E(c), d (V, D), m, e (V,); V tokens of the context, D the model's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from siliang.language import Bilingual
from siliang.methods.embedding_hooks import EmbeddingHooks
from siliang.methods.method import Adapter
from siliang.methods.prompt import Prompt, PromptConfig
from siliang.methods.prompt_hooks import Arguments, tensor_in
from siliang.methods.prompt_method import PromptMethod
from siliang.types import ConfigError, PeftType, TaskType

IGNORED = -100  # the label of a token that is not learned
WIDTH = 2048.0  # of the hidden states for which the bounds are meant
LABEL = 4  # the type of a label; those of the next example are more by this
LEAST_BOUND = 1e-10
ROUNDING = 1e-6  # by which a bound may be exceeded, so that what was projected is not projected again


@dataclass(kw_only=True)
class CPTConfig(PromptConfig):
    """CPT's settings, with PEFT's names and defaults.

    Attributes:
        cpt_token_ids: c. num_virtual_tokens is their number.
        cpt_mask: Not used, as in PEFT.
        cpt_tokens_type_mask: The type of each token.
        opt_weighted_loss_type: "decay": labels of the context count less the farther they are from the text.
        opt_loss_decay_factor: f.
        opt_projection_epsilon: e of inputs.
        opt_projection_format_epsilon: e of templates.
        tokenizer_name_or_path: Not used, as in PEFT.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    peft_type: ClassVar[str] = PeftType.CPT
    FILES: ClassVar[tuple[str, ...]] = ("tokenizer_name_or_path",)
    has_own_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_transformer_submodules = 1
        self.cpt_token_ids = self.cpt_token_ids or [0]
        V = len(self.cpt_token_ids)
        self.cpt_mask = self.cpt_mask or [1] * V
        self.cpt_tokens_type_mask = self.cpt_tokens_type_mask or [1] * V
        self.num_virtual_tokens = V if self.num_virtual_tokens is None else self.num_virtual_tokens
        self.check_task()
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if len(getattr(self, name)) != V:
                raise ConfigError(
                    Bilingual(
                        f"{name} has {len(getattr(self, name))} entries, and cpt_token_ids {V}: give one for each.",
                        f"{name} 有 {len(getattr(self, name))} 项，而 cpt_token_ids 有 {V} 项：须一一对应。",
                    )
                )
        if self.num_virtual_tokens != V:
            raise ConfigError(
                Bilingual(
                    f"num_virtual_tokens = {self.num_virtual_tokens}: CPT has one for each of cpt_token_ids ({V}). "
                    "Leave it out.",
                    f"num_virtual_tokens = {self.num_virtual_tokens}：CPT 的虚拟词元与 cpt_token_ids（{V} 个）"
                    "一一对应。请去掉它。",
                )
            )
        for name in ("cpt_token_ids", "cpt_tokens_type_mask"):
            if (least := min(getattr(self, name))) < 0:
                raise ConfigError(
                    Bilingual(f"{name} holds {least}: must be at least 0.", f"{name} 含有 {least}：须大于等于 0。")
                )
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(
                    Bilingual(f"{name} = {value}: must be at least 0.", f"{name} = {value}：须大于等于 0。")
                )

    def check_task(self, *, needed: bool = False) -> None:
        """
        Args:
            needed: The task is known by now.

        Raises:
            ConfigError: The task is not to write text on.
        """
        if self.task_type is not TaskType.CAUSAL_LM and (needed or self.task_type is not None):
            raise ConfigError(
                Bilingual(
                    f"task_type = {self.task_type}: CPT is for CAUSAL_LM alone.",
                    f"task_type = {self.task_type}：CPT 只用于 CAUSAL_LM。",
                )
            )

    @property
    def types(self) -> list[int]:
        """The type of each token of the context."""
        assert self.cpt_tokens_type_mask is not None
        return self.cpt_tokens_type_mask

    @property
    def tokens(self) -> list[int]:
        """c."""
        assert self.cpt_token_ids is not None
        return self.cpt_token_ids

    @property
    def encoder_elements(self) -> int:
        return 2 * self.rows * self.width

    def make_prompt(self, word_embeddings: nn.Embedding) -> ContextPrompt:
        """A new prompt.

        Args:
            word_embeddings: The base model's, in which the context is looked up.
        """
        prompt, weight = ContextPrompt(self), word_embeddings.weight
        if (last := max(self.tokens)) >= weight.shape[0]:
            raise ConfigError(
                Bilingual(
                    f"cpt_token_ids holds {last:,}, and the model has {weight.shape[0]:,} tokens.",
                    f"cpt_token_ids 含有 {last:,}，而模型只有 {weight.shape[0]:,} 个词元。",
                )
            )
        if not self.inference_mode and weight.device.type != "meta":
            with torch.no_grad():
                ids = torch.tensor(self.tokens, device=weight.device)
                prompt.embedding.weight.copy_(F.embedding(ids, weight))
        return prompt


class ContextHooks(EmbeddingHooks):
    """As every prompt's; where the model is given labels its loss is CPT's."""

    def _add(self) -> None:
        super()._add()
        self._learned: tuple[Tensor, Tensor] | None = None
        self.after(self.model, self._reweigh)
        # a mean: the stock Trainer, which asks the base model, is to divide it by the batches of a step
        self.model.__dict__["accepts_loss_kwargs"] = False

    def remove(self) -> None:
        super().remove()
        self.model.__dict__.pop("accepts_loss_kwargs", None)

    def _prepend(self, module: nn.Module, named: Arguments) -> None:
        labels, given = tensor_in(named, "labels"), tensor_in(named, "input_type_mask")
        named.pop("input_type_mask", None)
        self._learned = None
        if labels is not None:
            given = torch.full_like(labels, LABEL) if given is None else given.to(labels)
            self._learned = labels, given
            named["labels"] = None  # the loss of the model's own would be thrown away
        super()._prepend(module, named)

    def _reweigh(self, module: nn.Module, args: tuple[object, ...], output: ModelOutput) -> ModelOutput:
        if self._learned is None:
            return output
        config, (labels, types) = self.config, self._learned
        assert isinstance(config, CPTConfig)
        logits = output["logits"]
        B = len(labels)
        own_types = torch.tensor(config.types, device=labels.device).expand(B, -1)
        # the text is one more example behind those of the context
        types = torch.where(types > 0, types + -(-max(config.types) // LABEL) * LABEL, types)
        types = torch.cat([own_types, types], 1)[:, 1:]
        tokens = torch.tensor(config.tokens, device=labels.device).expand(B, -1)
        labels = torch.cat([tokens, labels], 1)[:, 1:]
        labels = torch.where((types > 0) & (types % LABEL == 0), labels, IGNORED)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
        weights = torch.stack([loss_weights(row, config) for row in types])
        output["loss"] = (losses.view(B, -1) * weights)[labels != IGNORED].mean()
        return output


class CPT(PromptMethod[CPTConfig]):
    """A context of examples before the text, whose embeddings are tuned within bounds."""

    name = "cpt"
    config = CPTConfig
    learning_rate = 1e-3
    learning_rate_source = Bilingual(
        "measured: on stories260K 1e-3 and 9e-3 give the same loss after 100 steps: the bounds are reached",
        "实测：在 stories260K 上训练 100 步，1e-3 与 9e-3 的损失相同：已达到界限",
    )
    trains = Bilingual("the embeddings of examples before the text, within bounds", "文本之前示例的嵌入，限制在界内")
    needs_settings = True
    hooks = ContextHooks

    def complete(self, model: nn.Module, config: CPTConfig, *, from_file: bool) -> None:
        config.check_task(needed=True)
        super().complete(model, config, from_file=from_file)

    def extra_loss(self, adapter: Adapter[CPTConfig]) -> Tensor | None:
        """The loss of the context's own labels, which no text changes: of each example their mean, weighted.

        Computed without dropout, so that it is the same on every rank. In PEFT, whose loss is the mean over all labels,
        an example weighs as much as its labels are many.
        """
        config, model = adapter.config, adapter.model
        examples = sorted({t for t in config.types[1:] if t > 0 and t % LABEL == 0})
        if not examples or model is None:
            return None
        device = next(model.parameters()).device
        ids = torch.tensor([config.tokens[-1:]], device=device)  # behind the context: its states are not read
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        finally:
            for module in training:
                module.training = True
        tokens, types = (torch.tensor(values[1:], device=device) for values in (config.tokens, config.types))
        losses = F.cross_entropy(logits[: len(tokens)].float(), tokens, reduction="none")
        factor = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        own = [factor ** (len(examples) - i) * losses[types == t].mean() for i, t in enumerate(examples)]
        return sum(own[1:], own[0])


def loss_weights(types: Tensor, config: CPTConfig) -> Tensor:
    """What a token counts in the loss: 1 in the last example, f in the one before it, f^2 ...

    Args:
        types: Of a row's tokens, (N,).

    Returns:
        (N,)
    """
    weights = torch.ones(len(types), device=types.device)
    if config.opt_weighted_loss_type == "decay":
        labels: Sequence[int] = types[(types > 0) & (types % LABEL == 0)].unique().tolist()
        for i, label in enumerate(reversed(labels)):
            weights[types == label] = config.opt_loss_decay_factor**i
    return weights


class ContextPrompt(Prompt):
    """E(c) and d: `embedding.weight`, which stays, and `delta_embedding.weight`, as PEFT names them."""

    def __init__(self, config: CPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.rows, config.width)
        self.delta_embedding = nn.Embedding(config.rows, config.width, _weight=torch.zeros(config.rows, config.width))
        self.flat = False
        kind = torch.tensor(config.types) % LABEL
        inputs, formats = config.opt_projection_epsilon, config.opt_projection_format_epsilon
        bounds = torch.where(kind == 2, inputs, formats) * (config.width / WIDTH) ** 0.5
        self.register_buffer("_tuned", (kind > 0)[:, None], persistent=False)
        self.register_buffer("_bounds", torch.where(kind > 0, bounds, LEAST_BOUND)[:, None], persistent=False)

    def trained(self) -> list[nn.Parameter]:
        return list(self.delta_embedding.parameters())

    def forward(self) -> Tensor:
        d = self.delta_embedding.weight
        bounds = self.get_buffer("_bounds")
        with torch.no_grad():
            norms = d.norm(dim=1, keepdim=True)
            d.copy_(torch.where(norms > bounds * (1 + ROUNDING), d * (bounds / norms), d))
        return self.embedding.weight + self.get_buffer("_tuned") * d

    @torch.no_grad()
    def flatten(self, table: Tensor) -> None:
        """Takes a file's table for the context, from which d begins anew, as in PEFT."""
        self.embedding.weight.copy_(table)
        self.delta_embedding.weight.zero_()
