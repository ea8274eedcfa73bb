"""Predictions of every task: classes, tags and answers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import refused, run
from every_task import TASKS, configured, make_models
from forking import PYTHON
from tiny import WORDS, write_jsonl

from siliang.data.words import cut_into_words, join_words
from siliang.run_folder import open_run
from siliang.tasks.token_cls import TaggedWords, spans_of
from siliang.train.run import train
from siliang.types import ConfigError, DataError
from siliang.use.predict import predict, read_rows

ANSWERS = ("good", "bright", "film", "story")
NEEDLESS = ("datasets", "pandas", "sklearn", "matplotlib", "peft", "ray", "transformers.trainer")
STEPS = {"max_steps": 80, "learning_rate": 1e-2, "batch_size": 8}
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Taught by hand what can be foretold: a word's tag, and an answer's first word."""
    folder = tmp_path_factory.mktemp("runs")
    models = make_models(folder, spread=0.02)
    rows: dict[str, list[dict[str, Any]]] = {"token_cls": [], "question_ans": []}
    for i in range(60):
        words = [WORDS[(i + 3 * j) % 20] for j in range(3 + i % 6)]
        tags = ["B-GOOD" if w in ("good", "bright") else "O" for w in words]
        rows["token_cls"].append({"tokens": words, "tags": tags})
        context, told = " ".join(words), [w for w in words if w in ANSWERS][:1]
        answers = {"text": told, "answer_start": [context.index(w) for w in told]}
        rows["question_ans"].append({"question": "say", "context": context, "answers": answers})
    found = {}
    for task in TASKS:
        learned = task in rows
        config = configured(task, models, folder, "full" if learned else "lora", **(STEPS if learned else {}))
        if learned:
            config.data.train = str(write_jsonl(folder / f"{task}-learned.jsonl", rows[task]))
            config.data.test_size = 0.1
        found[task] = folder / f"run-{task}"
        train(config.model_copy(update={"output": str(found[task])}))
    return found


def said(*arguments: object) -> str:
    ended = run(*arguments)
    assert ended.code == 0, ended
    return ended.out


def test_tags(runs: dict[str, Path]) -> None:
    out = said("predict", runs["token_cls"], "the film was good , we liked it", "the actor")
    assert out.splitlines() == ["good GOOD\tthe film was good , we liked it", "\tthe actor"]
    found = json.loads(said("predict", runs["token_cls"], "--json", "a bright story"))
    assert found == {
        "text": "a bright story",
        "words": ["a", "bright", "story"],
        "tags": ["O", "B-GOOD", "O"],
        "spans": [{"text": "bright", "tag": "GOOD", "words": [1, 2]}],
    }


@pytest.mark.parametrize("task", ["seq_cls", "question_ans"])
def test_a_prediction_imports_nothing_for_data(runs: dict[str, Path], task: str) -> None:
    """They take half a second. transformers itself imports accelerate, scipy and torch._dynamo, and seqeval, which
    reads tags, imports sklearn and pandas."""
    code = f"import sys; sys.argv[1:] = ['predict', {str(runs[task])!r}, 'say\\tthe actor']\n"
    code += "from siliang.cli.main import main\ntry:\n    main()\nfinally:\n"
    code += f"    print('heavy:', *[m for m in {NEEDLESS} if m in sys.modules])"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    answer, heavy = found.stdout.splitlines()
    assert answer and heavy == "heavy:"


def test_a_long_sentence_has_a_tag_for_each_word(runs: dict[str, Path]) -> None:
    """24 tokens are read at once."""
    words = [WORDS[(5 * i) % 20] for i in range(100)]
    (found,) = predict(open_run(runs["token_cls"]), [words])
    assert len(found.tags) == 100
    right = ["B-GOOD" if w in ("good", "bright") else "O" for w in words]
    assert sum(a == b for a, b in zip(found.tags, right, strict=True)) >= 97


def test_answers(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["question_ans"]
    sentences = [[WORDS[(i + 3 * j) % 20] for j in range(6)] for i in range(20)]
    taught = [next((w for w in words if w in ANSWERS), "(no answer)") for words in sentences]
    contexts = [" ".join(words) for words in sentences]
    lines = [line.split("\t") for line in said("predict", folder, *(f"say\t{c}" for c in contexts)).splitlines()]
    assert sum(given == right for (given, _, _), right in zip(lines, taught, strict=True)) >= 17
    assert {given for given, _, _ in lines} >= {"film", "(no answer)"}
    assert all(0.0 <= float(probability) <= 1.0 and question == "say" for _, probability, question in lines)
    for a in predict(open_run(folder), [("say", c) for c in contexts]):
        assert a.text == ("" if a.begin is None else a.context[a.begin : a.end])
    found = json.loads(said("predict", folder, "--json", "say", "--context", "a story we a is"))
    begin, end = found["start"], found["end"]
    assert found["answer"] == ("" if begin is None else "a story we a is"[begin:end])
    assert 0.0 < found["probability"] <= 1.0
    file = write_jsonl(tmp_path / "asked.jsonl", [{"question": "say", "context": "not very bright"}])
    assert said("predict", folder, file).endswith("\tsay\n")
    assert "its context" in refused("predict", folder, "say")
    figures = json.loads(said("eval", folder, "--json"))
    assert {"has_answer_f1", "no_answer_f1", "exact_match", "f1"} <= figures.keys()


def test_a_text_file_in_the_home_folder(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("the film\n\na \u201cstory\u201d\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("the caf\u00e9\n", encoding="utf-16")
    run = open_run(runs["seq_cls"])
    assert [row.input for row in read_rows(run, "~/a.txt")] == ["the film", "", "a \u201cstory\u201d"]
    assert [row.input for row in read_rows(run, "~/[b].txt")] == ["the caf\u00e9"]
    lines = said("predict", runs["seq_cls"], "~/a.txt").splitlines()
    assert len(lines) == 3 and lines[1] == ""


def test_who_writes_is_sent_to_generate(runs: dict[str, Path]) -> None:
    for task in ("causal_lm", "seq_2_seq_lm"):
        assert "use `siliang generate`" in refused("predict", runs[task], "the film")
    assert "--context is only for runs of question_ans" in refused("predict", runs["seq_cls"], "a", "--context", "b")
    with pytest.raises(ConfigError, match="use `siliang generate`"):
        predict(open_run(runs["causal_lm"]), ["a film"])
    assert isinstance(next(predict(open_run(runs["token_cls"]), ["a film"])), TaggedWords)
    with pytest.raises(DataError, match="its context"):
        next(predict(open_run(runs["question_ans"]), ["a film"]))


def test_words() -> None:
    assert cut_into_words("高勇,男，born in Paris (U.S.)") == (
        *("高", "勇", ",", "男", "，", "born", "in", "Paris", "(", "U.S", ".", ")"),
    )
    assert join_words(("北", "京", "is", "big")) == "北京 is big"
    assert join_words(tuple("Paris")) == "Paris" and join_words(()) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिंदी, भाषा।", ("हिंदी", ",", "भाषा", "।")),
        ("বাংলা தமிழ் (తెలుగు)", ("বাংলা", "தமிழ்", "(", "తెలుగు", ")")),
        ("«مُحَمَّدٌ»", ("«", "مُحَمَّدٌ", "»")),
        ("می\u200cخواهم", ("می\u200cخواهم",)),
        ("\u200f«سلام»", ("\u200f", "«", "سلام", "»")),
        ("ที่นี่", ("ที่", "นี่")),
        ("か\u3099き", ("か\u3099", "き")),
        ("cafe\u0301!", ("cafe\u0301", "!")),
        ("hi👩\u200d👧👍🏽❤\ufe0f🇩🇪🇫🇷", ("hi", "👩\u200d👧", "👍🏽", "❤\ufe0f", "🇩🇪", "🇫🇷")),
        ("£5 5°", ("£", "5", "5", "°")),
        ("... \u0301", (*"...", "\u0301")),
    ],
)
def test_letters_keep_their_signs(text: str, words: tuple[str, ...]) -> None:
    assert cut_into_words(text) == words
    assert join_words(("ที่", "นี่")) == "ที่นี่" and join_words(("ที่", "นี่", "ok")) == "ที่นี่ ok"


def test_spans_are_written_as_their_sentence() -> None:
    words = ("Gate", "B", "6", "of", "北", "京")
    tags = ("O", "B-G", "I-G", "O", "B-C", "I-C")
    assert [s.text for s in spans_of(words, tags, words)] == ["B 6", "北京"]
    text = "Gate B  6 of 北京"
    assert [s.text for s in spans_of(cut_into_words(text), tags, text)] == ["B  6", "北京"]
    characters = tuple("在B6门")
    assert [s.text for s in spans_of(characters, ("O", "B-G", "I-G", "O"), characters)] == ["B6"]
    text = "in (U.S.) now"
    assert [s.text for s in spans_of(cut_into_words(text), ("O", "O", "B-C", "I-C", "O", "O"), text)] == ["U.S."]
