"""The trial of a model: what it runs, what it compares, and what it leaves behind."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import TASK, VOCABULARY, make, without_dropout
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import siliang
from siliang.config import EmbeddingConfig
from siliang.engine.batches import SEPARATE, Sharing
from siliang.engine.step import Engine
from siliang.engine.trial import modes
from siliang.engine.trial_batch import BEGIN, LENGTHS, trial_batch
from siliang.models.introspect import layer_stack
from siliang.tasks import CAUSAL_LM, SEQ_CLS, TASKS
from siliang.tasks.embedding import with_vectors
from siliang.types import TaskType

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", ["CAUSAL_LM", "SEQ_CLS", "EMBEDDING", "PREFERENCE", "TOKEN_CLS"])
@pytest.mark.parametrize("vocabulary", [4, 8, VOCABULARY])
def test_the_sequences(name: str, vocabulary: int) -> None:
    batch = trial_batch(TASKS[TaskType(name)], vocabulary, 3)
    ids = batch.inputs["input_ids"]
    assert set(batch.lengths) == set(LENGTHS) and ids.min() >= 0 and ids.max() < vocabulary
    assert (ids == 3).any() and int(ids[0, batch.lengths[0] - 1]) == 3
    assert ids[0, :BEGIN].tolist() == ids[2, :BEGIN].tolist()
    assert all(3 not in row[: n - 1] for row, n in zip(ids.tolist(), batch.lengths, strict=True))


def passes_of(model: Any, task: Any, **how: Any) -> int:
    """How often an engine runs the model's layers before its first step."""
    seen: list[int] = []
    base = model.get_base_model() if isinstance(model, siliang.PeftModel) else model
    handle = layer_stack(base)[0].register_forward_pre_hook(lambda *_: seen.append(1))
    Engine(model, task, **how).close()
    handle.remove()
    return len(seen)


def test_how_often_the_model_runs() -> None:
    """Once by itself, and once in each way that is compared; an encoder shares nothing, and a mean reads all tokens."""
    lora = siliang.LoraConfig(task_type=TaskType.CAUSAL_LM, init_lora_weights=False, lora_dropout=0.0)
    model = siliang.get_peft_model(make("llama"), lora)
    assert passes_of(model, CAUSAL_LM) == 5  # plain, packed, shared, in training mode, the last layer
    assert passes_of(model, CAUSAL_LM, share=Sharing(evaluation=True), gradients=False) == 4
    assert passes_of(model, CAUSAL_LM, packing=False) == 2  # with all logits, and without
    assert passes_of(make("bert"), SEQ_CLS) == 3
    vectors = with_vectors(TASKS[TaskType.EMBEDDING], EmbeddingConfig(pooling="mean"))
    assert passes_of(BertModel(BertConfig(**SMALL)), vectors) == 2


class Wrong(torch.autograd.Function):
    """Does nothing. Its gradient is half of the right one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / 2


def wrong_for(layer: nn.Module, tokens: Any) -> None:
    """Makes the feed-forward part's gradient wrong where it computes such a number of packed tokens."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return Wrong.apply(output) if output.shape[0] == 1 and tokens(output.shape[1]) else output

    layer.register_forward_hook(hook)


ALL = sum(LENGTHS)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_wrong_gradient_of_shared_beginnings_is_found(how: str) -> None:
    model: Any = make("llama")
    wrong_for(model.model.layers[0].mlp, lambda n: n == ALL - BEGIN)
    if how == "lora":
        config = siliang.LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"], lora_dropout=0.0)
        model = siliang.get_peft_model(model, config)
    engine = Engine(model.train(), CAUSAL_LM)
    (note,) = engine.notes
    assert engine.padding is not None and engine.shares == SEPARATE and engine._reads is not None
    assert note.startswith("shared beginnings are computed for each row: they give other gradients than separate rows")
    engine.close()
    engine = Engine(model, CAUSAL_LM, gradients=False)  # an evaluation has none
    assert engine.shares.evaluation and not engine.notes


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_wrong_gradient_of_the_last_layer_is_found(name: str) -> None:
    model: Any = make(name).train()
    without_dropout(model)
    last = model.model.layers[-1].mlp if name == "llama" else model.bert.encoder.layer[-1].intermediate
    wrong_for(last, lambda n: n < ALL - BEGIN)
    engine = Engine(model, TASKS[TaskType(TASK[name])])
    (note,) = engine.notes
    assert engine.padding is not None and engine._reads is None
    assert note.startswith("the last layer computes all tokens: some tokens alone give other gradients than all")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_gradient_of_packed_rows_is_found(dtype: torch.dtype) -> None:
    model: Any = make("llama").to(dtype).train()
    wrong_for(model.model.layers[0].mlp, lambda n: True)
    engine = Engine(model, CAUSAL_LM)
    assert engine.padding is None
    assert engine.notes[0].startswith("packing is off: packed rows give other gradients than padded ones (by 0.")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["nothing", "a token", "a value"])
def test_one_wrong_token_of_packed_rows_is_found(how: str, dtype: torch.dtype) -> None:
    """One that is read, of fourteen, has the output of another one, or its value in the attention."""
    model: Any = make("llama").to(dtype).train()

    def other_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output[:, [0, 1, 1, *range(3, output.shape[1])]] if output.shape[0] == 1 else output

    layer = model.model.layers[-1]
    if how != "nothing":
        (layer.mlp if how == "a token" else layer.self_attn.v_proj).register_forward_hook(other_output)
    engine = Engine(model, CAUSAL_LM)
    assert (engine.padding is not None) == (how == "nothing"), engine.notes
    if how != "nothing":
        assert re.match("packing is off: packed rows give other (results|gradients) than padded ones", engine.notes[0])


def test_where_only_the_trained_weights_gradient_is_wrong() -> None:
    """What goes through the layers is right."""
    model: Any = make("llama").requires_grad_(False)
    mlp: Any = model.model.layers[0].mlp
    mlp.gate = nn.Parameter(torch.ones(()))

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        shared = output.shape[:2] == (1, ALL - BEGIN)
        return output * (Wrong.apply(module.gate) if shared else module.gate)

    mlp.register_forward_hook(hook)
    engine = Engine(model.train(), CAUSAL_LM)
    assert engine.shares == SEPARATE and "other gradients" in engine.notes[0]


def test_each_module_is_in_its_own_mode_again() -> None:
    model = siliang.get_peft_model(make("bert"), siliang.LoraConfig(task_type=TaskType.SEQ_CLS)).train()
    base: Any = model.get_base_model()
    frozen = base.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert not all(before.values())
    engine = Engine(model, SEQ_CLS, keep_frozen=True)
    assert {name: module.training for name, module in model.named_modules()} == before
    engine.close()
    with modes(model, training=True):
        assert frozen.training
    assert not frozen.training


def test_gradients_of_a_training_stay() -> None:
    model: Any = make("llama").train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    Engine(model, CAUSAL_LM)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
