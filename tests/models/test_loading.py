"""Weights are read piece by piece: bit for bit those of transformers, and never beside the whole file."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import PYTHON
from tiny import TASK, make
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, core_model_loading

from siliang.config import QuantizationConfig
from siliang.models import load, weights
from siliang.models.load import load_model
from siliang.models.quantized import held_tensors
from siliang.models.spec import ModelSpec
from siliang.models.weights import piece_by_piece
from siliang.tasks import CAUSAL_LM, TASKS
from siliang.types import TaskType

LLAMA: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small models are read in many pieces, too; an odd number of numbers in each."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 3 * 2**12 + 4)
    monkeypatch.setattr(weights, "LEAST_BYTES", 1)


def tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_as_transformers(folder: Path, task: ModelSpec, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    """Loads both ways, and gives what was loaded piece by piece."""
    found = load_model(str(folder), task, **how)
    with monkeypatch.context() as usual:
        usual.setattr(load, "piece_by_piece", lambda quantizing, keeping: nullcontext())
        expected = load_model(str(folder), task, **how)
    a, b = tensors(expected), tensors(found)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape, x.stride()) == (b[name].dtype, b[name].shape, b[name].stride()), name
        assert torch.equal(x, b[name]), name
    states = [list(held_tensors(model)) for model in (expected, found)]
    assert len(states[0]) == len(states[1])
    assert all(torch.equal(x, y) for x, y in zip(*states, strict=True))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept_as", ["one", "shards", "bin", "old bin"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_bits(
    tied: bool, kept_as: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA, num_attention_heads=4, tie_word_embeddings=tied))
    model = model.to(torch.bfloat16)
    if "bin" in kept_as:
        model.config.save_pretrained(tmp_path)
        state = model.state_dict()
        state["model.norm.weight"] = torch.randn(2 * 128, dtype=torch.bfloat16)[::2]  # with gaps
        state["model.layers.0.mlp.up_proj.weight"] = torch.randn(128, 320, dtype=torch.bfloat16).T  # lying otherwise
        old = {"_use_new_zipfile_serialization": kept_as == "bin"}
        torch.save(state, tmp_path / "pytorch_model.bin", **old)
    else:
        model.save_pretrained(tmp_path, max_shard_size="200KB" if kept_as == "shards" else "5GB")
    found = assert_as_transformers(tmp_path, CAUSAL_LM.model, monkeypatch, dtype=dtype)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_bits_in_few_bits(name: str, bits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(name).to(torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[operator]
    wanted = QuantizationConfig(bits=bits)
    assert_as_transformers(tmp_path, CAUSAL_LM.model, monkeypatch, dtype=torch.bfloat16, quantization=wanted)


@pytest.mark.parametrize("name", ["bert", "t5", "bloom"])
def test_the_same_bits_of_every_kind_of_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(name).save_pretrained(tmp_path)  # type: ignore[operator]
    how: dict[str, Any] = {"labels": ["a", "b"]} if name == "bert" else {}
    assert_as_transformers(tmp_path, TASKS[TaskType(TASK[name])].model, monkeypatch, dtype=torch.bfloat16, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_are_put_together(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = MixtralForCausalLM(MixtralConfig(**LLAMA, **EXPERTS))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert_as_transformers(tmp_path, CAUSAL_LM.model, monkeypatch, dtype=dtype)


def test_only_pages_of_a_file_are_given_back(tmp_path: Path) -> None:
    """Memory of its own would come back as zeros."""
    x = torch.arange(2**20, dtype=torch.float32)
    assert not weights._is_file(x)
    torch.save({"x": x}, tmp_path / "x.bin")
    mapped = torch.load(tmp_path / "x.bin", mmap=True)["x"]
    assert weights._is_file(mapped) is (sys.platform == "linux")
    assert torch.equal(weights._materialize(False, False, x, dtype=torch.float64), x.double()) and x[-1] == 2**20 - 1
    assert torch.equal(weights._materialize(True, False, mapped), x) and torch.equal(mapped, x)


def test_a_copy_is_memory_of_its_own_however_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LEAST_BYTES", 2**18)
    torch.save({"x": torch.arange(8.0)}, tmp_path / "x.bin")
    mapped = torch.load(tmp_path / "x.bin", mmap=True)["x"]
    assert weights._materialize(True, False, mapped).data_ptr() != mapped.data_ptr()
    assert weights._materialize(False, False, mapped).data_ptr() == mapped.data_ptr()


def test_what_it_takes_the_place_of_is_there() -> None:
    usual = core_model_loading._materialize_copy
    assert list(inspect.signature(usual).parameters) == ["tensor", "device", "dtype"]
    with pytest.raises(ZeroDivisionError), piece_by_piece(quantizing=False):
        assert core_model_loading._materialize_copy is not usual
        raise ZeroDivisionError
    assert core_model_loading._materialize_copy is usual


MEASURE = """
import json, sys, torch
from siliang.config import QuantizationConfig
from siliang.models.load import load_model
from siliang.tasks import CAUSAL_LM
import bitsandbytes, transformers.models.llama.modeling_llama  # their own memory is not the model's

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

found = {}
for name, dtype, bits in (("nf4", torch.bfloat16, QuantizationConfig()), ("fp32", torch.float32, None)):
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    model = load_model(sys.argv[1], CAUSAL_LM.model, dtype=dtype, quantization=bits)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    found[name] = (sum(held.values()), resident("VmHWM") - before, resident("VmRSS") - before)
    del model
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's own files")
def test_loading_takes_what_the_weights_take(tmp_path: Path) -> None:
    """98 MB in bf16: as fp32, and in 4 bits, without the file beside it."""
    config = LlamaConfig(
        vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=12,
        tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    for p in model.to(torch.bfloat16).parameters():
        p.data.normal_(0.0, 0.02)
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    file = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 90e6 < file < 110e6
    done = subprocess.run([PYTHON, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let a process forget its peak")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    converted, peak, _ = found["fp32"]
    assert converted == 2 * sum(p.nbytes for p in model.parameters())
    assert peak < converted + 40e6  # two pieces, and pages at the weights' ends; with the whole file 95e6
    held, peak, after = found["nf4"]
    assert held < file / 2 and after < held + 30e6  # the weights that are not quantized do not keep the whole file
    assert peak < held + 60e6  # and what quantizing the largest one takes
