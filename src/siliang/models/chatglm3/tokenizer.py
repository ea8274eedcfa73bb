"""ChatGLM3's tokenizer: a sentencepiece model and, behind its pieces, nine tokens that only a program may write.

It asks sentencepiece itself for the pieces. A converted tokenizer of the `tokenizers` library would have to agree with
it on every text, and would not be shorter; the published `tokenizer.model` is read and written as it is.

Role words in a text are text. Were "<|user|>" in a user's message read as the token, the message could speak for
somebody else, and a text about ChatGLM could not be trained on. So the model's own special tokens are found in a text
only if asked for (`split_special_tokens=False`), while tokens that a user adds are found always, as in every tokenizer.

That leaves one difficulty. A chat template renders a conversation to text, in which the template's own "<|user|>" and
one that somebody typed look alike. `apply_chat_template` therefore gives the template messages in which the first
letter of every special word is replaced by a character that occurs nowhere in them, looks for special words in what
comes back, which can only be the template's, and puts the letters back before it encodes the rest. Any template works,
the user's own too. The text alone (`tokenize=False`) is for people: encoded again it would not know whose words are
whose.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AddedToken, BatchEncoding, PythonBackend, TensorType
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template
from transformers.utils.generic import PaddingStrategy

from siliang.language import Bilingual
from siliang.models.chatglm3.template import CHAT_TEMPLATE, PUBLISHED_TEMPLATE
from siliang.types import ModelError

# In the order of their ids, which begin where the pieces end: 64789 in the published model.
COMMANDS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
SPACE = "▁"
PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ChatGLMTokenizer(PythonBackend):
    """The tokenizer of ChatGLM3 (and, but for the chat template, of ChatGLM2).

    Args:
        vocab_file: The sentencepiece model.
        encode_special_tokens: Find special tokens in texts; the published name for `split_special_tokens=False`.
        chat_template: None, or the published one, for the one here, which writes the same prompts and also tools and
            the end of answers.

    Raises:
        ModelError: There is no tokenizer.model, or it is another model's.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  as transformers declares it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        encode_special_tokens: bool = False,
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "<unk>",
        pad_token: str | AddedToken = "<unk>",
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not vocab_file:
            raise ModelError(
                Bilingual(
                    "tokenizer.model is missing, the file that ChatGLM2 and ChatGLM3 keep their pieces in.",
                    "缺少 tokenizer.model，ChatGLM2 和 ChatGLM3 的词片保存在该文件中。",
                )
            )
        self.vocab_file = vocab_file
        self.pieces = SentencePieceProcessor(model_file=vocab_file)
        self.commands = {word: len(self.pieces) + i for i, word in enumerate(COMMANDS)}
        if clash := [word for word in COMMANDS if self.pieces.piece_to_id(word) != self.pieces.unk_id()]:
            raise ModelError(
                Bilingual(
                    f"{vocab_file}: {clash[0]!r} is a piece, so it cannot also be a special token.",
                    f"{vocab_file}：{clash[0]!r} 是普通词片，不能同时是特殊词元。",
                )
            )
        # what published and older configs may hold about tokens whose ids are fixed
        given = kwargs.pop("extra_special_tokens", None) or kwargs.pop("additional_special_tokens", None) or []
        added = kwargs.pop("added_tokens_decoder", {})
        super().__init__(
            vocab_file=vocab_file,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            extra_special_tokens=[*COMMANDS, *(t for t in given if str(t) not in self.commands)],
            added_tokens_decoder={i: token for i, token in added.items() if str(token) not in self.commands},
            chat_template=CHAT_TEMPLATE if chat_template in (None, PUBLISHED_TEMPLATE) else chat_template,
            split_special_tokens=kwargs.pop("split_special_tokens", not encode_special_tokens),
            **kwargs,
        )

    # ---- texts to ids ----

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The pieces of a text.

        Args:
            text: Each stretch of it between added tokens begins with a space of the tokenizer's own.
            kwargs: `split_special_tokens=False` finds the model's special tokens in it too.
        """
        closed = kwargs.get("split_special_tokens", self.split_special_tokens)
        return [piece for piece, _, _ in self._pieces(text, closed=closed)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[gMASK] sop text; of a pair, [gMASK] sop text text </s>."""
        start = [self.commands["[gMASK]"], self.commands["sop"]]
        return start + token_ids_0 + ([] if token_ids_1 is None else [*token_ids_1, self.eos_token_id])

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for what `build_inputs_with_special_tokens` adds."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        return [1, 1] + [0] * len(token_ids_0) + ([] if token_ids_1 is None else [0] * len(token_ids_1) + [1])

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: list[dict[str, object] | Callable[..., object]] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str | TruncationStrategy = False,
        max_length: int | None = None,
        return_tensors: str | TensorType | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | Tensor | BatchEncoding:
        """A conversation, or a list of them, to ids, as in transformers; special words in messages stay words.

        Args:
            conversation: Messages with role (system, user, assistant, observation or tool) and content; `metadata` or
                `tool_calls` for the calls of tools.
            tools: Functions, or their JSON schemas, that the system message then lists.
            return_assistant_tokens_mask: Also return `assistant_masks`: 1 for each token that the assistant writes, up
                to and including the one that ends its turn.

        Raises:
            TypeError: A message holds something else than plain data.
        """
        kwargs.pop("sanitize_control_tokens", None)  # is always done
        schemas = None if tools is None else [t if isinstance(t, dict) else get_json_schema(t) for t in tools]
        template = self.get_chat_template(chat_template, schemas)
        if not conversation:
            raise ValueError(Bilingual("The conversation is empty.", "对话是空的。"))
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        chats = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
        chats = [[{key: v for key, v in message.items() if v is not None} for message in chat] for chat in chats]
        data = {"chats": chats, "tools": schemas, "documents": documents, "kwargs": kwargs}
        put_back: Callable[[str], str] = str
        if tokenize:
            data, put_back = self._disguise(data)
        rendered = render_jinja_template(
            conversations=data["chats"],
            tools=data["tools"],
            documents=data["documents"],
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **data["kwargs"]},
        )
        texts, spans = cast(tuple[list[str], list[list[tuple[int, int]]]], rendered)
        if not tokenize:
            return texts if batched else texts[0]
        rows: list[BatchEncoding] = []
        for i, text in enumerate(texts):
            pieces = list(self._pieces(text, closed=False, put_back=put_back))
            row = self.prepare_for_model(
                self.convert_tokens_to_ids([piece for piece, _, _ in pieces]),  # type: ignore[arg-type]
                add_special_tokens=False,
                truncation=truncation,
                max_length=max_length if truncation else None,
                return_attention_mask=False,
                **(tokenizer_kwargs or {}),
            )
            if return_assistant_tokens_mask:
                mask = [int(any(start < b and a < end for a, b in spans[i])) for _, start, end in pieces]
                kept = len(row["input_ids"])
                row["assistant_masks"] = mask[-kept:] if self.truncation_side == "left" else mask[:kept]
            rows.append(row)
        return self._batch(rows, batched, padding, max_length, return_tensors, return_dict)

    def build_chat_input(self, query: str, history: list[dict[str, object]] | None = None, role: str = "user") -> Any:
        """The prompt for one more message, as tensors: the published tokenizer's name for it."""
        messages = [*(history or []), {"role": role, "content": query}]
        return self.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")

    def get_command(self, token: str) -> int:
        """The id of a special token by its name: the published tokenizer's name for it."""
        return self.commands[token]

    # ---- ids to texts ----

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces; of bytes that are not a whole character, U+FFFD. Special tokens are shown as they are."""
        text = bytearray()
        for i, token in enumerate(tokens):
            if token in self._added_tokens_encoder:
                text += token.encode()
            elif (byte := _byte(token)) is not None:
                text.append(byte)
            else:
                # the first space is the tokenizer's own
                text += (token[1:] if i == 0 and token.startswith(SPACE) else token).replace(SPACE, " ").encode()
        return text.decode(errors="replace")

    # ---- the vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Pieces and commands, without tokens that were added."""
        return len(self.pieces) + len(self.commands)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        pieces = self.pieces.id_to_piece(list(range(len(self.pieces))))
        return {piece: i for i, piece in enumerate(pieces)} | self.commands | self._added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Writes tokenizer.model as it was read."""
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / name
        if not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def _convert_token_to_id(self, token: str) -> int:
        return self.commands.get(token, self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        # the model's table has more rows than there are tokens; an untrained model may name one of them
        return self.pieces.id_to_piece(index) if index < len(self.pieces) else ""

    # ---- the work behind ----

    def _pieces(
        self, text: str, *, closed: bool, put_back: Callable[[str], str] = str
    ) -> Iterator[tuple[str, int, int]]:
        """Each token of `text`, and the characters that it encodes: the first, and the one behind the last.

        Args:
            closed: Leave the model's special words text.
            put_back: Applied to what is left between tokens; does not change its length.
        """
        start = 0
        for i, part in enumerate(re.split(f"({self._special_words(closed)})", text)):
            if i % 2:  # re.split puts what matched at the odd places
                yield part, start, start + len(part)
            elif part:
                end = start - 1  # sentencepiece puts a space in front
                for piece in self.pieces.encode(put_back(part), out_type=str):
                    byte = _byte(piece)
                    # a character of several bytes is counted at the first; the others add nothing to it
                    end += len(piece) if byte is None else int(byte & 0xC0 != 0x80)
                    width = len(piece) if byte is None else 1
                    yield piece, max(end - width, start), max(end, start + 1)
            start += len(part)

    def _special_words(self, closed: bool) -> str:
        """The regex of the words that are tokens."""
        own = {*COMMANDS, *self.special_tokens_map.values()}
        words = [w for w in self._added_tokens_encoder if not (closed and w in own)]
        # "sop" and "eop" also occur inside words, as in "philosopher"
        patterns = [
            rf"(?<![A-Za-z0-9]){w}(?![A-Za-z0-9])" if w in ("sop", "eop") else re.escape(w)
            for w in sorted(words, key=len, reverse=True)
        ]
        return "|".join(patterns) or "(?!)"

    def _disguise(self, data: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], str]]:
        """`data` without the model's special words, and what undoes it, character for character."""
        own = sorted({*COMMANDS, *self.special_tokens_map.values()}, key=len, reverse=True)
        letters = sorted({word[0] for word in own})
        used = set().union(*map(set, _strings(data)))
        free = islice((c for c in map(chr, PRIVATE_USE) if c not in used), len(letters))
        masks = dict(zip(letters, free, strict=True))
        word = re.compile("|".join(map(re.escape, own)))
        disguised = _map_strings(data, lambda s: word.sub(lambda m: masks[m[0][0]] + m[0][1:], s))
        back = {ord(mask): letter for letter, mask in masks.items()}
        return disguised, lambda s: s.translate(back)

    def _batch(
        self,
        rows: list[BatchEncoding],
        batched: bool,
        padding: bool | str | PaddingStrategy,
        max_length: int | None,
        return_tensors: str | TensorType | None,
        return_dict: bool,
    ) -> BatchEncoding | list[int] | list[list[int]] | Tensor:
        """Rows to what the caller asked for: padded, tensors or lists, with or without the other columns."""
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        masks = columns.pop("assistant_masks", None)
        found = self.pad(columns, padding=padding, max_length=max_length, return_attention_mask=True)
        if masks is not None:
            found["assistant_masks"] = [
                gap + mask if self.padding_side == "left" else mask + gap
                for ids, mask in zip(found["input_ids"], masks, strict=True)
                for gap in [[0] * (len(ids) - len(mask))]
            ]
        if not (batched or return_tensors):
            found = {key: values[0] for key, values in found.items()}
        encoding = BatchEncoding(dict(found), tensor_type=return_tensors)
        return encoding if return_dict else encoding["input_ids"]


def _byte(piece: str) -> int | None:
    """The byte that a piece like <0x0A> encodes."""
    return int(piece[3:5], 16) if len(piece) == 6 and piece.startswith("<0x") and piece[5] == ">" else None


def _strings(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _strings(value)
    elif not (data is None or isinstance(data, (bool, int, float))):
        raise TypeError(
            Bilingual(
                f"Messages must be plain data (dicts, lists, strings, numbers); {type(data).__name__} is not.",
                f"消息只能是普通数据（字典、列表、字符串、数），不能是 {type(data).__name__}。",
            )
        )


def _map_strings(data: Any, change: Callable[[str], str]) -> Any:
    if isinstance(data, str):
        return change(data)
    if isinstance(data, Mapping):
        return {_map_strings(key, change): _map_strings(value, change) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_map_strings(value, change) for value in data]
    return data
