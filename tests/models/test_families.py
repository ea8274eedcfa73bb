"""The model families, tiny and random, through `train()` with each method's own targets, saved and opened again; and
gradient checkpointing, which must reach the inputs of every method.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, make, word_tokenizer
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from siliang.config import RunConfig
from siliang.methods import METHODS
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.train.run import train
from siliang.use.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),  # shorter than the rows
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "glm": lambda: GlmForCausalLM(GlmConfig(**SHAPE)),
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**SHAPE)),
    "qwen2": lambda: make("qwen2"),
    "bloom": lambda: make("bloom"),
    "gpt2": lambda: make("gpt2"),
}


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def run(model: str, task: str, data: Path, output: Path, *, checkpointing: bool, method: str = "lora") -> Record:
    """Three steps; a warning of the libraries that gradients do not arrive is an error."""
    values = {
        "model": model,
        "task": task,
        "method": {"name": method, **SMALL.get(method, {})},
        "data": {"train": str(data), "max_length": 32},
        "train": {
            "max_steps": 3,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "gradient_checkpointing": checkpointing,
        },
        "accept": ["SL042"],
        "output": str(output),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(requires_grad|does not require grad|use_reentrant|use_cache).*")
        return train(RunConfig.build(values))


SMALL: dict[str, dict[str, Any]] = {
    "miss": {"r": 4},
    "fourierft": {"n_frequency": 40},
    "c3a": {"block_size": 8},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8},
    "waveft": {"n_frequency": 40},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "multitask_prompt_tuning": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix_tuning": {"num_virtual_tokens": 3},
}


def losses(record: Record) -> list[float]:
    return [step.loss for step in record.steps if step.loss is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_each_family(family: str, instruction_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save(FAMILIES[family](), tmp_path / "model")
    plain, saving = (
        run(model, "causal_lm", instruction_file, tmp_path / f"run{on}", checkpointing=on) for on in (False, True)
    )
    assert len(losses(plain)) == 3
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)
    assert plain.parameters.trained > 0
    opened = evaluate(open_run(tmp_path / "runTrue"))
    assert opened["loss"] == pytest.approx(saving.final["eval_loss"], rel=1e-3)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "glm", "glm4", "bloom", "gpt2"])
@pytest.mark.parametrize("method", ["ia3", "ln_tuning"])
def test_own_targets_of_the_other_methods(family: str, method: str, tmp_path: Path) -> None:
    """Something to tune in every block, without a name from the user."""
    from siliang import get_peft_model
    from siliang.types import TaskType

    config = METHODS[method].config
    assert config is not None
    tuned = get_peft_model(FAMILIES[family](), config(task_type=TaskType.CAUSAL_LM))
    names = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert all(any(f".{block}." in n for n in names) for block in (0, 1))


def test_ln_tuning_finds_every_norm_of_glm4() -> None:
    """Four in a block, where its kin have two, and the last one."""
    from siliang import LNTuningConfig, get_peft_model
    from siliang.types import TaskType

    tuned = get_peft_model(FAMILIES["glm4"](), LNTuningConfig(task_type=TaskType.CAUSAL_LM))
    assert sum(p.requires_grad for p in tuned.parameters()) == 2 * 4 + 1


# in `make test` those that attach in ways of their own; all of them in `make test-long`
SHORT = ("lora", "loha", "oft", "vera", "ia3", "ln_tuning", "bitfit", "prompt_tuning", "p_tuning", "prefix_tuning")


@pytest.mark.parametrize("base", ["llama", "bert"])
@pytest.mark.parametrize(
    "method",
    [
        name if name in SHORT else pytest.param(name, marks=pytest.mark.long)
        for name in METHODS
        if name not in ("full", "head", "trainable_tokens", "cpt", "xlora")
    ],
)
def test_gradient_checkpointing_reaches_the_inputs(
    method: str,
    base: str,
    model_folders: dict[str, Path],
    instruction_file: Path,
    review_file: Path,
    tmp_path: Path,
) -> None:
    if (method, base) == ("bitfit", "llama"):
        pytest.skip("Llama has no biases")
    task, data = ("causal_lm", instruction_file) if base == "llama" else ("seq_cls", review_file)
    model = str(model_folders[base])
    records = [run(model, task, data, tmp_path / str(on), checkpointing=on, method=method) for on in (False, True)]
    plain, saving = map(losses, records)
    assert saving == pytest.approx(plain, rel=1e-5)
    # something was learned, so that the losses are equal because the gradients are
    assert records[1].final["eval_loss"] == pytest.approx(records[0].final["eval_loss"], rel=1e-5)
    assert len({round(s.grad_norm or 0.0, 9) for s in records[1].steps}) > 1
