"""What cannot be learned, read or answered is said before anything is computed, or does not end as success."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, make, word_tokenizer, write_jsonl
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from siliang.check import find, gather_input
from siliang.cli.main import main
from siliang.config import RunConfig
from siliang.data.batch import Batch
from siliang.data.conversations import writer
from siliang.data.encode import Encoder
from siliang.data.messages import conversation
from siliang.engine.step import Engine
from siliang.models.tokenizers import load_tokenizer
from siliang.run_folder import open_run
from siliang.tasks import CAUSAL_LM, QUESTION_ANS, SEQ_CLS, TASKS, StepLoss
from siliang.train.guard import Guard
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import ConfigError, DataError, ModelError, TaskType
from siliang.use.evaluate import evaluate
from siliang.use.generate import generate
from siliang.use.learned import losses, what_is_wrong
from siliang.use.merge import merge
from siliang.use.predict import predict
from siliang.use.predict_file import predict_file

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
LONG = "one " * 70


def settings(model: Path, rows: list[dict[str, Any]], output: Path, task: str = "causal_lm", **more: Any) -> RunConfig:
    output.parent.mkdir(exist_ok=True)
    data = {"train": str(write_jsonl(output.parent / "rows.jsonl", rows)), "max_length": 64} | more.pop("data", {})
    training = {"max_steps": 2, "batch_size": 4} | more.pop("train", {})
    return RunConfig.build(
        {"model": str(model), "task": task, "data": data, "train": training, **more, "output": str(output)}
    )


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["siliang", *words])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out + shown.err


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "roberta"])
def test_a_model_without_a_tokenizer(name: str, tmp_path: Path) -> None:
    model: Any = make(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer: none of tokenizer\.json, .* has a vocabulary"):
        load_tokenizer(str(tmp_path))
    word_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(word_tokenizer())


def test_a_training_that_was_nothing_all_along() -> None:
    guard = Guard(scaled=False)
    assert guard.check_end() is None  # not one step
    for step in (1, 2, 3):
        guard.record(step, torch.tensor(0.0), 1.0, [step])
        assert guard.check() is None
    bad = guard.check_end()
    assert bad is not None and (bad.what, bad.value, bad.rows) == ("loss", 0.0, (3,))
    again = Guard(scaled=False)
    again.load_state_dict(guard.state_dict())  # as a resumed run does
    again.record(4, torch.tensor(0.0), 0.5, [4])
    assert again.check_end() is not None
    again.record(5, torch.tensor(0.1), 0.5, [5])
    assert again.check_end() is None


def test_tokenizers_of_other_models(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": f"{a} {b}"} for a in WORDS[:8] for b in WORDS[8:12]]
    folder = tmp_path / "model"
    model: Any = make("llama")
    model.resize_token_embeddings(10)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = settings(folder, [{"text": "the a the the a"}, {"text": "a the a the"}] * 6, tmp_path / "run")
    found = next(f for f in find(gather_input(config)) if f.code == "SL023")
    assert found.severity == "error" and "another model's tokenizer" in found.message
    tok = word_tokenizer()
    tok.add_special_tokens({"pad_token": "<pad>"})
    model.resize_token_embeddings(len(tok) - 1)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    found = next(f for f in find(gather_input(settings(folder, rows, tmp_path / "run"))) if f.code == "SL023")
    assert found.severity == "error" and "its pad token is" in found.message


def test_questions_on_contexts_are_packed() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    engine = Engine(BertForQuestionAnswering(config), QUESTION_ANS)
    assert engine.padding is not None and engine.notes == []
    engine.close()


def test_why_packing_is_off_is_a_sentence() -> None:
    model: Any = make("deberta")
    (note,) = Engine(model, SEQ_CLS).notes
    assert note.startswith("packing is off: this model cannot run packed rows (")


# ---- learned positions: 64 of them ----


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    model: Any = make("gpt2")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


ASKED = [{"instruction": f"say {a}", "output": f"{a} {b}"} for a in WORDS[28:34] for b in WORDS[28:32]]


def test_rows_longer_than_the_positions(gpt2: Path, tmp_path: Path) -> None:
    long = [*ASKED, {"instruction": LONG, "output": "one"}]
    with pytest.raises(DataError, match=r"SL028 a row has \d+ tokens, the model 64 positions"):
        train(settings(gpt2, long, tmp_path / "run", data={"max_length": 512, "test_size": 0.0}))
    prompt: dict[str, Any] = {"method": {"name": "prompt", "num_virtual_tokens": 60}}
    with pytest.raises(DataError, match=r"the model 4 positions \(64, of which the method's virtual tokens take 60\)"):
        train(settings(gpt2, ASKED, tmp_path / "run", **prompt))
    held_out = str(write_jsonl(tmp_path / "e.jsonl", long))
    with pytest.raises(DataError, match="SL028"):
        train(settings(gpt2, ASKED, tmp_path / "run", data={"max_length": 512, "eval": held_out}))


def test_a_run_in_use_stays_within_its_positions(gpt2: Path, tmp_path: Path) -> None:
    train(settings(gpt2, ASKED, tmp_path / "run"))
    run = open_run(tmp_path / "run")
    assert isinstance(generate(run, "say one"), str)  # what is left of the positions
    with pytest.raises(ConfigError, match=r"max_new_tokens = 100 behind a prompt of \d+ tokens .* at most \d+ can"):
        generate(run, "say one", max_new_tokens=100)
    with pytest.raises(ConfigError, match=r"the prompt has \d+ tokens, and the model has 64 positions: shorten it"):
        generate(run, LONG)
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"instruction": "say one"}, {"instruction": LONG}])
    with pytest.raises(ConfigError, match=r"asked\.jsonl:2: the prompt has \d+ tokens"):
        predict_file(run, str(asked), tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out.*"))
    run.config.data.max_length = 512
    other = write_jsonl(tmp_path / "other.jsonl", [{"instruction": LONG, "output": "one"}])
    with pytest.raises(DataError, match=r"a row has \d+ tokens, and the model has 64 positions"):
        evaluate(run, str(other))


def test_a_text_to_classify_stays_within_them(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in review_file.read_text().splitlines()]
    method = {"name": "prompt", "num_virtual_tokens": 20}
    data = {"max_length": 512}
    train(settings(model_folders["bert"], rows, tmp_path / "run", "seq_cls", method=method, data=data))
    run = open_run(tmp_path / "run")
    assert len(list(predict(run, ["the film was good"]))) == 1
    with pytest.raises(DataError, match=r"a text has 70 tokens, and the model has 44 positions \(64, of which"):
        list(predict(run, [LONG]))


# ---- what a run says of itself, and hands on ----


def test_train_says_that_nothing_was_learned(
    model_folders: dict[str, Path],
    review_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a base that has learned what is held out, and is then taught something else
    held_out = [r | {"output": "film story actor"} for r in ASKED]
    others = write_jsonl(tmp_path / "others.jsonl", held_out)
    taught = {"max_steps": 20, "batch_size": 16, "learning_rate": 0.02}
    train(settings(model_folders["llama"], held_out, tmp_path / "base", method="full", train=taught))
    models = {"bert": model_folders["bert"], "taught": tmp_path / "base" / "model"}
    for task, data, model, said, more in (
        ("seq_cls", review_file, "bert", "learned nothing: ", ["train.learning_rate=1e-12"]),
        (
            "causal_lm",
            write_jsonl(tmp_path / "asked.jsonl", ASKED),
            "taught",
            "learned nothing: loss not below the base model's, on the held-out rows",
            [f"data.eval={others}", "train.learning_rate=0.1"],
        ),
    ):
        words = ["train", "--model", str(models[model]), "--data", str(data), "--task", task]
        words += ["--output", str(tmp_path / task)]
        for setting in ("train.max_steps=12", "data.max_length=64", *more):
            words += ["--set", setting]
        code, shown = command(capsys, monkeypatch, *words)
        assert code == 0 and said in shown, shown[-900:]


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_what_is_held_against_the_base_is_the_one_evaluation(
    method: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    found = list[tuple[float, float]]()
    config = settings(model_folders["llama"], ASKED, tmp_path / "run", method=method, data={"test_size": 0.5})
    record = train(config, Listener(trained=lambda run: found.append(losses(run))))
    still: dict[str, Any] = {"data": {"test_size": 0.5}, "train": {"learning_rate": 1e-30}}
    record_of_base = train(settings(model_folders["llama"], ASKED, tmp_path / "base", method="lora", **still))
    ((tuned, base),) = found
    assert tuned == record.final["eval_loss"]
    assert base == pytest.approx(record_of_base.final["eval_loss"], rel=1e-5) and base != tuned


def of_sequences(output: Tensor, batch: Batch) -> Tensor:
    """The log-probability of each sequence's labelled tokens, (S,)."""
    assert batch.targets is not None
    return output.new_zeros(len(batch.lengths)).index_add(0, batch.targets[1], output)


def above_the_base(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """-log sigmoid of the log ratio: log 2 an entry where the model is the base."""
    return -logsigmoid(torch.cat(list(values)) - torch.cat(list(reference))).sum()


@pytest.mark.parametrize(("rate", "verdict"), [(1e-2, None), (1e-30, "not below the base")])
def test_a_loss_of_whole_steps_is_compared_with_the_base(
    rate: float, verdict: str | None, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(CAUSAL_LM, step_loss=StepLoss(of_sequences, above_the_base, reference=True))
    monkeypatch.setitem(TASKS, TaskType.CAUSAL_LM, row)
    found = list[tuple[tuple[float, float], str | None]]()
    training = {"learning_rate": rate, "max_steps": 4}
    config = settings(model_folders["llama"], ASKED, tmp_path / "run", data={"test_size": 0.5}, train=training)
    record = train(config, Listener(trained=lambda run: found.append((losses(run), what_is_wrong(run)))))
    (((tuned, base), said),) = found
    assert tuned == record.final["eval_loss"] and base == pytest.approx(math.log(2)) and said == verdict


def test_a_merged_model_writes_conversations_as_training_did(model_folders: dict[str, Path], tmp_path: Path) -> None:
    train(settings(model_folders["llama"], ASKED, tmp_path / "run", data={"template": "alpaca"}))
    merge(open_run(tmp_path / "run"), tmp_path / "merged")
    tok = AutoTokenizer.from_pretrained(tmp_path / "merged")
    words: Any = word_tokenizer()
    ((entry,),) = writer("alpaca", Encoder(words)).entries([conversation("say one", "one two")])
    wanted = "".join(piece.text for piece in entry.pieces)
    talk = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one two"}]
    assert tok.apply_chat_template(talk, tokenize=False) == wanted
    train(settings(model_folders["llama"], ASKED, tmp_path / "full", method="full", data={"template": "alpaca"}))
    assert AutoTokenizer.from_pretrained(tmp_path / "full" / "model").chat_template == tok.chat_template


def test_long_texts_train_whole_and_are_counted(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": " ".join(WORDS[(i + k) % 40] for k in range(100))} for i in range(10)]
    config = settings(model_folders["llama"], rows, tmp_path / "run", data={"test_size": 0.2, "max_length": 16})
    record = train(config)
    assert record.rows.train == 8 * 7 and record.rows.truncated == 0  # 101 tokens: 16, and 15 new ones in each other
    words = ["check", "--model", str(model_folders["llama"]), "--data", config.data.train, "--task", "causal_lm"]
    code, shown = command(capsys, monkeypatch, *words, "--set", "data.max_length=16")  # type: ignore[arg-type]
    assert code == 0 and "windows           all 63  of rows 9" in shown and "window 2 of 7" in shown
