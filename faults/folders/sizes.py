"""Kind 4: small files that ask for much memory."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from faults.folders.limits import base_file, opened
from faults.folders.making import HELLO, change_json, change_settings, copy, sealed, table, with_base, write
from faults.folders.sandbox import Case, Expected, Site, Step
from siliang import PeftModel

KIND = "sizes"
FILE = "adapter_model.safetensors"


def _header(tensors: dict[str, tuple[str, list[int], int, int]], content: bytes = b"") -> bytes:
    """A safetensors file with the header as it is given: kind, shape, begin and end."""
    header = {n: {"dtype": k, "shape": s, "data_offsets": [a, b]} for n, (k, s, a, b) in tensors.items()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def _opening(name: str, change: Callable[[Site], object], run: str = "adapter", expected: Expected = "refused") -> Case:
    def build(site: Site) -> Sequence[Step]:
        from faults.folders.bases import tiny_llama

        copy(site, run) if run == "adapter" else copy(site, f"{run}/adapter")
        change(site)
        sealed(site.evil)
        model = tiny_llama()
        return [lambda: PeftModel.from_pretrained(model, site.evil)]

    return Case(KIND, name, build, expected)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Site], object]:
    def changed(site: Site) -> None:
        found = load_file(site.evil / FILE)
        change(found)
        save_file(found, site.evil / FILE)

    return changed


def _config(**values: Any) -> Callable[[Site], object]:
    return lambda site: change_json(site.evil / "adapter_config.json", values)


def _first(tensors: dict[str, Any]) -> str:
    return sorted(tensors)[0]


def _empty(shape: tuple[int, ...], **config: Any) -> Callable[[Site], object]:
    """A tensor without numbers, whose shape says much."""

    def change(site: Site) -> None:
        _tensors(lambda t: t.update({_first(t): torch.zeros(shape)}))(site)
        change_json(site.evil / "adapter_config.json", config)

    return change


def _pickled(make: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        found = make(load_file(site.evil / FILE))
        (site.evil / FILE).unlink()
        torch.save(found, site.evil / "adapter_model.bin")

    return change


def _deflated(site: Site) -> None:
    """A pickled file of zeros that unfolds to a thousand times its size."""
    out = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, out)
    entries = {
        i.filename: zipfile.ZipFile(io.BytesIO(out.getvalue())).read(i)
        for i in zipfile.ZipFile(io.BytesIO(out.getvalue())).infolist()
    }
    (site.evil / FILE).unlink()
    with zipfile.ZipFile(site.evil / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in entries.items():
            with file.open(name, "w", force_zip64=True) as part:
                part.write(content)
                if name.endswith("/data/0"):
                    for _ in range(110):
                        part.write(bytes(10**7))


def _bomb(site: Site) -> None:
    """A pickled file with a member that is not a tensor, and unfolds to gigabytes."""
    found = load_file(site.evil / FILE)
    (site.evil / FILE).unlink()
    torch.save(found, site.evil / "adapter_model.bin")
    with zipfile.ZipFile(site.evil / "adapter_model.bin", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for i in range(1):
            with file.open(f"archive/more{i}.pkl", "w") as part:
                for _ in range(120):
                    part.write(bytes(10**7))


def _strided(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = _first(t)
    return t | {key: torch.zeros(1).expand(40_000, 40_000)}


def _rank(r: int) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, t in list(tensors.items()):
            tensors[key] = torch.zeros(r, t.shape[1]) if "_A" in key else torch.zeros(t.shape[0], r)

    return change


def _many(site: Site) -> None:
    header = {f"x{i}": ("F32", [0, 10**9], 0, 0) for i in range(20_000)}
    write(site.evil / FILE, _header(header))


def _of_header(tensors: dict[str, tuple[str, list[int], int, int]], content: bytes = b"") -> Callable[[Site], object]:
    return lambda site: write(site.evil / FILE, _header(tensors, content))


OPENED: dict[str, Callable[[Site], object]] = {
    "a tensor of no rows and 10^9 columns, r of 4x10^7": _empty((0, 10**9), r=40_000_000),
    "a tensor of no rows and 10^9 columns": _empty((0, 10**9)),
    "a tensor of no columns": _empty((10**9, 0), r=10**9),
    "a tensor of many dimensions": _empty((0, 10**6, 10**6, 10**6), r=10**6),
    "a rank of 4x10^7": _config(r=40_000_000),
    "a rank of 10^9 by name": _config(rank_pattern={"q_proj": 10**9}),
    "a rank beyond numbers": _config(r=10**30),
    "a rank of 100,000 in files": _tensors(_rank(100_000)),
    "a further tensor of no numbers": _tensors(lambda t: t.update({"base_model.model.x": torch.zeros(0, 10**12)})),
    "a config that says another rank than the file": _config(r=512, lora_alpha=1),
    "alpha beyond numbers": _config(lora_alpha=10**400),
    "20,000 tensors of no numbers": _many,
    "a header of offsets beyond the file": _of_header({"x": ("F32", [10**9], 0, 4 * 10**9)}),
    "a header of negative offsets": _of_header({"x": ("F32", [-1], -4, 0)}),
    "a header of overlapping tensors": _of_header({"x": ("F32", [2], 0, 8), "y": ("F32", [2], 0, 8)}, bytes(8)),
    "a header of 2^62 numbers": _of_header({"x": ("F32", [2**31, 2**31], 0, 0)}),
    "a header's length beyond the file": lambda site: write(site.evil / FILE, (2**40).to_bytes(8, "little") + b"{}"),
    "a header of a hundred megabytes of blanks": lambda site: write(
        site.evil / FILE, (99_000_000).to_bytes(8, "little") + b"{" + b" " * 98_999_998 + b"}"
    ),
    "a header of deep lists": lambda site: write(site.evil / FILE, struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a deflated pickle": _deflated,
    "a pickle, and a bomb in its folder": _bomb,
    "a pickle of strides of 0": _pickled(_strided),
    "a pickle of a sparse tensor": _pickled(
        lambda t: (
            t
            | {_first(t): torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**9, 10**9))}
        )
    ),
    "a pickle of a meta tensor": _pickled(lambda t: t | {_first(t): torch.empty(10**6, 10**6, device="meta")}),
    "a pickle of numbers": _pickled(lambda t: {"x": 1, "y": [1] * 100_000}),
    "a pickle of a nested dict": _pickled(lambda t: {"a": {"b": dict(t)}}),
    "a pickle of complex numbers": _pickled(lambda t: {k: v.to(torch.complex64) for k, v in t.items()}),
    "modules_to_save that hold all": _config(modules_to_save=["model", "lm_head", "embed_tokens"]),
    "layers that are not there": _config(layers_to_transform=list(range(100_000)), layers_pattern="layers"),
    "a list of a million targets": _config(target_modules=[f"x{i}" for i in range(1_000_000)]),
    "trainable tokens": _config(trainable_token_indices=list(range(10**6))),
    "parameters as targets": _config(target_parameters=["q_proj.weight"] * 10_000),
    "weight tying asked for": _config(layer_replication=[[0, 10_000]] * 1000),
    "a replicated layer": _config(layer_replication=[[0, 2], [0, 2]]),
}

PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "6x10^6 submodules": ("prefix_tuning", {"num_transformer_submodules": 6_000_000}),
    "submodules of a prompt": ("prompt_tuning", {"num_transformer_submodules": 6_000_000}),
    "10^9 virtual tokens": ("prompt_tuning", {"num_virtual_tokens": 10**9}),
    "10^9 virtual tokens of a prefix": ("prefix_tuning", {"num_virtual_tokens": 10**9}),
    "10^9 layers": ("prefix_tuning", {"num_layers": 10**9}),
    "10^9 heads": ("prefix_tuning", {"num_attention_heads": 10**9}),
    "a width of 10^9": ("prefix_tuning", {"token_dim": 10**9}),
    "a wide encoder": ("prefix_tuning", {"encoder_hidden_size": 10**9, "prefix_projection": True}),
    "a wide encoder of a prompt": ("p_tuning", {"encoder_hidden_size": 10**9}),
    "a wide encoder of a prompt, just allowed": (
        "p_tuning",
        {"encoder_hidden_size": 32_768, "encoder_num_layers": 500},
    ),
    "many layers of an encoder": ("p_tuning", {"encoder_num_layers": 10**9, "encoder_reparameterization_type": "LSTM"}),
    "negative tokens": ("prompt_tuning", {"num_virtual_tokens": -4}),
    "tokens that are text": ("prompt_tuning", {"num_virtual_tokens": "4"}),
    "a prompt of an initial text": (
        "prompt_tuning",
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x " * 500_000, "tokenizer_name_or_path": "evil"},
    ),
}

# what is only used to begin a training, and not looked at when an adapter is opened
UNUSED = ("6x10^6 submodules", "a wide encoder", "a wide encoder of a prompt", "a prompt of an initial text")
MODELS: dict[str, dict[str, Any]] = {
    "10^7 layers": {"num_hidden_layers": 10**7},
    "a vocabulary of 10^10": {"vocab_size": 10**10},
    "a width of 10^9": {"hidden_size": 10**9},
    "an inner width of 10^9": {"intermediate_size": 10**9},
    "positions of 10^12": {"max_position_embeddings": 10**12},
    "no heads": {"num_attention_heads": 0},
    "heads of 10^9": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "a head's width of 10^9": {"head_dim": 10**9},
    "labels of 10^7": {"id2label": {str(i): "x" for i in range(300_000)}},
    "labels by number": {"num_labels": 10**9},
    "rope of 10^30": {"rope_theta": 1e308, "rope_scaling": {"rope_type": "dynamic", "factor": 1e300}},
    "rope of long lists": {
        "rope_scaling": {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 10**5,
            "long_factor": [1.0] * 10**5,
        }
    },
    "layer types of a million": {"layer_types": ["full_attention"] * 1_000_000},
    "an odd dtype": {"torch_dtype": "os.system", "dtype": "evil"},
    "a dtype that is a structure": {"dtype": {"": "float64", "model": "evil"}},
    "pruned heads": {"pruned_heads": {str(i): list(range(1000)) for i in range(1000)}},
    "a deep config": {"text_config": {"text_config": {"text_config": {"num_hidden_layers": 10**9}}}},
}


def _model(name: str, values: dict[str, Any]) -> dict[str, Callable[[Site], object]]:
    return {f"config: {name}": base_file("config.json", values)}


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Site], object]:
    def changed(site: Site) -> None:
        base = with_base(site)
        found = load_file(base / "model.safetensors")
        change(found)
        save_file(found, base / "model.safetensors", metadata={"format": "pt"})

    return changed


WEIGHTS: dict[str, Callable[[Site], object]] = {
    "weights: a tensor of no numbers": _weights(lambda t: t.update({_first(t): torch.zeros(0, 10**9)})),
    "weights: a further tensor": _weights(lambda t: t.update({"x": torch.zeros(0, 10**12)})),
    "weights: none": _weights(lambda t: t.clear()),
    "weights: a header beyond the file": lambda site: write(
        with_base(site) / "model.safetensors", _header({"lm_head.weight": ("F32", [10**5, 10**5], 0, 4 * 10**10)})
    ),
    "weights: a pickle that unfolds": lambda site: (
        base := with_base(site),
        (base / "model.safetensors").unlink(),
        _deflated_model(site),
    ),
}


def _deflated_model(site: Site) -> None:
    base = site.evil / "base"
    torch.save({"lm_head.weight": torch.zeros(80, 32)}, base / "pytorch_model.bin")
    with (
        zipfile.ZipFile(base / "pytorch_model.bin", "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("x/data/9", "w") as part,
    ):
        for _ in range(120):
            part.write(bytes(10**7))


ASKED: dict[str, dict[str, Any]] = {
    "r of 4x10^7": {"method/r": 40_000_000},
    "10^9 virtual tokens": {"method": {"name": "prompt_tuning", "num_virtual_tokens": 10**9}},
    "added tokens": {"data/add_tokens": [f"<{i}>" for i in range(9_000)]},
    "a length of 10^12": {"data/max_length": 10**12},
    "a batch of 10^12": {"train/batch_size": 10**12},
    "epochs of 10^300": {"train/epochs": 1e300},
    "workers of 10^6": {"data/workers": 10**6},
    "labels of a million letters": {"data/labels": ["x" * 900_000]},
}

CASES = [
    *(_opening(name, change) for name, change in OPENED.items()),
    *(
        _opening(name, _config(**values), run, "either" if name in UNUSED else "refused")
        for name, (run, values) in PROMPTS.items()
    ),
    *table(
        KIND,
        {n: c for name, values in MODELS.items() for n, c in _model(name, values).items()},
        base=lambda site: None,
        expected="either",
    ),
    *table(KIND, WEIGHTS, base=lambda site: None),
    opened("r = true", {"r": True}, kind=KIND),
    opened("a bias that is none", {"bias": "evil"}, kind=KIND),
    *table(
        KIND,
        {f"run.yaml: {name}": lambda site, v=values: change_settings(site, v) for name, values in ASKED.items()},
        steps=[HELLO],
        expected="either",
    ),
    *table(
        KIND,
        {f"to be planned: {name}": lambda site, v=values: change_settings(site, v) for name, values in ASKED.items()},
        steps=[("plan", "evil/run.yaml")],
        expected="either",
    ),
]
