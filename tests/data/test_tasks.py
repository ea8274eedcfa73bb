"""Every task from data to metrics: tiny runs here, short ones on real data behind `shared`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import WORDS, word_tokenizer, write_jsonl
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from siliang.config import DataConfig, RunConfig
from siliang.data.examples import Span
from siliang.data.prepared import EvalRows
from siliang.data.tokens import TokenSet, tokenize
from siliang.engine.batches import Batch
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.tasks import QUESTION_ANS, metrics
from siliang.tasks.question_ans import best_answers, read
from siliang.train.run import train
from siliang.use.evaluate import evaluate
from siliang.use.generate import generate

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def run(folder: Path, model: Path, task: str, data: dict[str, Any], **settings: Any) -> tuple[Record, dict[str, float]]:
    """Trains, opens the run again, and measures it."""
    values = {
        "model": str(model),
        "task": task,
        "data": data,
        "train": {"batch_size": 8, **settings.pop("train", {})},
        "output": str(folder / "run"),
        **settings,
    }
    record = train(RunConfig.build(values))
    return record, evaluate(open_run(folder / "run"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config: Any = T5Config(vocab_size=120, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    config.eos_token_id = 2
    T5ForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_tags(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"tokens": ["I", "liked", a, b], "tags": ["O", "O", "B-X", "E-X"]} for a in WORDS[:9] for b in WORDS[9:14]]
    data = {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "max_length": 32}
    rate = {"max_steps": 60, "learning_rate": 1e-2}
    record, measured = run(
        tmp_path, model_folders["bert"], "token_cls", data, train=rate, method="full", accept=["SL042"]
    )
    assert record.labels == ["O", "B-X", "E-X"]
    assert measured["f1"] == 1.0 and measured["accuracy"] == 1.0
    assert measured["f1"] == record.final["f1"]
    assert measured["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-6)


def test_answers_in_a_context(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = []
    for i, word in enumerate(WORDS[:30]):
        context = f"hello world {word} ! ? yes" if i % 2 else f"{word} ! hello world ? yes"
        rows.append(
            {
                "context": context,
                "question": "say !",
                "answers": {"text": [word], "answer_start": [context.index(word)]},
            }
        )
    data = {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "max_length": 32, "test_size": 0.2}
    rate = {"max_steps": 120, "learning_rate": 5e-3}
    record, measured = run(
        tmp_path, model_folders["bert"], "question_ans", data, train=rate, method="full", accept=["SL042"]
    )
    assert 0.0 <= measured["exact_match"] <= measured["f1"] <= 1.0
    assert measured["exact_match"] == record.final["exact_match"]
    assert measured["f1"] > 0.4


def test_text_from_text(t5: Path, tmp_path: Path) -> None:
    rows = [{"source": f"say {w}", "target": f"{w}"} for w in WORDS[:5] * 8]
    data = {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "max_length": 32, "max_target_length": 6}
    rate = {"max_steps": 80, "learning_rate": 1e-2}
    record, measured = run(tmp_path, t5, "seq_2_seq_lm", data, train=rate, method="full", accept=["SL042"])
    assert measured["loss"] < 1.0
    assert measured["rouge_l"] > 0.5
    assert measured["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-6)
    assert isinstance(generate(open_run(tmp_path / "run"), "say the", max_new_tokens=4), str)


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "siliang", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- the figures themselves ----


def test_metrics_by_hand() -> None:
    assert metrics.classification([0, 1, 1, 1], [0, 0, 1, 1]) == {
        "accuracy": 0.75,
        "f1": pytest.approx((2 / 3 + 0.8) / 2),
    }
    right = [["B-A", "M-A", "E-A", "O", "S-B"]]
    guess = [["B-A", "M-A", "E-A", "O", "O"]]
    assert metrics.spans_of_tags(guess, right) == {
        "f1": pytest.approx(2 / 3),
        "precision": 1.0,
        "recall": 0.5,
        "accuracy": 0.8,
        "f1_A": 1.0,
        "f1_B": 0.0,
    }
    cut = [["B-A", "E-A", "O", "O", "S-B"]]  # a span that ends too early is none
    assert metrics.spans_of_tags(cut, right)["f1"] == 0.5
    assert metrics.squad(["The cat", "in 北京市", ""], [["cat"], ["北京"], []]) == {
        "exact_match": pytest.approx(2 / 3),
        "f1": pytest.approx((1 + 2 * 2 / 6 + 1) / 3),
    }


def test_rouge_l_counts_chinese_characters() -> None:
    assert metrics.units("飞行器的ABC测试, ok!") == ["飞", "行", "器", "的", "abc", "测", "试", "ok"]
    assert metrics.rouge("rougeL", ["飞行控制"], ["飞行器控制"]) == pytest.approx(2 * 4 / 9)
    assert metrics.rouge("rougeL", ["the cat sat"], ["the dog sat"]) == pytest.approx(2 / 3)


def test_words_keep_their_signs() -> None:
    assert metrics.units("हिंदी, தமிழ்! مُحَمَّدٌ") == ["हिंदी", "தமிழ்", "مُحَمَّدٌ"]
    assert metrics.units("ที่นี่") == ["ที่", "นี่"]
    assert metrics.units("می\u200cخواهم \u200fسلام\u200f") == ["میخواهم", "سلام"]
    assert metrics.units("cafe\u0301 İ") == ["caf\u00e9", "i\u0307"]
    assert metrics.rouge("rougeL", ["हिंदी भाषा"], ["हिंदी लिपि"]) == 0.5  # before: of pieces of words
    assert metrics.squad(["हिंदी भाषा"], [["हिंदी लिपि"]]) == {"exact_match": 0.0, "f1": 0.5}


@pytest.mark.parametrize(
    ("guess", "right", "same"),
    [
        ("£5", "5", False),
        ("5°", "5", False),
        ("“so”", "so", False),
        ("co-op", "coop", True),
        ("$5, the", "5", True),
        ("《北京》。", "北京", True),
        ("5℃的水", "5的水", False),
    ],
)
def test_what_squads_script_drops(guess: str, right: str, same: bool) -> None:
    """ASCII punctuation and articles alone; of Chinese, as CMRC's script, all punctuation."""
    assert metrics.squad([guess], [[right]])["exact_match"] == float(same)


def windows_of(*spans: Span) -> TokenSet:
    data = DataConfig(train="x", max_length=10, stride=2)
    tokenizer: Any = word_tokenizer()
    return tokenize(list(spans), tokenizer, data, QUESTION_ANS.data)


def answered(windows: TokenSet, spans: list[Span], outside: float, *, unanswered: bool) -> list[str]:
    """What a model is understood to say that gives 5 to the answer's tokens, and `outside` to the first of a window
    that does not hold it."""
    starts, ends = torch.zeros(len(windows), 10), torch.zeros(len(windows), 10)
    for i in range(len(windows)):
        row = windows[i]
        if row["end_positions"]:
            starts[i, row["start_positions"]] = ends[i, row["end_positions"]] = 5.0
        else:
            starts[i, 0] = ends[i, 0] = outside
    lengths = tuple(windows.lengths.tolist())
    batch = Batch({}, lengths, len(lengths), (), entries=tuple(range(len(lengths))))
    output: Any = SimpleNamespace(start_logits=starts, end_logits=ends)
    found = read(output, batch, windows)
    rows = EvalRows(windows, spans, unanswered=unanswered)
    return [a.text for a in best_answers(dict(enumerate(found)), rows)]


def test_the_best_span_is_found_over_windows() -> None:
    context = " ".join(WORDS[:20])
    span = Span("say it", context, ("was is",), (context.index("was is"),))
    windows = windows_of(span)
    assert len(windows) > 1
    for unanswered in (False, True):  # the windows without the answer do not outvote the one with it
        assert answered(windows, [span], 9.0, unanswered=unanswered) == ["was is"]


def test_no_answer_is_an_answer_where_it_was_learned() -> None:
    """As SQuAD 2 wants it: [CLS] in every window scores higher than any span."""
    spans = [Span("say it", " ".join(WORDS[:n]), (), ()) for n in (4, 20)]
    windows = windows_of(*spans)
    assert answered(windows, spans, 3.0, unanswered=True) == ["", ""]
    assert "" not in answered(windows, spans, 3.0, unanswered=False)
    assert "" not in answered(windows, spans, -1.0, unanswered=True)  # some span of zeros scores higher
    gold = [["cat"], [], [], ["the", "bad film"]]
    found = metrics.squad_by_kind(["cat", "", "dog", "film"], gold)
    assert found == {
        "exact_match": 0.5,
        "f1": pytest.approx((1 + 1 + 0 + 2 / 3) / 4),
        "has_answer_exact_match": 0.5,
        "has_answer_f1": pytest.approx((1 + 2 / 3) / 2),
        "no_answer_exact_match": 0.5,
        "no_answer_f1": 0.5,
    }
    assert metrics.squad_by_kind(["cat"], [["cat"]]) == {"exact_match": 1.0, "f1": 1.0}


# ---- real data ----


@pytest.mark.shared
def test_causal_on_alpaca_zh(shared: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    for file in (shared / "tokenizers" / "minimind").iterdir():
        shutil.copyfile(file, model / file.name)
    rows = [r for r in json.loads((shared / "data" / "alpaca_zh_52k.json").read_text())[:700] if r["output"]]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    data = {"train": str(tmp_path / "d.json"), "template": "chat", "max_length": 96}
    rate = {"max_steps": 60, "learning_rate": 3e-3}
    record, measured = run(tmp_path, model, "causal_lm", data, train=rate, method="full", accept=["SL042"])
    losses = [s.loss for s in record.steps if s.loss is not None]
    print(f"alpaca_zh: training loss {losses}, held out {measured}")
    assert losses[0] > 7.5 and losses[-1] < losses[0] - 1.0  # ln 6400 = 8.76 at the start
    assert measured["loss"] == pytest.approx(record.final["eval_loss"], rel=3e-2)


@pytest.mark.slow
@pytest.mark.shared
def test_classes_on_chnsenticorp(shared: Path, tmp_path: Path) -> None:
    raw = (shared / "data" / "ChnSentiCorp_htl_all.csv").read_text(encoding="utf-8-sig").splitlines()
    rows = raw[1:901] + raw[-500:]  # the file is sorted by label
    (tmp_path / "d.csv").write_text("\n".join([raw[0], *rows]) + "\n")
    data = {"train": str(tmp_path / "d.csv"), "test_size": 0.15, "stratify": True, "seed": 123, "max_length": 64}
    rate = {"max_steps": 50, "batch_size": 32, "learning_rate": 2e-4}
    model = shared / "weights" / "zh-mini-bert"
    record, measured = run(tmp_path, model, "seq_cls", data, train=rate, method="full")
    print(f"ChnSentiCorp, {record.rows.train} rows: {measured}")
    assert measured["accuracy"] == record.final["accuracy"]
    assert measured["accuracy"] > 0.72 and measured["f1"] > 0.65  # the larger class is 0.64


@pytest.mark.shared
def test_an_opened_adapter_meets_the_pooler_it_was_trained_on(shared: Path, tmp_path: Path) -> None:
    """zh-mini-bert has no pooler, so a new one is drawn at each opening, and no adapter's file holds it."""
    rows = (shared / "data" / "ChnSentiCorp_htl_all.csv").read_text(encoding="utf-8-sig").splitlines()
    (tmp_path / "d.csv").write_text("\n".join([rows[0], *rows[1:61], *rows[-60:]]) + "\n")
    data = {"train": str(tmp_path / "d.csv"), "test_size": 0.5, "max_length": 32}
    model = shared / "weights" / "zh-mini-bert"
    record, measured = run(
        tmp_path, model, "seq_cls", data, train={"max_steps": 6, "learning_rate": 3e-3}, method="lora"
    )
    assert measured["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.shared
def test_spans_on_ner_resume(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "ner_resume"
    blocks = (folder / "dev.char.bmes").read_text(encoding="utf-8").split("\n\n")[:200]
    (tmp_path / "e.bmes").write_text("\n\n".join(blocks) + "\n")
    data = {"train": str(folder / "train.char.bmes"), "eval": str(tmp_path / "e.bmes"), "max_length": 64}
    rate = {"max_steps": 80, "batch_size": 16, "learning_rate": 5e-4}
    model = shared / "weights" / "zh-mini-bert"
    record, measured = run(tmp_path, model, "token_cls", data, train=rate, method="full", accept=["SL042"])
    print(f"ner_resume, 80 steps: {measured}")
    assert record.labels is not None and len(record.labels) == 28
    assert measured["f1"] > 0.5
    assert measured["f1"] == record.final["f1"]


QUESTIONS = {"NAME": "这个人叫什么名字？", "ORG": "在哪个单位工作？", "TITLE": "担任什么职务？"}


def questions(sentences: list[str]) -> list[dict[str, Any]]:
    """SQuAD's rows from tagged sentences: for each kind of span a question, whose answer is the first of that kind."""
    rows: list[dict[str, Any]] = []
    for sentence in sentences:
        pairs = [line.split(" ") for line in sentence.strip("\n").split("\n")]
        context, asked = "".join(word for word, _ in pairs), set[str]()
        for start, (_, tag) in enumerate(pairs):
            kind = tag[2:]
            if tag[:2] != "B-" or kind not in QUESTIONS or kind in asked:
                continue
            asked.add(kind)
            end = next(i for i in range(start, len(pairs)) if pairs[i][1] == f"E-{kind}") + 1
            answers = {"text": [context[start:end]], "answer_start": [start]}
            rows.append({"context": context, "question": QUESTIONS[kind], "answers": answers})
    return rows


@pytest.mark.slow
@pytest.mark.shared
def test_answers_on_ner_resume(shared: Path, tmp_path: Path) -> None:
    """Through the commands, as a user would."""
    blocks = (shared / "data" / "ner_resume" / "dev.char.bmes").read_text(encoding="utf-8").split("\n\n")
    rows = questions([b for b in blocks if b.strip()])
    (tmp_path / "train.json").write_text(json.dumps(rows[:-80], ensure_ascii=False))
    (tmp_path / "eval.json").write_text(json.dumps(rows[-80:], ensure_ascii=False))
    settings = {
        "model": str(shared / "weights" / "zh-mini-bert"),
        "task": "question_ans",
        "method": "full",
        "data": {"train": str(tmp_path / "train.json"), "eval": str(tmp_path / "eval.json"), "max_length": 64},
        "train": {"max_steps": 36, "batch_size": 16, "learning_rate": 3e-4},
        "accept": ["SL042"],
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    command("train", tmp_path / "run.yaml")
    lora = ("--method", "lora", "--output", tmp_path / "lora", "--set", "train.max_steps=2")
    command("train", tmp_path / "run.yaml", *lora, "--set", "train.learning_rate=1e-3")
    record = Record.read(tmp_path / "run")
    losses = [s.loss for s in record.steps if s.loss is not None]
    measured = json.loads(command("eval", tmp_path / "run", "--json"))
    print(f"questions on ner_resume: {len(rows)} rows, training loss {losses[0]:.2f} to {losses[-1]:.2f}, {measured}")
    assert losses[-1] < losses[0] - 0.5
    assert measured["exact_match"] == record.final["exact_match"] and measured["f1"] == record.final["f1"]
    assert 0.15 < measured["exact_match"] <= measured["f1"]
    assert "AutoModelForQuestionAnswering" in command("merge", tmp_path / "lora", "--output", tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.shared
def test_titles_on_csl(shared: Path, tmp_path: Path) -> None:
    """A tiny random T5 learns in a minute how titles sound, not what the abstract says: ROUGE-L rises from nothing."""
    bert, model = shared / "weights" / "zh-mini-bert", tmp_path / "model"
    torch.manual_seed(0)
    config: Any = T5Config(vocab_size=21128, d_model=48, d_kv=16, d_ff=96, num_layers=1, num_heads=3)
    config.decoder_start_token_id = 0
    config.eos_token_id = 102
    T5ForConditionalGeneration(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(bert / name, model / name)
    held_out = (shared / "data" / "csl_title" / "test.tsv").read_text().splitlines()[:60]
    (tmp_path / "e.tsv").write_text("\n".join(held_out) + "\n")
    data = {
        "train": str(shared / "data" / "csl_title" / "dev.tsv"),
        "eval": str(tmp_path / "e.tsv"),
        "header": ["task", "source", "target"],
        "max_length": 64,
        "max_target_length": 24,
    }
    rate = {"max_steps": 150, "batch_size": 16, "learning_rate": 1e-2}
    record, measured = run(tmp_path, model, "seq_2_seq_lm", data, train=rate, method="full", accept=["SL042"])
    losses = [s.loss for s in record.steps if s.loss is not None]
    print(f"csl_title: training loss {losses[0]:.2f} to {losses[-1]:.2f}, held out {measured}")
    assert losses[-1] < losses[0] - 2
    assert measured["rouge_l"] > 0.03
