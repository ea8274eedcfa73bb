"""CPT beside the live `peft`: the loss with labels in the context, the bounds, and the training by siliang."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from tiny import batch, make
from transformers import Trainer, TrainingArguments

import siliang
from siliang.config import RunConfig
from siliang.engine.method_hooks import extra_loss
from siliang.run_folder import open_run
from siliang.train.run import train
from siliang.types import ConfigError
from siliang.use.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
CONTEXT: dict[str, Any] = {
    "cpt_token_ids": [5, 9, 11, 4, 20, 31, 8, 5, 9, 12, 4, 21, 30],
    "cpt_mask": [1] * 13,
    "cpt_tokens_type_mask": [1, 2, 2, 3, 3, 4, 0, 5, 6, 6, 7, 8, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.7,
    "opt_projection_epsilon": 0.2,
    "opt_projection_format_epsilon": 0.1,
    "task_type": "CAUSAL_LM",
}


def pair(**more: Any) -> tuple[Any, Any]:
    settings = CONTEXT | more
    ours = siliang.get_peft_model(make("llama"), siliang.CPTConfig(**settings))
    theirs = peft.get_peft_model(make("llama"), peft.CPTConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    ours.prompt_encoder["default"].delta_embedding.weight.data.copy_(0.3 * torch.randn(13, 32, generator=generator))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("kind", ["decay", "none"])
@pytest.mark.parametrize("typed", [True, False])
def test_loss_and_steps(kind: str, typed: bool) -> None:
    inputs, losses = batch("llama"), []
    models = pair(opt_weighted_loss_type=kind)
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            kinds = torch.tensor([1, 2, 2, 2, 3, 4, 4, 0, 0, 0, 0]).repeat(3, 1)  # PEFT changes it in place
            out = model(**inputs, **({"input_type_mask": kinds} if typed else {}))
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(out.loss.detach())
    assert_close(torch.stack(losses[0]), torch.stack(losses[1]))
    ours, theirs = (model.prompt_encoder["default"] for model in models)
    assert_close(ours.delta_embedding.weight, theirs.delta_embedding.weight, roundings=512)
    assert losses[0][-1] < losses[0][0]


def test_labels_of_the_text_are_learned_whatever_the_contexts_types_are() -> None:
    """PEFT adds the largest type of the context to the text's: where that is no label's, nothing is learned."""
    ours, theirs = pair(cpt_tokens_type_mask=[1] * 13)
    assert theirs(**batch("llama")).loss.isnan()
    assert ours(**batch("llama")).loss.isfinite()


def test_bounds() -> None:
    ours, theirs = pair()
    found, there = (model.prompt_encoder["default"] for model in (ours, theirs))
    assert_close(found(), there(torch.arange(13)[None])[0])
    norms = found.delta_embedding.weight.norm(dim=1) / (32 / 2048) ** 0.5
    kinds = torch.tensor(CONTEXT["cpt_tokens_type_mask"]) % 4
    assert_close(norms[kinds == 2], torch.full((4,), 0.2))
    assert_close(norms[kinds % 2 == 1], torch.full((5,), 0.1))
    before = found.delta_embedding.weight.clone()
    assert torch.equal(found(), found()) and torch.equal(before, found.delta_embedding.weight)


def test_the_loss_of_the_context_alone() -> None:
    """The term that `siliang train` adds is what the labels of the context have in a forward with a text."""
    ours, _ = pair()
    ours.set_adapter("default")
    term = extra_loss(ours)
    assert term is not None
    logits = ours(input_ids=batch("llama")["input_ids"][:1]).logits[0, :12]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(CONTEXT["cpt_token_ids"][1:]), reduction="none")
    assert_close(term, 0.49 * losses[4] + 0.7 * losses[10:12].mean())
    (gradient,) = torch.autograd.grad(term, ours.prompt_encoder["default"].delta_embedding.weight)
    assert gradient[torch.tensor(CONTEXT["cpt_tokens_type_mask"]) % 4 == 0].eq(0).all() and gradient.any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cpt_mask": [1]}, "cpt_mask has 1 entries, and cpt_token_ids 13: give one for each"),
        ({"task_type": "SEQ_CLS"}, "task_type = SEQ_CLS: CPT is for CAUSAL_LM alone"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens = 4: CPT has one for each of cpt_token_ids"),
        ({"opt_projection_epsilon": -1.0}, r"opt_projection_epsilon = -1.0: must be at least 0"),
        ({"cpt_token_ids": [120] * 13}, "cpt_token_ids holds 120, and the model has 120 tokens"),
        ({"cpt_token_ids": [-1] * 13}, "cpt_token_ids holds -1: must be at least 0"),
        ({"opt_weighted_loss_type": "linear"}, "opt_weighted_loss_type = 'linear': must be"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        siliang.get_peft_model(make("llama"), siliang.CPTConfig(**CONTEXT | settings))


def test_the_stock_trainers_accumulation(tmp_path: Path) -> None:
    """Two batches of two rows are one of four: CPT's loss is a mean, and has no use for the count of labels.

    With PEFT's own model the Trainer takes the base model's loss for the one that is computed, and adds the means up.
    """
    ids = [[5, 9, 11, 4, 20, 31], [8, 5, 9, 12, 4, 21], [7, 6, 9, 11, 3, 20], [4, 9, 8, 12, 5, 30]]
    data = Dataset.from_list([{"input_ids": i, "attention_mask": [1] * 6, "labels": i} for i in ids])
    found = []
    for rows in (4, 2):
        model, _ = pair()
        settings: dict[str, Any] = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        settings |= {"max_steps": 1, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant"}
        settings |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0, "seed": 1}
        trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), **settings), train_dataset=data)
        loss = trainer.train().training_loss
        found.append((torch.tensor(loss), model.prompt_encoder["default"].delta_embedding.weight.detach()))
        with model.disable_adapter():
            assert model.accepts_loss_kwargs
    for one, two in zip(*found, strict=True):
        assert_close(one, two)


def test_training(model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path) -> None:
    method = {"name": "cpt", **{k: v for k, v in CONTEXT.items() if k != "task_type"}}
    values = {
        "model": str(model_folders["llama"]),
        "task": "causal_lm",
        "method": method,
        "data": {"train": str(instruction_file), "test_size": 0.2, "max_length": 32},
        "train": {"max_steps": 4, "batch_size": 4, "precision": "fp32", "log_every": 1},
    }
    found = []
    for packing in (True, False):
        values["train"] |= {"packing": packing}
        record = train(RunConfig.build(values | {"output": str(tmp_path / str(packing))}))
        found.append([step.loss for step in record.steps if step.loss is not None])
        assert record.parameters.trained == 13 * 32
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert evaluate(open_run(tmp_path / "True"))["loss"] == pytest.approx(
        evaluate(open_run(tmp_path / "False"))["loss"], rel=1e-4
    )
