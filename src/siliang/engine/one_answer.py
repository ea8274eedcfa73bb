"""What a model's own generation_config may ask of `generate`: one plain answer, with a limited search, that does not
depend on the padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        return _penalized(scores, seen, self._penalty)


class PromptReward(LogitsProcessor):
    """Raises the scores of the tokens of each prompt, without its padding: the encoder_repetition_penalty."""

    def __init__(self, reward: float, ids_BT: Tensor, mask_BT: Tensor) -> None:
        self._reward, self._prompts = reward, [ids[real.bool()] for ids, real in zip(ids_BT, mask_BT, strict=True)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(scores, dtype=torch.bool)
        beams = len(input_ids) // len(self._prompts)
        for i in range(len(input_ids)):
            seen[i, self._prompts[i // beams]] = True
        return _penalized(scores, seen, 1 / self._reward)


class LeastLength(LogitsProcessor):
    """A text does not end before it has so many tokens, with those of its prompt and without padding."""

    def __init__(self, least: int, ends: Sequence[int], mask_BT: Tensor) -> None:
        """
        Args:
            ends: The tokens that end a text.
        """
        self._least, self._ends, self._padding_B = least, list(ends), (1 - mask_BT.long()).sum(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        beams = len(input_ids) // len(self._padding_B)
        short = input_ids.shape[1] - self._padding_B.repeat_interleave(beams) < self._least
        ends = torch.zeros_like(scores[:1], dtype=torch.bool)
        ends[:, self._ends] = True
        return scores.masked_fill(short[:, None] & ends, -torch.inf)


def without_padding(
    model: Any, batch: Mapping[str, Tensor], ends: Sequence[int], *, decoder_only: bool, penalty: float | None = None
) -> dict[str, Any]:
    """Settings of generate with which padding has no effect on a text. transformers' own count it: penalties take the
    token that pads, which is often the one that ends a text, for one of the text.

    Args:
        batch: The input_ids and attention_mask of the prompts.
        ends: The tokens that end a text.
        penalty: The repetition penalty; None for the model's own.

    Raises:
        ValueError: A penalty is not above 0.
    """
    own, mask_BT, processors = model.generation_config, batch["attention_mask"], list[LogitsProcessor]()
    penalty = penalty if penalty is not None else own.repetition_penalty
    if penalty is not None and penalty != 1.0:
        above_0 = _above_0("repetition_penalty", penalty)
        processors.append(RepetitionPenalty(above_0, mask_BT if decoder_only else mask_BT[:, :0]))
    if (reward := own.encoder_repetition_penalty) is not None and reward != 1.0:
        above_0 = _above_0("encoder_repetition_penalty", reward)
        processors.append(PromptReward(above_0, batch["input_ids"], mask_BT))
    settings: dict[str, Any] = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0}
    if decoder_only and own.min_length:
        processors.append(LeastLength(int(own.min_length), ends, mask_BT))
        settings["min_length"] = 0
    return settings | ({"logits_processor": LogitsProcessorList(processors)} if processors else {})


def _above_0(name: str, value: object) -> float:
    if not isinstance(value, int | float) or not value > 0:
        shown = short_repr(value)
        raise ValueError(Bilingual(f"{name} = {shown} must be above 0", f"{name} = {shown}：应大于 0"))
    return float(value)


def _penalized(scores_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    lowered = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, lowered, scores_BV)
