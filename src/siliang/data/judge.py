"""Whether the tokens of an example are any use."""

from __future__ import annotations

from dataclasses import dataclass

from siliang.data.entries import BAD, Rows
from siliang.data.example import Example
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Judge:
    """Whether the tokens of an example are any use.

    Attributes:
        unknown: The token of everything that the tokenizer does not know; None where it knows all.
        special: Tokens that say nothing of the text.
        predicts: The model learns each token from those before it.
    """

    tokenizer: Tokenizer
    unknown: int | None
    special: frozenset[int]
    predicts: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, predicts: bool) -> Judge:
        """For the tokens of this tokenizer."""
        unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_ids)
        if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
            unknown = None  # GPT-2 calls its end of sequence so, and has no unknown token
        special.discard(unknown)
        return cls(tokenizer, unknown, frozenset(special), predicts)

    def problem(self, example: Example, entries: Rows) -> str | None:
        """What is wrong with an example; None where nothing is."""
        if entries and (entries[0].get("row", 0) < 0 or BAD in entries[0]):
            return None
        ids = [token for entry in entries for token in entry["input_ids"]]
        if self.predicts and len(ids) < 2:
            return Bilingual(
                f"becomes {len(ids)} token{'' if len(ids) == 1 else 's'}, and a token is learned from those before it",
                f"只有 {len(ids)} 个词元，而每个词元要根据前面的词元来学",
            )
        if not self.predicts and self.special.issuperset(ids):
            return Bilingual(
                "becomes no token but special ones: the tokenizer makes nothing of its text",
                "除特殊词元外没有词元：分词器从它的文本得不到任何词元",
            )
        unknown = self.unknown
        if unknown is None or unknown not in ids:
            return None
        words = ids
        if parts := example.texts:  # what the template adds is not the row's
            coded = self.tokenizer(parts, add_special_tokens=False, split_special_tokens=True, verbose=False)
            words = [token for part in coded["input_ids"] for token in part]
        n = words.count(unknown)
        if n == len(words) or (self._is_most_of(ids, unknown) and self._is_most_of(words, unknown)):
            return Bilingual(
                f"is not in the tokenizer's vocabulary: {n:,} of its {len(words):,} tokens are unknown",
                f"不在分词器的词表中：{len(words):,} 个词元中有 {n:,} 个未知",
            )
        return None

    def _is_most_of(self, ids: list[int], unknown: int) -> bool:
        return 2 * ids.count(unknown) > sum(token not in self.special for token in ids)
