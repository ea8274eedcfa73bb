"""The base model's own figures, before any training."""

from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, word_tokenizer
from torch import nn
from transformers import OlmoConfig, OlmoForCausalLM

from siliang.compare.base import CHUNK, CachedBase, checksums
from siliang.compare.run import untuned_config
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
    found = _measure_base(untuned_config(run, out), {"prompts": ["say yes"], "max_new_tokens": 2}, CachedBase())
    # the weights are small and random: every one of the tokens is as likely as the others
    assert found["eval_loss"] == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), rel=0.05)
    assert (out / "answers.json").is_file()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("size", [1, 7, 64, CHUNK + 8, 2 * CHUNK + 1])
def test_a_checksum_changes_with_any_bit_and_with_the_order(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (size,), generator=generator).to(dtype)

    def of(tensor: torch.Tensor) -> dict[str, int]:
        module = nn.Module()
        module.register_buffer("x", tensor)
        return checksums(module)

    state, before = torch.get_rng_state(), of(values)
    assert of(values.clone()) == before
    assert torch.equal(torch.get_rng_state(), state)
    for at in {0, size // 2, size - 1}:
        other = values.clone()
        other.view(torch.uint8)[at * values.element_size()] ^= 1  # one bit
        assert of(other) != before
    for order in (
        torch.randperm(size, generator=generator),
        torch.arange(size).flip(0),
        torch.arange(size).roll(CHUNK),
    ):
        if not torch.equal(values[order], values):
            assert of(values[order]) != before
    for first, second in ((0, 1), (0, 4), (3, size - 1)):  # two elements change places
        other = values.clone()
        if size > 4:
            other[[first, second]] = other[[second, first]]
        if not torch.equal(other, values):
            assert of(other) != before


def test_a_sign_that_moves_changes_the_checksum() -> None:
    weights = torch.ones(64, dtype=torch.bfloat16)
    found = set()
    for at in range(64):
        weights[at] = -1
        found.add(checksums(nn.ParameterDict({"x": weights}))["x"])
        weights[at] = 1
    assert len(found) == 64
