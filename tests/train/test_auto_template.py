"""data.template=auto: the tokenizer's own chat template where there is one, and the run says and records which."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from tiny import word_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, GenerationConfig

from siliang.run_folder import open_run
from siliang.use.generate import generate

CHATTY = (
    "{% for m in messages %}{{ '<s> ' + m.role + ' : ' + m.content + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant :' }}{% endif %}"
)
ROWS = [
    {"messages": [{"role": r, "content": f"{t} {i}"} for t in ("one", "two") for r in ("user", "assistant")]}
    for i in range(12)
]


@pytest.fixture
def base(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model whose tokenizer has a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(model_folders["llama"], folder)
    tok = word_tokenizer()
    tok.chat_template = CHATTY
    tok.save_pretrained(folder)
    return folder


def trained(model: Path, folder: Path, *more: str) -> dict[str, object]:
    """The record of a run with `auto`."""
    rows = write_jsonl(folder.with_suffix(".jsonl"), ROWS)
    short = ("--set", "train.max_steps=4", "--set", "train.save_every=2", "--set", "train.batch_size=2", *more)
    ended = run("train", "--model", model, "--data", rows, "--task", "causal_lm", "--output", folder, *short)
    assert ended.code == 0, ended
    record = json.loads((folder / "run.json").read_text())
    return {"lines": ended.out + ended.err, **record}


def test_the_tokenizers_own_is_taken_said_and_recorded(base: Path, tmp_path: Path) -> None:
    record = trained(base, tmp_path / "run")
    assert "template   the tokenizer's own chat template" in str(record["lines"])
    assert record["config"]["data"]["template"] == "chat"  # type: ignore[index]
    assert record["adjusted"]["data.template"] == "auto"  # type: ignore[index]
    opened = open_run(tmp_path / "run")
    assert opened.config.data.template == "chat" and isinstance(generate(opened, "one", max_new_tokens=2), str)
    rows = tmp_path / "run.jsonl"
    ended = run("check", "--model", base, "--data", rows, "--task", "causal_lm")
    assert "template          the tokenizer's own chat template" in ended.out
    counts = json.loads(run("check", "--model", base, "--data", rows, "--task", "causal_lm", "--json").out)["counts"]
    assert counts["template"] == "chat"
    # with the same settings, in which `auto` is not what the record has, the run continues
    more = ("--set", "train.max_steps=6", "--set", "train.batch_size=2", "--set", "train.save_every=2", "--resume")
    given = ("--model", base, "--data", rows, "--task", "causal_lm", "--output", tmp_path / "run")
    ended = run("train", *given, *more)
    assert ended.code == 0, ended
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert again["steps"][-1]["step"] == 6 and again["adjusted"]["data.template"] == "auto"


def test_without_one_it_is_human_assistant(model_folders: dict[str, Path], tmp_path: Path) -> None:
    record = trained(model_folders["llama"], tmp_path / "run")
    assert "template   human-assistant; the tokenizer has no chat template of its own" in str(record["lines"])
    assert record["config"]["data"]["template"] == "human-assistant"  # type: ignore[index]


def test_a_named_one_stays_and_its_arguments_are_recorded(base: Path, tmp_path: Path) -> None:
    more = ("--set", "data.template=qwen3", "--set", 'data.template_arguments={"enable_thinking": false}')
    record = trained(base, tmp_path / "run", *more)
    assert "template   qwen3 (enable_thinking=False)" in str(record["lines"])
    # qwen3's empty thought is in the prompt of the last answer, so that each answer has an entry of its own
    assert "(made of " in str(record["lines"])
    assert record["config"]["data"]["template_arguments"] == {"enable_thinking": False}  # type: ignore[index]
    merged = run("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert 'qwen3, with which it was trained, with {"enable_thinking": false}' in merged.out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_transformers_stops_where_an_answer_was_learned_to_end(base: Path, tmp_path: Path, method: str) -> None:
    """The base ends at </s>, an answer in ChatML at <|im_end|>."""
    tok = word_tokenizer()
    tok.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tok.save_pretrained(base)
    own = GenerationConfig.from_pretrained(base).eos_token_id
    trained(base, tmp_path / "run", "--set", "data.template=chatml", "--method", method)
    saved = tmp_path / "run" / "model"
    if method == "lora":
        saved = tmp_path / "merged"
        assert run("merge", tmp_path / "run", "--output", saved).code == 0
    ends = GenerationConfig.from_pretrained(saved).eos_token_id
    assert ends == [own, tok.convert_tokens_to_ids("<|im_end|>")]
    model, ids = AutoModelForCausalLM.from_pretrained(saved), torch.tensor([[5, 6]])
    written = model.generate(ids, max_new_tokens=9, prefix_allowed_tokens_fn=lambda batch, ids: [ends[1]])
    assert written.tolist() == [[5, 6, ends[1]]]


def test_a_run_of_texts_ends_as_its_base(base: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"one two {i}"} for i in range(12)])
    more = ("--set", "train.max_steps=2", "--method", "full", "--output", tmp_path / "run")
    assert run("train", "--model", base, "--data", rows, "--task", "causal_lm", *more).code == 0
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "model")
    assert saved.eos_token_id == GenerationConfig.from_pretrained(base).eos_token_id


STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATTY


def test_a_template_that_wants_a_system_message(base: Path, tmp_path: Path) -> None:
    """What ends an answer is found with one; a run is saved, and generates with a system message."""
    tok = word_tokenizer()
    tok.chat_template = STRICT
    tok.save_pretrained(base)
    rows = [{"messages": [{"role": "system", "content": "one"}, *row["messages"]]} for row in ROWS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    short = ("--set", "train.max_steps=2", "--set", "train.batch_size=2", "--method", "full")
    ended = run("train", "--model", base, "--data", data, "--task", "causal_lm", "--output", tmp_path / "run", *short)
    assert ended.code == 0, ended
    assert isinstance(generate(open_run(tmp_path / "run"), "one", system="one", max_new_tokens=2), str)


def test_a_template_of_one_round_is_saved(base: Path, tmp_path: Path) -> None:
    tok = word_tokenizer()
    tok.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one round') }}{% endif %}" + CHATTY
    tok.save_pretrained(base)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": row["messages"][:2]} for row in ROWS])
    short = ("--set", "train.max_steps=2", "--set", "train.batch_size=2", "--method", "full")
    ended = run("train", "--model", base, "--data", data, "--task", "causal_lm", "--output", tmp_path / "run", *short)
    assert ended.code == 0, ended
