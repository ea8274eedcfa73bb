"""What tokens depend on, as a hash: tokens that were made once are found again by it."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

from siliang.config import DataConfig
from siliang.data.example_set import ExampleSet
from siliang.data.spec import DataSpec
from siliang.data.templates import find_template, template_for
from siliang.models.tokenizer import Tokenizer

SETTINGS = (
    "template_arguments",
    "train_on",
    "max_length",
    "max_target_length",
    "stride",
    "too_long",
    "long_text",
)  # that decide on tokens


def key_of(
    examples: ExampleSet, tokenizer: Tokenizer, data: DataConfig, spec: DataSpec, labels: list[str] | None, judged: bool
) -> str:
    """What the tokens depend on, as a hash: the examples, the tokenizer, the template, the limits, this code."""
    template = find_template(template_for(data.template, getattr(tokenizer, "chat_template", None)))
    settings = [
        *map(code_hash, code_folders(spec)),
        spec.name,
        spec.encoded_with,
        labels,
        judged,
        repr(template),
        tokenizer_hash(tokenizer),
        *(getattr(data, name) for name in SETTINGS),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for line in examples.lines():
        digest.update(line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()[:40]


def code_folders(spec: DataSpec) -> list[Path]:
    """Where the code lies that makes tokens: this folder, and that of all tasks, or of one that is not siliang's."""
    task = sys.modules[spec.encoder.__module__].__file__
    assert task is not None
    here = Path(__file__).parent
    folders = [folder for folder in Path(task).parents if folder.parent == here.parent]
    return [here, *(folders or [Path(task).parent])]


@cache
def code_hash(folder: Path) -> str:
    """Of the code in a folder: all of it, so that no file is forgotten, and the libraries under it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    for library in ("transformers", "tokenizers", "jinja2"):
        digest.update(f"{library} {version(library)}\0".encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    outer = [
        type(tokenizer).__name__,
        str(tokenizer.special_tokens_map),
        str(getattr(tokenizer, "chat_template", None)),
    ]
    return hashlib.sha256("\0".join([inner, *outer]).encode("utf-8", "surrogatepass")).hexdigest()
