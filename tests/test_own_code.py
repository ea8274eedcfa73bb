"""Code that a model brings along runs only where this user has allowed it, and only as it was allowed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import refused, run
from forking import PYTHON
from huggingface_hub import constants
from tiny import make, word_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, LlamaConfig

import siliang
from siliang.compare.pool import Worker
from siliang.models.base_config import load_config
from siliang.models.load import load_model
from siliang.models.own_code import read_own_code
from siliang.models.tokenizers import load_tokenizer
from siliang.safety.permissions import allowed_file
from siliang.tasks import CAUSAL_LM
from siliang.types import ModelError, OwnCodeError

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
import os
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
open(os.environ["MARK"], "a").close()
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}
CLASSES = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code makes when it runs; nothing is allowed yet."""
    monkeypatch.setenv("MARK", str(tmp_path / "ran"))
    monkeypatch.setenv("SILIANG_ALLOW_CODE", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    return tmp_path / "ran"


@pytest.fixture
def own(tmp_path: Path, mark: Path) -> Path:
    """A model with code of its own, which no other test has imported."""
    folder = tmp_path / "own"
    make("llama").save_pretrained(folder)  # type: ignore[operator]
    word_tokenizer().save_pretrained(folder)
    for name, text in CODE.items():
        (folder / name).write_text(text + f"# {tmp_path}")
    change(folder / "config.json", model_type="own", auto_map=CLASSES)
    return folder


def change(path: Path, **values: object) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | values))


def hash_of(folder: Path) -> str:
    return read_own_code(str(folder), folder).sha256


def planned(model: Path, folder: Path) -> list[object]:
    return ["plan", *training(model, folder / "o")[:6], "--method", "lora"]


def compared(model: Path, folder: Path) -> list[object]:
    more = ["--set", "methods=[{name: ia3, target_modules: [q_proj], feedforward_modules: []}]", "--seeds", 1]
    return ["compare", *training(model, folder / "comparison")[:-2], *more]


def training(model: Path, output: Path) -> list[object]:
    data = write_jsonl(output.parent / "data.jsonl", [{"instruction": f"say {i}", "output": "good"} for i in range(8)])
    sets = ["train.max_steps=1", "accept=[SL002,SL003]", "method.target_modules=[q_proj]"]
    given = ["--model", model, "--task", "causal_lm", "--data", data, "--output", output]
    return [*given, *(part for s in sets for part in ("--set", s))]


@pytest.fixture
def trained(own: Path, tmp_path: Path) -> Path:
    """A run on that model, made by somebody who had allowed its code."""
    assert run("train", *training(own, tmp_path / "run"), "--allow-code", hash_of(own)).code == 0
    os.environ["SILIANG_ALLOW_CODE"] = ""
    Path(os.environ["MARK"]).unlink()
    for name in [name for name in sys.modules if name.startswith("siliang_own_code_")]:  # as in another process
        del sys.modules[name]
    return tmp_path / "run"


def test_no_command_runs_it_unasked(trained: Path, own: Path, tmp_path: Path, mark: Path) -> None:
    """A run's record names the code that ran; that is not a permission."""
    sha256 = hash_of(own)
    assert json.loads((trained / "run.json").read_text())["code_sha256"] == sha256
    commands: list[list[object]] = [
        ["generate", trained, "say"],
        ["eval", trained],
        ["predict", trained, "say"],
        ["merge", trained, "--output", tmp_path / "merged"],
        planned(own, tmp_path),
        ["check", trained / "run.yaml"],
        ["train", *training(own, tmp_path / "other")],
        ["train", *training(own, tmp_path / "other"), "--devices", 2],
        compared(own, tmp_path),
    ]
    for command in commands:
        said = refused(*command)
        assert f"--allow-code {sha256}" in said and "modeling_own.py" in said, command
    ended = run("chat", trained, stdin=b"say\n")
    assert ended.code == 2 and f"--allow-code {sha256}" in ended.err
    assert not mark.exists() and not (tmp_path / "other").exists()
    assert run("generate", trained, "say", "--allow-code", sha256).code == 0
    assert mark.exists()


@pytest.mark.parametrize("command", ["generate", "plan", "check", "train", "eval"])
def test_a_file_cannot_allow_it(command: str, trained: Path, own: Path, mark: Path) -> None:
    settings = trained / "run.yaml"
    settings.write_text(f"remote_code: {hash_of(own)}\n{settings.read_text()}")
    more = {"generate": ["say"]}.get(command, [])
    said = refused(command, settings if command in ("plan", "check", "train") else trained, *more)
    assert "remote_code is not a setting" in said and "--allow-code" in said
    assert not mark.exists()


def test_it_is_asked_once_in_a_terminal(own: Path, tmp_path: Path, mark: Path) -> None:
    command = planned(own, tmp_path)
    for answer in (b"n\n", b"\n", b""):
        ended = run(*command, asked=True, stdin=answer)
        assert ended.code == 2 and f"{own}/modeling_own.py" in ended.err and hash_of(own) in ended.err
        assert "[y/N]" in ended.err and not mark.exists() and not allowed_file().exists()
    ended = run(*command, asked=True, stdin=b"y\n")
    assert ended.code != 2 and str(allowed_file()) in ended.err and mark.exists()
    assert allowed_file().stat().st_mode & 0o777 == 0o600
    os.environ["SILIANG_ALLOW_CODE"] = ""  # another command
    ended = run(*command, asked=True)
    assert ended.code != 2 and "y/N" not in ended.err
    (own / "README.md").write_text("one file more")
    os.environ["SILIANG_ALLOW_CODE"] = ""
    assert "[y/N]" in run(*command, asked=True).err


def test_no_process_of_a_training_asks(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    ended = run(*planned(own, tmp_path), asked=True, stdin=b"y\n")
    assert ended.code == 2 and "y/N" not in ended.err


def test_the_users_file_is_the_users_alone(own: Path, tmp_path: Path, mark: Path) -> None:
    command = planned(own, tmp_path)
    path = allowed_file()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"version": 1, "allowed": {hash_of(own): {}}}))
    for place in (path, path.parent):
        usual = place.stat().st_mode & 0o777
        for mode in (0o666, 0o620, 0o777):
            place.chmod(mode | usual)
            assert "others may write to it" in refused(*command)
        place.chmod(usual)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert "cannot be read" in refused(*command)
    path.unlink()
    for text in ("{", "[]", '{"allowed": 5}', '{"allowed": {"x": 5}}', "[" * 100_000, " " * 2**21):
        path.write_text(text)
        assert "is damaged" in refused(*command)
    path.unlink()
    os.mkfifo(path)
    assert "not a plain file" in refused(*command)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "notes/more.txt", "modeling_own.py", "config.json", "new.py"])
def test_the_hash_is_over_the_whole_folder(file: str, own: Path) -> None:
    siliang.allow_code(hash_of(own))
    assert load_config(str(own)).model_type == "own"
    (own / file).parent.mkdir(exist_ok=True)
    with (own / file).open("a") as opened:
        opened.write(" ")
    with pytest.raises(OwnCodeError, match=hash_of(own)):
        load_config(str(own))


def test_what_is_changed_after_the_check_does_not_run(own: Path, mark: Path) -> None:
    code = read_own_code(str(own), own)
    siliang.allow_code(code.sha256)
    evil = "open(__import__('os').environ['MARK'] + '-evil', 'w')\n"
    for name in CODE:
        (own / name).write_text(evil)
    found = code.find_class("AutoModelForCausalLM")
    assert found.__name__ == "OwnForCausalLM" and mark.exists()
    assert not mark.with_name("ran-evil").exists()
    with pytest.raises(ModelError, match="says __import__"):
        load_config(str(own))


def test_no_module_of_transformers_cache_is_run(own: Path) -> None:
    siliang.allow_code(hash_of(own))
    before = [name for name in sys.modules if name.startswith("transformers_modules")]
    model = load_model(str(own), CAUSAL_LM.model, dtype=torch.float32)
    assert type(model).__module__ == f"siliang_own_code_{hash_of(own)}.modeling_own"
    assert [name for name in sys.modules if name.startswith("transformers_modules")] == before
    assert torch.equal(model(torch.tensor([[3, 4]])).logits, model(torch.tensor([[3, 4]])).logits)


def test_a_model_that_transformers_knows_never_runs_code(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "known"
    shutil.copytree(model_folders["llama"], folder)
    change(folder / "config.json", auto_map={"AutoConfig": "../../evil.Config"})
    assert isinstance(load_config(str(folder)), LlamaConfig)


def test_what_is_merged_brings_the_code_along(trained: Path, own: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert run("merge", trained, "--output", merged, "--allow-code", hash_of(own)).code == 0
    assert {p.name for p in merged.glob("*.py")} == set(CODE)
    siliang.allow_code(hash_of(merged))
    assert load_model(str(merged), CAUSAL_LM.model, dtype=torch.float32).config.model_type == "own"


def test_a_tokenizer_with_code(model_folders: dict[str, Path], own: Path, mark: Path) -> None:
    """Of a model with code, and of one that transformers knows."""
    text = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""
    named = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    for folder in (own, own.parent / "known"):
        if not folder.is_dir():
            shutil.copytree(own, folder)
            change(folder / "config.json", model_type="own-too", auto_map={})
        (folder / "tokenization_own.py").write_text(text)
        change(folder / "tokenizer_config.json", **named)
        with pytest.raises(OwnCodeError, match=r"tokenization_own\.py"):
            load_tokenizer(str(folder))
        siliang.allow_code(hash_of(folder))
        assert type(load_tokenizer(str(folder))).__name__ == "OwnTokenizer"


def test_a_model_of_the_hub(own: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same hash, over the files of the commit that the cache has."""
    cache, commit = tmp_path / "hub", "c" * 40
    snapshot = cache / "models--somebody--own" / "snapshots" / commit
    shutil.copytree(own, snapshot)
    refs = cache / "models--somebody--own" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        with pytest.raises(OwnCodeError, match=hash_of(own)):
            load_config("somebody/own", revision=revision)
    assert not mark.exists()
    siliang.allow_code(hash_of(own))
    assert load_config("somebody/own").name_or_path == "somebody/own"
    model = load_model("somebody/own", CAUSAL_LM.model, dtype=torch.float32)
    here = load_model(str(own), CAUSAL_LM.model, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), here.parameters(), strict=True))


@pytest.mark.parametrize(
    "named",
    ["../evil.Own", "/tmp/evil.Own", "somebody/repo--evil.Own", "sub/evil.Own", "evil", "a.b.c", "evil.Own\n", 5, ""],
)
def test_classes_from_elsewhere(named: object, own: Path, mark: Path) -> None:
    change(own / "config.json", auto_map=CLASSES | {"AutoModel": named})
    with pytest.raises(ModelError, match="which is not a class in the model's folder"):
        load_config(str(own))


@pytest.mark.parametrize(
    "line",
    [
        "exec(open('x').read())",
        "eval('1')",
        "compile('1', 'x', 'exec')",
        "__import__('os')",
        "import importlib",
        "import importlib.util as u",
        "from importlib import import_module",
        "import runpy",
        "import ctypes",
        "import subprocess",
        "from subprocess import run",
        "import pickle",
        "import marshal",
        "import urllib.request",
        "import requests",
        "import socket",
        "from huggingface_hub import hf_hub_download",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "import os\nos.system('true')",
        "import os as o\no.system('true')",
        "from os import system",
        "import os\nos.execv('/bin/true', [])",
        "import os\ngetattr(os, 'sys' + 'tem')('true')",
        "import sys\nsys.path.insert(0, 'x')",
        "import sys\nsys.modules['torch'] = 1",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.ops.load_library('x')",
        "from torch import hub",
        "from torch.utils.cpp_extension import load",
        "open('/etc/passwd')",
        "open('../x')",
        "open('a/../../x')",
        "from pathlib import Path\nPath('~/x')",
        "open('more.py')",
        "open(__file__)",
        "from transformers import AutoModel\nAutoModel.from_pretrained('a', trust_remote_code=True)",
        "from transformers import AutoModel\nAutoModel.from_pretrained('a', **{'trust_remote_code': True})",
        "(lambda: 0).__globals__['__builtins__']",
        "().__class__.__base__.__subclasses__()",
        "open('.git/x')",
        "from ..x import y",
        "from .missing import y",
        "from torch import *",
        "x = (",
        "x = " + "(" * 300 + ")" * 300,
        "\0",
    ],
)
def test_code_that_loads_other_code_cannot_be_allowed(line: str, own: Path, mark: Path) -> None:
    (own / "modeling_own.py").write_text(f"{(own / 'modeling_own.py').read_text()}\n{line}\n")
    with pytest.raises(ModelError, match=r"modeling_own\.py cannot be allowed|needs missing\.py") as caught:
        load_config(str(own))
    assert str(caught.value).count("\n") <= 1
    assert not mark.exists()


@pytest.mark.parametrize(
    "line",
    [
        "import re\nx = re.compile(r'\\s+')",
        "import torch\nx = torch.compile",
        "def forward(input, code, http):\n    return input.shape, code.x, http.y",
        "x = f'{1}/{2} of a path ...'",
        "x = 'https://huggingface.co/docs'",
        "import os\nx = os.path.join('a', 'vocab.json')",
        "'''It reads /etc/passwd.'''",
        "try:\n    from flash_attn import flash_attn_func\nexcept ImportError:\n    pass",
    ],
)
def test_usual_code_can_be_allowed(line: str, own: Path) -> None:
    (own / "modeling_own.py").write_text(f"{line}\n{(own / 'modeling_own.py').read_text()}")
    siliang.allow_code(hash_of(own))
    assert load_model(str(own), CAUSAL_LM.model, dtype=torch.float32) is not None


def test_what_is_allowed_is_handed_to_other_processes(own: Path, tmp_path: Path, mark: Path) -> None:
    ended = run(*compared(own, tmp_path), "--allow-code", hash_of(own))
    assert ended.code == 0, ended
    (record,) = (tmp_path / "comparison").glob("runs/*/*/run.json")
    assert json.loads(record.read_text())["code_sha256"] == hash_of(own)


def test_what_is_no_hash() -> None:
    assert "is not a SHA-256" in refused("methods", "--allow-code", "abc")
    assert "is not a SHA-256" in refused("methods", "--allow-code=")


def test_the_code_is_what_transformers_would_run(own: Path) -> None:
    """The same model by transformers' own way, in a cache of its own."""
    siliang.allow_code(hash_of(own))
    ours = load_model(str(own), CAUSAL_LM.model, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True).eval()
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert [*ours.state_dict()] == [*theirs.state_dict()]


def test_nothing_is_imported_from_the_folder_at_hand(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python puts the folder at hand in front of its path for `python -m`: there is a stranger's torch.py."""
    ours, theirs = tmp_path / "ours" / "siliang" / "compare", tmp_path / "theirs"
    ours.mkdir(parents=True)
    for package in (ours, ours.parent):
        (package / "__init__.py").touch()
    (ours / "worker.py").write_text("import json\nprint(json.dumps({'kind': 'done', 'found': {'loads': 7}}))\n")
    for name in ("json/__init__.py", "siliang/__init__.py", "sitecustomize.py"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text("import os\nopen(os.environ['MARK'], 'a').close()\n")
    monkeypatch.setattr(sys, "executable", PYTHON)
    monkeypatch.chdir(theirs)
    worker = Worker(tmp_path / "worker.log", lambda: {"PYTHONPATH": str(tmp_path / "ours")})
    heard = list(worker.run({}))
    worker.close()
    assert heard == [{"kind": "began"}, {"kind": "done", "found": {"loads": 7}}]
    assert not mark.exists()
