"""How long a row may be for a run's model."""

from __future__ import annotations

from siliang.data.tokens import TokenSet
from siliang.engine.written import positions_of
from siliang.language import Bilingual, local
from siliang.run_folder import OpenedRun
from siliang.types import DataError


def check_positions(run: OpenedRun, tokens: TokenSet, what: str) -> None:
    """
    Raises:
        DataError: A row is longer than the model can read.
    """
    limit = (positions := positions_of(run.model)).reads
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
    if run.task.has_encoder and positions.writes is not None:
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
