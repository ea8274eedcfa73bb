"""Measures of written texts: those of their libraries, in training, on its best step, after a resume, and by
`siliang eval`; and the F1 of each type of span."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from commands import refused, run
from every_task import configured, make_models
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics import classification_report
from tiny import WORDS, make, word_tokenizer, write_jsonl

from siliang.config import RunConfig
from siliang.engine import written
from siliang.records import Record
from siliang.run_folder import CHECKPOINTS, open_run
from siliang.tasks import measures, metrics, task_of
from siliang.tasks.measures import MEASURES, one_spacing, score_texts, tokenizer_of
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import ConfigError, DataError
from siliang.use.evaluate import eval_rows, evaluate, with_evaluation
from siliang.use.generate import generate

ALL = list(MEASURES)
EN = (["the cat sat on the mat", "no", "a b c d e"], ["the cat sat on a mat", "yes", "a b c d e"])
ZH = (["今天天气很好。", "他在北京工作", ""], ["今天天气不错。", "他在北京上班", "空"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


# ---- the measures themselves ----


@pytest.mark.parametrize(("texts", "tokenizer"), [(EN, "13a"), (ZH, "zh")])
def test_bleu_and_chrf_are_sacrebleus(texts: tuple[list[str], list[str]], tokenizer: str) -> None:
    hypotheses, references = texts
    found = score_texts(["bleu", "chrf"], hypotheses, references)
    assert found["bleu"].value == sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenizer).score > 0
    assert found["chrf"].value == sacrebleu.corpus_chrf(hypotheses, [references]).score > 0
    assert f"tok:{tokenizer}" in found["bleu"].signature and "version:" in found["chrf"].signature
    other = score_texts(["bleu"], hypotheses, references, "char")["bleu"]
    assert other.value == sacrebleu.corpus_bleu(hypotheses, [references], tokenize="char").score


def test_rouge_is_rouge_scores_and_counts_chinese_characters() -> None:
    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(kinds.values()))  # with its own tokenizer, of English words
    as_words = [[" ".join(f"c{ord(c)}" for c in text if c.isalnum()) for text in texts] for texts in ZH]
    for texts, same in ((EN, EN), (ZH, as_words)):
        found = score_texts(list(kinds), *texts)  # type: ignore[arg-type]
        for ours, theirs in kinds.items():
            scores = [scorer.score(b, a)[theirs].fmeasure for a, b in zip(*same, strict=True)]
            assert found[ours].value == pytest.approx(sum(scores) / len(scores)), ours  # type: ignore[index]


def test_exact_match_does_not_count_blanks() -> None:
    assert one_spacing(" 今 天  is a\nday 好") == "今天is a day好"
    assert score_texts(["exact_match"], ["今 天", "a  b ", "A"], ["今天", "a b", "a"])["exact_match"].value == 2 / 3


def test_the_tokenizer_of_bleu_is_that_of_most_letters() -> None:
    assert tokenizer_of(["今天 OK 吗", "天气"]) == "zh"
    assert tokenizer_of(["これは猫です"]) == "char" == tokenizer_of(["สวัสดีครับ"])
    assert tokenizer_of(["a good day 好"]) == "13a" == tokenizer_of(["", "123"])


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=4))
def test_any_texts_can_be_measured(pairs: list[tuple[str, str]]) -> None:
    for name, score in score_texts(ALL, [a for a, _ in pairs], [b for _, b in pairs]).items():
        assert 0 <= score.value <= (100 + 1e-9 if name in ("bleu", "chrf") else 1), name


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "S-Z", "M-X", "E-X"]), min_size=1, max_size=12), st.data())
def test_f1_of_each_type_is_seqevals(gold: list[str], data: st.DataObject) -> None:
    guess = data.draw(st.permutations(gold))
    found = metrics.spans_of_tags([guess], [gold])
    rows = [[metrics.as_iobes(tag) for tag in row] for row in (gold, guess)]
    if metrics.types_of(gold):
        zero: Any = 0  # seqeval declares a text
        report: Any = classification_report([rows[0]], [rows[1]], output_dict=True, zero_division=zero)
        expected = {f"f1_{name}": values["f1-score"] for name, values in report.items() if not name.endswith(" avg")}
        assert {name: value for name, value in found.items() if name.startswith("f1_")} == expected
        assert found["f1"] == report["micro avg"]["f1-score"]
    assert metrics.types_of(["NN", "VB", "O"]) == []  # parts of speech are no spans


# ---- in training ----


def with_measures(config: RunConfig, chosen: list[str], **settings: Any) -> RunConfig:
    values = config.model_dump(mode="json")
    return RunConfig.build(values | {"evaluation": {"measures": chosen, **settings}})


@pytest.mark.parametrize(
    ("task", "method"), [("causal_lm", "full"), ("causal_lm", "prompt_tuning"), ("seq_2_seq_lm", "full")]
)
def test_texts_are_those_of_generate(
    task: str, method: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written together, padded on the left, as one by one."""
    seen: list[list[str]] = []

    def scored(names: Any, texts: list[str], *others: Any) -> dict[str, measures.Score]:
        seen.append(texts)
        return score_texts(names, texts, *others)

    monkeypatch.setattr(written, "score_texts", scored)
    settings = {"max_steps": 20, "learning_rate": 2e-2}
    config = with_measures(
        configured(task, models, tmp_path, method, **settings), ["rouge_l", "exact_match"], max_new_tokens=5
    )
    train(config)
    opened = open_run(Path(config.output))
    rows, chosen = eval_rows(opened, None), task_of(config)
    asked = written.questions(chosen, opened.tokenizer, rows, None)
    texts: list[str] = []
    for number in range(len(rows.examples)):
        prompt = rows.examples[number].prompt(0)
        assert prompt is not None and asked[number].reference == prompt.target
        texts.append(generate(opened, prompt.instruction, max_new_tokens=5))
    assert seen == [texts] and len(set(texts)) > 1
    expected = score_texts(["rouge_l", "exact_match"], texts, [q.reference for q in asked.values()])
    record = Record.read(Path(config.output))
    assert {name: record.final[name] for name in expected} == {name: s.value for name, s in expected.items()}
    found = evaluate(opened)
    assert found["written"] == len(rows.examples) and found["rouge_l"] == record.final["rouge_l"]


@pytest.mark.parametrize("task", ["causal_lm", "seq_2_seq_lm"])
def test_the_best_step_is_that_of_a_measure_and_a_resume_has_the_same_bits(
    task: str, models: dict[str, Path], tmp_path: Path
) -> None:
    method = "prompt_tuning" if task == "causal_lm" else "full"
    settings = {"best": "chrf", "eval_every": 8, "max_steps": 32, "learning_rate": 2e-2, "save_every": 16, "keep": 9}
    config = with_measures(configured(task, models, tmp_path, method, **settings), ["rouge_1", "bleu"], rows=7)
    said: list[str] = []
    train(config, Listener(say=said.append))
    folder = Path(config.output)
    record = Record.read(folder)
    assert any("written for 7 of 12 held-out rows" in line for line in said)
    lines = {line.step: line.metrics for line in record.steps if line.eval_loss is not None}
    assert list(lines) == [8, 16, 24, 32] and lines[8].keys() == {"rouge_1", "bleu", "chrf"}
    assert record.best_step is not None
    assert record.best_step == max(lines, key=lambda step: (lines[step]["chrf"], -step))
    assert len({values["chrf"] for values in lines.values()}) > 1
    assert record.final["chrf"] == lines[record.best_step]["chrf"]
    assert record.signatures.keys() == lines[8].keys() and "sacrebleu" not in record.signatures["rouge_1"]
    measured = evaluate(open_run(folder))
    assert {name: measured[name] for name in lines[8]} == lines[record.best_step]
    # the run again, from its fourth step
    trained = "*/*model.safetensors"
    weights = next(folder.glob(trained)).read_bytes()
    shutil.rmtree(next(folder.glob(trained)).parent)
    for step in (24, 32):
        shutil.rmtree(folder / CHECKPOINTS / f"checkpoint-{step}", ignore_errors=True)
    kept = [line for line in record.steps if line.step <= 16]
    before = record.model_copy(update={"status": "interrupted", "final": {}, "steps": kept, "best_step": None})
    before.write(folder)
    train(config, resume=True)
    after = Record.read(folder)
    assert next(folder.glob(trained)).read_bytes() == weights
    assert [line.metrics for line in after.steps if line.eval_loss is not None] == list(lines.values())
    assert (after.best_step, after.final["bleu"]) == (record.best_step, record.final["bleu"])


def test_eval_measures_what_it_is_given(models: dict[str, Path], tmp_path: Path) -> None:
    config = configured("causal_lm", models, tmp_path)
    train(config)
    assert "written" not in evaluate(open_run(Path(config.output)))
    ended = run("eval", config.output, "--measures", "rouge_2,bleu,exact_match", "--rows", "5", "--json")
    found = json.loads(ended.out)
    assert found["written"] == 5 and found["signatures"]["bleu"].startswith("nrefs:1|")
    assert found["signatures"].keys() == {"rouge_2", "bleu", "exact_match"} <= found.keys()
    shown = run("eval", config.output, "--measures", "chrf", "--rows", "all")
    assert "written 12" in shown.out and "chrf        nrefs:1|" in shown.out
    for flags, says in (
        (("--measures", "rouge"), "'rouge_l'"),
        (("--measures", "meteor"), "rouge_1"),
        (("--rows", "none"), "a number from 1 on, or all"),
        (("--rows", "0"), "a number from 1 on, or all"),
    ):
        assert says in refused("eval", config.output, *flags), flags


def test_what_cannot_be_measured_is_one_line(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(task: str, chosen: list[str], kind: type[Exception] = ConfigError, **settings: Any) -> str:
        config = with_measures(configured(task, models, tmp_path, **settings), chosen)
        with pytest.raises(kind) as caught:
            train(config)
        text = str(caught.value)
        assert 1 <= len(text.splitlines()) <= 2
        return text

    assert "seq_cls has other metrics" in stopped("seq_cls", ["bleu"])
    assert "bits_per_byte, rouge_1, rouge_2, rouge_l, bleu" in stopped("causal_lm", [], best="rouge", eval_every=1)
    assert "Allowed: loss, accuracy, f1" in stopped("seq_cls", [], best="rouge_l", eval_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(measures, "find_spec", lambda name: None)
        assert "pip install 'siliang[measures]'" in stopped("causal_lm", ["rouge_l", "bleu"])
        assert "pip install 'siliang[measures]'" in stopped("causal_lm", [], best="chrf", eval_every=1)
    data = write_jsonl(tmp_path / "t.jsonl", [{"text": " ".join(2 * WORDS[i : i + 20])} for i in range(12)])
    values = configured("causal_lm", models, tmp_path).model_dump(mode="json")
    values["data"]["train"], values["evaluation"] = str(data), {"measures": ["bleu"]}
    with pytest.raises(DataError, match="learned whole"):
        train(RunConfig.build(values))


def test_a_text_is_no_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    model: Any = make("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    most = json.loads((tmp_path / "gpt2" / "config.json").read_text())["n_positions"]
    config = configured("causal_lm", {"causal_lm": tmp_path / "gpt2"}, tmp_path)
    values = config.model_dump(mode="json")
    values["data"]["max_target_length"] = 4 * most
    train(RunConfig.build(values))
    opened = open_run(Path(config.output))
    assert evaluate(with_evaluation(opened, {"measures": ["rouge_l"]}))["written"] == 12
    with pytest.raises(ConfigError, match=r"evaluation.max_new_tokens = \d+ behind a prompt"):
        evaluate(with_evaluation(opened, {"measures": ["rouge_l"], "max_new_tokens": most}))


def test_answers_that_were_cut_are_compared_whole(models: dict[str, Path], tmp_path: Path) -> None:
    """The reference is the data's, however much of it was trained."""
    config = configured("causal_lm", models, tmp_path)
    long = [{"instruction": "say", "output": " ".join(WORDS[:20] * 2)} for _ in range(8)]
    values = config.model_dump(mode="json")
    values["data"]["train"] = str(write_jsonl(tmp_path / "long.jsonl", long))
    values["accept"] += ["SL001", "SL002", "SL003"]
    values["evaluation"] = {"measures": ["rouge_1"]}
    config = RunConfig.build(values)
    train(config)
    opened = open_run(Path(config.output))
    asked = written.questions(task_of(config), opened.tokenizer, eval_rows(opened, None), None)
    assert {q.reference for q in asked.values()} == {long[0]["output"]}


def test_the_best_step_by_the_f1_of_one_type(models: dict[str, Path], tmp_path: Path) -> None:
    settings = {"best": "f1_Y", "eval_every": 2, "max_steps": 6, "learning_rate": 3e-2}
    config = configured("token_cls", models, tmp_path, **settings)
    train(config)
    record = Record.read(Path(config.output))
    lines = {line.step: line.metrics["f1_Y"] for line in record.steps if line.eval_loss is not None}
    assert record.best_step == max(lines, key=lambda step: (lines[step], -step))
    found = json.loads(run("eval", config.output, "--json").out)
    assert found["f1_Y"] == record.final["f1_Y"] and {"f1_X", "f1_Y"} <= found.keys()
    shutil.rmtree(config.output)
    with pytest.raises(ConfigError, match=r"Allowed: loss, f1, precision, recall, accuracy, f1_X, f1_Y"):
        train(configured("token_cls", models, tmp_path, **(settings | {"best": "f1_Z"})))
