"""LoRA on other layers than linear ones through the rest of siliang: the plan, a run, a stop, and the merge."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make, word_tokenizer
from transformers import ConvBertConfig, ConvBertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from siliang.config import RunConfig
from siliang.plan.preflight import Planner
from siliang.run_folder import open_run
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import InterruptedRunError
from siliang.use.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
METHODS: dict[str, dict[str, Any]] = {
    "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "replicated": {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "convolutions": {"target_modules": ["pointwise", "query"], "lora_dropout": 0.1},
    "dora": {"target_modules": ["pointwise", "word_embeddings"], "use_dora": True},
}


@pytest.fixture(scope="module")
def convbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with convolutions in its attention."""
    torch.manual_seed(0)
    tokenizer, folder = word_tokenizer(), tmp_path_factory.mktemp("models") / "convbert"
    sizes: dict[str, Any] = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = ConvBertConfig(vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=64, **sizes)
    ConvBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is its embedding."""
    torch.manual_seed(0)
    plain: Any = make("llama").config
    tokenizer, folder = word_tokenizer(), tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(LlamaConfig(**plain.to_dict() | {"tie_word_embeddings": True})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configured(model: Path, data: Path, output: Path, name: str) -> RunConfig:
    steps = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "log_every": 1}
    values = {
        "model": str(model),
        "task": "causal_lm" if "llama" in str(model) else "seq_cls",
        "method": {"name": "lora", "r": 2, **METHODS[name]},
        "data": {"train": str(data), "test_size": 0.2, "max_length": 32},
        "train": steps,
        "output": str(output),
        "accept": ["SL042"],
    }
    return RunConfig.build(values)


@pytest.mark.parametrize("name", METHODS)
def test_a_run(
    name: str, convbert: Path, tied_llama: Path, review_file: Path, instruction_file: Path, tmp_path: Path
) -> None:
    of_llama = "q_proj" in METHODS[name]["target_modules"]
    model, data = (tied_llama, instruction_file) if of_llama else (convbert, review_file)
    planner, config = Planner(), configured(model, data, tmp_path / "run", name)
    record = train(config, planner=planner)
    assert record.status == "completed" and planner.last_plan is not None
    planned, file = planner.last_plan, tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert planned.error is None and planned.peak_bytes > 0
    assert planned.trained == record.parameters.trained
    assert planned.adapter_bytes == sum(t.nbytes for t in load_file(file).values())

    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 2 and not stopped:  # a second signal would not wait for the checkpoint
            stopped.append(2)
            signal.raise_signal(signal.SIGTERM)

    again = configured(model, data, tmp_path / "again", name)
    with pytest.raises(InterruptedRunError):
        train(again, Listener(progress=stop))
    train(again, resume=True)
    assert (tmp_path / "again" / "adapter" / "adapter_model.safetensors").read_bytes() == file.read_bytes()
    assert merge(open_run(tmp_path / "run"), tmp_path / "merged").holds
