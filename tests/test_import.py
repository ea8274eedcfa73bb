"""Quick to import: nothing heavy until it is used."""

import subprocess
from pathlib import Path

import pytest
from forking import PYTHON

from siliang.cli import listings

HEAVY = ("torch", "transformers", "datasets", "numpy", "pandas")


@pytest.mark.parametrize("code", ["import siliang", "import siliang.cli.main"])
def test_imports_nothing_heavy(code: str) -> None:
    found = subprocess.run(
        [PYTHON, "-c", f"{code}; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == []


def test_training_imports_no_optional_library() -> None:
    """transformers' Trainer and its helpers import PEFT where it is installed, and PEFT bitsandbytes: two seconds."""
    needless = ("peft", "bitsandbytes", "transformers.trainer", "transformers.trainer_utils", "datasets", "pandas")
    code = "import siliang.train.run, siliang.plan.preflight, sys"
    found = subprocess.run(
        [PYTHON, "-c", f"{code}; print(*[m for m in {(*needless, 'sklearn', 'trl')} if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == []


@pytest.mark.parametrize("listing", ["settings", "settings_zh", "methods", "methods_zh"])
def test_what_is_listed_is_what_there_is(listing: str) -> None:
    file: Path = getattr(listings, listing.upper())
    assert file.read_text(encoding="utf-8") == getattr(listings, listing)(), "make docs"


@pytest.mark.parametrize("command", ["config", "methods", "--help"])
def test_a_listing_imports_nothing_heavy(command: str) -> None:
    code = f"import sys; sys.argv[1:] = [{command!r}]\nfrom siliang.cli.main import main\ntry:\n    main()\nfinally:\n"
    code += f"    print('heavy:', *[m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "heavy:" and len(found.stdout.splitlines()) > 10


@pytest.mark.parametrize("command", ["predict r text", "eval r", "generate r text", "chat r", "merge r --output o"])
def test_a_folder_that_is_no_run_is_refused_before_anything_heavy_is_imported(command: str, tmp_path: Path) -> None:
    code = f"import sys; sys.argv[1:] = {command.split()!r}\nfrom siliang.cli.main import main\n"
    code += f"try:\n    main()\nfinally:\n    print('heavy:', *[m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 2 and found.stdout.split() == ["heavy:"]
    assert "r is not a run's folder: it has no run.yaml. There is no such folder." in found.stderr


def test_public_names() -> None:
    import siliang

    other = {"NoMatchingPeftModuleError": "TargetError", "PeftError": "SiliangError", "PromptEmbedding": "Prompt"}
    other |= {"CPTEmbedding": "ContextPrompt", "PromptEncoder": "EncodedPrompt", "PromptLearningConfig": "PromptConfig"}
    for name in siliang.__all__:
        found = getattr(siliang, name)
        if name.isupper():
            assert isinstance(found, dict), name
        else:  # siliang.check is a package once a module of it was imported
            assert found.__name__.removeprefix("siliang.") == other.get(name, name)
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        _ = siliang.LoraConfg


def test_the_tutorials_imports() -> None:
    from siliang import (  # what one of them imports from peft, used or not
        LoraConfig,
        PeftType,
        get_peft_config,
    )

    config = get_peft_config({"peft_type": PeftType.LORA, "task_type": "SEQ_CLS", "r": 4})
    assert config == LoraConfig(task_type="SEQ_CLS", r=4)
