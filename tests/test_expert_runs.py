"""LoRA on the experts of a mixture (`target_parameters`) in a run: the plan's counts and bytes, stop and resume to the
same bits, recomputing, bf16, merge with proof, and what all-linear leaves out.
"""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import write_former
from safetensors.torch import load_file
from test_methods_everywhere import Done, check_plan, losses_of, planned_run, saved
from tiny import VOCABULARY, word_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from siliang import LoraConfig, get_peft_model
from siliang.config import RunConfig
from siliang.run_folder import open_run
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.start_adapter import filled_in
from siliang.train.types import Listener
from siliang.types import InterruptedRunError, TargetError
from siliang.use.merge import merge

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def configured(mixtral: Path, instruction_file: Path) -> Callable[..., RunConfig]:
    def give(output: Path, method: dict[str, Any] = EXPERTS, **settings: Any) -> RunConfig:
        steps = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "log_every": 1}
        values = {
            "model": str(mixtral),
            "task": "causal_lm",
            "method": {"name": "lora", "r": 2, **method},
            "data": {"train": str(instruction_file), "test_size": 0.2, "max_length": 32},
            "train": steps | settings,
            "output": str(output),
            "accept": ["SL042"],
        }
        return RunConfig.build(values)

    return give


@pytest.fixture(scope="module")
def done(configured: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Done:
    return planned_run(configured(tmp_path_factory.mktemp("runs") / "experts"))


def test_the_plan_says_what_the_run_has(done: Done) -> None:
    assert done.record.status == "completed" and len(set(done.losses)) == 4
    check_plan(done)
    tensors = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    start = "base_model.model.model.layers.1.mlp.experts"
    assert tensors[f"{start}.lora_A.weight"].shape == (8, 24)  # of down_proj: 4 experts of rank 2
    assert tensors[f"{start}.base_layer.lora_B.weight"].shape == (48, 8)
    assert all(t.abs().sum() > 0 for t in tensors.values())


def test_stopped_and_resumed(configured: Callable[..., RunConfig], done: Done, tmp_path: Path) -> None:
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 2 and not stopped:
            stopped.append(progress.step)
            signal.raise_signal(signal.SIGTERM)

    config = configured(tmp_path / "run")
    with pytest.raises(InterruptedRunError):
        train(config, Listener(progress=stop))
    assert losses_of(train(config, resume=True)) == done.losses
    assert saved(tmp_path / "run") == saved(done.folder)


def test_recomputing_changes_no_loss(configured: Callable[..., RunConfig], done: Done, tmp_path: Path) -> None:
    assert losses_of(train(configured(tmp_path / "run", gradient_checkpointing=True))) == done.losses
    assert saved(tmp_path / "run") == saved(done.folder)


def test_on_a_frozen_base_in_bf16_and_with_lora_plus(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    record = train(configured(tmp_path / "run", precision="bf16", loraplus_ratio=8))
    assert len(set(losses_of(record))) == 4
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_merged(done: Done, mixtral: Path, tmp_path: Path) -> None:
    assert merge(open_run(done.folder), tmp_path / "merged").holds
    merged, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", mixtral))
    before = dict(base.named_parameters())
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"gate_up_proj", "down_proj", "weight"}
    assert sum(name.endswith(("gate_up_proj", "down_proj")) for name in changed) == 4


def test_an_adapter_of_transformers_4_is_trained_further(
    configured: Callable[..., RunConfig], mixtral: Path, tmp_path: Path
) -> None:
    write_former(tmp_path / "former", AutoModelForCausalLM.from_pretrained(mixtral), ["q_proj", "w1", "w2", "w3"], r=2)
    values: dict[str, Any] = configured(tmp_path / "run").model_dump(mode="json")
    values |= {"method": "lora", "adapter": str(tmp_path / "former")}
    done = planned_run(RunConfig.build(filled_in(values)))
    check_plan(done)
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"] and config["target_modules"] == ["q_proj"]
    assert config["rank_pattern"] == {r".*\.gate_up_proj": 4}


def test_a_wrong_name_on_a_mixture_is_told_of_its_experts(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(configured(tmp_path / "run").model)
    says = r"The weights of experts are parameters \(target_parameters of LoRA\): .*experts.gate_up_proj"
    with pytest.raises(TargetError, match=says):
        get_peft_model(model, LoraConfig(target_modules=["expert_proj"]))


def test_all_linear_says_once_what_it_leaves_out(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"leaves out experts\.down_proj, gate\.weight, which are no linear") as caught:
        method = {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj"]}
        train(configured(tmp_path / "run", method))
    # shown once: the plan and the run say the same, from one place
    assert len({(str(w.message), w.lineno) for w in caught if "leaves out" in str(w.message)}) == 1
