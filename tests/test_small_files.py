"""Small files that ask for gigabytes: what a config says is bounded by what is in the files and on the model."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused
from safetensors.torch import save_file
from tiny import make, write_jsonl
from torch import Tensor

from siliang import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from siliang.adapters.file_sizes import SPARE_ELEMENTS, FileSizes, check_sizes
from siliang.methods.config import PeftConfig
from siliang.methods.prompt import PromptConfig
from siliang.models.base_config import load_config
from siliang.models.load import load_model
from siliang.tasks import SEQ_CLS
from siliang.types import AdapterError, ModelError, SiliangError, TaskType
from siliang.weight_files import read_adapter

CAUSAL: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
LSTM: Any = "LSTM"
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "embed_tokens"]),
    "dora": LoraConfig(**CAUSAL, r=4, use_dora=True),
    "ia3": IA3Config(**CAUSAL),
    "ln": LNTuningConfig(**CAUSAL),
    "prompt": PromptTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "mlp": PromptEncoderConfig(**CAUSAL, num_virtual_tokens=3, encoder_hidden_size=5),
    "lstm": PromptEncoderConfig(
        **CAUSAL,
        num_virtual_tokens=3,
        encoder_hidden_size=5,
        encoder_num_layers=3,
        encoder_reparameterization_type=LSTM,
    ),
    "prefix": PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3),
    "projected": PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3, encoder_hidden_size=5, prefix_projection=True),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_made_is_counted_before(name: str) -> None:
    model = get_peft_model(make("llama"), CONFIGS[name])
    config = model.peft_config["default"]
    if isinstance(config, PromptConfig):
        made = sum(p.numel() for p in model.injection.prompts.parameters())
        assert config.encoder_elements == made
        assert config.rows * config.width == model.injection.adapters["default"].tensors()["prompt_embeddings"].numel()
        return
    adapter = model.injection.adapters["default"]
    base, file = make("llama"), FileSizes("a file", elements=0, largest=2**31)
    assert adapter.parts.layers
    with pytest.raises(AdapterError, match=f"it has {sum(p.numel() for p in adapter.parameters()):,} numbers"):
        check_sizes(base, config, adapter.parts, dataclasses.replace(file, elements=-SPARE_ELEMENTS))


HUGE = 40_000_000


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lora", {"r": HUGE}),
        ("lora", {"r": 10**39}),
        ("lora", {"rank_pattern": {"q_proj": HUGE}}),
        ("lora", {"rank_pattern": {".*": 10**39}}),
        ("lora", {"r": HUGE, "init_lora_weights": "gaussian"}),
        ("dora", {"lora_alpha": 10**39, "r": HUGE}),
        ("lora", {"init_lora_weights": "pissa_niter_1000000000"}),
        ("lora", {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}}),
        ("lora", {"layers_to_transform": [0] * 100_000, "layers_pattern": "layers"}),
        ("lora", {"target_modules": ["q_proj"] * 100_000}),
        ("lora", {"trainable_token_indices": [10**9]}),
        ("lora", {"layer_replication": [[0, 10**9]]}),
        ("prompt", {"num_virtual_tokens": HUGE}),
        ("prompt", {"num_transformer_submodules": 6_000_000}),
        ("prompt", {"num_transformer_submodules": 10**39}),
        ("prompt", {"token_dim": HUGE}),
        ("mlp", {"num_transformer_submodules": 6_000_000}),
        ("mlp", {"encoder_hidden_size": 10**9}),
        ("lstm", {"encoder_num_layers": 32_000}),
        ("lstm", {"encoder_hidden_size": 32_000}),
        ("prefix", {"num_layers": HUGE}),
        ("prefix", {"num_attention_heads": 10**9}),
        ("prefix", {"num_virtual_tokens": HUGE}),
        ("prefix", {"token_dim": HUGE}),
        ("projected", {"encoder_hidden_size": 10**9}),
        ("projected", {"num_layers": 10**9}),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_configs_that_ask_for_more(name: str, values: dict[str, Any], empty: bool, tmp_path: Path) -> None:
    get_peft_model(make("llama"), CONFIGS[name]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if empty:  # a tensor with a huge side and no numbers
        tensors = read_adapter(tmp_path)
        save_file(tensors | {"more": torch.zeros(0, 10**9)}, tmp_path / "adapter_model.safetensors")
    # what made a prompt is not read, and so not made, unless it is trained further
    for trainable in (True,) if "encoder_hidden_size" in values else (False, True):
        with pytest.raises(SiliangError) as caught:
            PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=trainable)
        assert len(str(caught.value)) < 1000


def test_many_numbers_of_small_sides(tmp_path: Path) -> None:
    """The rank is that of a tensor of the file, and there are many layers."""
    model = make("llama")
    layers = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    rank = SPARE_ELEMENTS // 32
    get_peft_model(make("llama"), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": rank}))
    save_file({"x": torch.zeros(1, rank, dtype=torch.int8)}, tmp_path / "adapter_model.safetensors")
    assert layers > 4
    with pytest.raises(AdapterError, match="numbers on this model, and in its file"):
        PeftModel.from_pretrained(model, tmp_path)


# ---- files ----


def header_file(path: Path, header: dict[str, Any], data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [0, 10**9], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"a": 5},
        [],
    ],
)
def test_headers_of_safetensors(header: Any, tmp_path: Path) -> None:
    header_file(tmp_path / "adapter_model.safetensors", header, b"\0" * 4)
    with pytest.raises(AdapterError, match="is damaged"):
        read_adapter(tmp_path)


def test_a_header_that_is_longer_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(AdapterError, match="header is longer"):
        read_adapter(tmp_path)


def pickled(folder: Path, value: Any) -> Path:
    path = folder / "adapter_model.bin"
    torch.save(value, path)
    return path


class Large:
    """A bytearray of 8 GiB, in a few bytes; torch's safe reader makes it."""

    def __reduce__(self) -> Any:
        return bytearray, (2**33,)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"a": torch.zeros(1).expand(10**9)}, "more numbers than the file"),
        (
            {f"a{i}": torch.zeros(4, 4).t() for i in range(3)} | {"b": torch.zeros(1, 1).expand(10**5, 10**5)},
            "more numbers",
        ),
        (
            {"a": torch.eye(2).to_sparse()},
            "not a tensor",
        ),
        ({"a": torch.empty(10**12, device="meta")}, "not a tensor"),
        ({"a": Large()}, "bytearray"),
        ({"a": 5}, "not a plain tensor"),
        ([torch.zeros(2)], "not a dictionary"),
    ],
)
def test_pickled_tensors(value: Any, why: str, tmp_path: Path) -> None:
    pickled(tmp_path, value)
    with pytest.raises(AdapterError, match=f"is damaged: .*{why}"):
        read_adapter(tmp_path)


def test_plain_pickled_tensors_are_read(tmp_path: Path) -> None:
    value: dict[str, Tensor] = {
        "a": torch.arange(6.0).reshape(2, 3).t(),
        "b": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "c": torch.ones((), dtype=torch.int64),
    }
    pickled(tmp_path, value)
    found = read_adapter(tmp_path)
    assert found.keys() == value.keys() and all(torch.equal(found[key], value[key]) for key in value)


def test_a_packed_file(tmp_path: Path) -> None:
    path = pickled(tmp_path, {"a": torch.zeros(10**6)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 10**5
    with pytest.raises(AdapterError, match="compressed"):
        read_adapter(tmp_path)


PEAK = """
import json, resource, sys
from pathlib import Path
from tiny import make, write_jsonl
from siliang import PeftModel
from siliang.types import SiliangError
model = make("llama")
PeftModel.from_pretrained(model, sys.argv[1]).unload()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sorted(Path(sys.argv[1]).glob("*/")):
    try:
        PeftModel.from_pretrained(model, folder)
    except SiliangError:
        print(folder.name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in KiB")
def test_none_of_them_takes_memory(tmp_path: Path) -> None:
    get_peft_model(make("llama"), LoraConfig()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = read_adapter(tmp_path)
    folders = {name: tmp_path / name for name in ("empty", "packed", "pickle", "pattern")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
    (folders["empty"] / "adapter_config.json").write_text(json.dumps(config | {"r": HUGE}))
    save_file(tensors | {"more": torch.zeros(0, 10**9)}, folders["empty"] / "adapter_model.safetensors")
    pickled(folders["pickle"], {"a": Large()})
    pickled(folders["packed"], {"a": torch.zeros(1).expand(2**31)})
    pattern = "(?:a|b)?" * 100_000
    (folders["pattern"] / "adapter_config.json").write_text(json.dumps(config | {"target_modules": pattern}))
    save_file(tensors, folders["pattern"] / "adapter_model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    *refused, grown = done.stdout.split()
    assert refused == sorted(folders) and int(grown) < 500


# ---- base models ----


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**7},
        {"vocab_size": 10**10},
        {"num_labels": 10**9},
        {"id2label": {str(i): "x" for i in range(60_000)}},
        {"layer_types": ["full_attention"] * 60_000},
        {"pruned_heads": {"0": [0] * 60_000}},
        {"intermediate_size": 10**30},
        {"num_attention_heads": 10**8},
        {"head_dim": 10**9},
        {"head_dim": 10**6},
        {"max_position_embeddings": 10**12},
        {"text_config": {"num_hidden_layers": 10**7}},
        {"hidden_sizes": [1, 10**9]},
        {"num_hidden_layers": 900, "num_local_experts": 4000},
    ],
)
def test_configs_of_base_models(values: dict[str, Any], model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed_model(model_folders["llama"], tmp_path / "model", values)
    with pytest.raises(ModelError, match=r"config.json: .*(at most|layers of)"):
        load_config(str(folder))


def test_a_list_of_ends_without_end(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed_model(model_folders["llama"], tmp_path / "model", {})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(100_000))}))
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id has 100,000 entries: at most 50,000"):
        load_config(str(folder))


def changed_model(source: Path, folder: Path, values: dict[str, Any]) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_a_base_model_that_is_packed(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed_model(model_folders["llama"], tmp_path / "model", {})
    (folder / "model.safetensors").unlink()
    torch.save({"a": Large()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is damaged: .*bytearray"):
        load_config(str(folder))


SHAPES = """
import resource, sys
from pathlib import Path
import torch
from siliang.models.load import load_model
from siliang.tasks import CAUSAL_LM
from siliang.types import ModelError
load_model(sys.argv[1], CAUSAL_LM.model, dtype=torch.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[2:]:
    try:
        load_model(folder, CAUSAL_LM.model, dtype=torch.float32)
    except ModelError as error:
        print("of another shape" in str(error))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in KiB")
def test_shapes_are_compared_before_memory_is_taken(model_folders: dict[str, Path], tmp_path: Path) -> None:
    source = model_folders["llama"]
    changes: list[dict[str, Any]] = [
        {"vocab_size": 2**24},
        {"hidden_size": 2**15},
        {"intermediate_size": 2**24},
        {"num_hidden_layers": 100, "intermediate_size": 2**16},
    ]
    folders = [changed_model(source, tmp_path / str(i), values) for i, values in enumerate(changes)]
    done = subprocess.run(
        [sys.executable, "-c", SHAPES, str(source), *map(str, folders)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *refused, grown = done.stdout.split()
    assert refused == ["True"] * len(changes) and int(grown) < 500


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"hidden_act": "../act"}, "KeyError: '../act'"),
        ({"pad_token_id": 10**12}, "Padding_idx must be within num_embeddings"),
        ({"text_config": {"model_type": "other"}}, "'dict' object has no attribute 'to_dict'"),
        ({"hidden_act": ["gelu"]}, "its model cannot be loaded: Validation error for field 'hidden_act': TypeError"),
        ({"num_attention_heads": 0}, "its model cannot be loaded: ZeroDivisionError"),
    ],
)
def test_configs_that_do_not_go_together(
    values: dict[str, Any], why: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed_model(model_folders["llama"], tmp_path / "model", values)
    data = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "say", "output": "one"}] * 8)
    assert why in refused("check", "--model", folder, "--data", data, "--task", "causal_lm")


def test_other_ways_to_the_same_numbers_are_left_aside(model_folders: dict[str, Path], tmp_path: Path) -> None:
    values = {"return_dict": False, "chunk_size_feed_forward": 7}
    folder = changed_model(model_folders["bert"], tmp_path / "model", values)
    model = load_model(str(folder), SEQ_CLS.model, dtype=torch.float32, labels=["a", "b"])
    assert model(torch.ones(1, 5, dtype=torch.long)).logits.shape == (1, 2)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_of_complex_numbers(file: str, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, dtype=torch.complex64)}
    torch.save(tensors, tmp_path / file) if file.endswith("bin") else save_file(tensors, tmp_path / file)
    with pytest.raises(AdapterError, match=f"{file}: a holds complex numbers"):
        read_adapter(tmp_path)
