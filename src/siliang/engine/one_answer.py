"""What a model's own generation_config may ask of `generate`: one plain answer, with a limited search, that does not
depend on the padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from siliang.language import Bilingual
from siliang.secrets import short_repr
from siliang.types import ModelError

MOST_BEAMS = 64

# Options of a base model's generation_config that are overridden: several answers, scores in addition to the text, and
# search methods that transformers downloads as code from the hub.
ONE_PLAIN_ANSWER: dict[str, Any] = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "num_beam_groups": None,
    "diversity_penalty": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    # a cache of another kind, which may be of any size, compiled, or need a card
    "cache_implementation": None,
    "cache_config": None,
    "compile_config": None,
    "disable_compile": True,
    "prefill_chunk_size": None,
}


def one_plain_answer(model: Any) -> dict[str, Any]:
    """Settings of generate for a single plain answer; they override the model's generation_config."""
    return {name: value for name, value in ONE_PLAIN_ANSWER.items() if hasattr(model.generation_config, name)}


def check_beams(model: Any, name: str) -> int:
    """The beams of the model's generation_config.

    Raises:
        ModelError: They are too many.
    """
    beams = model.generation_config.num_beams or 1
    if not isinstance(beams, int) or beams > MOST_BEAMS:
        asked = short_repr(beams)
        raise ModelError(
            Bilingual(
                f"{name} sets num_beams = {asked}, which is more than {MOST_BEAMS}.",
                f"{name} 设置了 num_beams = {asked}：最大为 {MOST_BEAMS}。",
            )
        )
    return beams


class RepetitionPenalty(LogitsProcessor):
    """Lowers the scores of the tokens that each text has already, without its padding (arXiv:1909.05858)."""

    def __init__(self, penalty: float, real: Tensor) -> None:
        """
        Args:
            real: The attention mask of the prompts, (B, T); empty for an encoder's.
        """
        self._penalty, self._real = penalty, real

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(scores, dtype=torch.bool)
        beams, prompt = len(input_ids) // len(self._real), self._real.shape[1]
        for i, ids in enumerate(input_ids):
            seen[i, torch.cat([ids[:prompt][self._real[i // beams].bool()], ids[prompt:]])] = True
        lowered = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return torch.where(seen, lowered, scores)


def without_padding(model: Any, mask_BT: Tensor, penalty: float | None = None) -> dict[str, Any]:
    """Settings of generate in which a repetition penalty leaves the padding out. transformers' own lowers the token
    that pads, which is often the one that ends a text.

    Args:
        mask_BT: The attention mask of a decoder's prompts; (B, 0) for an encoder-decoder.
        penalty: None for the model's own.
    """
    penalty = penalty if penalty is not None else model.generation_config.repetition_penalty
    if penalty is None or penalty == 1.0:
        return {}
    return {
        "repetition_penalty": 1.0,
        "logits_processor": LogitsProcessorList([RepetitionPenalty(float(penalty), mask_BT)]),
    }
