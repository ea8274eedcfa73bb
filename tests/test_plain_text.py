"""Runs on plain text: every token is trained and measured once, per token and per byte, and a text is continued."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from siliang.config import DataConfig, RunConfig
from siliang.data.examples import Text
from siliang.data.messages import conversation
from siliang.data.prepared import EvalRows
from siliang.data.tokens import tokenize
from siliang.peft_api.model import PeftModel
from siliang.run_folder import open_run
from siliang.tasks import CAUSAL_LM
from siliang.train.run import train
from siliang.use.evaluate import evaluate
from siliang.use.generate import generate, how_it_is_asked

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
TEXTS = ["The cat sat on the mat. ", "小猫坐在垫子上。", "Ünïcode naïve café — ", "one two three "]


def bytes_tokenizer(size: int, *, start: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's; with `start` it begins a text with <s>, as Llama's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    own = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=own, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text * 3 for text in TEXTS], trainer)
    if start:
        from tokenizers.processors import TemplateProcessing

        made.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def documents(n: int) -> list[str]:
    return ["".join(TEXTS[(i + k) % 4] for k in range(1 + 7 * i % 13)).strip() for i in range(n)]


@pytest.mark.parametrize("size", [262, 300])
@pytest.mark.parametrize("start", [True, False])
def test_bytes_are_those_of_the_predicted_text(size: int, start: bool) -> None:
    """A tokenizer without a token to begin with cannot predict the first one."""
    tok = bytes_tokenizer(size, start=start)
    texts = documents(12)
    for max_length, stride in ((512, None), (16, None), (16, 5)):
        data = DataConfig(train="x", max_length=max_length, stride=stride)
        found = tokenize([Text(text) for text in texts], tok, data, CAUSAL_LM.data)
        whole = sum(len(text.encode()) for text in texts)
        # a first token may be a part of a character, whose text is then shown as one sign of 3 bytes
        first = 0 if start else sum(len(tok.decode([tok(text)["input_ids"][0]]).encode()) for text in texts)
        assert found.column("bytes").sum() == whole - first
        ids = [tok(text)["input_ids"] for text in texts]
        assert found.predicted == sum(map(len, ids))  # with </s>, without the first
    talk = conversation("say", "小猫 cat")
    answer = tokenize([talk], tok, DataConfig(train="x"), CAUSAL_LM.data)
    assert answer.column("bytes").tolist() == [len("小猫 cat".encode())]


def text_run(folder: Path, start: bool = True, **more: Any) -> RunConfig:
    """A run on plain texts that do not fit max_length."""
    tok, model = bytes_tokenizer(262, start=start), make("llama")
    model.resize_token_embeddings(262)
    model.save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    rows = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in documents(12)])
    data = {"train": str(rows), "max_length": 32, "test_size": 0.25} | more.pop("data", {})
    training = {"max_steps": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-2} | more
    values = {"model": str(folder / "model"), "task": "causal_lm", "method": {"name": "lora", "r": 4}}
    return RunConfig.build(values | {"data": data, "train": training, "output": str(folder / "run")})


@torch.no_grad()
def sliding_window(model: Any, ids: list[int], length: int, shared: int) -> tuple[float, int]:
    """As transformers' guide on perplexity has it: the summed loss of a document, and its predicted tokens."""
    total, count, end = 0.0, 0, 0
    for begin in range(0, len(ids), length - shared):
        stop = min(begin + length, len(ids))
        inputs = torch.tensor([ids[begin:stop]])
        labels = inputs.clone()
        labels[:, : len(labels[0]) - (stop - end)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        total, count, end = total + float(model(inputs, labels=labels).loss) * predicted, count + predicted, stop
        if stop == len(ids):
            return total, count
    return total, count


@pytest.mark.parametrize(("start", "stride"), [(True, None), (False, 9)])
def test_perplexities_are_those_of_sliding_windows(start: bool, stride: int | None, tmp_path: Path) -> None:
    config = text_run(tmp_path, start, data={"stride": stride, "eval": str(tmp_path / "held.jsonl")})
    held = documents(9)[5:]
    write_jsonl(tmp_path / "held.jsonl", [{"text": text} for text in held])
    record = train(config)
    found = evaluate(open_run(tmp_path / "run"))
    tok = AutoTokenizer.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    losses = [sliding_window(model, [*tok(text)["input_ids"], 2], 32, stride or 1) for text in held]
    loss, tokens = (sum(part) for part in zip(*losses, strict=True))
    nbytes = sum(len(text.encode()) for text in held)
    nbytes -= 0 if start else sum(len(tok.decode([tok(text)["input_ids"][0]]).encode()) for text in held)
    expected = {
        "perplexity": math.exp(loss / tokens),
        "byte_perplexity": math.exp(loss / nbytes),
        "bits_per_byte": loss / nbytes / math.log(2),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
        assert record.final[name] == pytest.approx(value, rel=1e-5), name


def test_a_cut_answer_counts_the_bytes_that_are_left() -> None:
    tok = bytes_tokenizer(262, start=True)
    talk = conversation("say", "a" * 100)
    cut = tokenize([talk], tok, DataConfig(train="x", max_length=32), CAUSAL_LM.data)
    kept = int(cut.learned.sum()) - 1  # without </s>
    assert cut.column("lost").tolist() != [0]
    assert cut.column("bytes").tolist() == [len(tok.decode([x for x in cut[0]["labels"] if x > 2]))] and kept > 0
    rows = EvalRows(cut, [talk])
    found = CAUSAL_LM.of_loss(1.5, rows)
    assert found["bits_per_byte"] == pytest.approx(1.5 * cut.predicted / cut.column("bytes").sum() / math.log(2))


def test_a_run_on_texts_continues_them(tmp_path: Path) -> None:
    train(text_run(tmp_path))
    run = open_run(tmp_path / "run")
    said = how_it_is_asked(run.record)
    assert said is not None and "continues the text" in said
    plain = generate(run, "The cat", plain=True, max_new_tokens=8)
    assert generate(run, "The cat", max_new_tokens=8) == plain
    asked = run.model.generate(input_ids=torch.tensor([run.tokenizer("The cat")["input_ids"]]), max_new_tokens=8)
    assert run.tokenizer.decode(asked[0], skip_special_tokens=True) == "The cat" + plain
