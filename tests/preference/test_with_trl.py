"""The losses of preferences beside TRL's: whole trainings by DPOTrainer, and the functions of CPO, SimPO and ORPO."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from every_task import configured, make_models, rated_rows
from tiny import write_jsonl
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer  # pyright: ignore
from trl.experimental.cpo import CPOTrainer  # pyright: ignore
from trl.experimental.orpo import ORPOTrainer  # pyright: ignore

from siliang.config import PreferenceConfig, RunConfig
from siliang.engine.batches import sequences_of
from siliang.plan.rows import order
from siliang.records import Record
from siliang.tasks.preferences.losses import LOSSES, Pairs, likelihood
from siliang.tasks.prepare import prepare_data
from siliang.train.prepare import prepare
from siliang.train.run import train
from siliang.train.types import Listener

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
STEPS = {"sigmoid": 30, "ipo": 6, "hinge": 6, "robust": 6, "sigmoid_norm": 6}
PEERS: dict[str, dict[str, Any]] = {"robust": {"label_smoothing": 0.2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


class InOrder:
    """A trainer of TRL that takes the rows as they come, and as tokens."""

    train_dataset: Any

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class PairsInOrder(InOrder, DPOTrainer):
    """DPO's."""


class RewardsInOrder(InOrder, RewardTrainer):
    """The reward model's."""


# of TRL's trainers
AS_OURS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "remove_unused_columns": False,
}


def begun(task: str, models: dict[str, Path], folder: Path, steps: int, **more: object) -> RunConfig:
    """A run with the settings of `AS_OURS`."""
    constant = {"warmup_fraction": 0.0, "schedule": "constant", "learning_rate": 5e-3}
    values = configured(task, models, folder, max_steps=steps, log_every=1, **constant).model_dump(mode="json")
    values["data"]["test_size"] = 0.3  # of 23 rows: 16 are left, four steps of an epoch
    method = {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return RunConfig.build(values | {"method": method} | more)


def in_order(config: RunConfig) -> list[dict[str, Any]]:
    """The entries that the run trains on, one step after the other."""
    tokens = prepare_data(config).train
    return [tokens[row] for step in order(config, tokens) for row in step]


def assert_losses_of(trainer: Any, record: Record, steps: int) -> list[float]:
    """Trains with TRL's trainer, whose losses are those of our run at each step; gives ours."""
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    ours = {line.step: line.loss for line in record.steps if line.loss is not None}
    assert list(ours) == list(range(1, steps + 1))
    assert list(ours.values()) == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    return list(ours.values())


@pytest.mark.parametrize("loss", STEPS)
def test_losses_of_a_training_are_those_of_trl(loss: str, models: dict[str, Path], tmp_path: Path) -> None:
    steps, more = STEPS[loss], PEERS.get(loss, {})
    config = begun("preference", models, tmp_path, steps, preference={"loss": loss, "beta": 0.3, **more})
    (tmp_path / "untrained").mkdir()
    untrained = config.model_copy(update={"output": str(tmp_path / "untrained")})
    prepare(untrained, Listener(), tmp_path / "untrained").model.save_pretrained(tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(models["preference"])
    trainer = PairsInOrder(
        model=peft.PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True),
        args=DPOConfig(
            str(tmp_path / "trl"), max_steps=steps, beta=0.3, loss_type=[loss], max_length=None, **AS_OURS, **more
        ),
        train_dataset=Dataset.from_list([_ids(entry) for entry in in_order(config)]),
        processing_class=AutoTokenizer.from_pretrained(models["preference"]),
    )
    losses = assert_losses_of(trainer, train(config), steps)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)


def test_losses_of_full_tuning_are_those_of_trl(models: dict[str, Path], tmp_path: Path) -> None:
    """TRL has the base model as a second model; siliang its log-probabilities, taken before the first step."""
    full = {"method": {"name": "full"}, "preference": {"beta": 0.3}}
    config = begun("preference", models, tmp_path, 30, **full)
    config = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 2e-3})})
    trainer = PairsInOrder(
        model=AutoModelForCausalLM.from_pretrained(models["preference"]),
        ref_model=AutoModelForCausalLM.from_pretrained(models["preference"]),
        args=DPOConfig(
            str(tmp_path / "trl"), max_steps=30, beta=0.3, max_length=None, **AS_OURS | {"learning_rate": 2e-3}
        ),
        train_dataset=Dataset.from_list([_ids(entry) for entry in in_order(config)]),
        processing_class=AutoTokenizer.from_pretrained(models["preference"]),
    )
    losses = assert_losses_of(trainer, train(config), 30)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.6


class AnswersInOrder(InOrder, KTOTrainer):
    """KTO's."""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_of_kto_are_those_of_trl(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    steps = 30
    data = write_jsonl(tmp_path / "rated.jsonl", rated_rows())
    settings = {"loss": "kto", "beta": 0.3, "desirable_weight": 1.5}
    values = begun("preference", models, tmp_path, steps, preference=settings).model_dump(mode="json")
    values["data"] |= {"train": str(data), "max_length": 64}  # TRL has one prompt for both answers, which is not cut
    rate = 5e-3
    if method == "full":  # at LoRA's rate rounding grows to 1e-4 within 30 steps
        rate = 1e-3
        values |= {"method": {"name": "full"}, "train": values["train"] | {"learning_rate": rate}}
    config = RunConfig.build(values)
    (tmp_path / "untrained").mkdir()
    untrained = config.model_copy(update={"output": str(tmp_path / "untrained")})
    prepare(untrained, Listener(), tmp_path / "untrained").model.save_pretrained(tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(models["preference"])
    whole = method == "full"
    trainer = AnswersInOrder(
        model=base if whole else peft.PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True),
        ref_model=AutoModelForCausalLM.from_pretrained(models["preference"]) if whole else None,
        args=KTOConfig(
            str(tmp_path / "trl"),
            max_steps=steps,
            beta=0.3,
            desirable_weight=1.5,
            max_length=None,
            **AS_OURS | {"learning_rate": rate},
        ),
        train_dataset=Dataset.from_list([_rated_ids(entry) for entry in in_order(config)]),
        processing_class=AutoTokenizer.from_pretrained(models["preference"]),
    )
    losses = assert_losses_of(trainer, train(config), steps)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)


def _rated_ids(row: dict[str, Any]) -> dict[str, Any]:
    """An answer as TRL has it after its tokenization."""
    own, other = sequences_of(row)
    first = next(i for i, x in enumerate(own["labels"]) if x != -100)
    return {
        "prompt_ids": own["input_ids"][:first],
        "completion_ids": own["input_ids"][first:],
        "KL_completion_ids": other["input_ids"][first:],
        "label": row["desirable"][0] > 0,
    }


def _ids(row: dict[str, Any]) -> dict[str, list[int]]:
    """A pair as TRL has it after its tokenization."""
    chosen, rejected = sequences_of(row)
    first = next(i for i, x in enumerate(chosen["labels"]) if x != -100)
    return {
        "prompt_ids": chosen["input_ids"][:first],
        "chosen_ids": chosen["input_ids"][first:],
        "rejected_ids": rejected["input_ids"][first:],
    }


# ---- losses without a base model ----

CPO: Any = CPOTrainer  # whose functions want another kind of tensors than they get
ORPO: Any = ORPOTrainer
C, R = torch.tensor([-3.2, -11.0, -0.4]), torch.tensor([-4.1, -2.5, -9.0])
M, N = torch.tensor([3.0, 7.0, 2.0]), torch.tensor([4.0, 2.0, 9.0])
PAIRS = Pairs(C, R, M, N, torch.zeros(3), torch.zeros(3))


def _as_cpo(loss: str, beta: float, smoothing: float) -> Any:
    return SimpleNamespace(
        alpha=0.0,
        beta=beta,
        label_smoothing=smoothing,
        loss_type=loss,
        simpo_gamma=0.7,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )


def test_cpo_and_simpo_are_those_of_trl() -> None:
    cpo = PreferenceConfig(loss="cpo", beta=0.2, label_smoothing=0.1)
    expected, *_ = CPO.cpo_loss(_as_cpo("sigmoid", 0.2, 0.1), C, R)
    torch.testing.assert_close(LOSSES["cpo"].loss(PAIRS, cpo), expected)
    simpo = PreferenceConfig(loss="simpo", beta=2.5, gamma=0.7)
    expected, *_ = CPO.cpo_loss(_as_cpo("simpo", 2.5, 0.0), C / M, R / N)
    torch.testing.assert_close(LOSSES["simpo"].loss(PAIRS, simpo), expected)


def test_orpo_is_that_of_trl() -> None:
    """TRL also learns the prompts; the paper's loss is that of an answer given its prompt."""
    orpo = PreferenceConfig(loss="orpo", beta=0.2)
    found, *_ = ORPO.odds_ratio_loss(_as_cpo("", 0.2, 0.0), C / M, R / N)
    torch.testing.assert_close(LOSSES["orpo"].loss(PAIRS, orpo), -found)
    assert float(likelihood(PAIRS)) == pytest.approx((3.2 + 11.0 + 0.4) / 12)


# ---- a reward model ----


def test_rewards_are_learned_as_by_trl(models: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(models["reward"], num_labels=1)
    torch.manual_seed(1)
    start = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(base, start)
    wrapped.save_pretrained(str(tmp_path / "start"))
    config = begun("reward", models, tmp_path, 30, adapter=str(tmp_path / "start"))
    pairs = [[part["input_ids"] for part in sequences_of(entry)] for entry in in_order(config)]
    trainer = RewardsInOrder(
        model=wrapped,
        args=RewardConfig(str(tmp_path / "trl"), max_steps=30, **AS_OURS),
        train_dataset=Dataset.from_list([{"chosen_ids": a, "rejected_ids": b} for a, b in pairs]),
        processing_class=AutoTokenizer.from_pretrained(models["reward"]),
    )
    losses = assert_losses_of(trainer, train(config), 30)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2)
