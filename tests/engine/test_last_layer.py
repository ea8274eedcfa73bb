"""The last layer computes what is read: the same losses and gradients, and what decides that."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch
from closeness import assert_all_close, assert_close
from stepping import gradients, rows_for
from tiny import TASK, VOCABULARY, make, without_dropout
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

import siliang
from siliang.config import EmbeddingConfig
from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.engine.padding import PaddingFree
from siliang.engine.step import Engine
from siliang.models.checkpointing import enable_checkpointing
from siliang.tasks import CAUSAL_LM, SEQ_CLS, TASKS, Task
from siliang.tasks.embedding import with_vectors
from siliang.types import TaskType

PAD = 0
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
}


def batch_for(task: Task, *, ends_with_padding: bool = False) -> Batch:
    rows = rows_for(task)
    if ends_with_padding:  # as where one token is both the padding and the end of a text
        rows[0]["input_ids"][-1] = rows[2]["input_ids"][-1] = PAD
    (batch,) = StepCollator(PadCollator(PAD), task, 8)(rows)["batches"]
    return batch


def both_ways(engine: Engine, model: nn.Module, batch: Batch) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients with the last layer computing what is read, and with it computing all tokens."""
    reads, found = engine._reads, []
    assert reads is not None and reads(batch) is not None
    for one in (reads, None):
        engine._reads = one
        with engine.loss(model, batch) as loss:
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    engine._reads = reads
    return found


def assert_same(found: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
    (loss, gradients_), (expected, wanted) = found
    assert wanted
    assert_close(loss, expected)
    assert_all_close(gradients_, wanted)


def count_rows(model: nn.Module, name: str) -> list[int]:
    """The tokens that the module of the last layer of this name computes, call by call."""
    seen: list[int] = []
    module = [m for path, m in model.named_modules() if path.endswith(name)][-1]
    module.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1].numel()))
    return seen


def test_what_is_not_read_is_not_computed() -> None:
    """Of 27 tokens 14 predict a label; a classifier reads one of each of the 5 texts."""
    for name, module, read in (("llama", "mlp.down_proj", 14), ("bert", "output.dense", 5)):
        task = TASKS[TaskType(TASK[name])]
        model = make(name).train()
        batch, engine = batch_for(task), Engine(model, task)
        seen = count_rows(model, module)
        with engine.loss(model, batch) as loss:
            loss.backward()
        assert seen == [read] and sum(batch.lengths) == 27
        engine.close()


LORA = {"lora_dropout": 0.0, "init_lora_weights": False, "target_modules": "all-linear"}
METHODS: dict[str, Any] = {
    "lora": siliang.LoraConfig(**LORA),
    "dora": siliang.LoraConfig(**LORA, use_dora=True),
    "adaption": siliang.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
    "poly": siliang.PolyConfig(init_weights=False, n_tasks=3, r=2),
    "adalora": siliang.AdaLoraConfig(init_lora_weights=False, init_r=3, target_r=2, total_step=10),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_see_more_than_a_linear_layer(method: str) -> None:
    """test_engine compares the others with transformers' own step, in which the last layer computes all tokens."""
    config = METHODS[method]
    model = siliang.get_peft_model(make("llama"), type(config)(**vars(config) | {"task_type": "CAUSAL_LM"}))
    for p in model.parameters():
        if p.requires_grad and not p.any():  # a gate
            nn.init.constant_(p, 0.3)
    without_dropout(model)
    batch = batch_for(CAUSAL_LM)
    if method == "poly":
        model.eval()  # which draws its mixture in training
        batch.inputs["task_ids"] = torch.arange(len(batch.lengths)) % 3
    engine = Engine(model, CAUSAL_LM)
    assert_same(both_ways(engine, model, batch))
    assert not any("last layer" in note for note in engine.notes)


@pytest.mark.parametrize("kind", ["llama", "classes"])
@pytest.mark.parametrize("prompts", [False, True])
def test_with_shared_beginnings(kind: str, prompts: bool) -> None:
    model, task = (make("llama"), CAUSAL_LM) if kind == "llama" else (decoder_of_classes("llama"), SEQ_CLS)
    if prompts:
        config = siliang.PromptTuningConfig(task_type=task.adapter_type, num_virtual_tokens=3)
        model = siliang.get_peft_model(model, config)
    engine = Engine(model.train(), task)
    begin = list(range(5, 45))
    rows = [{"input_ids": [*begin, 50 + i, 60 + i, *[70 + i] * i]} for i in range(4)]
    for i, row in enumerate(rows):
        ids = row["input_ids"]
        row["labels"] = [-100] * 36 + ids[36:] if kind == "llama" else i % 3
    collate = StepCollator(PadCollator(PAD), task, 8, shares=engine.shares)
    (batch,) = collate(rows)["batches"]
    assert batch.tree is not None
    found = both_ways(engine, model, batch)
    assert_same(found)
    batch.tree = None
    assert_same([found[0], both_ways(engine, model, batch)[1]])


@pytest.mark.parametrize("name", ["llama", "bloom", "bert"])
@pytest.mark.parametrize("how", [{"checkpointing": True}, {"memory_budget": 10**6}, {"outside": True}])
def test_recomputing(name: str, how: dict[str, Any]) -> None:
    task = TASKS[TaskType(TASK[name])]
    model = siliang.get_peft_model(make(name), siliang.LoraConfig(task_type=task.adapter_type, **LORA)).train()
    without_dropout(model)
    if outside := bool(how.get("outside")):
        enable_checkpointing(model)
    engine, batch = Engine(model, task, **({} if outside else how)), batch_for(task)
    seen = count_rows(model, {"llama": "gate_proj", "bloom": "dense_h_to_4h", "bert": "intermediate.dense"}[name])
    for _ in range(2):  # the first is measured
        seen.clear()
        found = both_ways(engine, model, batch)
        assert_same(found)
    read = 5 if name == "bert" else 14
    assert seen == [read, read, 27, 27]  # each way in the forward pass and again
    engine.close()


def test_autocast() -> None:
    model = siliang.get_peft_model(make("llama"), siliang.LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    engine, batch = Engine(model, CAUSAL_LM), batch_for(CAUSAL_LM)
    without_dropout(model)
    with torch.autocast("cpu", torch.bfloat16):
        (loss, found), (expected, wanted) = both_ways(engine, model, batch)
    assert abs(float(loss) - float(expected)) < 2e-2 * float(expected)
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-4, name


def test_half_precision_weights() -> None:
    for name in ("llama", "bert"):
        task = TASKS[TaskType(TASK[name])]
        engine = Engine(make(name).bfloat16(), task)
        assert engine._reads is not None and not engine.notes


def test_memory_of_the_last_layer_is_taken_to_be_that_of_the_one_before() -> None:
    """Another batch may have more labels."""
    model = make("llama").train()
    engine = Engine(model, CAUSAL_LM, memory_budget="auto")
    with engine.loss(model, batch_for(CAUSAL_LM)) as loss:
        loss.backward()
    first, last = engine.recompute.bytes_per_token
    assert first == last


# ---- what is read ----


def place_of(engine: Engine) -> str | None:
    """The name of the place that is read."""
    reads = engine._reads
    if reads is None:
        return None
    place = reads.args[0] if isinstance(reads, partial) else reads
    return place.func.__name__ if isinstance(place, partial) else place.__name__


def decoder_of_classes(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3))
    config: Any = make("gpt2").config
    config.pad_token_id, config.num_labels = PAD, 3
    return GPT2ForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("prompts", [False, True])
def test_a_decoder_of_classes_reads_the_last_token_that_is_not_padding(kind: str, prompts: bool) -> None:
    """As transformers does, even where the padding token ends a text."""
    model: Any = decoder_of_classes(kind)
    if prompts:
        model = siliang.get_peft_model(model, siliang.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    without_dropout(model)
    model.train()
    engine = Engine(model, SEQ_CLS)
    assert place_of(engine) == "_last_but"
    assert_same(both_ways(engine, model, batch_for(SEQ_CLS, ends_with_padding=True)))


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_vectors(kind: str, pooling: Any, prompts: bool) -> None:
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(**SMALL)) if kind == "encoder" else LlamaModel(LlamaConfig(**SMALL))
    if prompts:
        config = siliang.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
        model = siliang.get_peft_model(model, config)
    task = with_vectors(TASKS[TaskType.EMBEDDING], EmbeddingConfig(pooling=pooling))
    without_dropout(model)
    engine = Engine(model.train(), task)
    first = "_first" if not prompts else "_first_of_text"
    assert engine.padding is not None and not engine.notes
    # the texts of the trial end with their padding token, which is read as any other
    assert place_of(engine) == {"cls": first, "last": "_last", "mean": None}[pooling]
    if pooling == "mean":
        return
    ids = torch.randint(5, VOCABULARY, (6,)).tolist()
    row = {"input_ids": ids, "sequences": [4, 2], "labels": 0.0, "labels_low": 0.0}
    (batch,) = StepCollator(PadCollator(PAD), task, 8)([row, row | {"input_ids": ids[::-1]}])["batches"]
    reads, found = engine._reads, []
    for one in (reads, None):
        engine._reads = one
        with engine.values(model, batch) as values:
            values[:, -32:].square().sin().sum().backward()
        found.append((values.detach(), gradients(model)))
    assert_same(found)


@pytest.mark.parametrize("name", ["TOKEN_CLS", "QUESTION_ANS"])
def test_a_head_for_each_token_reads_all(name: str) -> None:
    from transformers import BertForQuestionAnswering, BertForTokenClassification

    kind: Any = {"TOKEN_CLS": BertForTokenClassification, "QUESTION_ANS": BertForQuestionAnswering}[name]
    engine = Engine(kind(BertConfig(**SMALL)), TASKS[TaskType(name)])
    assert engine._reads is None and not engine.notes


def test_where_nearly_all_is_read_all_is_computed() -> None:
    engine = Engine(make("llama"), CAUSAL_LM)
    rows = [{"input_ids": [5] * 30, "labels": [5] * 30}]
    (batch,) = StepCollator(PadCollator(PAD), CAUSAL_LM, 8)(rows)["batches"]
    assert engine._reads is not None and engine._reads(batch) is None and engine._reads(batch.dummy()) is None


# ---- what does not allow it ----


class Shift(nn.Module):
    """Adds to each token what the one before it has in its sequence."""

    def __init__(self, inner: nn.Module, made: list[PaddingFree]) -> None:
        super().__init__()
        self.inner, self.gate, self.made = inner, nn.Parameter(torch.zeros(())), made

    def forward(self, x: Tensor) -> Tensor:
        layout = self.made[0].layout if self.made else None
        if layout is None or x.shape[1] != layout.tokens:
            shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        else:
            shifted = layout.join([torch.cat([part[:1] * 0, part[:-1]]) for part in layout.by_sequence(x)])
        return self.inner(x) + self.gate * shifted


def test_a_layer_that_mixes_tokens_behind_its_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its part is zero, as many are at the beginning of a training."""
    model, made = cast(Any, make("llama")), list[PaddingFree]()
    attach = PaddingFree.attach
    monkeypatch.setattr(PaddingFree, "attach", lambda self: (made.append(self), attach(self)))
    layer = model.model.layers[-1]
    layer.mlp = Shift(layer.mlp, made)
    engine = Engine(model, CAUSAL_LM)
    assert engine._reads is None and layer.mlp.gate.item() == 0.0
    (note,) = engine.notes
    assert note.startswith("the last layer computes all tokens: some tokens alone give other results than all of them")


def test_activated_lora_counts_tokens() -> None:
    config = siliang.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    engine = Engine(siliang.get_peft_model(make("llama"), config), CAUSAL_LM)
    assert engine._reads is None
    assert engine.notes[-1] == "the last layer computes all tokens: aLoRA counts the tokens of each text"


def test_the_trial_leaves_no_trace() -> None:
    model = siliang.get_peft_model(make("llama"), siliang.LoraConfig(task_type="CAUSAL_LM")).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    engine = Engine(model, CAUSAL_LM)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    engine.close()
    assert not any("forward" in vars(m) for m in model.modules())
