"""Each rule: the trap is built and found; a clean run is silent."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, make, word_tokenizer, write_jsonl
from transformers import T5Config, T5ForConditionalGeneration, T5GemmaConfig, T5GemmaForConditionalGeneration

from siliang.check import RULES, Finding, find, gather_input, stop_on_errors
from siliang.check.counts import count
from siliang.check.input import Machine
from siliang.config import DataConfig, RunConfig
from siliang.data.load import load_rows
from siliang.language import local
from siliang.tasks import QUESTION_ANS
from siliang.types import ConfigError, DataError, ModelError

CLEAN = [{"instruction": f"say {a} {b}", "output": f"{b} {a}"} for a in WORDS[28:38] for b in WORDS[28:38]]
REVIEWS = [
    {"text": f"{a} {noun} was {b}", "label": label}
    for noun in ("film", "story", "actor")
    for a in ("the", "a", "very")
    for b, label in (("good", "pos"), ("bad", "neg"), ("bright", "pos"), ("dull", "neg"))
]
TAGGED = [
    {"tokens": ["I", "liked", w, x], "tags": ["O", "O", "B-NAME", "E-NAME"]} for w in WORDS[:9] for x in WORDS[9:14]
]

BETTER_AND_WORSE: list[dict[str, Any]] = [
    {"prompt": f"say {w}", "chosen": "one", "rejected": "two"} for w in WORDS[:30]
]


def calling(name: str, arguments: str, result: str = "1", system: int = 1) -> dict[str, Any]:
    """A conversation with a call of a tool and its result."""
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "system", "content": "is"}] * system
    messages += [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "two", "tool_call_id": result}, {"role": "assistant", "content": "one"}]
    return {"messages": messages, "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}]}


def t5(folder: Path) -> Path:
    """An encoder-decoder whose tokenizer adds no end of sequence."""
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=120, **sizes, decoder_start_token_id=0)  # pyright: ignore
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    word_tokenizer().save_pretrained(folder / "t5")
    return folder / "t5"


CALLING = [calling("weather", '{"a": 1}') for _ in range(20)]
TOGETHER = [{"anchor": f"the film {i}", "positive": f"good {i}"} for i in range(30)]
ON_TEXTS: dict[str, Any] = {"task": "embedding", "model": "bert", "data": {"test_size": 0.0}}
ON_RANKED: dict[str, Any] = {"task": "reranker", "model": "bert"}
ON_PAIRS: dict[str, Any] = {"task": "preference", "data": {"test_size": 0.0}}


class Case:
    """Builds runs over tiny models in one folder."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.folder, self.models = folder, models

    def __call__(
        self,
        rows: list[dict[str, Any]] | None = None,
        *,
        task: str = "causal_lm",
        model: str | Path = "llama",
        machine: Machine | None = None,
        held_out: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> list[Finding]:
        default = {"causal_lm": CLEAN, "seq_cls": REVIEWS, "token_cls": TAGGED}
        data = {"train": str(write_jsonl(self.folder / "d.jsonl", rows or default[task]))}
        if held_out is not None:
            data["eval"] = str(write_jsonl(self.folder / "e.jsonl", held_out))
        values: dict[str, Any] = {
            "model": str(self.models.get(str(model), model)),
            "task": task,
            "data": {**data, "max_length": 64, **settings.pop("data", {})},
            "train": {"batch_size": 4, "log_every": 1, **settings.pop("train", {})},
            "output": str(self.folder / "out"),
            **settings,
        }
        return find(gather_input(RunConfig.build(values), machine))


@pytest.fixture
def case(tmp_path: Path, model_folders: dict[str, Path]) -> Case:
    return Case(tmp_path, model_folders)


def codes(findings: list[Finding]) -> set[str]:
    return {f.code for f in findings}


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls", "token_cls"])
def test_a_clean_run_is_silent(case: Case, task: str) -> None:
    assert case(task=task, model="llama" if task == "causal_lm" else "bert") == []


def titled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"title": f"what number {i} says"} for i, row in enumerate(rows)]


def quoted(folder: Path) -> str:
    """Titles in quotes, or the work of a program that quotes: nobody knows."""
    path = folder / "d.tsv"
    path.write_text(
        "instruction\toutput\n" + "".join(f"{r['instruction']}\t{r['output']}\n" for r in CLEAN) + '"I"\tno\n'
    )
    return str(path)


def chatty(case: Case) -> Path:
    """A model whose chat template knows no system messages."""
    folder = case.folder / "chatty"
    make("llama").save_pretrained(folder)  # type: ignore[operator]
    tok = word_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.role + ' : ' + m.content }}{% if m.role == 'assistant' %}</s>{% else %} . {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    tok.save_pretrained(folder)
    return folder


BIG = 10**4
ON_4_BITS: dict[str, Any] = {
    "quantization": {"bits": 4},
    "method": {"name": "lora", "init_lora_weights": "pissa", "target_modules": ["q_proj"]},
}
TRAPS: dict[str, tuple[str, Callable[[Case], list[Finding]]]] = {
    "SL001": ("1 row is bad", lambda c: c([*CLEAN, {"instruction": "a", "output": " "}])),
    "SL002": ("1 of", lambda c: c([*CLEAN, CLEAN[3]], held_out=[{"instruction": "a", "output": "b"}])),
    "SL003": ("1 of 2 held-out", lambda c: c(held_out=[CLEAN[0], {"instruction": "I", "output": "no"}])),
    "SL004": (
        "1 training",
        lambda c: c([*CLEAN, {"instruction": "a \ufffd", "output": "I"}], data={"test_size": 0.01}),
    ),
    "SL005": ("'mixed'", lambda c: c(task="seq_cls", model="bert", data={"labels": ["neg", "pos", "'mixed'"]})),
    "SL047": (
        "'odd'",
        lambda c: c(
            [
                *REVIEWS,
                *({"text": f"{a} {b}", "label": "pos"} for a in WORDS for b in WORDS[:3]),
                REVIEWS[0] | {"label": "odd"},
            ],
            task="seq_cls",
            model="bert",
            data={"test_size": 0.0},
        ),
    ),
    "SL048": (
        "the mean 1",
        lambda c: c(
            [{"text": f"{a} good", "label": 100.5 + i} for i, a in enumerate(WORDS)], task="seq_cls", model="bert"
        ),
    ),
    "SL054": (
        "'0,5' is read as 0.5",
        lambda c: c(
            [{"text": f"{a} good", "label": f"{i % 3},5"} for i, a in enumerate(WORDS)], task="seq_cls", model="bert"
        ),
    ),
    "SL006": (
        "'pos' has",
        lambda c: c(
            [*({"text": f"{a} {b}", "label": "pos"} for a in WORDS for b in WORDS[:3]), *REVIEWS[1::4]],
            task="seq_cls",
            model="bert",
        ),
    ),
    "SL009": (
        "cut to 12 tokens",
        lambda c: c([*CLEAN, {"instruction": "I", "output": "no " * 30}], data={"max_length": 12}),
    ),
    "SL012": ("<|im_start|>", lambda c: c(data={"template": "chatml"})),
    "SL013": ("unknown", lambda c: c([*CLEAN, {"instruction": "I", "output": "Σ Ω"}], data={"test_size": 0.01})),
    "SL014": ("</s>", lambda c: c([*CLEAN, {"instruction": "I </s>", "output": "no"}], data={"test_size": 0.01})),
    "SL015": (
        "1 training",
        lambda c: c([*REVIEWS, REVIEWS[0] | {"label": "neg"}], task="seq_cls", model="bert", data={"test_size": 0.02}),
    ),
    "SL016": ("{{name}}", lambda c: c([*CLEAN, {"instruction": "I", "output": "{{name}}"}], data={"test_size": 0.01})),
    "SL017": (
        "1 sentences",
        lambda c: c(
            [*TAGGED, {"tokens": ["a", "b"], "tags": ["E-NAME", "O"]}],
            task="token_cls",
            model="bert",
            data={"test_size": 0.02},
        ),
    ),
    "SL018": (
        "1 training",
        lambda c: c(
            [
                {"context": f"the {w} was good", "question": "say", "answers": {"text": [w], "answer_start": [n]}}
                for w, n in (("film", 4), ("story", 4), ("actor", 3))
            ],
            task="question_ans",
            model="bert",
            data={"test_size": 0.0},
        ),
    ),
    "SL019": ("test_size", lambda c: c(data={"test_size": 0.0})),
    "SL020": (
        "'pos' (18 rows) and 'pos ' (1 rows)",
        lambda c: c(
            [*REVIEWS, {"text": "very good film", "label": "pos "}],
            task="seq_cls",
            model="bert",
            data={"test_size": 0.02},
        ),
    ),
    "SL029": ("1 rows have a cell in double quotes", lambda c: c(data={"train": quoted(c.folder)})),
    "SL030": (
        "d.jsonl:91 is refused by the chat template: no system here",
        lambda c: c([*CLEAN[:90], CLEAN[0] | {"system": "I"}, *CLEAN[91:]], model=chatty(c), data={"template": "chat"}),
    ),
    "SL024": ("'qury' matches no module", lambda c: c(method={"name": "lora", "target_modules": ["qury"]})),
    "SL025": ("none", lambda c: c(method="bitfit")),
    "SL026": (
        "tied",
        lambda c: c(model="bloom", method={"name": "lora", "target_modules": ["word_embeddings", "query_key_value"]}),
    ),
    "SL032": ("emulated", lambda c: c(train={"precision": "bf16"}, machine=Machine("cpu", native_bf16=False))),
    "SL031": ("eps", lambda c: c(train={"precision": "pure-fp16"})),
    "SL033": ("fp32", lambda c: c(quantization={"compute_dtype": "fp32"}, machine=Machine("cuda", native_bf16=False))),
    "SL034": ("'one'", lambda c: c([{"text": "one " * n} for n in range(1, 40)])),
    "SL036": ("the column 'title' holds running text", lambda c: c(titled(REVIEWS), task="seq_cls", model="bert")),
    "SL037": (
        "the column 'split' has the values 'test', 'train'",
        lambda c: c(
            [r | {"split": "train" if i % 3 else "test"} for i, r in enumerate(REVIEWS)], task="seq_cls", model="bert"
        ),
    ),
    "SL038": (
        "80 of 90 rows do not have alora_invocation_tokens before what they learn",
        lambda c: c(method={"name": "lora", "alora_invocation_tokens": word_tokenizer().encode(f"say {WORDS[28]}")}),
    ),
    "SL039": ("quantization.bits = 4: init_lora_weights = 'pissa'", lambda c: c(**ON_4_BITS)),
    "SL041": ("fewer than", lambda c: c(train={"max_steps": 3, "log_every": 10})),
    "SL042": ("3e-05", lambda c: c(method="full", train={"learning_rate": 3e-4})),
    "SL044": (
        "1 training rows have the answers of another row in the opposite order",
        lambda c: c([*BETTER_AND_WORSE, BETTER_AND_WORSE[0] | {"chosen": "two", "rejected": "one"}], **ON_PAIRS),
    ),
    "SL045": (
        "the chosen answer is the longer one in 100% of 30 training pairs",
        lambda c: c([row | {"chosen": "one two three"} for row in BETTER_AND_WORSE], **ON_PAIRS),
    ),
    "SL046": (
        "30 of 30 chosen answers refuse where the rejected one does not",
        lambda c: c([row | {"chosen": "Sorry, I cannot"} for row in BETTER_AND_WORSE], **ON_PAIRS),
    ),
    "SL049": (
        "all answers of the training rows are marked as good",
        lambda c: c(
            [{"prompt": f"say {i}", "completion": "one two", "label": True} for i in range(20)],
            **ON_PAIRS,
            preference={"loss": "kto"},
        ),
    ),
    "SL050": (
        "1 training rows have the same text twice",
        lambda c: c([*TOGETHER, {"anchor": "a film", "positive": "a film "}], **ON_TEXTS),
    ),
    "SL051": (
        "1 training rows have a negative that is a positive of the same anchor elsewhere",
        lambda c: c([*TOGETHER, TOGETHER[0] | {"positive": "bright", "negative": "good 0"}], **ON_TEXTS),
    ),
    "SL052": ("no training row has a negative", lambda c: c(TOGETHER, **ON_RANKED)),
    "SL053": (
        "the scores are 0, 1 and 2",
        lambda c: c(
            [{"text": f"the film {i}", "text_pair": "we liked the actor", "label": i % 3} for i in range(30)],
            **ON_TEXTS,
        ),
    ),
    "SL055": (
        "1 training rows have a call of 'wether', which is not among the tools (weather)",
        lambda c: c([*CALLING, calling("wether", "{}")], data={"test_size": 0.0}),
    ),
    "SL056": ("of 36 rows 36 have no token 1", lambda c: c(task="seq_cls", model=t5(c.folder))),
    "SL043": ("MB are free", lambda c: c(train={"save_every": 1, "keep": 10**12})),
}


@pytest.mark.parametrize("code", TRAPS)
def test_the_trap_is_found(code: str, case: Case) -> None:
    said, build = TRAPS[code]
    found = [f for f in build(case) if f.code == code]
    assert len(found) == 1
    assert said in found[0].message
    assert found[0].cause and found[0].fix and found[0].severity == RULES[code].severity


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (calling("weather", "now"), "a call of 'weather' whose arguments are not a JSON object: 'now'"),
        (
            calling("weather", "{}", result="2"),
            "a result for the call '2', which is not there (the calls before it: 1)",
        ),
        (calling("weather", "{}", system=2), "more than one system message"),
    ],
)
def test_turns_that_do_not_fit(row: dict[str, Any], says: str, case: Case) -> None:
    (found,) = [f for f in case([*CALLING, row], data={"test_size": 0.0}) if f.code == "SL055"]
    assert found.message == f"1 training rows have {says}"
    assert "SL055" not in codes(case(CALLING, data={"test_size": 0.0}))


def test_several_labels_of_which_one_is_never_alone(case: Case) -> None:
    """ "a|b" beside "a" alone may be one class, or two."""
    rows = [row | {"label": "pos|new"} if i % 6 == 0 else row for i, row in enumerate(REVIEWS)]
    (found,) = [f for f in case(rows, task="seq_cls", model="bert") if f.code == "SL020"]
    assert found.severity == "warning" and "may be several in one, separated by '|': 'pos|new'" in found.message
    named = case([row | {"label": f"{row['label']}|x"} for row in rows], task="seq_cls", model="bert")
    assert "SL020" not in codes(named) or "may be several" not in str(named)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([[0, 1], [1, 0]], "look like a 0 or 1 for each label"),
        ([[True, False], [False, True]], "look like a 0 or 1 for each label"),
        ([["a", "b"], ["b", "a"]], "Check data.labels"),
        ([["true"], ["true"]], "Check data.labels"),  # one value only: the name of a label
        ([[], []], "Check data.labels"),
        ([["0"], ["0"]], "Check data.labels"),
    ],
)
def test_rows_that_all_have_the_same_labels(labels: list[list[object]], says: str, case: Case) -> None:
    """One column for each of two labels is read as both labels in every row."""
    rows = [row | {"label": labels[i % 2]} for i, row in enumerate(REVIEWS)]
    data: dict[str, Any] = {} if labels[0] else {"labels": ["0", "1"]}
    (found,) = (f for f in case(rows, task="seq_cls", model="bert", data=data) if f.code == "SL005")
    assert found.severity == "error" and "training rows have the same labels" in found.message and says in found.fix


def test_a_class_that_is_read_at_the_last_token(case: Case) -> None:
    """T5Gemma has an encoder and a decoder, and needs no end of sequence."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 120}
    config = T5GemmaConfig(encoder=sizes, decoder=sizes, vocab_size=120)
    T5GemmaForConditionalGeneration(config).save_pretrained(case.folder / "t5gemma")
    word_tokenizer().save_pretrained(case.folder / "t5gemma")
    assert "SL056" not in codes(case(task="seq_cls", model=case.folder / "t5gemma"))


def test_held_out_rows_of_one_class(case: Case) -> None:
    held_out = [row for row in REVIEWS if row["label"] == "pos"][:4]
    (found,) = [f for f in case(REVIEWS, held_out=held_out, task="seq_cls", model="bert") if f.code == "SL005"]
    assert found.severity == "warning" and "the held-out rows have one class only, 'pos'" in found.message


def test_a_decimal_comma_in_a_score(case: Case) -> None:
    rows = [{"sentence1": f"the film {i}", "sentence2": "we liked it", "score": f"0,{i + 1}"} for i in range(9)]
    (found,) = [f for f in case(rows, **ON_TEXTS) if f.code == "SL054"]
    assert "9 rows have a number with a decimal comma" in found.message and "is read as 0.1" in found.message


def test_a_model_whose_files_are_quantized_is_one(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(case.models["llama"], folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(values))
    for method, words in (({"name": "osf"}, "OSF splits the base model's own weights"), ("full", "needs all its bits")):
        found = next(f for f in case(model=folder, method=method) if f.code == "SL039")
        assert f"{folder} is quantized: " in found.message and words in found.message
    assert "SL039" not in codes(case(model=folder))


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        ([{"text": f"a {i}", "label": f"class {i}"} for i in range(30)], {}, "has 0 pairs of one class"),
        (
            [{"sentence1": f"the film {i}", "sentence2": "we liked it", "score": 1} for i in range(30)],
            {},
            "have the score 1",
        ),
        (TOGETHER, {"train": {"batch_size": 1}}, "a step has one row"),
    ],
)
def test_nothing_to_compare(rows: Any, more: dict[str, Any], words: str, case: Case) -> None:
    (found,) = (f for f in case(rows, **ON_TEXTS, **more) if f.code == "SL052")
    assert words in found.message and found.severity == "error"
    assert not {"SL050", "SL051", "SL052", "SL053"} & set(codes(case(TOGETHER, **ON_TEXTS)))


@pytest.mark.parametrize(
    ("method", "fix"),
    [
        ({"name": "lora", "target_modules": ["qury"]}, "Name modules that the model has"),
        ({"name": "cpt", "cpt_token_ids": [9999]}, "Change that setting of the method."),
        (
            {"name": "lora", "target_modules": ["lm_head"], "ensure_weight_tying": True, "use_dora": True},
            "Change that setting of the method.",
        ),
        ({"name": "lora", "layers_to_transform": [99]}, "Change that setting of the method."),
    ],
)
def test_the_remedy_of_a_misfit_is_that_of_its_kind(method: dict[str, Any], fix: str, case: Case) -> None:
    found = next(f for f in case(method=method, model="bloom") if f.code == "SL024")
    assert found.fix.startswith(fix), (found.message, found.fix)
    assert local(found.fix, "zh") != found.fix


@pytest.mark.parametrize(
    ("rows", "task", "fix"),
    [
        (titled(REVIEWS), "seq_cls", "data.columns.text_pair=title reads both"),
        (titled(CLEAN), "causal_lm", "data.columns.input=title or data.columns.system=title adds"),
    ],
)
def test_a_column_of_text_is_named_with_its_setting(rows: Any, task: str, fix: str, case: Case) -> None:
    model = "bert" if task == "seq_cls" else "llama"
    found = next(f for f in case(rows, task=task, model=model) if f.code == "SL036")
    assert found.fix.startswith(fix) and found.severity == "warning"
    part = fix.partition("=")[0].removeprefix("data.columns.")
    said = case(rows, task=task, model=model, data={"columns": {part: "title"}})
    assert "SL036" not in codes(said)


def prepared(process: Callable[[Any, str, str], tuple[list[int], list[int]]]) -> list[dict[str, Any]]:
    tok = word_tokenizer()
    rows = []
    for row in CLEAN:
        ids, labels = process(tok, row["instruction"], row["output"])
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return rows


def seed_rows(tok: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The tutorials' process function, which asks for the end as text; Llama-2's tokenizer makes words of it."""
    a = tok(f"Human: {question}\n\nAssistant: ", add_special_tokens=False)["input_ids"]
    b = tok(answer + tok.eos_token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return a + b, [-100] * len(a) + b


def right_rows(tok: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    a, b = (tok(t, add_special_tokens=False)["input_ids"] for t in (question, answer))
    return [*a, *b, tok.eos_token_id], [-100] * len(a) + [*b, tok.eos_token_id]


def test_prepared_rows(case: Case) -> None:
    assert case(prepared(right_rows)) == []

    def end_masked(tok: Any, q: str, a: str) -> tuple[list[int], list[int]]:
        ids, labels = right_rows(tok, q, a)
        return ids, [x if x != tok.eos_token_id else -100 for x in labels]

    def all_masked(tok: Any, q: str, a: str) -> tuple[list[int], list[int]]:
        ids, _ = right_rows(tok, q, a)
        return ids, [-100] * len(ids)

    def prompt_learned(tok: Any, q: str, a: str) -> tuple[list[int], list[int]]:
        ids, _ = right_rows(tok, q, a)
        return ids, ids

    def shifted(tok: Any, q: str, a: str) -> tuple[list[int], list[int]]:
        ids, labels = right_rows(tok, f"{q} I", "one two three four five six seven")
        return ids, [*labels[1:], -100]

    lost = case(prepared(seed_rows))
    # the pieces of "</s>" are unknown to this small vocabulary
    assert codes(lost) == {"SL007", "SL013"} and "90 of 90 rows" in lost[0].message
    masked = next(f for f in case(prepared(end_masked)) if f.code == "SL007")
    assert "in 90 of them it is present, but its label is masked" in masked.message
    assert "SL008" in codes(case(prepared(all_masked)))
    assert "SL010" in codes(case(prepared(prompt_learned)))
    assert "SL011" in codes(case(prepared(shifted)))
    cut = case(prepared(right_rows), data={"max_length": 8, "test_size": 0.0})
    assert "SL009" not in codes(cut)  # four to seven tokens each
    raw = [{"input_ids": row["input_ids"]} for row in prepared(right_rows)]
    assert "SL010" not in codes(case(raw))


@pytest.mark.shared
def test_the_seeds_llama2_rows_lose_their_end(case: Case, shared: Path, tmp_path: Path) -> None:
    """Llama-2's own tokenizer, the tutorial's function: the end is there as pieces of text, and check says so."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    tok = LlamaTokenizer.from_pretrained(shared / "tokenizers" / "llama2", add_bos_token=True)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    rows = []
    for row in CLEAN:
        ids, labels = seed_rows(tok, row["instruction"], row["output"])
        rows.append({"input_ids": ids, "labels": labels})
    assert codes(case(rows, model=tmp_path / "model")) == {"SL007"}
    assert case(model=tmp_path / "model") == []


def test_models_that_do_not_fit(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make("llama").save_pretrained(folder)  # type: ignore[operator]
    big = word_tokenizer()
    big.add_tokens([f"w{i}" for i in range(100)])
    big.save_pretrained(folder)
    assert codes(case(model=folder)) == {"SL023"} and case(model=folder)[0].severity == "warning"
    used = case([*CLEAN, {"instruction": "w99", "output": "w99"}], model=folder, data={"test_size": 0.01})
    assert [f.severity for f in used if f.code == "SL023"] == ["error"]
    long_rows = [{"text": "film " * 80 + b, "label": "ab"[i % 2]} for i, b in enumerate(WORDS[:20])]
    long = case(long_rows, task="seq_cls", model="bert", data={"max_length": 100})
    assert "a row has 81 tokens, the model 64 positions" in next(f.message for f in long if f.code == "SL028")
    for accepted in (
        case(long_rows, task="seq_cls", model="bert", data={"max_length": 100}, accept=["SL028"]),
        case([*CLEAN, {"instruction": "w99", "output": "w99"}], model=folder, accept=["sl023"]),
    ):  # the run would end in it
        (found,) = (f for f in accepted if f.code in ("SL023", "SL028"))
        assert (found.severity, found.accepted) == ("error", False) and "cannot be accepted" in found.fix
    assert not [f for f in case(model=folder, accept=["SL023"]) if not f.accepted]  # a warning can
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(
        json.dumps({"model_type": "mystery", "auto_map": {"AutoConfig": "code.Mystery"}})
    )
    with pytest.raises(ModelError, match=r"its code needs code.py, which is not in its folder"):
        case(model=foreign)


def test_a_missing_pad_token_and_a_wrong_collator(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from siliang.check import rules_tokens
    from siliang.check.rules_model import no_pad_token

    data = {"train": str(write_jsonl(tmp_path / "d.jsonl", CLEAN)), "max_length": 64}
    values = {"model": str(case.models["llama"]), "task": "causal_lm", "data": data, "output": str(tmp_path / "o")}
    subject = gather_input(RunConfig.build(values))
    assert not list(no_pad_token(subject)) and not list(rules_tokens.padding_learned(subject))
    subject.tokenizer._pad_token = None
    subject.tokenizer.pad_token = None
    assert list(no_pad_token(subject))

    class ByNumber(rules_tokens.PadCollator):
        """As DataCollatorForLanguageModeling does: every label that is the pad token is masked, the end with it."""

        def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
            batch = super().__call__(rows)
            batch["labels"][batch["labels"] == 2] = -100
            return batch

    subject.tokenizer.pad_token = "</s>"
    monkeypatch.setattr(rules_tokens, "PadCollator", ByNumber)
    assert list(rules_tokens.padding_learned(subject))


def test_accepted_findings_do_not_stop(case: Case) -> None:
    rows = [*CLEAN, {"instruction": "a", "output": ""}]
    with pytest.raises(DataError, match=r"SL001 1 row is bad: .*has an empty 'output'.\nCorrect them"):
        stop_on_errors(case(rows))
    found = case(rows, accept=["sl001"])
    stop_on_errors(found)
    assert [(f.code, f.severity, f.accepted) for f in found] == [("SL001", "warning", True)]
    with pytest.raises(ConfigError, match="rule SL999 does not exist"):
        case(accept=["SL999"])


def test_labels_that_teach_nothing(case: Case) -> None:
    """One class, one tag, or no answer: a run on it would end as a success."""
    one = [row | {"label": "pos"} for row in REVIEWS]
    bert: dict[str, Any] = {"model": "bert"}
    said = "the training rows have one class only"
    for found in (
        case(one, task="seq_cls", **bert),
        case(one, task="seq_cls", data={"labels": ["neg", "pos"]}, **bert),
        case([row | {"tags": ["O"] * 4} for row in TAGGED], task="token_cls", **bert),
        case([row | {"tags": ["O"] * 4} for row in TAGGED], task="token_cls", data={"labels": ["O", "B-X"]}, **bert),
    ):
        assert [(f.code, f.severity) for f in found if said in f.message] == [("SL005", "error")]
    empty = {"text": [], "answer_start": []}
    asked = [{"context": f"the {w} was good", "question": f"say {w}", "answers": empty} for w in WORDS[:20]]
    found = case(asked, task="question_ans", **bert)
    assert ("SL008", "none of the 18 windows holds an answer") in {(f.code, f.message) for f in found}


@pytest.mark.parametrize(("best", "severity"), [(None, "warning"), ("accuracy", "warning"), ("margin", "error")])
def test_held_out_answers_of_one_kind(best: str | None, severity: str, case: Case) -> None:
    rows = [{"prompt": f"say {i}", "completion": "one two", "label": i % 2 == 0} for i in range(20)]
    settings: dict[str, Any] = {
        **ON_PAIRS,
        "preference": {"loss": "kto"},
        "train": {"best": best, "eval_every": 2 if best else None},
    }
    (found,) = [f for f in case(rows, held_out=rows[1::2], **settings) if f.code == "SL049"]
    assert found.message == "all answers of the held-out rows are marked as bad" and found.severity == severity


def test_a_held_out_answer_that_is_not_at_its_start(case: Case) -> None:
    rows = [
        {"context": f"the {w} was good", "question": f"say {w}", "answers": {"text": [w], "answer_start": [4]}}
        for w in WORDS[:24]
    ]
    wrong = [rows[20] | {"answers": {"text": [WORDS[20]], "answer_start": [3]}}, *rows[21:]]
    (found,) = [f for f in case(rows[:20], held_out=wrong, task="question_ans", model="bert") if f.code == "SL018"]
    assert found.message == "1 held-out rows have an answer that is not at its answer_start"
    bad = str(write_jsonl(case.folder / "bad.jsonl", wrong))  # rows that no check sees
    values = {"model": str(case.models["bert"]), "task": "question_ans", "output": str(case.folder / "out")}
    subject = gather_input(RunConfig.build(values | {"data": {"train": bad, "test_size": 0.0, "max_length": 64}}))
    assert count(subject)["rows"] == {"train": 3, "held_out": 0, "bad": 1}
    with pytest.raises(DataError, match=rf"bad.jsonl:1 has the answer '{WORDS[20]}', which is not at its start \(3\)"):
        load_rows(DataConfig(train="x"), QUESTION_ANS.data, bad)
    left = load_rows(DataConfig(train="x", skip_bad_rows=True), QUESTION_ANS.data, bad)
    assert len(left.eval) == 3


def test_every_kind_of_bad_row_can_be_left_out(case: Case) -> None:
    skip = {"skip_bad_rows": True, "test_size": 0.1}
    rows = [*CLEAN[:90], CLEAN[0] | {"system": "I"}, *CLEAN[91:], {"instruction": "a", "output": ""}]
    found = case(rows, model=chatty(case), data={"template": "chat", **skip})
    assert {(f.code, f.severity) for f in found if f.code in ("SL001", "SL030")} == {
        ("SL001", "warning"),
        ("SL030", "warning"),
    }
    stop_on_errors(found)
    answers = [
        {
            "context": f"the {w} was good",
            "question": f"say {w}",
            "answers": {"text": [w], "answer_start": [4 - (i == 3)]},
        }
        for i, w in enumerate(WORDS[:20])
    ]
    found = case(answers, task="question_ans", model="bert", data=skip)
    assert "SL018" not in codes(found) and "which is not at its start (3)" in found[0].message
    stop_on_errors(found)
    masked = prepared(right_rows)
    masked[5]["labels"] = [-100] * len(masked[5]["labels"])
    found = case(masked, data=skip)
    assert "SL008" not in codes(found) and "carries no label" in next(f for f in found if f.code == "SL030").message
    stop_on_errors(found)


def test_pages() -> None:
    for code, rule in RULES.items():
        assert rule.title and not rule.title.startswith("Cause"), code
        assert rule.cause and rule.fix, code
    assert len({rule.function for rule in RULES.values()}) == len(RULES)


def test_every_rule_has_a_trap() -> None:
    elsewhere = {"SL007", "SL008", "SL010", "SL011", "SL021", "SL022", "SL023", "SL028", "SL035"}
    assert set(RULES) == set(TRAPS) | elsewhere


def test_counts_of_an_encoder_decoder(tmp_path: Path) -> None:
    folder = t5(tmp_path)
    rows = [{"source": f"say {w}", "target": w} for w in WORDS[:20]]
    values = {
        "model": str(folder),
        "task": "seq_2_seq_lm",
        "output": str(tmp_path / "o"),
        "data": {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "max_length": 64},
        "train": {"batch_size": 2, "log_every": 1},
    }
    subject = gather_input(RunConfig.build(values))
    assert find(subject) == []
    assert count(subject)["rows"] == {"train": 18, "held_out": 2, "bad": 0}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("0", "1", "-1"), "24 rows have the label '-1', and others are numbers from 0"),
        (("0", "1", "2", "-1"), "rows have the label '-1', and others are numbers from 0"),
        (("0", "1", "true", "false"), "'0' (18 rows) and 'false' (18 rows); '1' (18 rows) and 'true' (18 rows)"),
        (("1", "0", "True"), "'1' (24 rows) and 'True' (24 rows)"),
        ((" pos", " neg"), "hold invisible characters: ' neg' (36 rows), ' pos' (36 rows)"),
        (("-1", "1"), None),
        (("-1", "0", "1", "-2"), None),
        (("1", "true", "maybe"), None),
        (("0", "1"), None),
    ],
)
def test_labels_that_are_none_or_one(labels: tuple[str, ...], said: str | None, case: Case) -> None:
    rows = [{"text": f"{a} {b}", "label": labels[i % len(labels)]} for i, (a, b) in enumerate(PAIRS)]
    found = [f for f in case(rows, task="seq_cls", model="bert") if f.code == "SL020" and f.severity == "error"]
    assert [said is not None and said in f.message for f in found] == ([] if said is None else [True]), found
    named = case(rows, task="seq_cls", model="bert", data={"labels": list(labels)})
    assert "SL020" not in codes(named)


PAIRS = [(a, b) for a in WORDS[28:36] for b in WORDS[28:37]]
