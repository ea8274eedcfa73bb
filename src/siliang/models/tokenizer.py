"""The interface of tokenizers: those of transformers, and custom ones of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, overload


class CodedTexts(Protocol):
    """The tokens of several texts, with their further columns."""

    @overload
    def __getitem__(self, name: Literal["offset_mapping"]) -> list[list[tuple[int, int]]]: ...
    @overload
    def __getitem__(self, name: Literal["overflow_to_sample_mapping"]) -> list[int]: ...
    @overload
    def __getitem__(self, name: Literal["input_ids", "token_type_ids"]) -> list[list[int]]: ...
    def __contains__(self, name: object) -> bool: ...

    def sequence_ids(self, i: int) -> list[int | None]:
        """The text of a pair, 0 or 1, to which each token belongs; None for special tokens. Fast tokenizers only."""
        ...

    def word_ids(self, i: int) -> list[int | None]:
        """The index of each token's word; None for special tokens. Fast tokenizers only."""
        ...


class Tokenizer(Protocol):
    """A tokenizer, as `load_tokenizer` gives it. A token that it lacks is None."""

    bos_token: str | None
    eos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    sep_token_id: int | None
    unk_token_id: int | None
    chat_template: str | dict[str, str] | None

    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def all_special_tokens(self) -> list[str]: ...
    @property
    def special_tokens_map(self) -> dict[str, str]: ...
    @property
    def is_fast(self) -> bool: ...

    def __len__(self) -> int: ...

    @overload
    def __call__(
        self,
        text: str,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        verbose: bool = True,
    ) -> dict[str, list[int]]: ...
    @overload
    def __call__(
        self,
        text: list[str] | list[list[str]] | None = None,
        text_pair: list[str] | None = None,
        *,
        text_target: list[str] | None = None,
        add_special_tokens: bool = True,
        split_special_tokens: bool | None = None,
        is_split_into_words: bool = False,
        truncation: bool | Literal["only_second"] = False,
        max_length: int | None = None,
        stride: int = 0,
        return_overflowing_tokens: bool = False,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> CodedTexts: ...

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...
    def get_added_vocab(self) -> dict[str, int]: ...
    def add_tokens(self, new_tokens: list[str]) -> int: ...
    def num_special_tokens_to_add(self, pair: bool = False) -> int: ...
    def build_inputs_with_special_tokens(self, token_ids_0: list[int]) -> list[int]: ...
    def get_chat_template(
        self, chat_template: str | None = None, tools: list[dict[str, object]] | None = None
    ) -> str: ...
    def save_pretrained(self, save_directory: Path) -> object: ...
