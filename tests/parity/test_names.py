"""Every public name of PEFT is one of siliang's, or docs/porting.md says why it is not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

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


# What siliang writes otherwise on purpose, and why.
OTHER_DEFAULTS = {
    ("XLORA", "adapters"): "an empty mapping is what PEFT makes of None",
}


def defaults(config: type) -> dict[str, object]:
    """Of each field; of a dataclass its values, of an enum its value."""
    found: dict[str, object] = {}
    for f in dataclasses.fields(config):
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        found[f.name] = getattr(value, "value", value)
    return found


@pytest.mark.parametrize("kind", sorted(OF_PEFT & CONFIG_CLASSES.keys()))
def test_fields_and_their_defaults_are_pefts(kind: str) -> None:
    """A field of PEFT is one here, is refused by name (UNSUPPORTED), or docs/porting.md says that it is missing."""
    config = CONFIG_CLASSES[kind]
    ours, theirs = defaults(config), defaults(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)])
    missing = theirs.keys() - ours.keys() - config.UNSUPPORTED.keys() - NOT_HERE - {"peft_type", "peft_version"}
    assert not missing, f"{kind}: {sorted(missing)}"
    assert ours.keys() - theirs.keys() <= set(config.NOT_IN_PEFT)
    assert {name: theirs[name] for name in config.UNSUPPORTED} == config.UNSUPPORTED
    for name in ours.keys() & theirs.keys():
        assert (ours[name] == theirs[name]) != ((kind, name) in OTHER_DEFAULTS), (name, ours[name], theirs[name])
