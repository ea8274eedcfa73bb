"""What `siliang check` shows of rows, on a terminal and in plain lines, for each task."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import word_tokenizer, write_jsonl
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from siliang.check import gather_input
from siliang.cli.check import grouped
from siliang.cli.show_examples import HEAD, TAIL, show_examples
from siliang.config import RunConfig

GREEN, GREY, BOLD, OFF = "\x1b[32m", "\x1b[90m", "\x1b[1;32m", "\x1b[0m"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer cuts words into pieces and has special tokens of its own."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "wang", "##lin", "lives", "in", "rome", "who", "good", "bad"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForSequenceClassification(BertConfig(vocab_size=12, **small)).save_pretrained(folder)
    return folder


def shown(model: Path, task: str, rows: list[dict[str, Any]], folder: Path, *, colours: bool, **data: Any) -> list[str]:
    """The lines of the examples, without the headline."""
    path = write_jsonl(folder / "d.jsonl", rows)
    values = {
        "model": str(model),
        "task": task,
        "data": {"train": str(path), "test_size": 0.0, "max_length": 32, **data},
        "output": str(folder / "o"),
    }
    out = io.StringIO()
    console = Console(
        file=out,
        width=10_000,
        force_terminal=colours,
        color_system="standard" if colours else None,
        highlight=False,
        legacy_windows=False,
        soft_wrap=True,
    )
    show_examples(console, gather_input(RunConfig.build(values)), 2)
    lines = out.getvalue().replace(str(path), "d.jsonl").splitlines()
    assert lines[0].startswith("Examples (")
    return lines[1:]


def test_a_class_follows_its_text(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "wanglin lives", "label": "good"}, {"text": "who", "label": "bad"}]
    lines = ["d.jsonl:1:", "[CLS]wanglin lives[SEP]", "-> good", "", "d.jsonl:2:", "[CLS]who[SEP]", "-> bad", ""]
    assert shown(bert, "seq_cls", rows, tmp_path, colours=False) == lines
    coloured = shown(bert, "seq_cls", rows, tmp_path, colours=True)
    assert f"{GREY}wanglin lives{OFF}" in coloured[1] and coloured[2] == f"-> {GREEN}good{OFF}"


def test_each_token_with_its_tag(bert: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["wanglin", "lives"], "tags": ["B-NAME", "O"]}]
    lines = ["d.jsonl:1:", "[CLS] wang/B-NAME ##lin lives/O [SEP]", ""]
    assert shown(bert, "token_cls", rows, tmp_path, colours=False) == lines
    coloured = shown(bert, "token_cls", rows, tmp_path, colours=True)[1]
    assert f"{BOLD}wang/B-NAME{OFF} {GREY}##lin{OFF} {GREEN}lives/O{OFF}" in coloured


def test_the_answer_in_its_context(bert: Path, tmp_path: Path) -> None:
    context = "wanglin lives in rome"
    rows = [
        {"context": context, "question": "who", "answers": {"text": ["wanglin"], "answer_start": [0]}},
        {"context": context, "question": "who", "answers": {"text": [], "answer_start": []}},
    ]
    lines = ["d.jsonl:1:", "[CLS]who[SEP][[wanglin]]lives in rome[SEP]", ""]
    lines += ["d.jsonl:2:", "[CLS]who[SEP]wanglin lives in rome[SEP]", "-> no answer in here", ""]
    assert shown(bert, "question_ans", rows, tmp_path, colours=False) == lines
    assert f"{GREEN}wanglin{OFF}" in shown(bert, "question_ans", rows, tmp_path, colours=True)[1]
    windows = shown(bert, "question_ans", rows, tmp_path, colours=False, max_length=8, stride=0)
    assert windows[:2] == ["d.jsonl:1, window 1 of 2:", "[CLS]who[SEP][[wanglin]]lives in[SEP]"]
    assert windows[3:6] == ["d.jsonl:1, window 2 of 2:", "[CLS]who[SEP]rome[SEP]", "-> no answer in here"]


def test_a_target_under_its_source(bert: Path, tmp_path: Path) -> None:
    rows = [{"source": "who lives in rome", "target": "wanglin"}]
    lines = ["d.jsonl:1:", "[CLS]who lives in rome[SEP]", "-> [CLS]wanglin[SEP]", ""]
    assert shown(bert, "seq_2_seq_lm", rows, tmp_path, colours=False) == lines
    assert f"{GREEN}wanglin{OFF}" in shown(bert, "seq_2_seq_lm", rows, tmp_path, colours=True)[2]


def test_a_long_row_shows_its_end(tmp_path: Path, model_folders: dict[str, Path]) -> None:
    rows = [{"instruction": "say", "output": "one two " * 400}]
    data = {"max_length": 1000, "template": "plain"}
    head, middle, tail = shown(model_folders["llama"], "causal_lm", rows, tmp_path, colours=False, **data)[1:-1]
    tokens = len(word_tokenizer()("say" + " one two" * 400)["input_ids"]) + 1
    assert middle == f"... {tokens - HEAD - TAIL:,} more tokens ..."
    assert head.startswith("say") and "[[one two" in head and head.endswith("]]")
    assert tail.startswith("[[") and tail.endswith("</s>]]")


def test_places_name_each_file_once() -> None:
    assert grouped(["a.csv:3", "a.csv:7", "b.json, row 2", "b.json, row 9", "c.csv:1"]) == (
        "a.csv:3, 7; b.json, row 2, 9; c.csv:1"
    )
