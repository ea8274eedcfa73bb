"""How long a row may be for a run's model."""

from __future__ import annotations

from siliang.data.tokens import TokenSet
from siliang.language import Bilingual, local
from siliang.models.positions import Positions
from siliang.peft_api.model import PeftModel
from siliang.run_folder import OpenedRun
from siliang.tasks import TASKS
from siliang.types import DataError


def positions_of(run: OpenedRun, *, base: bool = False) -> Positions:
    """The positions that the run's model has, with its virtual tokens, or, as the base model, without them."""
    if not isinstance(run.model, PeftModel):
        return Positions.of(run.model)
    prompts = [] if base else [c for c in run.model.peft_config.values() if c.is_prompt_learning]
    virtual = sum(c.num_virtual_tokens or 0 for c in prompts)  # type: ignore[attr-defined]
    prefix = any(c.is_prefix for c in prompts)
    return Positions.of(run.model.get_base_model(), virtual=virtual, prefix=prefix)


def check_positions(run: OpenedRun, tokens: TokenSet, what: str) -> None:
    """
    Raises:
        DataError: A row is longer than the model can read.
    """
    limit = (positions := positions_of(run)).reads
    longest = tokens.longest_sequence
    if limit is not None and longest > limit:
        raise DataError(
            Bilingual(
                f"{what} has {longest:,} tokens, and the model has {positions.in_words(limit)}: shorten it, "
                "or train with "
                "no larger data.max_length.",
                f"{local(what, 'zh')}有 {longest:,} 个词元，而模型有 {positions.in_words(limit).zh}："
                "请缩短，或用不更大的 data.max_length 训练。",
            )
        )
    if TASKS[run.config.task].has_encoder and positions.writes is not None:
        longest = int(tokens.learned.max(initial=0))
        if longest > positions.writes:
            raise DataError(
                Bilingual(
                    f"a target has {longest:,} tokens, and the model's decoder {positions.in_words(positions.writes)}: "
                    "shorten it, or train with no larger data.max_target_length.",
                    f"有目标长 {longest:,} 个词元，而模型的解码器有 {positions.in_words(positions.writes).zh}"
                    "：请缩短，或用不更大的 data.max_target_length 训练。",
                )
            )
