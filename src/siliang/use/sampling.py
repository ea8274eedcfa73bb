"""How a text is written: which token is taken, and where it ends. Nothing depends on what else is written beside it.

A token is drawn by adding Gumbel noise to the log-probabilities and taking the largest sum, with a random generator for
each text, so that in fp32 a text is the same alone and in any batch; half precision rounds by the size of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import LogitsProcessor, StoppingCriteria

from siliang.argument_kinds import check_kinds
from siliang.language import Bilingual
from siliang.types import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where a text ends.

    Attributes:
        max_new_tokens: The most new tokens. None: `up_to`, or fewer if the model has no more positions.
        temperature: 0 for the most probable token each time, higher for more varied text.
        top_p: Only the most probable tokens are drawn that together have this probability.
        top_k: Only so many of the most probable tokens are drawn.
        repetition_penalty: Above 1: tokens that are there already are less probable (Keskar et al., 2019).
        stop: The text ends exactly in front of the first of these.
        seed: The same seed gives the same text. None: another text each time.
    """

    max_new_tokens: int | None = None
    up_to: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in check_kinds(type(self), vars(self)).items():
            object.__setattr__(self, name, value)
        bounds = {
            "max_new_tokens": (self.max_new_tokens, _at_least(self.max_new_tokens, 1), "1 or more", "不小于 1 的整数"),
            "temperature": (self.temperature, 0 <= self.temperature < math.inf, "0 or more", "不小于 0 的数"),
            "top_p": (
                self.top_p,
                self.top_p is None or 0 < self.top_p <= 1,
                "above 0 and at most 1",
                "大于 0、至多为 1 的数",
            ),
            "top_k": (self.top_k, _at_least(self.top_k, 1), "1 or more", "不小于 1 的整数"),
            "repetition_penalty": (
                self.repetition_penalty,
                self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf,
                "above 0",
                "大于 0 的数",
            ),
            "seed": (self.seed, _at_least(self.seed, 0), "0 or more", "不小于 0 的整数"),
            "stop": (self.stop, all(self.stop), "words that are not empty", "非空的词"),
        }
        for name, (value, fine, allowed, allowed_zh) in bounds.items():
            if not fine:
                raise ConfigError(
                    Bilingual(f"{name} = {value!r}: must be {allowed}.", f"{name} = {value!r}：应为{allowed_zh}。")
                )
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise ConfigError(
                Bilingual(
                    "top_p and top_k have no effect at temperature 0: give a temperature above 0, such as 0.8.",
                    "温度为 0 时 top_p 和 top_k 不起作用：请给出大于 0 的温度，例如 0.8。",
                )
            )

    def values(self) -> dict[str, object]:
        """The settings, for JSON."""
        return asdict(self)

    def cut(self, text: str) -> str:
        """The text in front of the first stop word."""
        return text[: min((at for word in self.stop if (at := text.find(word)) >= 0), default=len(text))]


def _at_least(number: int | None, least: int) -> bool:
    return number is None or number >= least


class Drawn(LogitsProcessor):
    """Draws each text's next token with its own random generator: the largest score is that of the drawn token."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        """
        Args:
            numbers: Of the texts, which make their seeds different.
        """
        self._sampling = sampling
        seed = torch.seed() % 2**31 if sampling.seed is None else sampling.seed
        self._generators = [torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**63) for n in numbers]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        s = self._sampling
        scores = scores.float() / s.temperature
        if s.top_k is not None and s.top_k < scores.shape[-1]:
            least = scores.topk(s.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if s.top_p is not None and s.top_p < 1:
            ordered, places = scores.sort(descending=True)
            p = ordered.softmax(-1)
            beyond = p.cumsum(-1) - p >= s.top_p  # the first one always stays
            scores = scores.masked_fill(beyond.scatter(1, places, beyond), -torch.inf)
        noise = [torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self._generators]
        gumbel = -torch.log(-torch.log(torch.stack(noise).clamp(1e-300, 1 - 1e-16)))
        return scores + gumbel.to(scores)


class StopWords(StoppingCriteria):
    """A text is finished when it holds a stop word."""

    def __init__(self, words: Sequence[str], tokenizer: Any, prompt: int) -> None:
        """
        Args:
            prompt: The tokens in front of the new ones.
        """
        self._words, self._tokenizer, self._prompt = words, tokenizer, prompt

    def __call__(self, input_ids: torch.Tensor, scores: object, **more: Any) -> torch.BoolTensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt :], skip_special_tokens=True)
        found = [any(word in text for word in self._words) for text in texts]
        return cast(torch.BoolTensor, torch.tensor(found, device=input_ids.device))
