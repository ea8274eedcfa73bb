"""Names of other tools: each is told what it is here, and what it is told holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import refused

from siliang import other_names
from siliang.config import RunConfig, assign, name_hint
from siliang.config.comparison import CompareConfig
from siliang.other_names import MEASURED, METHOD_VALUES, NAMES, TABLE, TASK_VALUES, Row
from siliang.tasks import TASKS
from siliang.tasks.measures import MEASURES
from siliang.types import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def build(*assignments: str, method: str = "lora", folder: Path | None = None) -> RunConfig:
    task = "embedding" if any(text.startswith("embedding.") for text in assignments) else "causal_lm"
    values: dict[str, Any] = {"model": "m", "task": task, "data": {"train": "d.csv"}, "output": "o"}
    values |= {"method": {"name": method}, "train": {"eval_every": 5}}  # which train.best and train.patience need
    if any(assignment.startswith("classification.") for assignment in assignments):  # of that task alone
        values["task"] = "seq_cls"
    if folder is not None:  # DeepSpeed's settings go with its strategy alone
        (folder / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
        values["distributed"] = {"strategy": "deepspeed"}
    for assignment in assignments:
        assign(values, assignment.replace("zero2.json", str((folder or Path()) / "zero2.json")), RunConfig)
    return RunConfig.build(values)


def test_every_row_of_the_table_holds(tmp_path: Path) -> None:
    for row in TABLE:
        assert row.setting or row.note, row
        if not row.setting:
            continue
        method = "prompt_tuning" if row.setting == "method.num_virtual_tokens" else "lora"
        folder = tmp_path if row.setting in ("distributed.deepspeed", "distributed.zero_stage") else None
        build(f"{row.setting}={row.example}", method=method, folder=folder)
        for theirs in row.values:
            found = other_names.assignments(row, theirs)
            assert found is not None
            build(*found)


def test_what_is_proposed_for_best_is_measured() -> None:
    measured = {"loss", *(metric.name for task in TASKS.values() for metric in task.metrics)} | set(MEASURES)
    assert set(MEASURED) == measured
    proposed = [ours for row in TABLE if row.setting == "train.best" for ours in row.values.values() if ours]
    assert {ours.removeprefix("train.best=") for ours in proposed} == measured


def test_what_is_lacking_is_proposed_nowhere() -> None:
    for row in TABLE:
        assert not row.lacks.keys() & row.values.keys()
        assert all(other_names.assignments(row, theirs) is None for theirs in row.lacks)


def test_a_name_stands_in_one_row_and_is_none_of_ours() -> None:
    names = [name for row in TABLE for name in row.names]
    assert sorted(names) == sorted(set(names))
    assert all(other_names.plain(name) == name for name in names)
    assert not set(NAMES) & {"model", "data", "train", "method", "output", "distributed", "accept"}
    assert len(names) > 250


@pytest.mark.parametrize(("name", "ours"), METHOD_VALUES.items())
def test_methods_of_other_names(name: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"method = {name!r}: use ")):
        build(f"method='{name}'")
    build(*ours.split())


@pytest.mark.parametrize(("name", "ours"), TASK_VALUES.items())
def test_tasks_of_other_names(name: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"use `task={ours}`"):
        build(f"task={name.replace('_', '-')}")
    build(f"task={ours}")


@pytest.mark.parametrize(
    ("given", "here"),
    [
        ("lr=1e-5", "`train.learning_rate=1e-05`"),
        ("train.lr=1e-5", "`train.learning_rate=1e-05`"),
        ("lora_rank=8", "`method.r=8`"),
        ("method.lora_rank=8", "`method.r=8`"),
        ("method.rank=4", "`method.r=4`"),
        ("cutoff_len=1024", "`data.max_length=1024`"),
        ("data.cutoff_len=1024", "`data.max_length=1024`"),
        ("bf16=true", "`train.precision=bf16`"),
        ("bf16=false", "`train.precision=fp32`"),
        ("fp16=false", "`train.precision=fp32`"),
        ("fp32=false", "`train.precision=auto`"),
        ("fsdp=false", "`distributed.strategy=ddp`"),
        ("evals_per_epoch=4", "train.eval_every is a number of steps"),
        ("per_device_eval_batch_size=64", "no metric depends on it; leave it out"),
        ("eval_batch_size=64", "no metric depends on it; leave it out"),
        ("metric_for_best_model=eval_loss", "`train.best=loss`"),
        ("metric_for_best_model=eval_accuracy", "`train.best=accuracy`"),
        ("metric_for_best_model=eval_mcc", "train.best, as in `train.best=loss`"),
        ("logging_dir=logs", "trackers write into `trackers` in the run's folder"),
        ("report_to=tensorboard", "`train.trackers=tensorboard`"),
        ("report_to=[wandb, mlflow]", "`train.trackers=[wandb, mlflow]`"),
        ("report_to=none", "leave it out"),
        ("report_to=all", "siliang takes trackers by name"),
        ("report_to=comet_ml", "siliang does not have it; train.trackers takes tensorboard"),
        ("use_swanlab=true", "`train.trackers=swanlab`"),
        ("wandb_project=reviews", "`train.tracker_project=reviews`"),
        ("swanlab_project=a/b", "train.tracker_project, as in `train.tracker_project=siliang`"),
        ("run_name=first", "after its folder"),
        ("wandb_mode=online", "the environment may: WANDB_MODE"),
        ("lr_scheduler_type=rex", "siliang does not have it; `siliang config` lists those of train.schedule"),
        ("lr_scheduler_type=constant", "`train.schedule=constant` and `train.warmup_fraction=0`"),
        ("lr_scheduler_type=constant_with_warmup", "`train.schedule=constant`."),
        ("warmup_steps=1", "It is a share of all steps"),
        ("warmup_steps=0", "`train.warmup_fraction=0`"),
        ("truncation_strategy=left", "not its beginning"),
        ("truncation_strategy=right", "`data.too_long=cut`"),
        ("template=default", "data.template"),
        ("stage=ppo", "siliang does not have it"),
        ("quantization=true", "as in `quantization.bits=4`"),
        ("data_seed=1", "train.seed sets the order"),
        ("packing=true", "`train.packing=true`"),
        ("quantization=4", "`quantization.bits=4`"),
        ("quantization=nf4", "`quantization.bits=4`"),
        ("train.quantization=8", "`quantization.bits=8`"),
        ("dora=true", "`method.use_dora=true`"),
        ("qlora=true", "`method=lora` and `quantization.bits=4`"),
        ("target_modules=q_proj,v_proj", "`method.target_modules=q_proj,v_proj`"),
        ("lora_target=all", "`method.target_modules=all-linear`"),
        ("finetuning_type=lora", "`method=lora`"),
        ("adapter=qlora", "`method=lora` and `quantization.bits=4`"),
        ("adapter=lora", "`method=lora`"),
        ("load_in_4bit=true", "`quantization.bits=4`"),
        ("load_in_8bit=true", "`quantization.bits=8`"),
        ("per_device_train_batch_size=2", "`train.batch_size=2`"),
        ("Per-Device-Train-Batch-Size=2", "`train.batch_size=2`"),
        ("gradient_accumulation_steps=8", "`train.gradient_accumulation=8`"),
        ("num_train_epochs=3.0", "`train.epochs=3.0`"),
        ("epochs=3", "`train.epochs=3`"),
        ("model.epochs=3", "model is a single value"),
        ("lr_scheduler_type=cosine", "`train.schedule=cosine`"),
        ("lr_scheduler_type=polynomial", "`train.schedule=polynomial`"),
        ("lr=fast", "train.learning_rate, as in `train.learning_rate=5e-5`"),
        ("warmup_steps=100", "train.warmup_fraction, as in `train.warmup_fraction=0.1`. It is a share"),
        ("torch_dtype=bfloat16", "`train.precision=bf16`"),
        ("optim=adamw_torch", "`train.optimizer=adamw`"),
        ("optim=sgd", "siliang does not have it"),
        ("early_stopping_patience=3", "`train.patience=3`"),
        ("loraplus_lr_ratio=16", "`train.loraplus_ratio=16`"),
        ("flash_attn=fa2", "by itself"),
        ("rank_pattern={q_proj: 4}", "`method.rank_pattern={q_proj: 4}`"),
        ("data=d.csv", "`data.train=d.csv`"),
        ("data.labels.a=b", "data.labels"),
        ("lr", "train.learning_rate"),
    ],
)
def test_names_in_the_settings(given: str, here: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(given)
    assert here in str(caught.value)


@pytest.mark.parametrize(
    ("given", "here"),
    [
        ("train.optimizer=adamw_torch", "Use `train.optimizer=adamw`."),
        ("train.optimizer=AdamW", "Use `train.optimizer=adamw`."),
        ("train.optimizer=adamw_bnb_8bit", "Use `train.optimizer=adamw_8bit`."),
        ("train.optimizer=sgd", "sgd: siliang does not have it;"),
        ("train.optimizer=lion_8bit", "lion_8bit: siliang does not have it;"),
        ("train.schedule=wsd", "Use `train.schedule=warmup_stable_decay`."),
        ("train.schedule=rex", "rex: siliang does not have it;"),
        ("train.precision=bfloat16", "Use `train.precision=bf16`."),
        ("train.trackers=all", "siliang takes trackers by name"),
        ("train.trackers=none", "siliang needs no setting for this: leave it out."),
        ("train.trackers=[comet_ml]", "comet_ml: siliang does not have it;"),
        ("distributed.strategy=full_shard", "Use `distributed.strategy=fsdp`."),
    ],
)
def test_values_of_other_tools_under_our_own_name(given: str, here: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(given)
    assert here in str(caught.value)


@pytest.mark.parametrize("given", ["train.precision=true", "train.optimizer=fast", "train.schedule=7"])
def test_a_value_of_no_other_tool_or_of_several_meanings_gets_no_proposal(given: str) -> None:
    with pytest.raises(ConfigError, match="input should be") as caught:
        build(given)
    assert "Here that" not in str(caught.value) and "siliang does not" not in str(caught.value)


def test_no_nonsense() -> None:
    """A far-off name gets no proposal, and a method's setting none that the method lacks."""
    for given in ("train.foo=1", "xyzzy=1", "fp=1", "abc=1", "train.zzz=1", "data.q=1"):
        with pytest.raises(ConfigError) as caught:
            build(given)
        assert "Did you mean" not in str(caught.value) and "Here that" not in str(caught.value), str(caught.value)
    with pytest.raises(ConfigError) as caught:
        build("method={name: ia3, lora_rank: 4}")
    assert "method.r" not in str(caught.value)
    assert name_hint("learning_rate", RunConfig, 1, section="train") == ""


def test_a_whole_file_of_another_tool() -> None:
    """All of its names in two lines, and not one a run; what is called otherwise is not said to be missing."""
    theirs = {
        "model_name_or_path": "qwen", "stage": "sft", "finetuning_type": "lora", "lora_target": "all", "lora_rank": 8,
        "dataset": "alpaca.json", "template": "qwen", "cutoff_len": 2048, "output_dir": "saves", "bf16": True,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "do_train": True,
        "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "logging_steps": 10, "overwrite_output_dir": True,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(theirs, source="sft.yaml")
    message = str(caught.value)
    assert message.count("\n") == 1
    for here in ("model=qwen", "data.max_length=2048", "train.precision=bf16", "method.r=8", "output=saves"):
        assert f"`{here}`" in message
    assert "missing" not in message
    with pytest.raises(ConfigError, match=r"lr is not a setting. Use `train.learning_rate=0.1`"):
        CompareConfig.build({"model": "m", "task": "seq_cls", "data": {"train": "d"}, "output": "o", "lr": 0.1})
    with pytest.raises(ConfigError, match=r"search.lr is not a setting of any of the methods. Use .*learning_rate"):
        CompareConfig.build(
            {"model": "m", "task": "seq_cls", "data": {"train": "d"}, "output": "o", "search": {"lr": [0.1]}}
        )


@pytest.mark.parametrize(
    ("words", "here"),
    [
        (("train", "--lr", "1e-5"), "`--set train.learning_rate=1e-05`"),
        (("train", "--epochs=3"), "`--set train.epochs=3`"),
        (("train", "--lora-rank", "8"), "`--set method.r=8`"),
        (("check", "--batch-size", "8"), "`--set train.batch_size=8`"),
        (("train", "--bf16"), "`--set train.precision=bf16`"),
        (("train", "--qlora"), "`--set method=lora` and `--set quantization.bits=4`"),
        (("compare", "--learning_rate", "1"), "`--set train.learning_rate=1`"),
        (("plan", "--max-length", "100"), "`--set data.max_length=100`"),
        (("train", "--modle", "x"), "'--model'"),
        (("finetune",), "`siliang train`"),
        (("tarin",), "'train'"),
    ],
)
def test_names_as_options(words: tuple[str, ...], here: str) -> None:
    assert here in refused(*words)


def test_an_option_of_a_command_without_settings() -> None:
    assert "--set" not in refused("eval", "run", "--batch-size", "8")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("method.target_modules=q_proj,v_proj", ["q_proj", "v_proj"]),
        ("method.target_modules=q_proj, v_proj", ["q_proj", "v_proj"]),
        ("method.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("method.target_modules=.*\\.(q|v)_proj", ".*\\.(q|v)_proj"),
        ("method.target_modules=a{1,2}", "a{1,2}"),
        ("method.modules_to_save=a,b", ["a", "b"]),
        ("method.layers_to_transform=0,1", [0, 1]),
    ],
)
def test_lists_with_commas(given: str, value: object) -> None:
    key = given.partition("=")[0].removeprefix("method.")
    assert build(given).method.arguments[key] == value


def test_lists_of_the_data_with_commas() -> None:
    config = build("data.labels=bad,good", "accept=SL002,SL003", "data.header=a, b")
    assert config.data.labels == ["bad", "good"]
    assert config.accept == ["SL002", "SL003"]
    assert config.data.header == ["a", "b"]


def test_the_docs_hold_the_table() -> None:
    assert (ROOT / "docs" / "names.md").read_text(encoding="utf-8") == other_names.as_markdown()


def test_values_as_set_takes_them() -> None:
    assert other_names.written([1, "a", True]) == "[1, a, true]"
    assert other_names.written({"a": None}) == "{a: null}"
    assert other_names.assignments(Row("a.b", ("c",)), 1e-5) == ["a.b=1e-05"]
