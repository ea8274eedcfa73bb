"""What files from strangers are not let do, one by one; tests/faults tries thousands at random."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import read_rows
from tiny import make, write_jsonl
from transformers import LlamaConfig

from siliang import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from siliang.config import RunConfig
from siliang.models.base_config import load_config
from siliang.models.load import load_model
from siliang.records import Record
from siliang.safety.safe_yaml import read_yaml
from siliang.secrets import without_secrets
from siliang.tasks import CAUSAL_LM
from siliang.train.run import train
from siliang.types import AdapterError, ConfigError, DataError, ModelError, TaskType

# ---- yaml ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]), "10,000"),
        ("a: &a [*a]", "is used inside its value"),
        ("a: " + "x" * 1_000_001, "1,000,000 characters"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("b: 0\na: !!int x", "run.yaml:2: .* x is not a whole number"),
        ("a: !!bool x", "a value cannot be read"),
        ("a: 0x" + "f" * 900_000, "is too large: at most 64 bits"),
        ("a: -0b" + "1" * 900_000, "is too large: at most 64 bits"),
        ("a: " + "9" * 900_000, "is too large: at most 64 bits"),
        ("a: !!float 1" + "0" * 400, "too many for a number"),
        ("a: 1e400", "1e400 is out of range"),
        ("a: !!binary aGVsbG8=", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!timestamp 2026-01-31", "could not determine a constructor"),
        ("a: 1\nb: 2\na: 3", "run.yaml:3: .* a appears twice in one mapping"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "<< appears twice in one mapping"),
        ("? [a]\n: 1", "a name before a colon must be a text"),
        ("a: &x b\n? *x\n: 1", "a name before a colon must be a text"),
    ],
)
def test_yaml_beyond_what_settings_need(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "run.yaml")


def test_yaml_may_use_aliases(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}\n")
    assert read_yaml(tmp_path / "run.yaml") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


# ---- paths ----


def test_links_out_of_a_model_folder(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    outside = tmp_path / "secret.json"
    (folder / "generation_config.json").rename(outside)
    (folder / "generation_config.json").symlink_to(outside)
    with pytest.raises(ModelError, match="a link that leads out of"):
        load_config(str(folder))


def test_the_hubs_own_links(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Its cache keeps a model as links to the blobs of the same repository."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    shutil.copytree(model_folders["llama"], blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert load_model(str(snapshot), CAUSAL_LM.model, dtype=torch.float32) is not None
    (snapshot / "more.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="leads out"):
        load_config(str(snapshot))


def test_weights_named_elsewhere(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"'../model.safetensors', which is not in the model's folder"):
        load_config(str(folder))


def test_adapter_folders_and_names(tmp_path: Path) -> None:
    model = get_peft_model(make("llama"), LoraConfig())
    model.save_pretrained(tmp_path / "adapter")
    for name in ("../x", "a/b", "..", "a\\b", ""):
        with pytest.raises(ConfigError, match="adapter name"):
            model.add_adapter(name, LoraConfig())
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "w.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").symlink_to(tmp_path / "w.safetensors")
    with pytest.raises(AdapterError, match="a link that leads out of"):
        PeftModel.from_pretrained(make("llama"), tmp_path / "adapter")


def test_a_data_set_stays_in_its_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "secret.jsonl", [{"text": "secret", "label": "a"}])
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": "open", "label": "a"}])
    assert read_rows(str(tmp_path / "set"))[0].values["text"] == "open"
    header = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../secret.jsonl\n---\n"
    (tmp_path / "set" / "README.md").write_text(header)
    with pytest.raises(DataError, match="which is not inside it"):
        read_rows(str(tmp_path / "set"))


# ---- code ----


def test_what_a_config_says_of_code_is_not_asked(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama"], folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "_attn_implementation": "evil/attention",
        "attn_implementation": "evil/attention",
        "_attn_implementation_internal": "evil/attention",
        "_experts_implementation": "evil/experts",
    }
    (folder / "config.json").write_text(json.dumps(values))
    config = load_config(str(folder))
    assert isinstance(config, LlamaConfig) and not hasattr(config, "auto_map")
    model = load_model(str(folder), CAUSAL_LM.model, dtype=torch.float32)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not (tmp_path / "run").exists()
    values["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"its code evil\.py cannot be allowed"):
        load_config(str(folder))
    assert not (tmp_path / "run").exists()


def test_no_tokenizer_is_fetched_for_a_prompt_that_a_file_holds(model_folders: dict[str, Path], tmp_path: Path) -> None:
    kind: dict[str, Any] = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the film"}
    kind["tokenizer_name_or_path"] = str(model_folders["llama"])
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, **kind)
    get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(str(model_folders["llama"]), "nobody/nothing"))
    opened = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert opened.peft_config["default"].tokenizer_name_or_path == "nobody/nothing"  # type: ignore[attr-defined]


# ---- time and memory ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"r": 10**9},
            "would have 1,000,000,000 rows or columns by adapter_config.json, and the largest tensor of the file has",
        ),
        ({"rank_pattern": {"q_proj": 10**9}}, "would have 1,000,000,000 rows or columns"),
        ({"target_modules": 5}, "target_modules = 5"),
        ({"lora_alpha": "many"}, "lora_alpha = 'many'"),
    ],
)
def test_adapters_that_ask_for_too_much(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    get_peft_model(make("llama"), LoraConfig()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(make("llama"), tmp_path)


# ---- secrets ----


def test_secrets_reach_no_record(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    data = tmp_path / "hf_abcdefghijklmnopqrstuvwxyz" / "correct-horse-battery.jsonl"
    data.parent.mkdir()
    shutil.copy(review_file, data)
    values = {"model": str(model_folders["bert"]), "task": "seq_cls", "data": {"train": str(data), "max_length": 16}}
    train(RunConfig.build(values | {"train": {"max_steps": 2, "save_every": 1}, "output": str(tmp_path / "run")}))
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"hf_abcdefghij" not in content and b"correct-horse" not in content, path
    assert Record.read(tmp_path / "run").config["data"]["train"].endswith("***/***.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "https://me:pass-word@host/x",
        "Authorization: Bearer abcdefgh12345678",
        "hf_ABCDEFGHIJKLMNOPQRSTUVWX",
        "ghp_abcdefghijklmnopqrstuvwxyz0123",
    ],
)
def test_shapes_of_secrets(text: str) -> None:
    hidden = without_secrets(text)
    assert "***" in hidden and not any(part in hidden for part in ("pass-word", "abcdefgh", "ABCDEFGH"))


def test_what_is_no_secret_stays() -> None:
    text = '{"model": "hf_tiny", "sha256": "9f86d081884c7d659a2feaa0c55ad015", "url": "https://huggingface.co/a/b"}'
    assert without_secrets(text) == text
