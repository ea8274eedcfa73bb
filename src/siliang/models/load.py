"""Loads base models and tokenizers: from safetensors, without code that nobody allowed, with errors that say what to
do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaTokenizer,
    PreTrainedConfig,
)
from transformers.utils import logging as hf_logging

from siliang.capabilities import why_missing
from siliang.config import QuantizationConfig
from siliang.environment import bound_kernel_caches
from siliang.hardware import choose_precision
from siliang.hub import cached_file, find_file, hub_is_off, only_cached
from siliang.limits import SECONDS, in_time
from siliang.models.extra import CHATGLM, make_known
from siliang.models.folder import (
    ADAPTER,
    NO_ADAPTER,
    check_hub_names,
    check_names,
    check_tokenizer_names,
    clean_quantization,
    read_config,
)
from siliang.models.invented import embedding_weights, invented_modules, may_be_invented
from siliang.models.own_code import OwnCode, code_of, find_own_code, find_tokenizer_code
from siliang.models.quantized import check_quantized, keep_as_stored
from siliang.models.sizes import check_counts, check_files, may_be_too_large
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer_file import check_made, check_tokenizer
from siliang.models.weights import piece_by_piece
from siliang.paths import check_links, near_names
from siliang.secrets import short_repr
from siliang.types import OTHER_HEADS, ModelError, first_line

BEFORE_HEADS = ("pooler", "pre_classifier", "sequence_summary")  # which files may lack: they are trained then
OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer")  # never quantised: every token's choice hangs on them
SHARDABLE_STORAGE = torch.bfloat16  # FSDP deals out what could have gradients: whole bytes pass as it, bit for bit
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)
NEEDED = ("attention and kernels chosen by siliang alone", "adapters beside a model left aside")  # capabilities
# what transformers raises where a config does not go together
MISFITS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)


def load_config(name: str, *, revision: str | None = None) -> Any:
    """A base model's config.

    Raises:
        ModelError: `name` is no model, here or on the hub.
        OwnCodeError: It brings code of its own, which the user has not allowed.
    """
    _check_folder(name, revision)
    for needed in NEEDED:
        if (missing := why_missing(needed)) is not None:
            raise ModelError(f"{name} is not loaded: {missing}, and siliang needs it to keep code out of models.")
    try:
        config, code = _read_config(name, revision)
    except ModelError:
        raise
    except Exception as error:  # a config's own checks raise kinds of their own
        raise ModelError(_why_not(name, error)) from error
    for part in _parts(config):
        # what a downloaded file says of code to run, its own or a kernel from the hub, is not asked
        if code is None:
            part.__dict__.pop("auto_map", None)
        part.__dict__.pop("fusion_config", None)
        # nor are other ways to give the same numbers, which the training step does not know
        part.return_dict = True
        if "chunk_size_feed_forward" in part.__dict__:
            part.chunk_size_feed_forward = 0
        part._attn_implementation = part._experts_implementation = None
        if (bits := part.__dict__.get("quantization_config")) is not None:
            part.quantization_config = clean_quantization(name, bits)
    return config


def _read_config(name: str, revision: str | None) -> tuple[Any, OwnCode | None]:
    """The config, and the model's own code that it is made with."""
    code = find_own_code(name, revision)
    if code is None:
        try:
            cached = only_cached(name)
            return AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=False, local_files_only=cached
            ), None
        except ValueError:
            code = find_own_code(name, revision)  # of the hub, whose config.json is here by now
            if code is None:
                raise
    config = code.find_class("AutoConfig").from_pretrained(str(code.folder))
    config.name_or_path = name
    return config, code


def model_from_config(config: Any, spec: ModelSpec, **settings: Any) -> Any:
    """A model of a config of `load_config`, with weights at random.

    Raises:
        ValueError: There is no model of this kind for the task.
    """
    auto = _auto_class(spec)
    if (code := code_of(config)) is not None:
        return code.find_class(auto.__name__)._from_config(config, **settings)
    return auto.from_config(config, trust_remote_code=False, **settings)


def _auto_class(spec: ModelSpec) -> Any:
    """The class of transformers that loads a model for the task."""
    return getattr(transformers, spec.auto_class)


def _parts(config: Any) -> Iterator[Any]:
    """A config and those inside of it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def load_model(
    name: str,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    labels: list[str] | None = None,
    revision: str | None = None,
    seed: int = 0,
    quantization: QuantizationConfig | None = None,
    shardable: bool = False,
    device: torch.device | None = None,
) -> Any:
    """A base model in eval mode, with its weights on the CPU, or, quantised, on `device`.

    Args:
        spec: What the task asks of it.
        dtype: Of the weights, or of those that are not quantised.
        quantization: The linear layers in few bits; the task's head and the output layer stay as they are.
        shardable: Bytes of 4 bits lie in tensors of `SHARDABLE_STORAGE`.
        labels: The classes or tags of the model, whose head is new unless the weights bring one so large.
        seed: Of weights that the folder does not hold, such as a new head, or the pooler of a BERT that was trained
            without one. A method trains and saves them.

    Raises:
        ModelError: It cannot be loaded, weights of its layers are missing, or they are not in the few bits that its
            config says.
    """
    bound_kernel_caches()
    config = load_config(name, revision=revision)
    if (Path(name) / ADAPTER).is_file():
        warnings.warn(
            f"{name} holds an adapter beside the model ({ADAPTER}), which is left aside: to train it further, move it "
            "into a folder of its own and name that as `adapter`.",
            stacklevel=2,
        )
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    elif spec.outputs is not None:
        config.num_labels = spec.outputs
    if (folder := Path(name)).is_dir() and may_be_too_large(config, folder):
        invented_weights(name, spec, config, revision=revision)  # raises where a shape differs, before memory is taken
    with torch.random.fork_rng(), piece_by_piece(quantizing=quantization is not None):
        torch.manual_seed(seed)
        quantised = _quantised(quantization, spec, device or torch.device("cpu"), shardable)
        model = _from_pretrained(name, spec, config, dtype=dtype, revision=revision, **quantised)
    check_quantized(model, name)
    keep_as_stored(model)
    return model.eval()


def invented_weights(name: str, spec: ModelSpec, config: Any, *, revision: str | None = None) -> list[str]:
    """The modules that `load_model` will have to make up, found without reading a weight.

    Args:
        config: Of `load_config`, with the task's labels.

    Raises:
        ModelError: It cannot be loaded.
    """
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # its report of what is missing comes with the real loading
    hf_logging.disable_progress_bar()
    try:
        model = _from_pretrained(name, spec, config, dtype=torch.float32, revision=revision, device_map={"": "meta"})
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
    return invented_modules(model)


def _from_pretrained(name: str, spec: ModelSpec, config: Any, *, revision: str | None, **settings: Any) -> Any:
    auto: Any = _auto_class(spec)
    # transformers would put an adapter that lies beside the weights on the model: it looks where there is none
    cached = only_cached(name)
    elsewhere = {"subfolder": NO_ADAPTER, "local_files_only": cached}
    try:
        if (code := code_of(config)) is not None:
            auto = code.find_class(auto.__name__)
            settings |= {"use_safetensors": True}
            revision = revision if Path(name).is_dir() else code.folder.name
        model, info = auto.from_pretrained(
            name,
            config=config,
            revision=revision,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=cached,
            adapter_kwargs=elsewhere,
            **settings,
        )
    except ModelError:
        raise
    except Exception as error:  # safetensors, transformers and the hub each raise kinds of their own
        raise ModelError(_why_not(name, error)) from error
    if model._hf_peft_config_loaded:
        raise ModelError(f"{name} holds an adapter in {NO_ADAPTER}, which is left aside everywhere: remove it.")
    lost = {str(key[0] if isinstance(key, tuple) else key) for key in (*info["mismatched_keys"], *info["missing_keys"])}
    ends = embedding_weights(model) if lost else set()
    if lost := {key for key in lost if not may_be_invented(model, key, ends)}:
        raise ModelError(f"{name}: {len(lost)} weights are missing or of another shape, the first is {min(lost)}.")
    return model


def kept_whole(spec: ModelSpec) -> list[str]:
    """The modules that are never quantised, as bitsandbytes takes them."""
    return [*spec.heads, *OTHER_HEADS, *BEFORE_HEADS, *OUTPUT_LAYERS]


def _quantised(
    wanted: QuantizationConfig | None, spec: ModelSpec, device: torch.device, shardable: bool
) -> dict[str, Any]:
    """What from_pretrained needs to load in few bits."""
    if wanted is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ModelError("quantization needs bitsandbytes, which is not installed: pip install 'siliang[cuda]'.")
    kept = kept_whole(spec)
    settings: dict[str, Any] = {"load_in_8bit": True, "llm_int8_skip_modules": kept}
    if wanted.bits == 4:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": wanted.type,
            "bnb_4bit_use_double_quant": wanted.double,
            "bnb_4bit_compute_dtype": choose_precision(wanted.compute_dtype, device).dtype,
            "bnb_4bit_quant_storage": SHARDABLE_STORAGE if shardable else torch.uint8,
            "llm_int8_skip_modules": kept,
        }
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """A base model's tokenizer, with a pad token.

    Raises:
        ModelError: It cannot be loaded.
        OwnCodeError: It, or its model, brings code of its own, which the user has not allowed.
    """
    _check_folder(name, revision)
    folder = Path(name)
    try:
        check_tokenizer(name, revision)
        tokenizer = _tokenizer_from_pretrained(name, revision)
        check_made(tokenizer, name, revision)
    except ModelError:
        raise
    except Exception as error:
        if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise ModelError(_no_tokenizer(name, TOKENIZER_FILES)) from None
        load_config(name, revision=revision)  # which transformers reads as well, says what is wrong with itself
        raise ModelError(_why_not(name, error, what="tokenizer")) from error
    # transformers makes one that knows no word where the files of its words are missing
    files = tuple(dict.fromkeys(tokenizer.vocab_files_names.values()))
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if files and len(set(tokenizer.get_vocab()) - special) < 2:
        raise ModelError(_no_tokenizer(name, files))
    if type(longest := tokenizer.model_max_length) not in (int, float):
        raise ModelError(f"{name}: model_max_length = {short_repr(longest)} in its tokenizer_config.json is no number.")
    if tokenizer.pad_token_id is None:
        # safe: batches mask padding by position, never by the token's number
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    try:
        in_time(partial(tokenizer, "a 1 \uff01", verbose=False), SECONDS)
        tokenizer.convert_tokens_to_ids(
            "\uff01 no word \uff01"
        )  # which asks for the unknown word for ever, if it is none
    except Exception as error:  # the tokenizers library raises Exception itself, as where its unknown word is no word
        raise ModelError(f"{name}: its tokenizer makes no tokens of a text: {first_line(error)}") from None
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
    except ValueError as error:  # transformers does not know it
        code = find_tokenizer_code(name, revision) if "trust_remote_code" in str(error) else None
        if code is None or "AutoTokenizer" not in code.classes:
            raise
    return code.find_class("AutoTokenizer").from_pretrained(str(code.folder), **given)


def _no_tokenizer(name: str, files: tuple[str, ...]) -> str:
    return (
        f"{name} has no tokenizer: of {', '.join(dict.fromkeys(('tokenizer.json', *files)))} none is there that holds "
        "words.\nCopy the tokenizer's files of the model that it was made from beside config.json."
    )


def load_tokenizer_alone(name: str, settings: dict[str, Any]) -> Any:
    """The tokenizer that an adapter's config names, whose folder need hold no model. It runs no code of its own.

    Args:
        name: A folder, or a name on the hub.
        settings: For AutoTokenizer.from_pretrained.

    Raises:
        ModelError: It cannot be loaded, or asks for too much.
    """
    folder, revision = Path(name), settings.get("revision")
    if folder.is_dir() and not (folder / "config.json").is_file():
        check_links(folder, ModelError)
    else:
        _check_folder(name, revision)
    try:
        check_tokenizer(name, revision)
        aside = check_tokenizer_names(name, revision)
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=only_cached(name), **settings, **aside
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_why_not(name, error, what="tokenizer")) from error


def _check_folder(name: str, revision: str | None = None) -> None:
    path = Path(name)
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise ModelError(f"{name} is a folder, but no model: config.json is missing there.")
        check_links(path, ModelError)
        values = read_config(config)
        if not isinstance(values.get("model_type"), str):
            raise ModelError(f"{config} names no model_type, so it is not a transformers model.")
        make_known(values.get("model_type"))
        check_counts(values, config)
        if (generation := path / "generation_config.json").is_file():
            check_counts(read_config(generation), generation)
        check_names(path)
        check_files(path)
    elif path.is_file():
        raise ModelError(f"{name} is a file: give the folder of the model, which holds config.json and the weights.")
    elif _looks_like_a_path(name):
        raise ModelError(f"There is no model folder {name}.{near_names(path)}")
    elif (why := hub_is_off()) is not None and cached_file(name, "config.json", revision=revision) is None:
        raise ModelError(
            f"{name} is no folder here, and not in the hub's cache; {why}.{near_names(path)} Give the model's folder."
        )
    else:
        check_hub_names(name, revision)
        if (found := find_file(name, "config.json", revision)) is not None:
            values = read_config(found)
            make_known(values.get("model_type"))
            check_counts(values, found)


def _looks_like_a_path(name: str) -> bool:
    """Not owner/name, nor the name of one of the hub's old models."""
    strange = (
        name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name or ":" in name
    )
    return (
        strange
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII)
        or ("/" in name and Path(name).parent.is_dir())
    )


def _why_not(name: str, error: Exception, what: str = "model") -> str:
    why = first_line(error, kind=isinstance(error, TypeError | AttributeError | LookupError | ArithmeticError))
    if "weights_only" in why:  # torch would advise to run what is in the file
        why = "a .bin file of its weights holds something else than tensors, or is damaged."
    if not Path(name).is_dir():
        return f"{name} is no folder here, and the hub did not give its {what}: {why}"
    return f"{name}: its {what} cannot be loaded: {why}"
