"""What a model's own generation_config may ask of `generate`: one plain answer, with a limited search."""

from __future__ import annotations

from typing import Any

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
