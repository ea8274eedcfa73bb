"""The kept index of transformers' models is the one that transformers makes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from forking import PYTHON

from siliang import import_index

MODELS = Path(import_index.__file__).parent  # any folder with files and folders
CODE = """
import sys
from siliang.import_index import keep_index
keep_index()
import transformers
assert "transformers.models.auto" not in sys.modules
from transformers import BertConfig, LlamaForCausalLM
from transformers.utils import import_utils
assert type(import_utils.__spec__.loader).__name__ == "SourceFileLoader"
kept = import_utils.create_import_structure_from_path
real = kept.__closure__[[*kept.__code__.co_freevars].index("real")].cell_contents
folder = transformers.__path__[0] + "/models"
assert kept(folder) == kept(folder + "/__init__.py") == real(folder) and kept(folder) is not kept(folder)
assert list(kept(folder)) == list(real(folder))
assert kept(folder + "/bert") == real(folder + "/bert")
"""


def test_it_is_what_transformers_makes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path))
    for damaged in (None, '{"folders": {}, "defined": [[[], {"..x": ["a"]}]]}'):
        if damaged is not None:
            (file,) = (tmp_path / "imports").iterdir()
            file.write_text(damaged)
        for _ in range(2 if damaged is None else 1):  # made, then read
            done = subprocess.run([PYTHON, "-c", CODE], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


class Counted:
    """A stand-in for transformers' function."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: str | Path) -> import_index.Index:
        self.calls += 1
        return {"bert": {frozenset({"torch"}): {"modeling_bert": {"BertModel"}}}, frozenset(): {"auto": {"A", "B"}}}


def test_a_changed_file_makes_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "models"
    (models / "bert").mkdir(parents=True)
    file = models / "bert" / "modeling_bert.py"
    file.write_text("a")
    real = Counted()
    kept = import_index._kept(real, models)

    def index() -> import_index.Index:
        import_index._state.cache_clear()  # of one process
        return kept(str(models))

    made = index()
    assert index() == made == real("") and real.calls == 2
    file.write_text("ab")
    assert index() == made and real.calls == 3
    (models / "new.py").write_text("")
    assert index() == made and real.calls == 4
    assert len([*(tmp_path / "cache" / "imports").iterdir()]) == 3
    newest = max((tmp_path / "cache" / "imports").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for damaged in ("", "[]", json.dumps({"folders": {"a b": {"folders": {}, "defined": []}}, "defined": []})):
        newest.write_text(damaged)
        assert index() == made
    assert kept(str(models / "bert")) == made and real.calls == 8
    import_index._state.cache_clear()
