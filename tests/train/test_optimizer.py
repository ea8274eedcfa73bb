"""Our optimizers and schedules beside those of transformers' Trainer and of bitsandbytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny import make
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainingArguments

from siliang import LoraConfig, get_peft_model
from siliang.config import RunConfig, TrainConfig
from siliang.methods import METHODS, HeadConfig
from siliang.tasks import SEQ_CLS
from siliang.train.checks import check_layerwise, check_loraplus
from siliang.train.optimizer import OPTIMIZERS, Lion, check_optimizer_runs, make_optimizer
from siliang.train.schedule import make_schedule
from siliang.types import ConfigError


def model_of(kind: str, tuned: str) -> Any:
    model: Any = make(kind)
    if tuned == "lora":
        return get_peft_model(model, LoraConfig(r=2, bias="all", target_modules="all-linear"))
    return model


def our_optimizer(model: torch.nn.Module, heads: Sequence[str] = (), **settings: Any) -> Optimizer:
    return make_optimizer(model, TrainConfig(**settings), heads=heads, learning_rate=3e-3, eps=1e-8)


def the_trainers(model: torch.nn.Module, folder: Path, **more: Any) -> Trainer:
    args = TrainingArguments(str(folder), learning_rate=3e-3, use_cpu=True, report_to=[], **more)
    return Trainer(model=model, args=args)


@pytest.mark.parametrize("kind", ["llama", "bert", "bloom", "t5", "gpt2"])
@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_the_groups_are_the_trainers(kind: str, tuned: str, tmp_path: Path) -> None:
    model = model_of(kind, tuned)
    theirs = the_trainers(model, tmp_path, weight_decay=0.1).create_optimizer()
    ours = our_optimizer(model, weight_decay=0.1)
    assert type(ours) is type(theirs)
    filled = [group for group in theirs.param_groups if group["params"]]
    assert len(ours.param_groups) == len(filled) > 0
    for own, other in zip(ours.param_groups, filled, strict=True):
        assert [id(p) for p in own["params"]] == [id(p) for p in other["params"]]
        assert {k: v for k, v in own.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "constant": ("constant_with_warmup", {}),
    "cosine_with_restarts": ("cosine_with_restarts", {}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "polynomial": ("polynomial", {}),
    "inverse_sqrt": ("inverse_sqrt", {}),
    "warmup_stable_decay": ("warmup_stable_decay", {"num_decay_steps": 4}),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5])
def test_the_learning_rates_are_the_trainers(name: str, warmup: float, tmp_path: Path) -> None:
    steps, (theirs, more) = 37, SCHEDULES[name]
    model = torch.nn.Linear(2, 2)
    warmup_steps = math.ceil(steps * warmup)
    trainer = the_trainers(
        model, tmp_path, lr_scheduler_type=theirs, warmup_steps=warmup_steps, lr_scheduler_kwargs=more
    )
    trainer.create_optimizer_and_scheduler(steps)
    assert trainer.lr_scheduler is not None and trainer.optimizer is not None
    optimizer = our_optimizer(model)
    peak = float(optimizer.defaults["lr"])
    schedule = make_schedule(optimizer, name, peak=peak, warmup_fraction=warmup, steps=steps)
    for _ in range(steps):
        assert schedule.get_last_lr()[0] == trainer.lr_scheduler.get_last_lr()[0]
        for o, s in ((optimizer, schedule), (trainer.optimizer, trainer.lr_scheduler)):
            o.step()
            s.step()


def steps(model: Any, optimizer: Optimizer, made: int = 3) -> list[torch.Tensor]:
    """What is trained, after some steps on gradients that are the same each time."""
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(made):
        for p in trained:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in trained]


@pytest.mark.parametrize(
    ("name", "theirs"), [("adafactor", "adafactor"), ("adamw_8bit", "adamw_bnb_8bit"), ("lion", "lion_32bit")]
)
def test_steps_are_those_of_the_trainers_optimizer(name: str, theirs: str, tmp_path: Path) -> None:
    a = model_of("llama", "full")
    b = copy.deepcopy(a)
    found = steps(a, our_optimizer(a, optimizer=name, weight_decay=0.1))
    more = {"adam_beta2": 0.99} if name == "lion" else {}
    expected = steps(b, the_trainers(b, tmp_path, optim=theirs, weight_decay=0.1, **more).create_optimizer())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    model = model_of("llama", "full")
    by_both, by_adamw = copy.deepcopy(model), copy.deepcopy(model)
    found = steps(by_both, our_optimizer(by_both, optimizer="muon"))
    expected = steps(by_adamw, our_optimizer(by_adamw))
    names = [name for name, _ in model.named_parameters()]
    other = {n for n, x, y in zip(names, found, expected, strict=True) if not torch.equal(x, y)}
    matrices = {
        n for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n
    }
    assert other == matrices and matrices
    name, start = next((n, p) for n, p in model.named_parameters() if n in matrices)
    alone = torch.nn.Parameter(start.detach().clone())
    muon = torch.optim.Muon([alone], lr=3e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for n, p in model.named_parameters():
            gradient = torch.randn(p.shape, generator=generator)
            alone.grad = gradient if n == name else alone.grad
        muon.step()
    assert torch.equal(alone, found[names.index(name)])


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "lion", "muon"])
def test_a_state_that_was_saved_goes_on_to_the_same_bits(name: str) -> None:
    model = model_of("llama", "lora")
    optimizer = our_optimizer(model, optimizer=name)
    steps(model, optimizer)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    expected = steps(model, optimizer, 2)
    model.load_state_dict(weights)
    again = our_optimizer(model, optimizer=name)
    again.load_state_dict(state)
    for x, y in zip(steps(model, again, 2), expected, strict=True):
        assert torch.equal(x, y)


def rates(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_loraplus_is_pefts() -> None:
    """As peft.optimizers.create_loraplus_optimizer has it."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model as peft_model
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft_model(make("llama"), PeftLora(r=2, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    made = create_loraplus_optimizer(theirs, AdamW, lr=3e-3, loraplus_lr_ratio=16)
    model: Any = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    ours = our_optimizer(model, loraplus_ratio=16)
    assert rates(model, ours) == rates(theirs, made)
    assert ours.param_groups[0]["lr"] == 3e-3  # the log has the peak of A


def test_layers_further_down_have_smaller_rates() -> None:
    model = model_of("bert", "full")
    found = rates(model, our_optimizer(model, layerwise_decay=0.5))
    assert found["classifier.weight"] == 3e-3
    assert found["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(1.5e-3)
    assert found["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.75e-3)
    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.375e-3)


def test_the_table_has_every_optimizer_of_the_settings() -> None:
    assert tuple(OPTIMIZERS) == get_args(TrainConfig.model_fields["optimizer"].annotation)


def test_an_optimizer_that_cannot_run_here_is_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"paged_adamw_8bit pages a GPU's memory.*use adamw_8bit"):
        check_optimizer_runs(TrainConfig(optimizer="paged_adamw_8bit"), cpu, sharded=False)
    with pytest.raises(ConfigError, match="muon does not train sharded weights"):
        check_optimizer_runs(TrainConfig(optimizer="muon"), cpu, sharded=True)
    check_optimizer_runs(TrainConfig(optimizer="lion"), cpu, sharded=True)


def test_lion_has_one_moment() -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = Lion([{"params": list(model.parameters())}], lr=1e-3)
    steps(model, optimizer, 1)
    assert all(list(state) == ["exp_avg"] for state in optimizer.state.values())


@pytest.mark.parametrize(("kind", "tuned"), [("bert", "full"), ("bert", "lora"), ("llama", "lora")])
def test_muon_is_not_for_heads_and_embeddings(kind: str, tuned: str) -> None:
    model: Any = make(kind)
    heads = SEQ_CLS.model.heads if kind == "bert" else ()
    if tuned == "lora":
        embeddings = "word_embeddings" if kind == "bert" else "embed_tokens"
        inside = ["query", "value"] if kind == "bert" else ["q_proj", "lm_head"]
        task_type = SEQ_CLS.adapter_type if kind == "bert" else None
        model = get_peft_model(model, LoraConfig(task_type=task_type, r=2, target_modules=[embeddings, *inside]))
    optimizer = our_optimizer(model, heads, optimizer="muon")
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for g in optimizer.param_groups if "ns_steps" in g for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    apart = ("embed", "classifier", "lm_head")
    assert by_muon == {n for n, p in trained.items() if p.ndim == 2 and not any(word in n for word in apart)}
    assert by_muon and {n for n, p in trained.items() if p.ndim == 2} - by_muon


def test_layers_further_down_have_smaller_rates_of_their_factors() -> None:
    model: Any = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    found = rates(model, our_optimizer(model, layerwise_decay=0.5))
    for where, rate in (("embed_tokens", 0.375e-3), ("layers.0.", 0.75e-3), ("layers.1.", 1.5e-3)):
        assert [found[name] for name in found if where in name] == pytest.approx([rate, rate])


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"lora"}))
def test_loraplus_needs_a_b(name: str) -> None:
    config = RunConfig.build(
        {
            "model": "m",
            "task": "seq_cls",
            "method": name,
            "data": {"train": "t.jsonl"},
            "train": {"loraplus_ratio": 16},
            "output": "o",
        }
    )
    message = rf"train\.loraplus_ratio = 16: {name} has no B that would train faster; leave it out"
    with pytest.raises(ConfigError, match=message):
        check_loraplus(config, METHODS[name])


def test_loraplus_is_for_lora() -> None:
    values = {"model": "m", "task": "seq_cls", "data": {"train": "t.jsonl"}, "output": "o"}
    check_loraplus(RunConfig.build(values | {"train": {"loraplus_ratio": 16}}), METHODS["lora"])


def test_a_decay_of_the_rate_that_reaches_nothing_is_refused() -> None:
    settings = TrainConfig(layerwise_decay=0.9, loraplus_ratio=16)
    model: Any = get_peft_model(make("bert"), HeadConfig(task_type=SEQ_CLS.adapter_type))
    message = r"train\.layerwise_decay = 0\.9: what head trains is above all layers"
    with pytest.raises(ConfigError, match=message):
        check_layerwise(model, settings, METHODS["head"])
    check_layerwise(model, TrainConfig(), METHODS["head"])
    check_layerwise(model_of("bert", "lora"), settings, METHODS["lora"])
    check_layerwise(make("bert"), settings, METHODS["full"])
