"""Kind 5: weights, data and settings that a file says to read elsewhere."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from faults.folders.limits import base_file
from faults.folders.making import (
    HELLO,
    USES,
    change_json,
    change_settings,
    copy,
    link,
    sealed,
    table,
    victim,
    with_base,
    write,
)
from faults.folders.sandbox import Case, Expected, Site, Step
from siliang import PeftModel

KIND = "paths"
ROW = '{"text": "w1", "label": "good"}\n'
SECRET = '{"text": "secretword", "label": "good"}\n'


def _out(site: Site, name: str = "model.safetensors") -> Path:
    """The base model's weights, moved out of its folder."""
    base = with_base(site)
    there = site.outside / name
    shutil.move(base / "model.safetensors", there)
    return base


def _index(base: Path, name: str, where: str = "model.safetensors.index.json") -> None:
    keys = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    write(base / where, json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}))


WEIGHTS: dict[str, Callable[[Site], object]] = {
    "an index that leads up": lambda site: _index(_out(site), "../../../outside/model.safetensors"),
    "an index of an absolute name": lambda site: _index(_out(site), str(site.outside / "model.safetensors")),
    "an index of a name with dots inside": lambda site: _index(_out(site), "x/../../../../outside/model.safetensors"),
    "an index in a subfolder": lambda site: (
        base := _out(site),
        _index(base, "../../../../outside/model.safetensors", "sub/model.safetensors.index.json"),
        change_json(base / "config.json", {"transformers_weights": "sub/model.safetensors.index.json"}),
    ),
    "transformers_weights that lead up": lambda site: change_json(
        _out(site) / "config.json", {"transformers_weights": "../../../outside/model.safetensors"}
    ),
    "transformers_weights of an absolute name": lambda site: change_json(
        _out(site) / "config.json", {"transformers_weights": str(site.outside / "model.safetensors")}
    ),
    "transformers_weights of an index": lambda site: (
        base := _out(site),
        _index(base, "../../../outside/model.safetensors", "other.safetensors.index.json"),
        change_json(base / "config.json", {"transformers_weights": "other.safetensors.index.json"}),
    ),
    "transformers_weights of a link": lambda site: (
        base := _out(site),
        link(base / "w.safetensors", site.outside / "model.safetensors"),
        change_json(base / "config.json", {"transformers_weights": "w.safetensors"}),
    ),
    "transformers_weights of an address": lambda site: change_json(
        _out(site) / "config.json", {"transformers_weights": "http://localhost:9/x.safetensors"}
    ),
    "transformers_weights that are numbers": lambda site: change_json(
        _out(site) / "config.json", {"transformers_weights": 5}
    ),
    "transformers_weights that are a list": lambda site: change_json(
        _out(site) / "config.json", {"transformers_weights": ["../x"]}
    ),
    "transformers_weights that are empty": lambda site: change_json(
        _out(site) / "config.json", {"transformers_weights": ""}
    ),
    "an index of bin": lambda site: _index(
        _out(site), "../../../outside/model.safetensors", "pytorch_model.bin.index.json"
    ),
    "an index of a variant": lambda site: _index(
        _out(site), "../../../outside/model.safetensors", "model.fp16.safetensors.index.json"
    ),
    "an index of consolidated weights": lambda site: _index(
        _out(site), "../../../outside/model.safetensors", "consolidated.safetensors.index.json"
    ),
    "an index whose map is a list": lambda site: write(
        _out(site) / "model.safetensors.index.json", json.dumps({"weight_map": ["../../../outside/model.safetensors"]})
    ),
    "an index whose map is numbers": lambda site: write(
        _out(site) / "model.safetensors.index.json", json.dumps({"weight_map": {"a": 1}})
    ),
    "an index that is a link": lambda site: (
        base := _out(site),
        _index(site.outside, "model.safetensors"),
        link(base / "model.safetensors.index.json", site.outside / "model.safetensors.index.json"),
    ),
    "an index with a name in bytes": lambda site: _index(_out(site), "..\\..\\..\\outside\\model.safetensors"),
    "an index with a name of dots": lambda site: _index(_out(site), ".."),
    "an index with an empty name": lambda site: _index(_out(site), ""),
    "a name in the config": lambda site: change_json(
        _out(site) / "config.json", {"_name_or_path": str(site.outside), "name_or_path": str(site.outside)}
    ),
    "a gguf file": lambda site: change_json(
        _out(site) / "config.json", {"gguf_file": str(site.outside / "model.safetensors")}
    ),
    "a subfolder": lambda site: change_json(_out(site) / "config.json", {"subfolder": "../../../outside"}),
    "a variant": lambda site: change_json(_out(site) / "config.json", {"variant": "../../../outside/x"}),
}

QUANTIZED: dict[str, Any] = {
    "of a module of its own": {"quant_method": "evil.Quantizer"},
    "of the hub's kernels": {"quant_method": "fp8", "kernel": "evil/kernel"},
    "gptq": {"quant_method": "gptq", "bits": 4, "dataset": "evil", "tokenizer": "../../outside"},
    "awq": {"quant_method": "awq", "modules_to_fuse": {"x": ["y"]}, "exllama_config": {"version": 2}},
    "vptq": {"quant_method": "vptq", "config_for_layers": {"x": {}}},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system", "_data": "x"}}},
    "quark": {"quant_method": "quark", "x": 1},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {"x": {"targets": ["re:(a+)+$"]}}},
    "hqq": {"quant_method": "hqq", "quant_config": {"x": 1}},
    "aqlm": {"quant_method": "aqlm", "linear_weights_not_to_quantize": ["x"]},
    "eetq": {"quant_method": "eetq"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "fbgemm": {"quant_method": "fbgemm_fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "bitsandbytes with a module's pattern": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "llm_int8_skip_modules": ["(a+)+$"],
    },
    "bitsandbytes of odd values": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": "x",
        "bnb_4bit_quant_storage": "os.system",
    },
    "that is a list": ["evil"],
    "that is a text": "evil",
    "without a method": {"load_in_8bit": True},
}


def _readme(text: str) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        there = site.outside
        for name in ("secret.jsonl", "train.jsonl", "data/train.jsonl"):
            write(there / name, SECRET)
        with gzip.open(there / "secret.jsonl.gz", "wt") as file:
            file.write(SECRET)
        with zipfile.ZipFile(there / "secret.zip", "w") as archive:
            archive.writestr("secret.jsonl", SECRET)
        write(site.evil / "README.md", f"---\n{text.replace('OUT', str(there))}\n---\n")

    return change


def _files(path: str) -> str:
    return f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {json.dumps(path)}"


SCHEMES = {
    name: _readme(_files(path))
    for name, path in {
        "a name that leads up": "../../outside/secret.jsonl",
        "an absolute name": "OUT/secret.jsonl",
        "local://": "local://OUT/secret.jsonl",
        "file://": "file://OUT/secret.jsonl",
        "gzip://": "gzip://secret.jsonl::OUT/secret.jsonl.gz",
        "zip://": "zip://secret.jsonl::OUT/secret.zip",
        "zip:// of anything": "zip://*::OUT/secret.zip",
        "dir://": "dir://secret.jsonl::local://OUT",
        "dir:// of a file": "dir://OUT/secret.jsonl",
        "simplecache::": "simplecache::local://OUT/secret.jsonl",
        "filecache::": "filecache::local://OUT/secret.jsonl",
        "blockcache::": "blockcache::local://OUT/secret.jsonl",
        "reference://": "reference://x::OUT/secret.jsonl",
        "tar://": "tar://secret.jsonl::OUT/secret.jsonl.gz",
        "libarchive://": "libarchive://secret.jsonl::OUT/secret.zip",
        "memory://": "memory://secret.jsonl",
        "data:": "data:application/json;base64,e30=",
        "http://": "http://localhost:9/secret.jsonl",
        "https://": "https://localhost:9/secret.jsonl",
        "hf://": "hf://datasets/nobody/nothing/secret.jsonl",
        "s3://": "s3://bucket/secret.jsonl",
        "ssh://": "ssh://localhost/secret.jsonl",
        "smb://": "smb://localhost/secret.jsonl",
        "ftp://": "ftp://localhost/secret.jsonl",
        "github://": "github://a:b@c/secret.jsonl",
        "git://": "git://OUT:secret.jsonl",
        "jupyter://": "jupyter://localhost:9/secret.jsonl",
        "a pattern that leads up": "../../outside/*.jsonl",
        "a pattern of all folders": "**/../../../outside/*.jsonl",
        "a pattern with a class": "[.][.]/[.][.]/outside/secret.jsonl",
        "a home": "~/secret.jsonl",
        "a variable": "$HOME/secret.jsonl",
        "a backslash": "..\\..\\outside\\secret.jsonl",
        "bars": "data/train.jsonl|OUT/secret.jsonl",
    }.items()
} | {
    "a data_dir that leads up": _readme("configs:\n- config_name: default\n  data_dir: ../../outside/data"),
    "an absolute data_dir": _readme("configs:\n- config_name: default\n  data_dir: OUT/data"),
    "data_files by split": _readme("configs:\n- config_name: default\n  data_files:\n    train: OUT/secret.jsonl"),
    "data_files as a text": _readme("configs:\n- config_name: default\n  data_files: OUT/secret.jsonl"),
    "data_files in a list": _readme(
        "configs:\n- config_name: default\n  data_files: [data/train.jsonl, OUT/secret.jsonl]"
    ),
    "a drop of options": _readme(
        "configs:\n- config_name: default\n  data_files: data/train.jsonl\n  field: x\n  chunksize: 1"
    ),
    "a second configuration": _readme(
        _files("data/train.jsonl") + "\n- config_name: other\n  data_files: OUT/secret.jsonl"
    ),
    "a builder by name": _readme(
        "configs:\n- config_name: default\n  data_files: data/train.jsonl\nbuilder_name: evil"
    ),
}


def _data(name: str, change: Callable[[Site], object], base: str = "set", expected: Expected = "either") -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, base)
        change(site)
        return [("check", "--model", site.shared / "bert", "--task", "seq_cls", "--data", "evil")]

    return Case(KIND, f"data: {name}", build, expected, hides=("secretword",))


SETS = [
    *(_data(f"README: {name}", change) for name, change in SCHEMES.items()),
    _data(
        "a saved set whose files lead up",
        lambda site: (
            write(site.outside / "secret.arrow", next(site.shared.joinpath("saved_set").rglob("*.arrow")).read_bytes()),
            change_json(
                next(site.evil.rglob("state.json")), {"_data_files": [{"filename": "../../../outside/secret.arrow"}]}
            ),
        ),
        "saved_set",
    ),
    _data(
        "a saved set whose files are absolute",
        lambda site: (
            write(site.outside / "secret.arrow", next(site.shared.joinpath("saved_set").rglob("*.arrow")).read_bytes()),
            change_json(
                next(site.evil.rglob("state.json")), {"_data_files": [{"filename": str(site.outside / "secret.arrow")}]}
            ),
        ),
        "saved_set",
    ),
    _data(
        "a saved set whose parts lead up",
        lambda site: change_json(site.evil / "dataset_dict.json", {"splits": ["../../outside"]}),
        "saved_set",
    ),
    _data(
        "a saved set of a part that is a link",
        lambda site: (
            shutil.move(site.evil / "train", site.outside / "train"),
            link(site.evil / "train", site.outside / "train"),
        ),
        "saved_set",
    ),
    _data(
        "a saved set of a file that is a link",
        lambda site: (
            file := next(site.evil.rglob("*.arrow")),
            shutil.move(file, site.outside / "x.arrow"),
            link(file, site.outside / "x.arrow"),
        ),
        "saved_set",
    ),
    _data(
        "a saved set of numbers",
        lambda site: change_json(next(site.evil.rglob("state.json")), {"_data_files": 5}),
        "saved_set",
    ),
    _data(
        "a file that is a link",
        lambda site: link(site.evil / "data" / "train.jsonl", victim(site, "secret.jsonl", SECRET * 30)),
    ),
    _data(
        "a folder that is a link",
        lambda site: (
            write(site.outside / "data" / "train.jsonl", SECRET * 30),
            link(site.evil / "data", site.outside / "data"),
        ),
        "plain_set",
    ),
    _data(
        "a README that is a link",
        lambda site: link(
            site.evil / "README.md", victim(site, "README.md", f"---\n{_files('data/train.jsonl')}\n---\n")
        ),
    ),
    _data(
        "an archive",
        lambda site: zipfile.ZipFile(site.evil / "data" / "train.zip", "w").writestr("../x.jsonl", ROW),
        "plain_set",
    ),
    _data(
        "a file that unfolds",
        lambda site: write(site.evil / "data" / "train.jsonl.gz", gzip.compress(bytes(10**8), 1)),
        "plain_set",
    ),
    _data("a pipe among the files", lambda site: os.mkfifo(site.evil / "data" / "train-2.jsonl"), "plain_set"),
    _data("a README of a terabyte", lambda site: os.truncate(site.evil / "README.md", 10**12)),
    _data("a data file of a terabyte", lambda site: os.truncate(site.evil / "data" / "train.jsonl", 10**12)),
]


def _settings(**values: Any) -> Callable[[Site], object]:
    """Settings say where to read, and where else than in the user's own folders? What they lead to is only read."""

    def change(site: Site) -> None:
        site.mine.append(site.outside)
        for name in ("secret.jsonl", "template.yaml"):
            write(
                site.outside / name,
                SECRET if name.endswith("jsonl") else "user: '{content}'\nassistant: secretword\nend: ''\n",
            )
        named = {n.replace("__", "/"): str(v).replace("OUT", str(site.outside)) for n, v in values.items()}
        change_settings(site, named)

    return change


def _adapter_beside(site: Site) -> None:
    """An adapter's files lie in the base model's folder, as transformers would attach them."""
    base = with_base(site)
    shutil.copytree(site.shared / "adapter", base, dirs_exist_ok=True)
    found = load_file(base / "adapter_model.safetensors")
    save_file({k: v + 100 for k, v in found.items()}, base / "adapter_model.safetensors")


def _adapter(values: dict[str, Any]) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        change_json(
            site.evil / "adapter" / "adapter_config.json",
            {k: str(v).replace("OUT", str(site.outside)) if isinstance(v, str) else v for k, v in values.items()},
        )
        sealed(site.evil / "adapter")
        shutil.copytree(site.shared / "llama", site.outside / "model")

    return change


ADAPTERS = {
    "a base model outside": _adapter({"base_model_name_or_path": "OUT/model"}),
    "a base model that leads up": _adapter({"base_model_name_or_path": "../outside/model"}),
    "a base model of an address": _adapter({"base_model_name_or_path": "http://localhost:9/x"}),
    "a base model of a share": _adapter({"base_model_name_or_path": "//server/share"}),
    "a revision": _adapter({"revision": "../../outside"}),
    "a tokenizer outside": _adapter({"tokenizer_name_or_path": "OUT/model"}),
    "a start of LoftQ": _adapter({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
    "a start by a path": _adapter({"init_lora_weights": "OUT/model/model.safetensors"}),
    "a start of EVA": _adapter({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
}


def _opened(name: str, values: dict[str, Any]) -> Case:
    def build(site: Site) -> Sequence[Step]:
        from faults.folders.bases import tiny_llama

        copy(site, "adapter")
        shutil.copytree(site.shared / "llama", site.outside / "model")
        site.mine.append(site.outside)  # the size of its vocabulary is looked at
        change_json(
            site.evil / "adapter_config.json",
            {k: v.replace("OUT", str(site.outside)) if isinstance(v, str) else v for k, v in values.items()},
        )
        model = tiny_llama()
        return [lambda: PeftModel.from_pretrained(model, site.evil).save_pretrained(site.work / "saved")]

    return Case(KIND, f"opened and saved: {name}", build, "either")


def _look_unchanged(site: Site, text: str) -> str | None:
    """The base model's own answer, not that of the adapter in its folder."""
    from faults.commands import run

    shutil.rmtree(site.work / "again", ignore_errors=True)
    shutil.copytree(site.shared / "lora", site.work / "again")
    right = run("generate", "again", "w1", "--max-new-tokens", "2").out
    return None if text == right else f"another answer than without the adapter: {text[:80]!r}, {right[:80]!r}"


CASES = [
    *table(KIND, {f"weights: {n}": c for n, c in WEIGHTS.items()}, base=lambda site: None, expected="either"),
    *table(
        KIND,
        {
            f"quantization_config {n}": base_file("config.json", {"quantization_config": v})
            for n, v in QUANTIZED.items()
        },
        base=lambda site: None,
        expected="either",
    ),
    *SETS,
    *table(KIND, {f"adapter: {n}": c for n, c in ADAPTERS.items()}, expected="either"),
    *(
        _opened(name, values)
        for name, values in {
            "a base model outside": {"base_model_name_or_path": "OUT/model"},
            "a base model of a hub": {"base_model_name_or_path": "nobody/nothing"},
            "a tokenizer outside": {"tokenizer_name_or_path": "OUT/model"},
        }.items()
    ),
    *table(
        KIND,
        {"an adapter among the base model's files": _adapter_beside},
        base=lambda site: None,
        expected="either",
        look=lambda site, text: None if "error" in text else _look_unchanged(site, text),
    ),
    *table(
        KIND,
        {
            "run.yaml: a template outside": _settings(data__template="OUT/template.yaml"),
            "run.yaml: a template above": _settings(data__template="../outside/template.yaml"),
            "run.yaml: an adapter outside": _settings(adapter="OUT"),
        },
        steps=[HELLO],
        expected="either",
        hides=("secretword",),
    ),
    *table(
        KIND,
        {
            "run.yaml: an output outside": _settings(output="OUT/new"),
            "run.yaml: an output above": _settings(output="../outside/new"),
        },
        steps=[USES["resume"]],
        expected="either",
    ),
]
