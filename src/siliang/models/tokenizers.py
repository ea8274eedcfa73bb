"""Loads the tokenizers of base models, with a pad token. Custom code runs only if the user allowed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from siliang.hub import only_cached
from siliang.language import Bilingual, local
from siliang.models.base_config import check_folder, load_config, why_not
from siliang.models.extra import CHATGLM, make_known
from siliang.models.folder import check_tokenizer_names, read_config
from siliang.models.own_code import find_own_code, find_tokenizer_code
from siliang.models.tokenizer import Tokenizer
from siliang.models.tokenizer_file import check_made, check_tokenizer
from siliang.paths import check_links
from siliang.safety.limits import SECONDS, run_in_time
from siliang.secrets import short_repr
from siliang.types import ModelError, first_line

TOKENIZER = Bilingual("tokenizer", "分词器")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)


def load_tokenizer(name: str, *, revision: str | None = None) -> Tokenizer:
    """A base model's tokenizer, with a pad token.

    Raises:
        ModelError: The tokenizer cannot be loaded.
        OwnCodeError: The tokenizer or its model has custom code, which the user has not allowed.
    """
    check_folder(name, revision)
    folder = Path(name)
    try:
        tokenizer = _looked_at(name, revision, partial(_tokenizer_from_pretrained, name, revision))
    except ModelError:
        raise
    except Exception as error:
        if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise ModelError(_no_tokenizer(name, TOKENIZER_FILES)) from None
        load_config(name, revision=revision)  # transformers reads config.json, too: an error in it is reported as such
        raise ModelError(why_not(name, error, what=TOKENIZER)) from error
    # without vocabulary files, transformers creates a tokenizer with an empty vocabulary
    files = tuple(dict.fromkeys(tokenizer.vocab_files_names.values()))
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if files and len(set(tokenizer.get_vocab()) - special) < 2:
        raise ModelError(_no_tokenizer(name, files))
    if type(longest := tokenizer.model_max_length) not in (int, float):
        raise ModelError(
            Bilingual(
                f"{name}: model_max_length = {short_repr(longest)} in its tokenizer_config.json is not a number.",
                f"{name}：tokenizer_config.json 中 model_max_length = {short_repr(longest)} 不是数。",
            )
        )
    if tokenizer.pad_token_id is None:
        # safe: batches mask padding by position, never by token id
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    try:
        run_in_time(partial(tokenizer, "a 1 \uff01", verbose=False), SECONDS)
        tokenizer.convert_tokens_to_ids(
            "\uff01 no word \uff01"
        )  # it recurses without end if the unknown token is not in the vocabulary
    except (
        Exception
    ) as error:  # the tokenizers library raises Exception, for example if the unknown token is not in the vocabulary
        raise ModelError(
            Bilingual(
                f"{name}: its tokenizer makes no tokens of a text: {first_line(error)}",
                f"{name}：它的分词器不能把文本变成词元：{local(first_line(error), 'zh')}",
            )
        ) from None
    return tokenizer


def load_tokenizer_alone(name: str, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that an adapter's config names. Its folder may be without a model. Custom code is not run.

    Args:
        name: A folder, or a name on the Hub.
        settings: Arguments of AutoTokenizer.from_pretrained.

    Raises:
        ModelError: The tokenizer cannot be loaded, or exceeds a limit.
    """
    folder, revision = Path(name), settings.get("revision")
    if folder.is_dir() and not (folder / "config.json").is_file():
        check_links(folder, ModelError)
        if (file := folder / "tokenizer_config.json").is_file():
            make_known(tokenizer=read_config(file).get("tokenizer_class"))
    else:
        check_folder(name, revision)

    def load() -> Any:
        ignored = check_tokenizer_names(name, revision)
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=only_cached(name), **settings, **ignored
        )

    try:
        return _looked_at(name, revision, load)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(why_not(name, error, what=TOKENIZER)) from error


def _looked_at(name: str, revision: str | None, load: Callable[[], Any]) -> Any:
    """Calls `load` between a check of the tokenizer's files and a check of its rules.

    Raises:
        ModelError: The tokenizer exceeds a limit.
    """
    check_tokenizer(name, revision)
    tokenizer = load()
    check_made(tokenizer, name, revision)
    return tokenizer


def _tokenizer_from_pretrained(name: str, revision: str | None) -> Any:
    given = check_tokenizer_names(name, revision)
    bare = (Path(name) / "tokenizer.model").is_file() and not (Path(name) / "tokenizer_config.json").is_file()
    if bare and load_config(name, revision=revision).model_type != CHATGLM:
        # AutoTokenizer would read a bare sentencepiece file without the leading space and <s> of Llama
        return LlamaTokenizer.from_pretrained(name, add_bos_token=True)
    code = find_own_code(name, revision)
    try:
        if code is None or "AutoTokenizer" not in code.classes:
            config = load_config(name, revision=revision) if code is not None or given else None
            return AutoTokenizer.from_pretrained(
                name,
                config=config,
                revision=revision,
                trust_remote_code=False,
                local_files_only=only_cached(name),
                **given,
            )
    except ValueError as error:  # not a tokenizer of transformers
        code = find_tokenizer_code(name, revision) if "trust_remote_code" in str(error) else None
        if code is None or "AutoTokenizer" not in code.classes:
            raise
    return code.find_class("AutoTokenizer").from_pretrained(str(code.folder), **given)


def _no_tokenizer(name: str, files: tuple[str, ...]) -> str:
    wanted = dict.fromkeys(("tokenizer.json", *files))
    return Bilingual(
        f"{name} has no tokenizer: none of {', '.join(wanted)} has a vocabulary.\n"
        "Copy the tokenizer files of the original model into the folder of config.json.",
        f"{name} 没有分词器：{'、'.join(wanted)} 中没有一个含有词表。\n"
        "请把原模型的分词器文件复制到 config.json 所在的文件夹。",
    )
