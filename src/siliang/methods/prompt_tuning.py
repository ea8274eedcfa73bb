"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021, arXiv:2104.08691).

    model(P ; E(x))        P is trained, the embeddings E and all else stay

Shapes: P (V, D); V virtual tokens, D the model's hidden size. For an encoder-decoder twice as many rows: as in PEFT,
the encoder gets the first half, and the second is not used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from siliang.language import Bilingual, local
from siliang.methods.embedding_hooks import EmbeddingHooks
from siliang.methods.prompt import Prompt, PromptConfig
from siliang.methods.prompt_method import PromptMethod
from siliang.safety.limits import SECONDS, RefusedError, run_in_time
from siliang.secrets import short_repr
from siliang.types import ConfigError, PeftType, first_line


class PromptTuningInit(StrEnum):
    """What the prompt starts from."""

    RANDOM = "RANDOM"
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"


# Of tokenizer_kwargs: an adapter's file may not name other files.
TOKENIZER_SETTINGS = (
    *("use_fast", "revision", "add_prefix_space", "add_bos_token", "add_eos_token", "legacy"),
    *("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces", "do_lower_case"),
)


@dataclass(kw_only=True)
class TextPromptConfig(PromptConfig):
    """The settings of a prompt that may start from the embeddings of a text.

    Attributes:
        prompt_tuning_init_text: The text.
        tokenizer_name_or_path: The tokenizer of the text: a folder or hub name.
        tokenizer_kwargs: Passed to AutoTokenizer.from_pretrained; only the keys of `TOKENIZER_SETTINGS`.
    """

    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, object] | None = None

    FILES: ClassVar[tuple[str, ...]] = ("tokenizer_name_or_path",)

    def check_text(self, *, wanted: bool) -> None:
        """
        Args:
            wanted: The prompt starts from a text.

        Raises:
            ConfigError: A setting of the text is missing, or has no effect.
        """
        if wanted:
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    raise ConfigError(
                        Bilingual(
                            f"prompt_tuning_init = TEXT needs {name} as well.",
                            f"prompt_tuning_init = TEXT 还需要 {name}。",
                        )
                    )
        elif self.tokenizer_kwargs:
            raise ConfigError(
                Bilingual(
                    "tokenizer_kwargs is for prompt_tuning_init = TEXT only.",
                    "tokenizer_kwargs 只用于 prompt_tuning_init = TEXT。",
                )
            )

    def text_ids(self) -> list[int]:
        from siliang.models.tokenizers import load_tokenizer_alone  # only this start loads a tokenizer

        settings = {k: v for k, v in (self.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
        if (unknown := next((key for key in settings if key not in TOKENIZER_SETTINGS), None)) is not None:
            raise ConfigError(
                Bilingual(
                    f"tokenizer_kwargs has {short_repr(unknown)}, which may name files elsewhere. Allowed: "
                    f"{', '.join(TOKENIZER_SETTINGS)}.",
                    f"tokenizer_kwargs 含有 {short_repr(unknown)}，它可能指向别处的文件。可用："
                    f"{'、'.join(TOKENIZER_SETTINGS)}。",
                )
            )
        assert self.tokenizer_name_or_path is not None
        tokenizer = load_tokenizer_alone(self.tokenizer_name_or_path, settings)
        try:
            ids = run_in_time(partial(tokenizer, self.prompt_tuning_init_text), SECONDS)["input_ids"]
        except RefusedError as error:
            raise ConfigError(
                Bilingual(
                    f"{self.tokenizer_name_or_path}: its tokenizer makes no tokens of "
                    f"prompt_tuning_init_text: {first_line(error)}.",
                    f"{self.tokenizer_name_or_path}：它的分词器无法处理 prompt_tuning_init_text："
                    f"{local(first_line(error), 'zh')}。",
                )
            ) from None
        if not ids:
            raise ConfigError(
                Bilingual(
                    f"prompt_tuning_init_text = {self.prompt_tuning_init_text!r} has no tokens.",
                    f"prompt_tuning_init_text = {self.prompt_tuning_init_text!r} 没有词元。",
                )
            )
        return (ids * (self.rows // len(ids) + 1))[: self.rows]


@dataclass(kw_only=True)
class PromptTuningConfig(TextPromptConfig):
    """Prompt tuning's settings, with PEFT's names and defaults.

    Attributes:
        prompt_tuning_init: RANDOM; TEXT: the embeddings of a text, repeated or cut to length; SAMPLE_VOCAB: those of
            random tokens.
    """

    prompt_tuning_init: PromptTuningInit = PromptTuningInit.RANDOM

    peft_type: ClassVar[str] = PeftType.PROMPT_TUNING

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_text(wanted=self.prompt_tuning_init is PromptTuningInit.TEXT)

    def make_prompt(self, word_embeddings: nn.Embedding) -> SoftPrompt:
        """A new prompt.

        Args:
            word_embeddings: The base model's, whose rows TEXT and SAMPLE_VOCAB start from.
        """
        prompt = SoftPrompt(self.rows, self.width)
        if not self.inference_mode and self.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            prompt.start_from(word_embeddings, torch.randint(0, word_embeddings.weight.shape[0], (self.rows,)))
        elif not self.inference_mode and self.prompt_tuning_init is PromptTuningInit.TEXT:
            prompt.start_from(word_embeddings, torch.tensor(self.text_ids()))
        return prompt

    def for_file(self, *, has_encoder: bool) -> Self:
        """As for every prompt. The file holds the prompt itself: no tokenizer is loaded to start from a text."""
        return dataclasses.replace(self, prompt_tuning_init=PromptTuningInit.RANDOM, tokenizer_kwargs=None)


class PromptTuning(PromptMethod[PromptTuningConfig]):
    """Virtual tokens before the text."""

    name = "prompt_tuning"
    config = PromptTuningConfig
    learning_rate = 3e-2
    learning_rate_source = Bilingual(
        "measured: 78% on SST-2 after 300 steps; 59% after 200 with the 0.3 of Lester et al. 2021, appendix A.1",
        "实测：SST-2 训练 300 步得 78%；用 Lester 等 2021 附录 A.1 的 0.3，200 步得 59%",
    )
    trains = Bilingual("virtual tokens before the text", "文本之前的虚拟词元")
    hooks = EmbeddingHooks


class SoftPrompt(Prompt):
    """P itself: `prompt_encoder.<adapter>.embedding.weight` (V, D)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.flat = True

    def forward(self) -> Tensor:
        return self.embedding.weight

    @torch.no_grad()
    def start_from(self, word_embeddings: nn.Embedding, ids: Tensor) -> None:
        """Takes the embeddings of tokens.

        Args:
            ids: (V,).
        """
        weight = word_embeddings.weight
        if weight.device.type != "meta":
            self.embedding.weight.copy_(word_embeddings(ids.to(weight.device)))
