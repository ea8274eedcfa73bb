"""What the files of a model or of a data set name: files of their own folder, and nothing else is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, run
from reading import read_rows
from tiny import make, write_jsonl

from siliang import LoraConfig, PromptTuningConfig, get_peft_model
from siliang.data.sources import _fetch
from siliang.models.base_config import load_config
from siliang.models.load import load_model
from siliang.models.tokenizers import load_tokenizer
from siliang.tasks import CAUSAL_LM
from siliang.types import ConfigError, DataError, ModelError, TaskType

OPENED: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | bytes):
        OPENED.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_hear)


@pytest.fixture
def model(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))


@pytest.fixture
def outside(model: Path) -> Path:
    """Weights and words beside the model's folder."""
    folder = model.parent / "outside"
    shutil.copytree(model, folder)
    return folder


def change(path: Path, **values: object) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | values))


def opened(model: Path) -> None:
    load_tokenizer(str(model))
    load_model(str(model), CAUSAL_LM.model, dtype=torch.float32)


@pytest.mark.parametrize(
    "named", ["part.safetensors", "sub/model.safetensors.index.json", "../outside/model.safetensors", "/x", 5]
)
def test_weights_that_the_config_names(named: object, model: Path, outside: Path) -> None:
    (model / "sub").mkdir()
    change(
        model / "sub" / "model.safetensors.index.json", metadata={}, weight_map={"a": "../outside/model.safetensors"}
    )
    change(model / "config.json", transformers_weights=named)
    with pytest.raises(ModelError, match="transformers_weights"):
        opened(model)
    for command in ("plan", "check"):
        given = [
            "--model",
            model,
            "--task",
            "causal_lm",
            "--data",
            write_jsonl(model.parent / "d.jsonl", [{"text": "a"}]),
        ]
        assert "transformers_weights" in refused(command, *given)


@pytest.mark.parametrize(
    "named", ["../outside/model.safetensors", "/x.safetensors", "sub/x.safetensors", "link", 5, [1]]
)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json", "x.index.json"])
def test_weights_that_an_index_names(named: object, index: str, model: Path, outside: Path) -> None:
    change(model / index, metadata={}, weight_map={"a": named})
    (model / "link").symlink_to(outside / "model.safetensors")
    with pytest.raises(ModelError, match=r"not in the model's folder|leads out of|is damaged"):
        opened(model)


def test_weights_that_are_none(model: Path) -> None:
    change(model / "model.safetensors.index.json", metadata={}, weight_map={"a": "config.json"})
    with pytest.raises(ModelError, match=r"'config.json', which is not a file of weights"):
        opened(model)


def test_a_bin_of_something_else_is_not_advised_to_be_run(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(ModelError, match="something else than tensors, or is damaged") as said:
        load_model(str(model), CAUSAL_LM.model, dtype=torch.float32)
    assert "weights_only" not in str(said.value)


def test_other_ways_to_name_weights_and_configs(model: Path, outside: Path) -> None:
    config = (model / "config.json").read_text()
    change(model / "config.json", configuration_files=["../outside/config.4.0.0.json"])
    with pytest.raises(ModelError, match="configuration_files"):
        opened(model)
    (model / "config.json").write_text(config)
    (model / "shard-00000-model-00001-of-00001.safetensors").touch()
    with pytest.raises(ModelError, match="distributed checkpoint"):
        opened(model)
    (model / "shard-00000-model-00001-of-00001.safetensors").unlink()
    opened(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fast_tokenizer_files", ["../outside/tokenizer.4.0.0.json"]),
        ("fast_tokenizer_files", ["/tokenizer.4.0.0.json"]),
        ("init_inputs", ["/etc/passwd"]),
        ("sp_model_kwargs", {"model_file": "/etc/passwd"}),
        ("mecab_kwargs", {"mecab_option": ["-r", "../x"]}),
        ("sudachi_kwargs", {"sudachi_config_path": "~/x"}),
    ],
)
def test_files_that_a_tokenizer_names(key: str, value: object, model: Path, outside: Path) -> None:
    change(model / "tokenizer_config.json", **{key: value})
    with pytest.raises(ModelError, match=key):
        load_tokenizer(str(model))


def test_names_that_old_tokenizers_keep_are_left_aside(model: Path, outside: Path) -> None:
    """Published configs name files of their authors' machines; transformers finds its own."""
    words = load_tokenizer(str(model)).get_vocab()
    change(outside / "tokenizer.json", added_tokens=[])
    names = dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "name_or_path"))
    change(model / "tokenizer_config.json", **{name: str(outside / "tokenizer.json") for name in names})
    global OPENED
    OPENED = []
    try:
        assert load_tokenizer(str(model)).get_vocab() == words
        assert not [name for name in OPENED if name.startswith(str(outside))]
    finally:
        OPENED = None


def test_an_adapter_beside_a_base_model_is_left_aside(model: Path, outside: Path) -> None:
    before = load_model(str(model), CAUSAL_LM.model, dtype=torch.float32)
    tuned = get_peft_model(make("llama"), LoraConfig(init_lora_weights=False))
    tuned.save_pretrained(model)
    with pytest.warns(UserWarning, match="has an adapter in the model's folder"):
        after = load_model(str(model), CAUSAL_LM.model, dtype=torch.float32)
    assert {n: p.sum().item() for n, p in before.named_parameters()} == {
        n: p.sum().item() for n, p in after.named_parameters()
    }
    tuned.save_pretrained(model / "no-adapter-is-looked-for")
    with pytest.raises(ModelError, match="may not be there"):
        load_config(str(model))


BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq', which siliang does not load"),
        ({"quant_method": "awq"}, "quantized by 'awq'"),
        ({"quant_method": "quark"}, "quantized by 'quark'"),
        ({"quant_method": ["x"]}, "which siliang does not load"),
        ({"quant_method": "bitsandbytes"}, "without load_in_4bit"),
        (5, "cannot be loaded"),
        (BITS | {"load_in_8bit": True}, "without load_in_4bit"),
        (BITS | {"bnb_4bit_quant_type": "x"}, "bnb_4bit_quant_type = 'x'"),
        (BITS | {"bnb_4bit_compute_dtype": "save"}, "bnb_4bit_compute_dtype = 'save'"),
        (BITS | {"llm_int8_threshold": 1e9}, "llm_int8_threshold"),
        (BITS | {"llm_int8_skip_modules": ["(a+)+$"]}, "no names of modules"),
        (BITS | {"llm_int8_skip_modules": ["a"] * 10_001}, "no names of modules"),
        (BITS | {"llm_int8_enable_fp32_cpu_offload": True}, "llm_int8_enable_fp32_cpu_offload"),
    ],
)
def test_bits_that_a_config_asks_for(values: object, message: str, model: Path) -> None:
    change(model / "config.json", quantization_config=values)
    with pytest.raises(ModelError, match=message):
        load_config(str(model))


def test_known_bits_keep_the_known_fields(model: Path) -> None:
    given = BITS | {"_load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"]}
    change(model / "config.json", quantization_config=given | {"modules_to_import": "x"}, fusion_config={"a": 1})
    config = load_config(str(model))
    assert config.quantization_config == {k: v for k, v in given.items() if not k.startswith("_")}
    assert not hasattr(config, "fusion_config")


# ---- data ----


def described(folder: Path, files: object, **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "train.jsonl", [{"text": "open", "label": "a"}])
    header = json.dumps({"configs": [{"config_name": "default", "data_files": files, **more}]})[1:-1]
    (folder / "README.md").write_text("---\n" + header.replace('"configs"', "configs", 1) + "\n---\n")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jsonl",
        "{root}/secret.jsonl",
        "local://{root}/secret.jsonl",
        "file://{root}/secret.jsonl",
        "zip://x.jsonl::{root}/secret.zip",
        "gzip://x::{root}/secret.gz",
        "dir://{root}",
        "simplecache::file://{root}/secret.jsonl",
        "http://127.0.0.1:9/x.jsonl",
        "hf://datasets/a/b/x.jsonl",
        "a/../../*.jsonl",
        "~/x.jsonl",
        "link.jsonl",
        "*/secret.jsonl",
        ".hidden.jsonl",
        "cache-x.jsonl",
        5,
    ],
)
def test_files_that_a_data_set_names(name: object, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "secret.jsonl", [{"text": "secret", "label": "a"}])
    name = name.format(root=tmp_path) if isinstance(name, str) else name
    for files in (name, [name], [{"split": "train", "path": name}], {"train": [name]}):
        folder = described(tmp_path / "set", files)
        (folder / "link.jsonl").unlink(missing_ok=True)
        (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
        (folder / "d").unlink(missing_ok=True)
        (folder / "d").symlink_to(tmp_path)
        for hidden in (".hidden.jsonl", "cache-x.jsonl"):
            shutil.copy(tmp_path / "secret.jsonl", folder / hidden)
        with pytest.raises(DataError, match=r"not inside it|leads out|hidden|holds no data|none is there"):
            read_rows(str(folder))
    said = refused("check", "--model", tmp_path, "--task", "seq_cls", "--data", tmp_path / "set")
    assert "secret" not in said or str(tmp_path) in said


def test_other_descriptions_of_a_data_set(tmp_path: Path) -> None:
    folder = described(tmp_path / "set", "train.jsonl", data_dir="..")
    with pytest.raises(DataError, match="not inside it"):
        read_rows(str(folder))
    described(folder, "train.jsonl")
    assert [row.values["text"] for row in read_rows(str(folder))] == ["open"]
    (folder / ".huggingface.yaml").write_text("configs: []")
    with pytest.raises(DataError, match="is not read"):
        read_rows(str(folder))
    (folder / ".huggingface.yaml").unlink()
    bomb = "\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))])
    (folder / "README.md").write_text(f"---\nconfigs: []\n{bomb}\n---\n")
    with pytest.raises(DataError, match="its description cannot be read"):
        read_rows(str(folder))


@pytest.mark.parametrize("name", ["../x.arrow", "/x.arrow", "file:///x.arrow", "zip://a::/x.zip", "cache-x.arrow", 5])
def test_files_that_a_saved_data_set_names(name: object, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"text": "a", "label": "b"}])}).save_to_disk(str(tmp_path / "set"))
    assert len(read_rows(str(tmp_path / "set"))) == 1
    change(tmp_path / "set" / "train" / "state.json", _data_files=[{"filename": name}])
    with pytest.raises(DataError, match=r"not inside it|hidden"):
        read_rows(str(tmp_path / "set"))
    change(tmp_path / "set" / "dataset_dict.json", splits=["../train"])
    with pytest.raises(DataError, match="not inside it"):
        read_rows(str(tmp_path / "set"))


def test_what_is_read_is_what_is_hashed(model: Path, tmp_path: Path) -> None:
    """By what Python opens in a run; weights are opened by safetensors itself."""
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "more.jinja").write_text("{{ messages }}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("notes.json", "pytorch_model.bin", "preprocessor_config.json"):
        (model / name).write_text("{}")
    data = described(tmp_path / "set", "train.jsonl")
    write_jsonl(data / "train.jsonl", [{"instruction": f"say {i}", "output": "good"} for i in range(8)])
    sets = ["train.max_steps=1", "accept=[SL002,SL003,SL012]", "method.target_modules=[q_proj]", "data.test_size=0.2"]
    sets.append("data.template=human-assistant")  # the model's own is none
    flags = ["--model", model, "--task", "causal_lm", "--data", data, "--output", tmp_path / "run"]
    global OPENED
    OPENED = []
    try:
        ended = run("train", *flags, *(part for s in sets for part in ("--set", s)))
    finally:
        read, OPENED = set(OPENED), None
    assert ended.code == 0, ended
    of_model = {os.path.relpath(name, model) for name in read if name.startswith(f"{model}/")}
    hashed = json.loads((tmp_path / "run" / "run.json").read_text())["model_files"]
    assert of_model - {"generation_config.json"} | {"model.safetensors"} == set(hashed)
    strange = {
        n for n in read if n.startswith(str(tmp_path)) and not n.startswith((f"{model}/", f"{data}", f"{tmp_path}/run"))
    }
    assert not strange


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "local:///etc/passwd", "zip://a::hf://datasets/a/b/x.zip", "http://x/y"]
)
def test_files_that_a_data_set_of_the_hub_names(file: str) -> None:
    with pytest.raises(DataError, match="which is not in its repository"):
        _fetch(file, "a/b")


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "gguf_file", "cache_dir", "config", "subfolder"])
def test_files_that_an_adapters_tokenizer_names(key: str, model: Path) -> None:
    text: dict[str, Any] = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "the film",
        "num_virtual_tokens": 2,
    }
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, tokenizer_name_or_path=str(model), tokenizer_kwargs={key: "/etc/passwd"}, **text
    )
    with pytest.raises(ConfigError, match=key):
        get_peft_model(make("llama"), config)
