"""Folders that a grammar makes: whole and valid, but for hostile values at chosen places.

A value is changed at its place in its file's structure, to one of another size, kind, name or number; a file is
changed at its place in its folder, to a link, a pipe, another's content. Texts of templates, tokenizers and READMEs
are made from rules of their own. The same seed makes the same cases.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from faults.folders.making import copy, fifo, link, sealed, sparse, victim, victims, write
from faults.folders.sandbox import Case, Site, Step
from siliang import PeftModel
from siliang.config import RunConfig
from siliang.data.chat import ChatTemplate
from siliang.data.encode import Encoder
from siliang.data.load import load_examples
from siliang.data.messages import Conversation, Message
from siliang.models.load import load_model
from siliang.models.tokenizers import load_tokenizer
from siliang.report.gather import gather
from siliang.report.page import write_page
from siliang.run_folder import find_run, open_trained
from siliang.tasks import CAUSAL_LM, SEQ_CLS
from siliang.train.resume import check_resumed
from siliang.types import TaskType
from siliang.use.generate import generate

Chance = random.Random
Maker = Callable[[Chance, Site], Sequence[Step]]

# ---- values ----

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    7,
    255,
    65_536,
    2**31,
    2**32,
    2**53,
    2**63,
    10**9,
    10**12,
    10**30,
    10**400,
    -(2**63),
    0.0,
    -0.5,
    0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    False,
]
TEXTS: list[str] = [
    "",
    " ",
    "x",
    ".",
    "..",
    "../x",
    "../../outside/victim.txt",
    "OUT/victim.txt",
    "OUT",
    "/etc/passwd",
    "/dev/zero",
    "//server/share",
    "http://localhost:9/x",
    "file:///etc/passwd",
    "hf://nobody/x",
    "zip://x::OUT/victim.txt",
    "~/x",
    "$HOME",
    "a\\b",
    "a\0b",
    "\x1b[31mx\x1b]0;y\x07",
    "a\u202eb",
    "\ud800",
    "<script>x</script>",
    "{{ 7 * 7 }}",
    "$(touch x)",
    "(a+)+$",
    "(.*)*x",
    "a" * 300,
    "a" * 50_000,
    "1:1:1:1",
    "0x" + "f" * 400,
    "9" * 5000,
    "NaN",
    "null",
    "true",
    "lora",
    "all-linear",
    "q_proj",
    "llama",
    "evil.Evil",
    "os.system",
    "evil/kernel",
    "四两",
    "é",
    "e\u0301",
    "LORA",
    "CAUSAL_LM",
    "float64",
    "completed",
    "run.json",
]
KEYS = [
    "evil",
    "",
    "auto_map",
    "remote_code",
    "quantization_config",
    "attn_implementation",
    "transformers_weights",
    "__class__",
    "model",
    "data",
    "path",
    "r",
    "rank_pattern",
    "target_modules",
    "modules_to_save",
    "num_virtual_tokens",
    "base_model_name_or_path",
    "tokenizer_class",
    "chat_template",
    "vocab_size",
    "num_hidden_layers",
    "text_config",
    "torch_dtype",
    "extra_special_tokens",
]


def value(chance: Chance, depth: int = 3) -> Any:
    """Any value."""
    kind = chance.randrange(10)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind < 8:
        return chance.choice(TEXTS)
    if kind == 8 or depth == 0:
        return chance.choice([None, [], {}, [[]], {"": None}, [0] * 5000, {f"k{i}": i for i in range(500)}])
    if chance.random() < 0.5:
        return [value(chance, depth - 1) for _ in range(chance.choice((1, 2, 3, 20)))]
    return {chance.choice(KEYS): value(chance, depth - 1) for _ in range(chance.choice((1, 2, 3)))}


def like(chance: Chance, old: Any) -> Any:
    """Another value of the same kind, as often as not; or any."""
    if chance.random() < 0.3:
        return value(chance)
    if isinstance(old, bool) or old is None:
        return chance.choice([True, False, None, 0, "true"])
    if isinstance(old, int | float):
        return chance.choice([*NUMBERS, old * 10**6, -old, old + 1])
    if isinstance(old, str):
        return chance.choice([*TEXTS, old * 100, old.upper(), f"../{old}", f"{old}\n", old[:-1]])
    if isinstance(old, list):
        return chance.choice([old * 1000, old[:1], old[::-1], [old], [*old, value(chance)], []])
    if isinstance(old, dict):
        return chance.choice(
            [{}, list(old), {k: value(chance, 1) for k in old}, {f"{k} ": v for k, v in old.items()}, {"x": old}]
        )
    return value(chance)


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of values in a structure."""
    found: list[tuple[Any, ...]] = [path] if path else []
    inner = values.items() if isinstance(values, dict) else enumerate(values[:20]) if isinstance(values, list) else ()
    for key, held in inner:
        found += places(held, (*path, key))
    return found


def changed(chance: Chance, values: Any, times: int) -> Any:
    """A structure with some values changed, taken out, doubled, renamed, put in each other's place, or added."""
    for _ in range(times):
        there = places(values)
        if not there:
            return value(chance)
        *parents, last = chance.choice(there)
        inner = values
        for part in parents:
            inner = inner[part]
        match chance.randrange(8):
            case 0 if isinstance(inner, dict):
                del inner[last]
            case 1 if isinstance(inner, dict):
                inner[chance.choice([*KEYS, *TEXTS[:30]])] = value(chance)
            case 2 if isinstance(inner, dict):
                inner[chance.choice(KEYS)] = inner.pop(last)
            case 3:
                *others, end = chance.choice(there)
                source = values
                for part in others:
                    source = source[part]
                inner[last] = json.loads(json.dumps(source[end]))
            case _:
                inner[last] = like(chance, inner[last])
    return values


def change_file(chance: Chance, path: Path, site: Site, times: int) -> None:
    """A JSON or yaml file with some values changed."""
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    values = changed(chance, values, times)
    made = yaml.safe_dump(values, allow_unicode=True) if path.suffix == ".yaml" else json.dumps(values)
    write(path, made.replace("OUT", str(site.outside)))


def change_tensors(chance: Chance, path: Path) -> None:
    """A file of tensors with some of other shapes, kinds, names or numbers; or a header that says what is not there."""
    if chance.random() < 0.4:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = changed(chance, json.loads(content[8 : 8 + size]), chance.choice((1, 1, 2, 4)))
        made = json.dumps(header).encode("utf-8", "surrogatepass")
        length = chance.choice([len(made)] * 5 + [0, 2**40, len(made) + 1])
        path.write_bytes(length.to_bytes(8, "little") + made + content[8 + size :])
        return
    tensors = load_file(path)
    for _ in range(chance.choice((1, 1, 2, 5))):
        key = chance.choice(sorted(tensors)) if tensors else "x"
        t = tensors.get(key, torch.zeros(1))
        match chance.randrange(8):
            case 0:
                tensors.pop(key, None)
            case 1:
                kind = chance.choice(
                    [torch.bool, torch.int64, torch.float64, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]
                )
                tensors[key] = t.to(kind)
            case 2:
                shape = chance.choice(
                    [(0, 10**9), (10**9, 0), (1,), (), (3, 3, 3), (2**31, 0), (*t.shape, 1), tuple(t.shape)[::-1]]
                )
                tensors[key] = torch.zeros(shape)
            case 3:
                tensors[key] = torch.full_like(t.float(), chance.choice([float("nan"), float("inf"), 1e38, 0.0]))
            case 4:
                tensors[f"{key}{chance.choice(['.x', '', '.base_layer', '/../x', ' '])}"] = t.clone()
            case 5:
                tensors[chance.choice([*KEYS[1:], "lm_head.weight", "base_model.model.lm_head.weight"]) or "x"] = (
                    torch.zeros(4, 4)
                )
            case 6:
                tensors[key] = t.repeat(*([chance.choice((2, 3, 50))] + [1] * (t.dim() - 1))) if t.dim() else t
            case _:
                tensors[key] = t.flatten()
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})


# ---- files ----


def change_place(chance: Chance, folder: Path, site: Site) -> None:
    """A file or a folder of the stranger's that is something else: a link, a pipe, nothing, another's content."""
    there = [p for p in sorted(folder.rglob("*")) if not p.is_symlink()]
    path = chance.choice(there) if there else folder / "x"
    kind = chance.randrange(14)
    if path.is_dir() and kind not in (0, 1, 2, 3, 9):
        path = next((p for p in sorted(path.rglob("*")) if p.is_file() and not p.is_symlink()), folder / "x.json")
    match kind:
        case 0:
            link(path, victims(site) if path.is_dir() else victim(site))
        case 1:
            out = site.outside / f"moved-{path.name}"
            if path.exists():
                shutil.move(path, out)
            link(path, out)
        case 2:
            link(
                path,
                chance.choice(
                    [path.name, "..", "/etc/passwd", "/dev/zero", "/proc/self/environ", "nowhere", str(folder)]
                ),
            )
        case 3:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        case 4:
            fifo(path)
        case 5:
            sparse(path)
        case 6:
            content = path.read_bytes() if path.is_file() else b""
            write(path, content[: chance.randrange(len(content) + 1)])
        case 7:
            other = chance.choice([p for p in there if p.is_file()] or [path])
            write(path, other.read_bytes() if other.is_file() else b"")
        case 8:
            path.unlink(missing_ok=True)
            path.mkdir(parents=True)
        case 9:
            name = chance.choice(["X", "a\nb", "a\x1b[31m", "\u202e", "$(touch x)", "n" * 200, " ", "é"])
            if path.exists():
                path.rename(path.with_name(name))
        case 10:
            name = chance.choice(
                [f".{path.name}.tmp{os.getpid()}", f".{path.name}.tmp", f".{path.name}.tmp-old", f"{path.name}.lock"]
            )
            link(path.with_name(name), victim(site) if chance.random() < 0.5 else victims(site))
        case 11:
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(victim(site))
        case 12:
            write(
                path,
                chance.choice([b"", b"\0" * 1000, b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe", b"null", b"1" * 5000]),
            )
        case _:
            name = chance.choice(
                [
                    "evil.py",
                    "generation_config.json",
                    "adapter_config.json",
                    "pytorch_model.bin",
                    "README.md",
                    "x.index.json",
                ]
            )
            write(
                path.parent / name,
                chance.choice(["{}", "import os\n", "---\nconfigs: []\n---\n", json.dumps(value(chance))]),
            )


def _times(chance: Chance) -> int:
    return chance.choice((1, 1, 1, 2, 3, 8))


def _some(chance: Chance, names: Sequence[str], folder: Path, site: Site, *, seal_in: Sequence[str] = ()) -> None:
    """Changes some of a folder's files by their structure, and now and then what is where."""
    for _ in range(chance.choice((1, 1, 2))):
        path = folder / chance.choice(names)
        if not path.is_file() or path.is_symlink() or path.stat().st_size > 10**7:
            continue
        try:
            change_tensors(chance, path) if path.suffix == ".safetensors" else change_file(
                chance, path, site, _times(chance)
            )
        except Exception:
            write(path, json.dumps(value(chance)))  # what was made does not fit into such a file
    if chance.random() < 0.3:
        change_place(chance, folder, site)
    if chance.random() < 0.8:
        for inner in seal_in:
            _sealed(folder / inner)


def _sealed(folder: Path) -> None:
    with suppress(OSError):
        paths = [folder, *folder.rglob("*")]
        plain = all(not p.is_symlink() and (p.is_dir() or p.is_file()) and p.stat().st_size < 10**8 for p in paths)
        if plain and folder.is_dir() and (folder / "manifest.json").is_file():
            sealed(folder)


# ---- kinds of folders ----

RUNS = ("lora", "prompt_tuning", "prefix_tuning", "p_tuning", "ia3", "bitfit", "full", "seq_cls")


def _run(chance: Chance, site: Site) -> Sequence[Step]:
    copy(site, chance.choice(RUNS))
    last = "checkpoints/checkpoint-2"
    names = [
        "run.yaml",
        "run.json",
        "run.yaml",
        "run.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/manifest.json",
        f"{last}/state.json",
        f"{last}/manifest.json",
        f"{last}/state.safetensors",
    ]
    _some(chance, names, site.evil, site, seal_in=("adapter", last))

    def use() -> None:
        opened = open_trained(find_run(Path("evil")))
        if opened.config.task == TaskType.CAUSAL_LM:
            generate(opened, "w1", max_new_tokens=1)

    def go_on() -> None:
        from siliang.run_folder import read_config

        check_resumed(read_config(Path("evil")), Path("evil"), lambda line: None, force=False)

    return [
        chance.choice(
            [lambda: find_run(Path("evil")), lambda: find_run(Path("evil")), use, use, go_on, ("report", "evil")]
        )
    ]


def _adapter(chance: Chance, site: Site) -> Sequence[Step]:
    from faults.folders.bases import tiny_llama

    name = chance.choice(["adapter", *(f"{run}/adapter" for run in RUNS[:6])])
    copy(site, name)
    names = ["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"]
    _some(chance, names, site.evil, site, seal_in=("",))
    model = tiny_llama()

    def use() -> None:
        opened: Any = PeftModel.from_pretrained(model, Path("evil"))
        with torch.no_grad():
            opened(input_ids=torch.ones(1, 3, dtype=torch.long))

    return [use]


PIECES = ["w", "1", " ", "ww", "", "[PAD]", "w" * 500, "▁", "\u0301"]
REGEXES = [r"\d+", r"(w+)+x", r"(w|w|1)*z", "[", r"(?<=w)1", "(w{1,50}){1,50}", "w*", r"\s+|\S", "(?=w)*"]


def _component(chance: Chance, depth: int = 3) -> Any:
    """A part of a tokenizer."""
    text = partial(chance.choice, PIECES)

    def pattern() -> dict[str, str]:
        return chance.choice([{"String": text()}, {"Regex": chance.choice(REGEXES)}])

    kind = chance.randrange(12)
    if kind == 0 and depth:
        name = chance.choice(["normalizers", "pretokenizers", "decoders", "processors"])
        return {"type": "Sequence", name: [_component(chance, depth - 1)] * chance.choice((1, 2, 5, 24))}
    return [
        {"type": "Replace", "pattern": pattern(), "content": text()},
        {
            "type": "Split",
            "pattern": pattern(),
            "behavior": chance.choice(["Removed", "Isolated", "MergedWithNext", "Contiguous"]),
            "invert": chance.random() < 0.5,
        },
        {"type": "Prepend", "prepend": text()},
        {"type": "Lowercase"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {
            "type": "Metaspace",
            "replacement": chance.choice(["▁", "w", "ww", ""]),
            "prepend_scheme": "always",
            "split": True,
        },
        {"type": "Digits", "individual_digits": True},
        {"type": "Fuse"},
        {
            "type": "Strip",
            "content": "w",
            "start": chance.choice([1, 10**9]),
            "stop": 0,
            "strip_left": True,
            "strip_right": True,
        },
        {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * chance.choice((1, 2, 500)),
            "pair": [],
            "special_tokens": {},
        },
        {"type": "Precompiled", "precompiled_charsmap": chance.choice(["", "AAAA", "AQAAAA==", "x"])},
        value(chance),
    ][kind - 1]


MODELS: list[Callable[[Chance], Any]] = [
    lambda c: {
        "type": "BPE",
        "vocab": {"w": 0, "1": 1, "w1": c.choice([2, 10**9, 0])},
        "merges": [["w", c.choice(["1", "x"])]],
        "dropout": c.choice([None, 0.5, 9.0]),
    },
    lambda c: {
        "type": "WordPiece",
        "vocab": {"[UNK]": 0, "w": 1},
        "unk_token": c.choice(["[UNK]", "x"]),
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": c.choice([1, 2**40]),
    },
    lambda c: {
        "type": "Unigram",
        "vocab": [["w", c.choice([-1.0, 1e300])], ["1", -2.0]],
        "unk_id": c.choice([0, 5, None]),
        "byte_fallback": True,
    },
    lambda c: {
        "type": "WordLevel",
        "vocab": {"w": c.choice([0, 2**31, 5]), "[UNK]": 3},
        "unk_token": c.choice(["[UNK]", "x"]),
    },
]


def _base(chance: Chance, site: Site) -> Sequence[Step]:
    base = copy(site, "llama")
    names = [
        "config.json",
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "model.safetensors",
        "generation_config.json",
    ]
    if not (base / "generation_config.json").is_file():
        write(
            base / "generation_config.json",
            json.dumps({"eos_token_id": 2, "max_length": 20, "num_beams": 1, "do_sample": False}),
        )
    if chance.random() < 0.35:
        values = json.loads((base / "tokenizer.json").read_text())
        part = chance.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor", "model"])
        values[part] = chance.choice(MODELS)(chance) if part == "model" else _component(chance)
        write(base / "tokenizer.json", json.dumps(values))
    else:
        _some(chance, names, base, site)

    def weights() -> None:
        load_model("evil", CAUSAL_LM.model, dtype=torch.float32)

    def words() -> None:
        tokenizer = load_tokenizer("evil")
        encoder = Encoder(tokenizer)
        tokenizer.decode(tokenizer("w1 w2 11")["input_ids"])
        assert encoder is not None

    return [chance.choice([weights, words, words])]


OPERATORS = ["+", "*", "~", "-", "%", "//", "**", "==", "<", "in", "and", "or"]
GROWING = ["[ns.a, ns.a]", "ns.a ~ ns.a", "ns.a + ns.a", "ns.a * 2"]
ENDINGS = ["", "== [ns.a]", "| length", "| tojson"]
EXPRESSIONS = [
    "messages",
    "messages[0]",
    "m",
    "m['content']",
    "m.role",
    "'w'",
    "99",
    "range(9)",
    "[]",
    "{}",
    "bos_token",
    "tools",
    "none",
    "loop",
    "namespace(x=1)",
    "cycler('a', 'b')",
    "lipsum",
    "self",
    "true",
    "9.5",
    "messages[0]['content'][0]",
    "joiner()",
    "dict(a=1)",
]
FILTERS = [
    "tojson",
    "list",
    "length",
    "string",
    "upper",
    "sort",
    "join('w')",
    "center(999)",
    "replace('w', 'ww')",
    "map('upper')",
    "first",
    "batch(9)",
    "groupby(0)",
    "sum",
    "pprint",
    "indent(9)",
    "wordwrap(1)",
    "urlize",
    "striptags",
    "xmlattr",
    "attr('__class__')",
    "max",
    "format('x')",
    "unique",
    "reverse",
    "items",
    "trim",
    "int",
    "float",
    "random",
    "safe",
    "escape",
    "default('x')",
    "truncate(5)",
]


def _expression(chance: Chance, depth: int) -> str:
    inner = lambda: _expression(chance, depth - 1)  # noqa: E731
    if depth <= 0:
        return chance.choice(EXPRESSIONS)
    return [
        lambda: chance.choice(EXPRESSIONS),
        lambda: f"({inner()} | {chance.choice(FILTERS)})",
        lambda: f"({inner()} {chance.choice(OPERATORS)} {inner()})",
        lambda: f"[{inner()}, {inner()}]",
        lambda: f"({inner()} if {inner()} else {inner()})",
        lambda: f"{inner()}[{inner()}]",
        lambda: (
            f"{inner()}.{chance.choice(['__class__', 'append', 'items', 'x', 'format', '__init__', 'role', 'encode'])}"
        ),
        lambda: f"{inner()}({inner()})",
        lambda: f"('w' * {chance.choice([9, 10**5, 10**10])})",
    ][chance.randrange(9)]()


def jinja(chance: Chance, depth: int = 3) -> str:
    """A chat template."""
    inner = lambda: jinja(chance, depth - 1) if depth > 0 else "w"  # noqa: E731
    value_of = lambda: _expression(chance, chance.randrange(4))  # noqa: E731
    parts = [
        lambda: "w ",
        lambda: f"{{{{ {value_of()} }}}}",
        lambda: f"{{% for m in messages %}}{inner()}{{% endfor %}}",
        lambda: f"{{% for x in {value_of()} %}}{inner()}{{% endfor %}}",
        lambda: f"{{% for x in range({chance.choice([3, 99, 9999])}) %}}{inner()}{{% endfor %}}",
        lambda: f"{{% if {value_of()} %}}{inner()}{{% else %}}{inner()}{{% endif %}}",
        lambda: f"{{% set m = {value_of()} %}}",
        lambda: (
            f"{{% set ns = namespace(a={value_of()}) %}}{{% for i in range({chance.choice([3, 30])}) %}}"
            f"{{% set ns.a = {chance.choice(GROWING)} %}}{{% endfor %}}{{{{ ns.a {chance.choice(ENDINGS)} }}}}"
        ),
        lambda: f"{{% macro f(x) %}}{inner()}{{% endmacro %}}{{{{ f({value_of()}) }}}}",
        lambda: f"{{% generation %}}{inner()}{{% endgeneration %}}",
        lambda: f"{{% {chance.choice(['include', 'import', 'extends'])} '{chance.choice(['x', '/etc/passwd'])}' %}}",
        lambda: "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    ]
    return "".join(chance.choice(parts)() for _ in range(chance.choice((1, 2, 3))))


def _template(chance: Chance, site: Site) -> Sequence[Step]:
    tokenizer = load_tokenizer(str(site.shared / "llama"))
    tokenizer.chat_template = jinja(chance)
    talk = Conversation((Message("user", "w1"), Message("assistant", "w2"), Message("user", "w3")))
    if chance.random() < 0.2:
        keys = ["name", "user", "assistant", "end", "system", "between", "begin", "tools", "evil"]
        fields = [
            "{content}",
            "{content}{content}",
            "",
            "{",
            "{x}",
            "w " * 500,
            5,
            None,
            [1],
            "{system}{content}",
            "\x1b[31m",
        ]
        write(site.work / "t.yaml", yaml.safe_dump({chance.choice(keys): chance.choice(fields) for _ in range(5)}))
        values = {"model": "m", "task": "causal_lm", "data": {"train": "x.jsonl", "template": "t.yaml"}, "output": "o"}
        return [lambda: RunConfig.build(values) and None]
    return [lambda: ChatTemplate(Encoder(tokenizer)).entries([talk]) and None]


def _path(chance: Chance) -> str:
    schemes = [
        "",
        "",
        "",
        "local://",
        "file://",
        "zip://x::",
        "gzip://x::",
        "dir://",
        "simplecache::",
        "http://localhost:9/",
        "hf://datasets/",
        "memory://",
        "tar://x::",
    ]
    names = [
        "data/train.jsonl",
        "data/*.jsonl",
        "**/*",
        "../../outside/secret.jsonl",
        "OUT/secret.jsonl",
        "data/../../../outside/*",
        "",
        ".",
        "..",
        "~",
        "train-link.jsonl",
        "data/train.jsonl\n",
    ]
    return chance.choice(schemes) + chance.choice(names)


def _readme(chance: Chance, site: Site) -> Sequence[Step]:
    base = chance.choice(["set", "set", "plain_set", "saved_set"])
    copy(site, base)
    for name in ("secret.jsonl", "data/secret.jsonl"):
        write(site.outside / name, '{"text": "secretword", "label": "good"}\n' * 30)
    if base == "saved_set":
        names = [p.relative_to(site.evil).as_posix() for p in site.evil.rglob("*.json")]
        _some(chance, names, site.evil, site)
    else:
        files = chance.choice(
            [
                lambda: _path(chance),
                lambda: [_path(chance) for _ in range(3)],
                lambda: [
                    {"split": chance.choice(["train", "test", "x/y", ""]), "path": _path(chance)} for _ in range(2)
                ],
                lambda: {"train": _path(chance), "test": [_path(chance)]},
                lambda: value(chance),
            ]
        )()
        entry: dict[str, Any] = {"config_name": chance.choice(["default", "../x", "a b"]), "data_files": files}
        if chance.random() < 0.3:
            entry[
                chance.choice(["data_dir", "features", "field", "encoding", "version", "drop_labels", "chunksize"])
            ] = value(chance)
        header: dict[str, Any] = {"configs": [entry] * chance.choice((1, 1, 2, 40))}
        if chance.random() < 0.3:
            dtype = chance.choice(["string", "int64", "evil", "list", "struct", "Value", "float16"])
            header["dataset_info"] = changed(
                chance,
                {
                    "features": [
                        {"name": "text", "dtype": dtype},
                        {"name": "label", "dtype": {"class_label": {"names": {"0": "bad", "1": "good"}}}},
                    ]
                },
                chance.choice((0, 1, 3)),
            )
        if chance.random() < 0.2:
            header = changed(chance, header, 2)
        try:
            text = yaml.safe_dump(header, allow_unicode=True)
        except (yaml.YAMLError, RecursionError):
            text = "configs: []"
        write(site.evil / "README.md", f"---\n{text}\n---\n".replace("OUT", str(site.outside)))
        if chance.random() < 0.3:
            change_place(chance, site.evil, site)
    values = {"model": "m", "task": "seq_cls", "data": {"train": "evil"}, "output": "o"}
    return [lambda: load_examples(RunConfig.build(values).data, SEQ_CLS.data, seed=0) and None]


def _comparison(chance: Chance, site: Site) -> Sequence[Step]:
    copy(site, "comparison")
    runs = [f"runs/{method}/seed-42/{name}" for method in ("lora", "bitfit") for name in ("run.json", "answers.json")]
    _some(chance, ["comparison.json", "comparison.json", *runs, "compare.yaml"], site.evil, site)

    def show() -> None:
        write_page(gather([Path("evil")]), Path("evil/report.html"))

    return [chance.choice([show, show, ("report", "evil")])]


# kinds of folders, and their share of the cases
KINDS: dict[str, tuple[Maker, int]] = {
    "run folders": (_run, 20),
    "adapters": (_adapter, 25),
    "base models": (_base, 20),
    "templates": (_template, 10),
    "data sets": (_readme, 15),
    "comparisons": (_comparison, 10),
}


def make_cases(n: int, seed: int = 0) -> list[Case]:
    """So many cases, in an order of chance."""
    chance = random.Random(seed)
    names = [kind for kind, (_, share) in KINDS.items() for _ in range(share)]
    return [_case(chance.choice(names), seed, i) for i in range(n)]


def _case(kind: str, seed: int, number: int) -> Case:
    def build(site: Site) -> Sequence[Step]:
        return KINDS[kind][0](random.Random(f"{kind} {seed} {number}"), site)

    return Case(kind, f"{seed}.{number}", build, "either", hides=("secretword",) if kind == "data sets" else ())
