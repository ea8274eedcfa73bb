"""Adapter files: whole or refused, with the model unchanged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch, make
from torch import nn

from siliang import BitFitConfig, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from siliang.adapters.files import read_training
from siliang.types import AdapterError
from siliang.weight_files import read_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(make("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_bitfit_round_trip(tmp_path: Path) -> None:
    model = get_peft_model(make("bert"), BitFitConfig(task_type=TaskType.SEQ_CLS))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    wanted = model(**batch("bert")).logits
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.bias" in keys
    assert "base_model.model.classifier.weight" in keys
    again = PeftModel.from_pretrained(make("bert"), tmp_path)
    assert torch.equal(again(**batch("bert")).logits, wanted)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BITFIT"


def test_config_as_peft_writes_it(adapter: Path) -> None:
    text = (adapter / "adapter_config.json").read_text()
    values = json.loads(text)
    assert list(values) == sorted(values)
    assert values["inference_mode"] is True and values["peft_type"] == "LORA"
    assert values["target_modules"] == ["q_proj", "v_proj"]
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, LoraConfig) and config.r == 8


def test_is_trainable_goes_on(adapter: Path) -> None:
    model = PeftModel.from_pretrained(make("llama"), adapter, is_trainable=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(make("llama"), adapter).parameters())


def test_unknown_field_warns_and_a_changing_one_stops(adapter: Path) -> None:
    change_config(adapter, something_new=3)
    with pytest.warns(UserWarning, match="unknown fields are ignored: something_new = 3"):
        PeftModel.from_pretrained(make("llama"), adapter)
    change_config(adapter, something_new=None, use_qalora=True)
    with pytest.raises(AdapterError, match="use_qalora = True changes what LORA computes"):
        PeftModel.from_pretrained(make("llama"), adapter)


def test_foreign_method(adapter: Path) -> None:
    change_config(adapter, peft_type="SUPERTUNING")
    with pytest.raises(AdapterError, match="'SUPERTUNING' is a method of PEFT that siliang does not have"):
        PeftModel.from_pretrained(make("llama"), adapter)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "1 of 8 tensors are missing"),
        (
            lambda t: t.update(extra=torch.zeros(1)),
            "1 tensors have no place in the model, the first is extra",
        ),
        (lambda t: t.update({KEY: torch.zeros(8, 16)}), r"has shape \(8, 16\), the model needs \(8, 32\)"),
    ],
)
def test_tensors_that_do_not_fit(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    change_tensors(adapter, change)
    base = make("llama")
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, adapter)
    assert list(base.state_dict()) == list(make("llama").state_dict())
    assert torch.equal(base(**batch("llama")).logits, make("llama")(**batch("llama")).logits)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 40])
def test_damaged_weights(adapter: Path, damage: Callable[[bytes], bytes]) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterError, match="damaged"):
        PeftModel.from_pretrained(make("llama"), adapter)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, b"PK\x03\x04" + b"\0" * 40], ids=["empty", "noise", "zip"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "siliang_training.safetensors"])
def test_each_damaged_file_is_named_with_what_to_do(name: str, damage: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(AdapterError) as raised:
        (read_training if "training" in name else read_adapter)(tmp_path)
    first, second = str(raised.value).splitlines()
    assert first.startswith(f"{tmp_path / name} is damaged: ") and second == "Download it, or train it, again."


def test_pickled_weights_run_no_code(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    PeftModel.from_pretrained(make("llama"), adapter)
    torch.save({"a": Hostile()}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="damaged"):
        PeftModel.from_pretrained(make("llama"), adapter)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("code was run",))


def test_missing_folder() -> None:
    with pytest.raises(AdapterError, match="no adapter folder"):
        PeftModel.from_pretrained(make("llama"), "./not-there")


def test_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(make("llama"), LoraConfig())

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("siliang.adapters.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
