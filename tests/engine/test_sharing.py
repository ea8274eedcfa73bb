"""Steps on rows that share their beginnings, against the plain model's own loss on padded rows: values and every
gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from closeness import assert_all_close, assert_close
from stepping import gradients, padded
from test_methods_everywhere import EVERY, SMALL
from tiny import VOCABULARY, without_dropout
from token_sets import token_set
from torch import Tensor, nn
from transformers import Glm4Config, Glm4ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import siliang
from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.data.row_beginnings import RowBeginnings
from siliang.engine.batches import EVERYWHERE, SEPARATE, Sharing, StepCollator
from siliang.engine.order import by_beginnings, evaluation_batches
from siliang.engine.padding import PaddingFree
from siliang.engine.sharing import find_shares
from siliang.engine.step import Engine
from siliang.engine.trial import ModelTrial, Output, Way
from siliang.engine.trial_batch import of_tokens
from siliang.methods import METHODS
from siliang.models.checkpointing import enable_checkpointing
from siliang.tasks import CAUSAL_LM, SEQ_CLS
from tests.engine.test_engine import METHODS as COMMON
from tests.engine.test_engine import SHAPE, model_of

BOTH = EVERYWHERE


def rows_in_a_tree() -> list[dict[str, Any]]:
    """Two branches below one beginning, a row that ends where another goes on, and one of its own."""
    g = torch.Generator().manual_seed(1)

    def some(n: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (n,), generator=g).tolist()

    top, left, right = some(12), some(16), some(17)
    ids = [top + left + some(3), top + left + some(9), top + left, top + right + some(5), some(7), top + right]
    return [{"input_ids": row, "labels": [-100] * 5 + row[5:], "row": i} for i, row in enumerate(ids)]


def family(name: str) -> Any:
    torch.manual_seed(0)
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8))
    if name == "glm4":
        return Glm4ForCausalLM(Glm4Config(**SHAPE, head_dim=8, pad_token_id=0))
    return model_of(name)


def step(model: nn.Module, engine: Engine, *, rows_at_once: int = 8, most: int | None = None) -> tuple[Tensor, Any]:
    """The mean loss of a step, backward included, and its batches."""
    collate = StepCollator(
        PadCollator(0), CAUSAL_LM, rows_at_once, most, packed=engine.padding is not None, shares=engine.shares
    )
    batches: list[Batch] = collate(rows_in_a_tree())["batches"]
    return engine.run(model, batches, float(sum(b.weight for b in batches))), batches


def compare(model: Any, config: Any, *, checkpointing: bool = False, plain: bool = True) -> Engine:
    """The engine, if its steps have the plain step's loss and gradients.

    Args:
        plain: Of the model itself; otherwise, the engine's without sharing, which has no loss terms of the method.
    """
    if config is not None:
        model = siliang.get_peft_model(model, type(config)(**vars(config) | {"task_type": "CAUSAL_LM"}))
        for p in model.parameters():
            if p.requires_grad:  # an adapter's start has gradients of zero
                p.data += 0.02 * torch.randn_like(p)
    without_dropout(model)
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    if plain:
        expected = model(**padded(rows_in_a_tree())).loss
        expected.backward()
    else:
        apart = Engine(model, CAUSAL_LM, share=SEPARATE)
        expected, _ = step(model, apart)
        apart.close()
    wanted = gradients(model)
    engine = Engine(model, CAUSAL_LM)
    for rows_at_once, most in ((8, None), (2, None), (8, 60)):
        found, batches = step(model, engine, rows_at_once=rows_at_once, most=most)
        assert any(batch.tree is not None for batch in batches) == engine.shares.training
        assert_close(found, expected.detach())
        assert_all_close(gradients(model), wanted)
    engine.close()
    return engine


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "granite", "glm4", "chatglm3", "gpt2", "bloom")


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    targets = "all-linear" if name in ("granite", "glm4", "qwen3") else None
    config = siliang.LoraConfig(init_lora_weights=False, target_modules=targets)
    assert compare(family(name), config).shares == BOTH


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("method", COMMON)
def test_common_methods(name: str, method: str) -> None:
    assert compare(family(name), COMMON[method]).shares == BOTH


def test_a_prefix_before_a_window() -> None:
    assert compare(family("mistral"), COMMON["prefix_tuning"]).shares == BOTH


@pytest.mark.parametrize("method", ["lora", "full", "prefix_tuning", "prompt_tuning"])
def test_with_gradient_checkpointing(method: str) -> None:
    assert compare(family("llama"), COMMON[method], checkpointing=True).shares == BOTH


OWN_ROWS = ("poly", "alora", "multitask_prompt_tuning")  # which compute each row in its own way
OVER_BATCHES = ("lily", "velora", "velora_once")  # take a mean over each batch, and are not packed


@pytest.mark.parametrize("method", EVERY)
def test_every_method(method: str) -> None:
    settings = {key: value for key, value in SMALL.get(method, {}).items() if not key.endswith("dropout")}
    config = METHODS[settings.pop("name", method)].config
    assert config is not None
    if method in (*OWN_ROWS, *OVER_BATCHES):
        model = siliang.get_peft_model(family("llama"), config(task_type="CAUSAL_LM", **settings))
        engine = Engine(model, CAUSAL_LM)
        assert engine.shares == SEPARATE and engine.notes
        assert (engine.padding is not None) == (method in OWN_ROWS)
        engine.close()
        return
    assert compare(family("llama"), config(**settings), plain=False).shares == BOTH


def test_virtual_tokens_are_shared_where_texts_share_nothing() -> None:
    model = siliang.get_peft_model(
        family("llama"), siliang.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    )
    model.train()
    rows = [{"input_ids": [i, 7, 8, i], "labels": [-100, 7, 8, i], "row": i} for i in range(5, 9)]
    expected = model(**padded(rows)).loss
    expected.backward()
    wanted, engine, seen = gradients(model), Engine(model, CAUSAL_LM), list[int]()
    assert engine.padding is not None
    layer = engine.padding.layers[0]
    handle = layer.register_forward_hook(lambda layer, args, output: seen.append(args[0].shape[1]))
    (batch,) = StepCollator(PadCollator(0), CAUSAL_LM, 8, shares=engine.shares)(rows)["batches"]
    found = engine.run(model, [batch], batch.weight)
    handle.remove()
    assert seen == [20 + 4 * 4]
    assert_close(found, expected.detach())
    assert_all_close(gradients(model), wanted)


def test_dropout_turns_it_off_in_training() -> None:
    config = siliang.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1)
    engine = Engine(siliang.get_peft_model(family("llama"), config), CAUSAL_LM)
    assert engine.shares == Sharing(training=False, evaluation=True)
    (note,) = engine.notes
    assert note.startswith("shared beginnings are computed for each row in training: there is something random (")
    collate = StepCollator(PadCollator(0), CAUSAL_LM, 8, shares=engine.shares)
    assert all(batch.tree is None for batch in collate(rows_in_a_tree())["batches"])


def test_noise_turns_it_off_in_training() -> None:
    engine = Engine(family("llama"), CAUSAL_LM, neftune_alpha=5.0)
    assert engine.shares == Sharing(training=False, evaluation=True) and "neftune_alpha" in engine.notes[0]


def test_an_encoder_shares_nothing() -> None:
    engine = Engine(model_of("bert"), SEQ_CLS)
    assert engine.padding is not None and engine.shares == SEPARATE


def test_a_layer_that_looks_ahead_is_found() -> None:
    """Whatever does so: the trial compares."""
    model = family("llama")

    def mix(module: nn.Module, args: Any, output: Any) -> Any:
        layout = padding.layout
        parts = layout.by_sequence(output) if layout is not None else list(output.unsqueeze(1).flatten(0, 1))
        mixed = [part + part.mean(-2, keepdim=True) for part in parts]
        return layout.join(mixed) if layout is not None else torch.cat(mixed)

    padding = PaddingFree(model)
    model.model.layers[0].mlp.register_forward_hook(mix)

    def run(batch: Batch, way: Way) -> Output:
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        with padding.packed(batch.lengths, batch.width, tree=way.tree):
            return Output([of_tokens(model(**inputs).logits, batch)])

    trial = ModelTrial(model, model, CAUSAL_LM, run)
    with trial.running():
        shares, (note,) = find_shares(trial, padding)
    assert shares == SEPARATE and "other results than separate rows" in note


def test_the_cache_of_frozen_layers_holds_whole_rows() -> None:
    config = siliang.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, layers_to_transform=[1])
    model = siliang.get_peft_model(family("llama"), config)
    model.train()
    expected = model(**padded(rows_in_a_tree())).loss
    expected.backward()
    wanted = gradients(model)
    splits = ((8, None), (3, None), (2, None), (8, 60))
    for filling in splits:
        engine = Engine(model, CAUSAL_LM, keep_frozen=True)
        assert engine.padding is not None and engine.padding.frozen is not None
        hits = 0
        for number, (rows_at_once, most) in enumerate((filling, *splits)):
            found, batches = step(model, engine, rows_at_once=rows_at_once, most=most)
            hits += len(batches) if number else 0
            assert any(batch.tree is not None for batch in batches)
            assert_close(found, expected.detach())
            assert_all_close(gradients(model), wanted)
            assert engine.padding.frozen.hits == hits
        engine.close()


def test_in_bf16() -> None:
    """Shared or separate, the gradients are off by what a layer rounds to bf16 from its end to its start."""
    model = siliang.get_peft_model(family("llama"), siliang.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.train()
    true = None
    for share, enabled in ((SEPARATE, False), (SEPARATE, True), (EVERYWHERE, True)):
        engine = Engine(model, CAUSAL_LM, share=share)
        collate = StepCollator(PadCollator(0), CAUSAL_LM, 8, shares=engine.shares)
        batches = collate(rows_in_a_tree())["batches"]
        engine.run(model, batches, 1.0, autocast=lambda on=enabled: torch.autocast("cpu", torch.bfloat16, enabled=on))
        found = gradients(model)
        true = found if true is None else true
        assert_all_close({name: g.bfloat16() for name, g in found.items()}, true, roundings=8)
        engine.close()


def test_an_evaluation_takes_rows_that_begin_alike_together() -> None:
    rows = [rows_in_a_tree()[i] for i in (0, 4, 3, 1, 5, 2)]

    order = by_beginnings(token_set([row["input_ids"] for row in rows]))
    assert sorted(order) == list(range(6))
    pairs = [{rows[i]["row"], rows[j]["row"]} for i, j in itertools.pairwise(order)]
    assert ({3, 5} in pairs and {0, 1} in pairs) or {0, 2} in pairs
    assert list(by_beginnings(token_set([[i] * 40 for i in (5, 3, 4)]))) == [0, 1, 2]


def test_every_evaluation_of_a_run_has_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row["input_ids"] for row in rows_in_a_tree()]
    tokens = token_set(rows)
    collate, calls = StepCollator(PadCollator(0), CAUSAL_LM, 2, shares=BOTH), list[object]()
    made = RowBeginnings.of
    monkeypatch.setattr(RowBeginnings, "of", lambda of: calls.append(of) or made(of))

    def entries(**of: int) -> list[tuple[int, ...]]:
        return [batch.entries for batch in evaluation_batches(tokens, collate, **of)]

    alone = entries()
    assert alone == entries() and sorted(i for batch in alone for i in batch) == list(range(len(rows)))
    order = [i for batch in alone for i in batch]
    shared = [entries(ranks=2, rank=rank, step=4) for rank in (0, 1)]
    assert sorted(i for batches in shared for batch in batches for i in batch if i >= 0) == list(range(len(rows)))
    assert {i for batches in shared for i in batches[0]} <= set(order[:4])
    assert len(calls) == 1


def test_it_can_be_turned_off() -> None:
    engine = Engine(family("llama"), CAUSAL_LM, share=SEPARATE)
    assert engine.shares == SEPARATE and not engine.notes


def test_rows_that_share_are_in_one_batch() -> None:
    collate = StepCollator(PadCollator(0), CAUSAL_LM, 8, 60, shares=BOTH)
    batches = collate(rows_in_a_tree())["batches"]
    assert sum(batch.tokens for batch in batches) == sum(len(row["input_ids"]) for row in rows_in_a_tree())
    assert all(batch.distinct_tokens <= 60 for batch in batches) and len(batches) == 2
    halves = [half for batch in batches for half in batch.halves()]
    assert any(half.tree is not None for half in halves)
    assert sum(half.weight for half in halves) == sum(batch.weight for batch in batches)


def test_rows_that_share_nothing_are_split_as_without_it() -> None:
    rows = [{"input_ids": [i] * (5 + 3 * i), "labels": [i] * (5 + 3 * i), "row": i} for i in range(9)]
    one, other = (
        StepCollator(PadCollator(0), CAUSAL_LM, 4, 50, shares=shares)([dict(row) for row in rows])["batches"]
        for shares in (BOTH, SEPARATE)
    )
    assert [batch.lengths for batch in one] == [batch.lengths for batch in other]
    assert all(batch.tree is None for batch in one)


def test_no_batch_has_more_tokens_than_it_may() -> None:
    """Within a batch a span may save too little, and its tokens are computed in each row."""
    g = torch.Generator().manual_seed(0)

    def some(n: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (n,), generator=g).tolist()

    rows = []
    for _ in range(12):
        top = some(6)  # of four rows: it saves 18 tokens in a step, and 6 or 12 in a batch of two or three of them
        rows += [{"input_ids": ids, "labels": ids, "row": 0} for ids in (top + some(4) for _ in range(4))]
    batches = StepCollator(PadCollator(0), CAUSAL_LM, 48, 40, shares=BOTH)(rows)["batches"]
    assert max(batch.distinct_tokens for batch in batches) <= 40
    assert sum(len(batch.lengths) for batch in batches) == 48 and any(batch.tree is not None for batch in batches)
