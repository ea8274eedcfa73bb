"""Kind 3: what never ends, or fills the memory, inside one call of C: templates, patterns, tokenizers, settings of
generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from faults.folders.making import HELLO, change_json, change_settings, copy, table, with_base, write
from faults.folders.sandbox import Case, Expected, Site, Step
from siliang import PeftModel

KIND = "limits"

NESTED = (
    "{% set ns = namespace(a=[], b=[]) %}{% for i in range(40) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
DOUBLED = "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
LONG = "{% set ns = namespace(s='a') %}{% for i in range(24) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"

TEMPLATES = {
    "nested lists compared": NESTED + "{{ ns.a == ns.b }}",
    "nested lists ordered": NESTED + "{{ ns.a < ns.b }}",
    "nested lists looked for": NESTED + "{{ ns.a in [ns.b] }}",
    "nested lists printed": NESTED + "{{ ns.a }}",
    "nested lists as JSON": NESTED + "{{ ns.a | tojson }}",
    "nested lists sorted": NESTED + "{{ [ns.a, ns.b] | sort }}",
    "nested lists, each once": NESTED + "{{ [ns.a, ns.b] | unique | list }}",
    "nested lists as text": NESTED + "{{ ns.a | string | length }}",
    "nested lists pretty": NESTED + "{{ ns.a | pprint }}",
    "nested lists at most": NESTED + "{{ [ns.a, ns.b] | max }}",
    "nested lists in groups": NESTED + "{{ [{'k': ns.a}, {'k': ns.b}] | groupby('k') }}",
    "nested dicts compared": NESTED.replace("[ns.a, ns.a]", "{'x': ns.a, 'y': ns.a}").replace(
        "[ns.b, ns.b]", "{'x': ns.b, 'y': ns.b}"
    )
    + "{{ ns.a == ns.b }}",
    "a large power": "{{ 9 ** (9 ** 9) }}",
    "a large shift": "{{ (2 ** 40000000) // 3 % 7 }}",
    "a number's digits": "{{ (10 ** 4000000) | string | length }}",
    "powers in a chain": (
        "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n % 7 }}"
    ),
    "text times a number": "{{ 'a' * 10 ** 11 }}",
    "a list times a number": "{{ ([0] * 10 ** 10) | length }}",
    "doubled text": DOUBLED + "{{ ns.s }}",
    "a wide format": "{{ '%999999999999d' % 1 }}{{ '%.999999999f' % 1.0 }}",
    "a wide format by parts": "{{ '{:>9999999999}'.format(1) }}",
    "a wide centre": "{{ 'a' | center(99999999999) }}",
    "a wide indent": LONG + "{{ (ns.s | wordwrap(1)) | indent(100000) }}",
    "replaced letters": LONG + "{{ ns.s | replace('a', ns.s) | length }}",
    "a range as a list": (
        "{{ range(99999) | list | length }}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a sum of lists": "{% set x = [[0] * 9999] * 99999 %}{{ x | sum(start=[]) | length }}",
    "a product of lists": (
        "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    ),
    "links in a long text": LONG + "{{ ('http://' ~ ns.s ~ '.') | urlize | length }}",
    "tags in a long text": LONG + "{{ ('<' ~ ns.s) | striptags | length }}{{ ('<!--' * 99999) | striptags }}",
    "words of a long text": LONG
    + ("{{ ns.s | wordcount }}{{ ns.s | title | length }}{{ (ns.s ~ '!') | urlencode | length }}"),
    "much lorem ipsum": "{{ lipsum(n=99999999) }}",
    "macros that call themselves": "{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}",
    "a loop that calls itself": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "a wide date": "{{ strftime_now('%Y' * 9999999) | length }}",
    "batches": "{{ range(99999) | batch(99999999, 'x') | list | length }}",
    "slices": "{{ range(99999) | slice(999999999) | list | length }}",
    "a large template": "{{ 'x' }}" * 120_000,
    "a deep template": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long chain": "{{ " + "1 + " * 20_000 + "1 }}",
    "constants folded": "{{ 'a' * 99999999 * 99 }}{{ [[[0] * 9999] * 9999] * 9999 }}",
}


def _templated(name: str, text: str, *, place: str = "chat_template.jinja", expected: Expected = "refused") -> Case:
    def build(site: Site) -> Sequence[Step]:
        base = with_base(site)
        change_settings(site, {"data/template": "chat"})
        (base / "chat_template.jinja").unlink()
        if place == "tokenizer_config.json":
            change_json(base / place, {"chat_template": text})
        elif place == "a list":
            change_json(base / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": text}]})
        else:
            write(base / place, text)
        if place.startswith("additional"):
            write(base / "chat_template.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
        return [HELLO]

    return Case(KIND, f"template: {name}{'' if place == 'chat_template.jinja' else f', in {place}'}", build, expected)


def _own_template(name: str, values: str | dict[str, Any], expected: Expected = "refused") -> Case:
    """A template file of the stranger's, which run.yaml names."""

    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        write(site.evil / "t.yaml", values if isinstance(values, str) else json.dumps(values))
        change_settings(site, {"data/template": "evil/t.yaml"})
        return [("train", "evil/run.yaml", "--output", "new")]

    return Case(KIND, f"template file: {name}", build, expected)


PATTERNS = {
    "doubled repeats": r"(([a-z_.0-9]+)+)+[A-Z]",
    "nested repeats": r"(.*)*(.*)*(.*)*(.*)*(.*)*(.*)*X",
    "counted repeats": r"((((q{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}",
    "large counts": r"(?:a{65535}){65535}",
    "many groups": "(" * 90 + "a" + ")" * 90 + "(b|c)" * 20_000,
    "a large set": "[" + "".join(chr(0x4E00 + i) for i in range(20_000)) + "]{1,60000}",
    "a lookbehind": r"(?<=" + "a" * 100_000 + r")(?=(a|a)*b)",
    "back references": r"(a*)*\1\1\1\1\1(b|\1)*",
    "alternatives": "(" + "|".join(f"{'q' * i}" for i in range(3000)) + ")*x",
    "flags": "(?s)(?m)(?x:" + " " * 900_000 + ")",
    "a million characters": "q" * 1_000_000,
    "deep groups": "(?:" * 20_000 + ")" * 20_000,
}
FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "target_modules": lambda p: {"target_modules": p},
    "exclude_modules": lambda p: {"exclude_modules": p},
    "rank_pattern": lambda p: {"rank_pattern": {p: 4}},
    "alpha_pattern": lambda p: {"alpha_pattern": {p: 4}},
    "layers_pattern": lambda p: {"layers_pattern": p, "layers_to_transform": [0]},
    "modules_to_save": lambda p: {"modules_to_save": [p]},
}


def opened(name: str, change: dict[str, Any], expected: Expected = "refused", kind: str = KIND) -> Case:
    """An adapter's config with other values, opened on a model."""

    def build(site: Site) -> Sequence[Step]:
        from faults.folders.bases import tiny_llama

        copy(site, "adapter")
        change_json(site.evil / "adapter_config.json", change)
        model = tiny_llama()
        return [lambda: PeftModel.from_pretrained(model, site.evil)]

    return Case(kind, name, build, expected)


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Site], object]:
    """A change of tokenizer.json."""

    def changed(site: Site) -> None:
        base = with_base(site)
        change_json(base / "tokenizer.json", lambda values: change(values) and None)

    return changed


def _set(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda t: t.update(values)


def _replace(times: int, a: str = "w", b: str = "ww") -> dict[str, Any]:
    rule = {"type": "Replace", "pattern": {"String": a}, "content": b}
    return {"type": "Sequence", "normalizers": [rule] * times}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _added(content: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


TOKENIZERS: dict[str, Callable[[Site], object]] = {
    "a rule that doubles, 26 times": tokenizer(_set(normalizer=_replace(26))),
    "a rule that doubles, 40 times": tokenizer(_set(normalizer=_replace(40))),
    "a rule that makes a long text": tokenizer(_set(normalizer=_replace(5, "w", "w" * 1000))),
    "a pattern of nested repeats": tokenizer(
        _set(normalizer={"type": "Replace", "pattern": {"Regex": "(w*)*(w*)*(w*)*x$"}, "content": "y"})
    ),
    "a splitting pattern of nested repeats": tokenizer(_set(pre_tokenizer=_split("((w|w1|1)+)+z"))),
    "a splitting pattern of counts": tokenizer(_set(pre_tokenizer=_split("((w{1,1000}){1,1000}){1,1000}z"))),
    "a splitting pattern of look-arounds": tokenizer(_set(pre_tokenizer=_split(r"(?<=(w|w|w){1,50})(?!(w+)+$)\d*"))),
    "padding to a billion": tokenizer(
        _set(
            padding={
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            }
        )
    ),
    "padding to a multiple of a billion": tokenizer(
        _set(
            padding={
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": 10**9,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            }
        )
    ),
    "truncation with a stride": tokenizer(
        _set(truncation={"max_length": 2, "strategy": "LongestFirst", "stride": 1, "direction": "Right"})
    ),
    "a template of many tokens": tokenizer(
        _set(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 300_000
                + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }
        )
    ),
    "a special token of many numbers": tokenizer(
        _set(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 500_000, "tokens": ["<s>"] * 500_000}},
            }
        )
    ),
    "post-processors in a chain": tokenizer(
        _set(
            post_processor={
                "type": "Sequence",
                "processors": [
                    {
                        "type": "TemplateProcessing",
                        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                        "pair": [],
                        "special_tokens": {},
                    }
                ]
                * 40,
            }
        )
    ),
    "200,000 added tokens": tokenizer(
        lambda t: t["added_tokens"].extend(_added(f"<x{i}>", 100 + i) for i in range(200_000))
    ),
    "an added token far away": tokenizer(lambda t: t["added_tokens"].append(_added("<far>", 2**31))),
    "an added token beyond numbers": tokenizer(lambda t: t["added_tokens"].append(_added("<far>", 2**62))),
    "an added token of a million letters": tokenizer(lambda t: t["added_tokens"].append(_added("x" * 1_000_000, 90))),
    "an empty added token": tokenizer(lambda t: t["added_tokens"].append(_added("", 90))),
    "a word's number beyond the table": tokenizer(lambda t: t["model"]["vocab"].update({"w1": 4_000_000_000})),
    "a negative number": tokenizer(lambda t: t["model"]["vocab"].update({"w1": -1})),
    "rules in a deep chain": tokenizer(lambda t: t.update(normalizer=_deep(3000))),
    "a byte-pair model of many merges": tokenizer(
        _set(
            model={
                "type": "BPE",
                "vocab": {"w" * (i + 1): i for i in range(2000)},
                "merges": [["w", "w" * i] for i in range(1, 1999)],
                "dropout": None,
            }
        )
    ),
    "a byte-pair model with dropout": tokenizer(
        _set(model={"type": "BPE", "vocab": {"w": 0, "1": 1}, "merges": [], "dropout": 0.5})
    ),
    "a word-piece model of long words": tokenizer(
        _set(
            model={
                "type": "WordPiece",
                "vocab": {"[UNK]": 0, "w": 1},
                "unk_token": "[UNK]",
                "continuing_subword_prefix": "",
                "max_input_chars_per_word": 2**62,
            }
        )
    ),
    "a unigram model of odd scores": tokenizer(
        _set(model={"type": "Unigram", "vocab": [["w", float("-inf")], ["1", 1e308]], "unk_id": 5})
    ),
    "a unigram model without words": tokenizer(_set(model={"type": "Unigram", "vocab": [], "unk_id": None})),
    "a charsmap that is none": tokenizer(
        _set(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA////AAAA"})
    ),
    "a decoder that doubles": tokenizer(
        _set(
            decoder={
                "type": "Sequence",
                "decoders": [{"type": "Replace", "pattern": {"String": "w"}, "content": "ww"}] * 40,
            }
        )
    ),
    "a decoder of a pattern": tokenizer(
        _set(decoder={"type": "Replace", "pattern": {"Regex": "(w*)*(w*)*(w*)*x$"}, "content": "y"})
    ),
    "a version that is not there": tokenizer(_set(version="9.9")),
    "no model": tokenizer(_set(model=None)),
    "a list": lambda site: write(with_base(site) / "tokenizer.json", "[" * 100_000),
    "a number": lambda site: write(with_base(site) / "tokenizer.json", "1"),
}


def _deep(n: int) -> dict[str, Any]:
    rule: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(min(n, 400)):
        rule = {"type": "Sequence", "normalizers": [rule, rule] if n == 40 else [rule]}
    return rule


def base_file(name: str, values: dict[str, Any]) -> Callable[[Site], object]:
    """Other values in a JSON file of the base model."""

    def change(site: Site) -> None:
        base = with_base(site)
        there = json.loads((base / name).read_text()) if (base / name).is_file() else {}
        write(base / name, json.dumps(there | values))

    return change


GENERATION: dict[str, dict[str, Any]] = {
    "a billion tokens": {"max_length": 10**9, "min_length": 10**9, "max_new_tokens": 10**9, "min_new_tokens": 10**9},
    "a million beams": {"num_beams": 10**6, "num_return_sequences": 10**6},
    "many sequences": {"num_return_sequences": 10**6, "do_sample": True},
    "groups of beams": {"num_beams": 10**5, "num_beam_groups": 10**5, "diversity_penalty": 1.0},
    "stop strings": {"stop_strings": ["w" * 100_000] * 50},
    "long lists": {"suppress_tokens": list(range(200_000)), "bad_words_ids": [[i % 80] for i in range(100_000)]},
    "a bias by sequence": {"sequence_bias": [[[1] * 5000, 1.0]] * 100},
    "a static cache of a billion": {"cache_implementation": "static", "max_cache_len": 10**9},
    "an offloaded cache": {"cache_implementation": "offloaded"},
    "an unknown cache": {"cache_implementation": "evil"},
    "a quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "evil", "nbits": 10**9}},
    "numbers that are none": {"temperature": float("nan"), "top_k": 10**12, "do_sample": True},
    "a watermark": {
        "watermarking_config": {"greenlist_ratio": 1e9, "seeding_scheme": "selfhash", "context_width": 10**6}
    },
    "prompt look-up": {"prompt_lookup_num_tokens": 10**9, "max_matching_ngram_size": 10**6},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 10**6},
    "dola layers": {"dola_layers": "high"},
    "a prefill in pieces": {"prefill_chunk_size": 1},
    "ids that are none": {"eos_token_id": ["x"], "pad_token_id": "evil", "bos_token_id": 10**12},
    "text for numbers": {"max_length": "many", "num_beams": "1"},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "a length beyond numbers": {"model_max_length": 10**400},
    "a negative length": {"model_max_length": -5},
    "special tokens that are structures": {"bos_token": {"content": ["x"], "__type": "AddedToken"}},
    "added tokens far away": {"added_tokens_decoder": {"999999999999": {"content": "<x>", "special": True}}},
    "100,000 added tokens": {
        "added_tokens_decoder": {str(100 + i): {"content": f"<{i}>", "special": True} for i in range(100_000)}
    },
    "a padding side that is none": {"padding_side": "evil", "truncation_side": 5},
    "a tokenizer of another model": {
        "tokenizer_class": "BertJapaneseTokenizer",
        "word_tokenizer_type": "mecab",
        "mecab_kwargs": {"mecab_option": "-r /etc/passwd"},
    },
    "a tokenizer that reads a list of words": {
        "tokenizer_class": "TransfoXLTokenizer",
        "pretrained_vocab_file": "evil.bin",
    },
    "a sentencepiece model of options": {
        "tokenizer_class": "LlamaTokenizer",
        "sp_model_kwargs": {"model_file": "/etc/passwd"},
        "legacy": True,
    },
}

CASES = [
    *(_templated(name, text) for name, text in TEMPLATES.items()),
    *(
        _templated("nested lists compared", TEMPLATES["nested lists compared"], place=place)
        for place in ("tokenizer_config.json", "a list")
    ),
    _templated(
        "nested lists compared",
        TEMPLATES["nested lists compared"],
        place="additional_chat_templates/tool_use.jinja",
        expected="works",
    ),
    _own_template("a long text", {"user": "{content}" * 100_000, "assistant": "a", "end": "b"}, "either"),
    _own_template(
        "many placeholders",
        {"user": "{content}{system}{input}" * 50_000, "assistant": "", "end": ""},
        "either",
    ),
    _own_template("no mapping", "- a\n- b\n"),
    _own_template("numbers", {"user": 10**30, "assistant": [1], "end": None}),
    *(opened(f"pattern: {name}", {"target_modules": p}) for name, p in PATTERNS.items()),
    *(
        opened(f"pattern: nested repeats in {field}", make(PATTERNS["nested repeats"]), "either")
        for field, make in FIELDS.items()
        if field != "target_modules"
    ),
    *(
        opened(f"pattern: large counts in {field}", make(PATTERNS["counted repeats"]), "either")
        for field, make in FIELDS.items()
    ),
    *table(
        KIND,
        {f"tokenizer: {name}": change for name, change in TOKENIZERS.items()},
        base=lambda site: None,
        expected="either",
    ),
    *table(
        KIND,
        {f"generation: {name}": base_file("generation_config.json", v) for name, v in GENERATION.items()},
        base=lambda site: None,
        expected="either",
    ),
    *table(
        KIND,
        {f"tokenizer_config: {name}": base_file("tokenizer_config.json", v) for name, v in SETTINGS.items()},
        base=lambda site: None,
        expected="either",
    ),
]
