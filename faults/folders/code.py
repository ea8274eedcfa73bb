"""Kind 1: code that a folder brings along."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from faults.folders.making import (
    FURTHER,
    HELLO,
    SETTINGS,
    USES,
    change_json,
    change_settings,
    change_yaml,
    copy,
    sealed,
    table,
    with_base,
    write,
)
from faults.folders.sandbox import Case, Site, Step
from siliang import PeftModel
from siliang.models.own_code import find_own_code
from siliang.types import SiliangError

KIND = "code"


class _Deed:
    """What is called when it is unpickled."""

    def __init__(self, site: Site) -> None:
        self._command = f"touch {site.mark}"

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self._command,)


def evil_code(site: Site) -> str:
    """Python that leaves a mark, and holds classes by all names that are asked for."""
    return (
        f"open({str(site.mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )


AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


def _hash(base: Path) -> str:
    """What a user would allow to let this code run."""
    try:
        code = find_own_code(str(base))
    except SiliangError:  # it could never be allowed
        return "0" * 64
    return code.sha256 if code else "0" * 64


def _coded(site: Site, auto_map: dict[str, Any] | None = None, allowed: str = "") -> None:
    """The base model in the folder asks for code in the same folder; the folder allows it in so many ways."""
    base = with_base(site)
    write(base / "evil.py", evil_code(site))
    write(base / "inner" / "evil.py", evil_code(site))
    change_json(base / "config.json", {"model_type": "evil", "auto_map": auto_map or AUTO_MAP})
    sha256 = _hash(base)
    kept = json.dumps({"version": 1, "allowed": {sha256: {"folder": "evil/base", "when": "2026-01-01T00:00:00+00:00"}}})
    match allowed:
        case "a setting" | "another setting" | "transformers' setting":
            name = {"a setting": "remote_code", "another setting": "allow_code"}.get(allowed, "trust_remote_code")
            change_settings(site, {name: sha256})
        case "its record":
            change_json(site.evil / "run.json", {"own_code": sha256, "remote_code": sha256})
        case "its record's own field":
            change_json(site.evil / "run.json", {"own_code": sha256})
        case "files":
            for folder in (site.evil, base, site.work, site.work / "siliang", site.work / ".config" / "siliang"):
                write(folder / "allowed_code.json", kept)
            write(site.work / ".env", f"SILIANG_ALLOW_CODE={sha256}\n")


def _pickled(site: Site) -> bytes:
    return pickle.dumps(_Deed(site))


def _torch_pickled(site: Site) -> bytes:
    out = io.BytesIO()
    torch.save({"x": _Deed(site)}, out)
    return out.getvalue()


def _config(**values: Any) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        base = with_base(site)
        write(base / "evil.py", evil_code(site))
        change_json(base / "config.json", {name.replace("__", "/"): value for name, value in values.items()})

    return change


def _file(name: str, values: dict[str, Any]) -> Callable[[Site], object]:
    """A further file of the base model, or another content of one that is there."""

    def change(site: Site) -> None:
        base = with_base(site)
        write(base / "evil.py", evil_code(site))
        write(base / "custom_generate" / "generate.py", evil_code(site) + "def generate(model, **kwargs): return 1\n")
        there = json.loads((base / name).read_text()) if (base / name).is_file() else {}
        write(base / name, json.dumps(there | values))

    return change


def _adapter_config(values: dict[str, Any]) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        write(site.evil / "adapter" / "evil.py", evil_code(site))
        change_json(site.evil / "adapter" / "adapter_config.json", values)
        sealed(site.evil / "adapter")

    return change


def _nothing(site: Site) -> None:
    pass


def _of_use(use: str, allowed: str = "") -> Case:
    def build(site: Site) -> Sequence[Step]:
        _coded(site, None, allowed)
        return [USES[use]]

    name = f"allowed by {allowed}: {use}" if allowed else f"code of its own folder: {use}"
    return Case(KIND, name, build)


def _auto_map(name: str, auto_map: dict[str, Any]) -> Case:
    def build(site: Site) -> Sequence[Step]:
        _coded(site, auto_map)
        return [HELLO]

    return Case(KIND, f"auto_map {name}", build)


AUTO_MAPS: dict[str, dict[str, Any]] = {
    "of a path": {"AutoConfig": "inner/evil.Config", "AutoModelForCausalLM": "inner/evil.Model"},
    "of a parent folder": {"AutoConfig": "../evil.Config", "AutoModelForCausalLM": "../evil.Model"},
    "of another repository": {"AutoConfig": "a/b--evil.Config", "AutoModelForCausalLM": "a/b--evil.Model"},
    "of an absolute repository": {"AutoConfig": "/tmp--evil.Config", "AutoModelForCausalLM": "/tmp--evil.Model"},
    "of a dotted module": {"AutoConfig": "inner.evil.Config", "AutoModelForCausalLM": "inner.evil.Model"},
    "of the standard library": {"AutoConfig": "os.system", "AutoModelForCausalLM": "os.system"},
    "that is a list": {"AutoConfig": ["evil.Config"], "AutoModelForCausalLM": ["evil.Model", None]},
    "of numbers": {"AutoConfig": 1, "AutoModelForCausalLM": {"a": 1}},
    "for a tokenizer too": {**AUTO_MAP, "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
}

ALLOWED = (
    "a setting",
    "another setting",
    "transformers' setting",
    "its record",
    "its record's own field",
    "files",
)
# Of a model that is known otherwise: what is asked is not done, and the run works.
IGNORED = {
    "auto_map of a known model": _config(auto_map=AUTO_MAP),
    "auto_map of a part": _config(text_config={"model_type": "llama", "auto_map": AUTO_MAP}),
    "attention of a hub's kernel": _config(attn_implementation="evil/kernel", _attn_implementation="evil/kernel:x"),
    "attention by parts": _config(_attn_implementation={"": "evil/kernel"}),
    "attention of a paged kernel": _config(_attn_implementation="paged|evil/kernel"),
    "attention of flash kernels": _config(_attn_implementation="kernels-community/flash-attn"),
    "experts of a hub's kernel": _config(_experts_implementation="evil/experts", experts_implementation="evil/experts"),
    "kernels are asked for": _config(use_kernels=True, kernel_config={"RMSNorm": "evil/kernel:RMSNorm"}),
    "a pipeline of its own": _config(custom_pipelines={"text-generation": {"impl": "evil.Pipe", "pt": ["AutoModel"]}}),
    "an architecture of its own": _config(architectures=["evil.Model", "os.system"]),
    "a trust flag in config.json": _config(trust_remote_code=True, auto_map=AUTO_MAP),
    "an activation of a path": _config(name_or_path="evil", transformers_version="99.0.0", trust_remote_code=True),
    "a generation of its own": _file(
        "generation_config.json", {"custom_generate": "evil/base", "trust_remote_code": True}
    ),
    "a folder custom_generate": _file("generation_config.json", {"custom_generate": "custom_generate"}),
    "an assistant": _file("generation_config.json", {"assistant_model": "evil/base", "prompt_lookup_num_tokens": 2}),
    "a compiler": _file(
        "generation_config.json", {"cache_implementation": "static", "compile_config": {"backend": "evil"}}
    ),
    "a compiled cache": _file("generation_config.json", {"cache_implementation": "hybrid", "disable_compile": False}),
    "a processor": _file("processor_config.json", {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.P"}}),
    "a preprocessor": _file("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": "evil.P"}}),
    "an image processor": _file("image_processor_config.json", {"auto_map": {"AutoImageProcessor": "evil.P"}}),
    "a tokenizer's auto_map": _file("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}),
    "peft's config in the model's folder": _file("adapter_config.json", {"auto_mapping": {"parent_library": "evil"}}),
    "a tokenizer class of its own alone": _file("tokenizer_config.json", {"tokenizer_class": "evil.Tokenizer"}),
    "an adapter's auto_mapping": lambda site: (
        copy(site, "lora"),
        _adapter_config({"auto_mapping": {"base_model_class": "Model", "parent_library": "evil"}})(site),
    ),
    "modules in the current folder": lambda site: (
        with_base(site),
        [
            write(site.work / f"{name}.py", evil_code(site))
            for name in ("evil", "yaml", "torch", "sitecustomize", "regex")
        ],
        [write(site.evil / f"{name}.py", evil_code(site)) for name in ("json", "usercustomize", "modeling_llama")],
    ),
    "a package siliang in the current folder": lambda site: (
        with_base(site),
        write(site.work / "siliang" / "__init__.py", evil_code(site)),
        write(site.work / "transformers" / "__init__.py", evil_code(site)),
    ),
}

REFUSED: dict[str, Callable[[Site], object]] = {
    "remote_code of the hub": lambda site: (
        copy(site, "lora"),
        change_settings(site, {"model": "evil/model", "revision": "a" * 40, "remote_code": "a" * 40}),
    ),
    "model_type of a path": _config(model_type="../evil"),
    "model_type of a module": _config(model_type="os"),
    "an adapter's pickle": lambda site: (
        copy(site, "lora"),
        (site.evil / "adapter" / "adapter_model.safetensors").unlink(),
        write(site.evil / "adapter" / "adapter_model.bin", _torch_pickled(site)),
        sealed(site.evil / "adapter"),
    ),
    "an adapter's bare pickle": lambda site: (
        copy(site, "lora"),
        (site.evil / "adapter" / "adapter_model.safetensors").unlink(),
        write(site.evil / "adapter" / "adapter_model.bin", _pickled(site)),
        sealed(site.evil / "adapter"),
    ),
    "a pickle named safetensors": lambda site: (
        copy(site, "lora"),
        write(site.evil / "adapter" / "adapter_model.safetensors", _torch_pickled(site)),
        sealed(site.evil / "adapter"),
    ),
    "a base model's pickle": lambda site: (
        base := with_base(site),
        (base / "model.safetensors").unlink(),
        write(base / "pytorch_model.bin", _torch_pickled(site)),
    ),
    "a base model's bare pickle": lambda site: (
        base := with_base(site),
        (base / "model.safetensors").unlink(),
        write(base / "pytorch_model.bin", _pickled(site)),
    ),
    "yaml that calls": lambda site: (
        copy(site, "lora"),
        write(site.evil / "run.yaml", f"model: !!python/object/apply:os.system ['touch {site.mark}']\n"),
    ),
    "yaml that imports": lambda site: (
        copy(site, "lora"),
        write(site.evil / "run.yaml", "model: !!python/name:os.system\ntask: causal_lm\n"),
    ),
}


def _resumed(name: str) -> Case:
    """A checkpoint holds a pickle in addition to its own files."""

    def build(site: Site) -> Sequence[Step]:
        copy(site, "lora")
        last = site.evil / "checkpoints" / "checkpoint-2"
        content = _torch_pickled(site) if name.endswith((".pt", ".bin", ".pth")) else _pickled(site)
        write(last / name, content)
        if name.startswith("state"):
            (last / "state.safetensors").write_bytes(content)
        sealed(last)
        return [USES["resume"]]

    return Case(KIND, f"a checkpoint's pickle {name}", build, "either")


def _data(name: str, change: Callable[[Site], object], base: str = "set") -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, base)
        write(site.evil / "evil.py", evil_code(site))
        change(site)
        flags = ("--model", site.shared / "bert", "--task", "seq_cls", "--data", "evil")
        return [("check", *flags)]

    return Case(KIND, f"data: {name}", build, "either")


DATA = [
    _data("a loading script", lambda site: None, "plain_set"),
    _data(
        "a README that names a script",
        lambda site: write(
            site.evil / "README.md",
            "---\nconfigs:\n- config_name: default\n  script: evil.py\n  data_files: data/train.jsonl\n---\n",
        ),
    ),
    _data(
        "a README that calls",
        lambda site: write(
            site.evil / "README.md", f"---\nconfigs: !!python/object/apply:os.system ['touch {site.mark}']\n---\n"
        ),
    ),
    _data(
        "a README's dataset_info that calls",
        lambda site: write(
            site.evil / "README.md", f"---\ndataset_info: !!python/object/apply:os.system ['touch {site.mark}']\n---\n"
        ),
    ),
    _data("a pickled data file", lambda site: write(site.evil / "data" / "train.pkl", _pickled(site))),
    _data("a script named as the folder", lambda site: write(site.work / "evil.py", evil_code(site)), "plain_set"),
    _data(
        "a saved set whose features are a class",
        lambda site: change_json(
            next(site.evil.rglob("dataset_info.json")), {"features": {"text": {"_type": "os.system", "id": "x"}}}
        ),
        "saved_set",
    ),
    _data(
        "a saved set with a format of its own",
        lambda site: change_json(
            next(site.evil.rglob("state.json")), {"_format_type": "evil", "_format_kwargs": {"x": 1}}
        ),
        "saved_set",
    ),
]


def _compared(name: str, change: Callable[[Site], object], steps: Sequence[Step]) -> Case:
    def build(site: Site) -> Sequence[Step]:
        copy(site, "comparison")
        change(site)
        return steps

    return Case(KIND, f"comparison: {name}", build, "either")


def _coded_comparison(site: Site) -> None:
    base = copy(site, "bert", site.evil / "base")
    write(base / "evil.py", evil_code(site))
    change_json(base / "config.json", {"model_type": "evil", "auto_map": AUTO_MAP})
    code = _hash(base)
    change_yaml(site.evil / "compare.yaml", {"model": "evil/base", "remote_code": code})
    change_json(
        site.evil / "comparison.json", {"config/model": "evil/base", "config/remote_code": code, "model_files": {}}
    )
    change_json(site.evil / "comparison.json", {"status": "running", "trials/0/status": "waiting"})


COMPARISONS = [
    _compared("compare.yaml allows code", _coded_comparison, [("compare", "evil/compare.yaml")]),
    _compared("report of one that allows code", _coded_comparison, [("report", "evil")]),
    _compared(
        "modules in the current folder of its workers",
        lambda site: (
            change_json(site.evil / "comparison.json", {"status": "running", "trials/0/status": "waiting"}),
            [write(site.work / f"{n}.py", evil_code(site)) for n in ("json", "torch", "yaml", "typing_extensions")],
        ),
        [("compare", "evil/compare.yaml")],
    ),
]


def _opened(name: str, change: Callable[[Site], object]) -> Case:
    def build(site: Site) -> Sequence[Step]:
        from faults.folders.bases import tiny_llama

        copy(site, "adapter")
        write(site.evil / "evil.py", evil_code(site))
        change(site)
        model = tiny_llama()
        return [lambda: PeftModel.from_pretrained(model, site.evil)]

    return Case(KIND, f"adapter: {name}", build, "either")


ADAPTERS = [
    _opened(
        "auto_mapping",
        lambda site: change_json(
            site.evil / "adapter_config.json", {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}
        ),
    ),
    _opened(
        "a peft_type of a module", lambda site: change_json(site.evil / "adapter_config.json", {"peft_type": "evil.X"})
    ),
    _opened(
        "a base model of a path",
        lambda site: change_json(site.evil / "adapter_config.json", {"base_model_name_or_path": "evil"}),
    ),
    _opened(
        "a pickle",
        lambda site: (
            (site.evil / "adapter_model.safetensors").unlink(),
            write(site.evil / "adapter_model.bin", _torch_pickled(site)),
        ),
    ),
    _opened(
        "a pickle for its training",
        lambda site: write(site.evil / "siliang_training.safetensors", _torch_pickled(site)),
    ),
    _opened(
        "runtime settings",
        lambda site: change_json(
            site.evil / "adapter_config.json",
            {"runtime_config": {"evil": "evil.X"}, "megatron_config": {"x": 1}, "megatron_core": "evil"},
        ),
    ),
    _opened(
        "a corda config",
        lambda site: change_json(
            site.evil / "adapter_config.json", {"corda_config": {"cache_file": "evil.bin"}, "eva_config": {"x": "evil"}}
        ),
    ),
]

TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "attr": "{{ messages | attr('__class__') | attr('__mro__') }}",
    "the function's own": "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "strftime_now": "{{ strftime_now.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "tojson": "{{ tojson.__globals__ }}{{ (messages | tojson).__class__.__base__.__subclasses__()[0] }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch MARK') }}",
    "loop": "{% for m in messages %}{{ loop.__class__.__init__.__globals__.os }}{% endfor %}",
    "map": "{{ messages | map(attribute='__class__') | list }}",
    "a generator's frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "mutation": "{{ messages.append(messages) }}{{ messages.clear() }}{{ messages.__setitem__(0, 1) }}",
    "include": "{% include '/etc/passwd' %}{% extends 'MARK' %}",
}


def _templated(name: str, text: str) -> Case:
    def build(site: Site) -> Sequence[Step]:
        base = with_base(site)
        change_settings(site, {"data/template": "chat"})
        write(base / "chat_template.jinja", text.replace("MARK", str(site.mark)))
        return [HELLO]

    return Case(KIND, f"template: {name}", build, "either", hides=("Popen", "_frozen_importlib", "root:x:0"))


CASES = [
    *map(_of_use, (*FURTHER, *SETTINGS)),
    *(_of_use(use, allowed) for allowed in ALLOWED for use in ("generate", "eval", "resume", "train", "check")),
    *(_auto_map(name, found) for name, found in AUTO_MAPS.items()),
    *table(KIND, IGNORED, base=_nothing, expected="either"),
    *table(KIND, REFUSED, base=_nothing),
    *map(_resumed, ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "state.safetensors")),
    *DATA,
    *COMPARISONS,
    *ADAPTERS,
    *(_templated(name, text) for name, text in TEMPLATES.items()),
]
