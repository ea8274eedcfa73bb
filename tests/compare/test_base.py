"""The base model's own figures, before any training."""

from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, word_tokenizer
from transformers import OlmoConfig, OlmoForCausalLM

from siliang.compare.base import KeptBase
from siliang.compare.run import untuned
from siliang.compare.worker import _measure_base
from siliang.config import RunConfig


def test_a_model_without_default_targets_is_measured(tmp_path: Path, instruction_file: Path) -> None:
    config = OlmoConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = OlmoForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "olmo")
    word_tokenizer().save_pretrained(tmp_path / "olmo")
    run = RunConfig.build(
        {
            "model": str(tmp_path / "olmo"),
            "task": "causal_lm",
            "method": "bitfit",
            "data": {"train": str(instruction_file), "max_length": 32},
            "train": {"precision": "fp32", "max_steps": 2},
            "accept": ["SL041"],
            "output": str(tmp_path / "cmp"),
        }
    )
    out = tmp_path / "base"
    out.mkdir()
    found = _measure_base(untuned(run, out), {"prompts": ["say yes"], "max_new_tokens": 2}, KeptBase())
    # the weights are small and random: every one of the tokens is as likely as the others
    assert found["eval_loss"] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), rel=0.05)
    assert (out / "answers.json").is_file()
