"""docs/precision.md, held against the tensors of real runs."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make, word_tokenizer

from siliang.config import QuantizationConfig, RunConfig
from siliang.hardware import choose_precision
from siliang.models.load import load_model
from siliang.tasks import CAUSAL_LM
from siliang.train.loop import Training
from siliang.train.prepare import prepare
from siliang.train.run import train
from siliang.train.types import Listener

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
PAGE = (Path(__file__).parents[2] / "docs" / "precision.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: [int(c) for c in cells[1:]]
    for line in PAGE.splitlines()
    if len(cells := re.findall(r"[^|`]+", line.replace(" ", ""))) == 6 and cells[1].isdigit()
}


class Bytes:
    """Bytes of the gradients and of Adam's moments, of each trained number, in the last step.

    The gradients are seen where they are clipped.
    """

    def __init__(self, training: Training) -> None:
        self.gradient = self.adam = 0.0
        self._clip, training.accelerator.clip_grad_norm_ = training.accelerator.clip_grad_norm_, self._clipped

    def _clipped(self, parameters: Any, max_norm: float) -> Any:
        parameters = list(parameters)
        trained = [p for p in parameters if p.requires_grad]
        self.gradient = sum(p.grad.nbytes for p in trained) / sum(p.numel() for p in trained)
        return self._clip(parameters, max_norm)

    def see_step(self, training: Training) -> None:
        states = training.optimizer.state
        moments = sum(t.nbytes for s in states.values() for t in s.values() if t.dim() > 0)
        self.adam = moments / sum(p.numel() for p in states)


def config(folder: Path, data: Path, output: Path, precision: str, **more: Any) -> RunConfig:
    train = {"precision": precision, "max_steps": 2, "batch_size": 4, "log_every": 1, "warmup_fraction": 0.0}
    data_section = {"train": str(data), "test_size": 0.0, "max_length": 64}
    values = {"model": str(folder), "task": "causal_lm", "data": data_section, "train": train, "output": str(output)}
    return RunConfig.build(values | more)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "full"])
@pytest.mark.parametrize("precision", ROWS)
def test_bytes(
    precision: str, method: str, model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    frozen, trained, gradient, adam, whole = ROWS[precision]
    assert trained + gradient + adam == whole
    said: list[str] = []
    tuned = {"name": method, "num_virtual_tokens": 4} if method == "prefix_tuning" else method
    chosen = config(model_folders["llama"], instruction_file, tmp_path / "run", precision, method=tuned)
    run = prepare(chosen, Listener(said.append), tmp_path)
    training = Training(run, on_step=lambda training: seen.see_step(training))
    seen = Bytes(training)
    training.run()
    assert {p.itemsize for p in run.model.parameters() if p.requires_grad} == {trained}
    assert {p.itemsize for p in run.model.parameters() if not p.requires_grad} == (
        {frozen} if method != "full" else set()
    )
    assert (seen.gradient, seen.adam) == (gradient, adam)
    assert any("0.0001" in line for line in said) == (precision == "pure-fp16")


@pytest.mark.parametrize(("precision", "learning_rate"), [("pure-bf16", 1e-2), ("pure-fp16", 3e-2)])
def test_pure_precision_learns(
    precision: str, learning_rate: float, model_folders: dict[str, Path], review_file: Path, tmp_path: Path
) -> None:
    """To the end: trained, saved, evaluated. Beside an eps of 1e-4 fp16's steps are smaller, and need a larger rate."""
    chosen = config(model_folders["bert"], review_file, tmp_path / "run", precision, task="seq_cls")
    chosen.train.max_steps, chosen.train.learning_rate, chosen.data.test_size = 60, learning_rate, 0.2
    record = train(chosen)
    assert record.precision == precision
    assert record.final["accuracy"] > 0.9


def test_fp16_adam_without_eps_is_no_number() -> None:
    """The trap that eps is raised for."""
    for eps, finite in ((1e-8, False), (choose_precision("pure-fp16", torch.device("cpu")).adam_eps, True)):
        p = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
        p.grad = torch.zeros(1, dtype=torch.float16)
        torch.optim.AdamW([p], eps=eps, foreach=False).step()
        assert bool(torch.isfinite(p)) == finite


@pytest.mark.parametrize(("bits", "double", "said"), [(8, False, "1, and 4"), (4, False, "0.5625"), (4, True, "0.516")])
def test_bytes_in_few_bits(bits: int, double: bool, said: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model: Any = make("llama")
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    wanted = QuantizationConfig(bits=bits, double=double)  # type: ignore[arg-type]
    loaded = load_model(str(tmp_path), CAUSAL_LM.model, dtype=torch.float32, quantization=wanted)
    layer, shape = loaded.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.gate_proj.weight.shape
    assert said in PAGE
    if bits == 8:
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        assert (layer.weight.nbytes, scales.nbytes) == (shape.numel(), 4 * shape[0])
        return
    state, blocks = layer.weight.quant_state, shape.numel() // 64
    scales = state.absmax.nbytes
    if double:
        assert state.state2.absmax.nbytes == 4 * -(-blocks // 256)
        scales += 4 * blocks / 256  # these weights are smaller than one block of scales
    assert (layer.weight.nbytes + scales) / shape.numel() == pytest.approx(float(said), abs=5e-4)


def test_kernel_caches_are_bounded_but_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    load_model(str(tmp_path), CAUSAL_LM.model, dtype=torch.float32)
    assert os.environ["LRU_CACHE_CAPACITY"] == "32" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
