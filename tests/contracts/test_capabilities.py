"""Whether the installed libraries have what siliang reaches into; a failure is one line that says what changed."""

import pytest

from siliang.capabilities import CAPABILITIES, report, why_missing


@pytest.mark.parametrize("name", [capability.name for capability in CAPABILITIES])
def test_what_siliang_reaches_into_is_there(name: str) -> None:
    finding = next(one for one in report() if one.capability.name == name)
    if finding.capability.optional and not finding.installed:
        pytest.skip(f"{finding.capability.library} is not installed")
    if finding.missing is not None:
        pytest.fail(f"{finding.missing}: {finding.capability.without}", pytrace=False)


@pytest.mark.parametrize(
    ("need", "said"),
    [
        ("transformers.modeling_layers:NoSuchLayer", "has no modeling_layers.NoSuchLayer"),
        ("transformers.no_such_module:Name", "has no no_such_module.Name"),
        ("transformers:AttentionInterface.register(key, colour)", "register has no parameter colour"),
        ("no_such_library:Name", "no_such_library is not installed"),
    ],
)
def test_what_is_missing_is_said(need: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from siliang import capabilities

    monkeypatch.setattr(capabilities, "CAPABILITIES", (capabilities.Capability("a trick", (need,), "it is off"),))
    why_missing.cache_clear()
    try:
        assert said in (why_missing("a trick") or "")
    finally:
        why_missing.cache_clear()
