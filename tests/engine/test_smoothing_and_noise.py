"""Label smoothing and NEFTune's noise through the engine, beside transformers' own on padded rows."""

from typing import Any

import pytest
import torch
from closeness import assert_all_close, assert_close
from stepping import gradients, padded, rows_for
from tiny import TASK, make, without_dropout
from torch import Tensor, nn
from transformers import BertForTokenClassification
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother

from siliang.config import TrainConfig
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.engine.step import Engine
from siliang.tasks import QUESTION_ANS, SEQ_2_SEQ_LM, TASKS, TOKEN_CLS, Task
from siliang.types import ConfigError, TaskType


def step(engine: Engine, model: nn.Module, task: Task, rows: list[dict[str, Any]]) -> Tensor:
    """The mean loss of the rows, backward included."""
    collate = StepCollator(PadCollator(0), task, len(rows), packed=engine.padding is not None)
    (batch,) = collate([dict(row) for row in rows])["batches"]
    with engine.loss(model, batch) as loss:
        mean = loss / batch.weight
        if torch.is_grad_enabled():
            mean.backward()
    return mean.detach()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bert-tokens", "t5"])
def test_label_smoothing_is_that_of_transformers(name: str, packing: bool) -> None:
    model: Any = make("bert") if name == "bert-tokens" else make(name)
    task = TASKS[TaskType(TASK[name])] if name != "bert-tokens" else TOKEN_CLS
    if name == "bert-tokens":
        model = BertForTokenClassification(model.config).eval()
    without_dropout(model)
    model.train()
    rows = rows_for(task, (9, 4, 6, 6, 3))
    batch = padded(rows)
    output = model(**batch)
    expected = LabelSmoother(0.2)(output, batch["labels"], shift_labels=task.decoder_only)
    expected.backward()
    wanted = gradients(model)
    plain = output.loss.detach()

    engine = Engine(model, task, packing=packing, label_smoothing=0.2)
    assert_close(step(engine, model, task, rows), expected.detach())
    assert_all_close(gradients(model), wanted)
    model.eval()
    with torch.no_grad():
        assert_close(step(engine, model, task, rows), plain)  # an evaluation gives the loss itself
    engine.close()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_noise_of_unpadded_rows_is_that_of_transformers(name: str, packing: bool) -> None:
    model, task = make(name), TASKS[TaskType(TASK[name])]
    without_dropout(model)
    model.train()
    rows = rows_for(task, (6, 6, 6))
    batch = padded(rows)
    embeddings: Any = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 40.0
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(3)
    expected = model(**batch).loss
    expected.backward()
    wanted = gradients(model)
    handle.remove()
    without = model(**batch).loss.detach()
    assert (without - expected.detach()).abs() > 1e-4

    engine = Engine(model, task, packing=packing, neftune_alpha=40.0)
    torch.manual_seed(3)
    assert_close(step(engine, model, task, rows), expected.detach())
    assert_all_close(gradients(model), wanted)
    model.eval()
    with torch.no_grad():
        assert_close(step(engine, model, task, rows), without)
    engine.close()
    model.train()
    assert_close(model(**batch).loss.detach(), without)  # nothing is left on the model


def test_the_noise_of_a_row_does_not_depend_on_padding() -> None:
    model, task = make("llama"), TASKS[TaskType.CAUSAL_LM]
    engine = Engine(model, task, packing=False, neftune_alpha=5.0)
    embeddings: Any = model.get_input_embeddings()
    ids = torch.full((2, 50), 7)
    with torch.no_grad():
        plain = embeddings(ids)
        assert engine._noise is not None
        with engine._noise.of((50, 2)):
            noise_SWD = embeddings(ids) - plain
    D = plain.shape[-1]
    for noise, n in zip(noise_SWD, (50, 2), strict=True):
        bound = 5.0 / (n * D) ** 0.5
        assert noise.abs().max() <= bound * (1 + 1e-5)
        assert noise.abs().max() >= 0.9 * bound
    engine.close()


def test_what_a_task_cannot_follow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.label_smoothing = 0\.1: question_ans does not smooth"):
        QUESTION_ANS.check_settings(TrainConfig(label_smoothing=0.1))
    with pytest.raises(ConfigError, match=r"train\.neftune_alpha = 5: not for seq_2_seq_lm"):
        SEQ_2_SEQ_LM.check_settings(TrainConfig(neftune_alpha=5.0))
    SEQ_2_SEQ_LM.check_settings(TrainConfig(label_smoothing=0.1))
