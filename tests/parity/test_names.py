"""Every public name of PEFT is one of siliang's, or docs/porting.md says why it is not."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest

import siliang
from siliang.methods.config import CONFIG_CLASSES, OF_PEFT, config_class
from siliang.peft_api.tuners import TUNERS
from siliang.types import AdapterError

DOC = (Path(__file__).resolve().parents[2] / "docs" / "porting.md").read_text(encoding="utf-8")
NOT_HERE = set(re.findall(r"`(\w+)`", DOC[DOC.index("## What siliang does not have") :]))


def test_names_are_here_or_said_to_be_missing() -> None:
    missing = set(peft.__all__) - set(siliang.__all__)
    assert missing <= NOT_HERE, sorted(missing - NOT_HERE)
    assert not NOT_HERE & set(siliang.__all__), sorted(NOT_HERE & set(siliang.__all__))
    for name in siliang.__all__:
        assert getattr(siliang, name) is not None


def test_types_of_adapters() -> None:
    assert {str(kind.value) for kind in peft.PeftType} == OF_PEFT
    for kind in OF_PEFT - CONFIG_CLASSES.keys():
        with pytest.raises(AdapterError, match=f"{kind}' is a method of PEFT that siliang does not have"):
            config_class(kind, source="a file")
    with pytest.raises(AdapterError, match="is not a method of siliang"):
        config_class("LORRA", source="a file")
    in_layers = {name for name, kind in CONFIG_CLASSES.items() if name in OF_PEFT and not kind.is_prompt_learning}
    assert set(TUNERS) == in_layers
