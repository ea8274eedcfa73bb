"""A loss of whole optimizer steps: the same gradient whatever batches and ranks share the step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_all_close
from stepping import gradients
from tiny import ENCODER, llama, without_dropout
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from siliang import LoraConfig, TaskType, get_peft_model
from siliang.config import TrainConfig
from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.data.spec import LABELS, NUMBERS
from siliang.engine.batches import StepCollator
from siliang.engine.step import Engine
from siliang.engine.whole_step import ByEntry, keep_reference, reference_of
from siliang.tasks import CAUSAL_LM, SEQ_CLS, StepLoss, Task
from siliang.tasks.preference import PREFERENCE
from siliang.types import ConfigError, DataError

BETA = 0.1


def scores(output: Any, batch: Batch) -> Tensor:
    """(S, C)."""
    return output.logits


def contrast(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Each entry's first sequence against the second ones of all."""
    both = torch.stack(list(values))
    return F.cross_entropy(both[:, 0] @ both[:, 1].T, torch.arange(len(both)), reduction="sum")


def of_sequences(output: Tensor, batch: Batch) -> Tensor:
    """The log-probability of each sequence's labelled tokens, (S,)."""
    assert batch.targets is not None
    return output.new_zeros(len(batch.lengths)).index_add(0, batch.targets[1], output)


def dpo(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Rafailov et al. 2023, equation 7: -log sigmoid(beta (log ratio of the chosen - log ratio of the rejected))."""
    ratios = torch.stack(list(values)) - torch.stack(list(reference))
    return -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).sum()


def pairs(length: int, target_length: int) -> dict[str, Any]:
    return {"input_ids": [1] * 2 * length, "sequences": [length, length]}


def labelled_pairs(length: int, target_length: int) -> dict[str, Any]:
    return pairs(length, target_length) | {"labels": [1] * 2 * length}


CONTRAST: Task = replace(
    SEQ_CLS,
    synthetic_row=pairs,
    loss=None,
    step_loss=StepLoss(scores, contrast),
    data=replace(SEQ_CLS.data, columns={"input_ids": NUMBERS}, sequences=True),
)
DPO: Task = replace(
    CAUSAL_LM,
    synthetic_row=labelled_pairs,
    step_loss=StepLoss(of_sequences, dpo, reference=True),
    data=replace(CAUSAL_LM.data, columns={"input_ids": NUMBERS, "labels": LABELS}, sequences=True),
)


def rows(n: int, *, labelled: bool = False) -> list[dict[str, Any]]:
    """Entries of two sequences of unlike lengths."""
    found: list[dict[str, Any]] = []
    for i in range(n):
        lengths = [3 + (5 * i) % 7, 4 + (3 * i) % 5]
        ids = [5 + (7 * i + 3 * j) % 100 for j in range(sum(lengths))]
        row: dict[str, Any] = {"input_ids": ids, "sequences": lengths, "entry": i}
        if labelled:  # of each sequence the first two tokens are a prompt
            starts = {0, 1, lengths[0], lengths[0] + 1}
            row["labels"] = [-100 if at in starts else token for at, token in enumerate(ids)]
        found.append(row)
    return found


def bert() -> nn.Module:
    """An encoder whose scores are of the order of 1: the gradients of small ones cancel."""
    sizes: dict[str, Any] = ENCODER
    return BertForSequenceClassification(BertConfig(**sizes, initializer_range=0.3))


def lora(base: nn.Module, task_type: TaskType, *, dropout: bool = False) -> Any:
    torch.manual_seed(0)
    if not dropout:
        without_dropout(base)
    model = get_peft_model(base, LoraConfig(task_type=task_type, r=4, init_lora_weights=False))
    return model.train()


def batches(engine: Engine, task: Task, made: list[dict[str, Any]], rows_at_once: int) -> list[Batch]:
    collate = StepCollator(PadCollator(0), task, rows_at_once, packed=engine.padding is not None)
    return collate([dict(row) for row in made])["batches"]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("task", ["contrast", "dpo"])
def test_any_batches_give_the_same_gradient(task: str, packing: bool) -> None:
    row, base, kind = (CONTRAST, bert, TaskType.SEQ_CLS) if task == "contrast" else (DPO, llama, TaskType.CAUSAL_LM)
    model, made = lora(base(), kind), rows(6, labelled=task == "dpo")
    engine = Engine(model, row, packing=packing)
    assert (engine.padding is not None) == packing
    found: list[tuple[float, dict[str, Tensor]]] = []
    for rows_at_once in (6, 2, 1):
        step = batches(engine, row, made, rows_at_once)
        assert [len(batch) for batch in step] == [rows_at_once] * (6 // rows_at_once)
        assert sum(batch.weight for batch in step) == 6
        found.append((float(engine.run(model, step, 6.0)), gradients(model)))
    engine.close()
    expected, wanted = found[0]
    assert wanted and expected > 0
    for loss, grads in found[1:]:
        assert loss == pytest.approx(expected, rel=1e-5)
        assert_all_close(grads, wanted)


def test_ranks_share_a_step() -> None:
    """Each rank has its own entries and the values of all; the mean of their gradients is that of one rank."""
    model, made = lora(bert(), TaskType.SEQ_CLS), rows(6)
    engine = Engine(model, CONTRAST)
    alone = float(engine.run(model, batches(engine, CONTRAST, made, 2), 6.0)), gradients(model)
    shares = [made[:2], made[2:]]
    values: list[ByEntry] = []

    def keep(own: ByEntry) -> list[ByEntry]:
        values.append(own)
        return [own, own]

    for share in shares:
        engine.run(model, batches(engine, CONTRAST, share, 2), 3.0, gather=keep)
    model.zero_grad()
    losses: list[float] = []
    sums: dict[str, Tensor] = {}
    for share in shares:
        losses.append(float(engine.run(model, batches(engine, CONTRAST, share, 2), 3.0, gather=lambda own: values)))
        for name, grad in gradients(model).items():
            sums[name] = sums[name] + grad / 2 if name in sums else grad / 2
    engine.close()
    assert sum(losses) / 2 == pytest.approx(alone[0], rel=1e-5)
    assert_all_close(sums, alone[1])


def test_the_second_run_of_a_batch_has_the_dropout_of_the_first() -> None:
    model, made = lora(bert(), TaskType.SEQ_CLS, dropout=True), rows(4)
    engine = Engine(model, CONTRAST)
    step = batches(engine, CONTRAST, made, 2)
    torch.manual_seed(3)
    engine.run(model, step, 4.0)
    found = gradients(model)
    torch.manual_seed(3)
    kept = []
    for batch in step:  # as one graph
        with engine.values(model, batch) as values:
            kept.append((batch.entries, values))
    parts = {i: part for entries, values in kept for i, part in zip(entries, values.split([2, 2]), strict=True)}
    (contrast([parts[i] for i in sorted(parts)], []) / 4).backward()
    engine.close()
    assert_all_close(found, gradients(model))


def test_dpo_is_the_formula() -> None:
    """Beside the formula in plain torch, on padded rows and all logits."""
    model, made = lora(llama(), TaskType.CAUSAL_LM), rows(3, labelled=True)
    engine = Engine(model, DPO)
    found = float(engine.run(model, batches(engine, DPO, made, 3), 3.0))
    engine.close()
    grads = gradients(model)

    def log_probability(ids: list[int], labels: list[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        right = torch.tensor(labels[1:])
        kept = right != -100
        return logits[kept].gather(1, right[kept][:, None]).sum()

    losses: list[Tensor] = []
    for row in made:
        cut = row["sequences"][0]
        pair = [(row["input_ids"][part], row["labels"][part]) for part in (slice(0, cut), slice(cut, None))]
        chosen, rejected = (log_probability(*sequence) for sequence in pair)
        with torch.no_grad(), model.disable_adapter():
            base = [log_probability(*sequence) for sequence in pair]
        losses.append(-F.logsigmoid(BETA * ((chosen - base[0]) - (rejected - base[1]))))
    mean = torch.stack(losses).mean()
    mean.backward()
    assert found == pytest.approx(float(mean.detach()), rel=1e-5)
    assert_all_close(grads, gradients(model))


def test_a_whole_model_has_a_reference_before_its_first_step_alone() -> None:
    """Its log-probabilities do not follow the weights, and a row without any is refused."""
    model = llama()
    engine = Engine(model, PREFERENCE)
    made = batches(engine, PREFERENCE, rows(3, labelled=True), 3)
    keep_reference(engine, model, made, nullcontext)
    before = [reference_of(engine, model, batch, nullcontext) for batch in made]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    after = [reference_of(engine, model, batch, nullcontext) for batch in made]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with engine.values(model, made[0]) as values:
        assert not torch.allclose(values.detach(), before[0])
    with pytest.raises(DataError, match="before its first step"):
        reference_of(engine, model, batches(engine, PREFERENCE, rows(4, labelled=True)[3:], 1)[0], nullcontext)
    engine.close()


def test_a_dummy_keeps_no_reference() -> None:
    """It has the keys of a real row, and none of its targets."""
    model = llama()
    engine = Engine(model, PREFERENCE)
    (batch,) = batches(engine, PREFERENCE, rows(2, labelled=True), 2)
    keep_reference(engine, model, [batch], nullcontext)
    before = reference_of(engine, model, batch, nullcontext)
    keep_reference(engine, model, [batch.dummy()], nullcontext)
    assert before.abs().min() > 0 and torch.equal(reference_of(engine, model, batch, nullcontext), before)
    assert engine.reference_store is not None
    with pytest.raises(ValueError, match="dummy"):
        engine.reference_store.add(batch.dummy(), torch.zeros_like(before))
    engine.close()


@pytest.mark.parametrize("task", [DPO, CONTRAST])
def test_labels_are_not_smoothed(task: Task) -> None:
    with pytest.raises(ConfigError, match=r"train\.label_smoothing = 0\.1: .* does not smooth"):
        task.check_settings(TrainConfig(label_smoothing=0.1))
    task.check_settings(TrainConfig())
