"""The settings: strict, and helpful about it."""

from pathlib import Path

import pytest

from siliang.config import RunConfig, assign, describe, read_yaml
from siliang.types import ConfigError

LEAST = {"model": "m", "task": "seq_cls", "data": {"train": "d.csv"}, "output": "o"}


def changed(*assignments: str) -> dict[str, object]:
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in LEAST.items()}
    for assignment in assignments:
        assign(values, assignment)
    return values


@pytest.mark.parametrize("name", ["prompt", "p-tuning", "Prefix-Tuning"])
def test_short_names_and_the_length_of_a_prompt(name: str) -> None:
    method = RunConfig.build(changed(f"method={name}")).method
    assert method.name == name.lower().replace("-", "_").removesuffix("_tuning") + "_tuning"
    assert method.arguments == {"num_virtual_tokens": 20}
    method = RunConfig.build(changed(f"method={{name: {name}, num_virtual_tokens: 5}}")).method
    assert method.arguments == {"num_virtual_tokens": 5}


def test_round_trip(tmp_path: Path) -> None:
    config = RunConfig.build(changed("method=bitfit", "train.learning_rate=1e-3", "data.labels=[a, b]"))
    assert config.train.learning_rate == 1e-3
    assert config.data.labels == ["a", "b"]
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert RunConfig.build(read_yaml(tmp_path / "run.yaml")) == config


def test_method_settings() -> None:
    config = RunConfig.build(changed("method=lora", "method.r=16", "method.target_modules=all-linear"))
    assert config.method.arguments == {"r": 16, "target_modules": "all-linear"}
    assert RunConfig.build(read_yaml_text(config.to_yaml())) == config


def read_yaml_text(text: str) -> dict[str, object]:
    import yaml

    return yaml.safe_load(text)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.learnin_rate=1", "train.learnin_rate is not a setting. Did you mean 'learning_rate'?"),
        ("learning_rate=1", "learning_rate is not a setting. Did you mean 'train.learning_rate'?"),
        ("trian.epochs=1", "trian is not a setting. Did you mean 'train'?"),
        ("train.epochs=-1", "train.epochs = -1: input should be greater than 0."),
        ("train.batch_size=many", "train.batch_size = 'many'"),
        ("task=translate", "task = 'TRANSLATE'"),
        ("method=lorra", "method 'lorra' is not one of lora,"),
        ("method.rank=4", "method.rank is not a setting of lora. Did you mean 'r"),
        ("method.r=0", "r = 0: the rank must be a whole number of at least 1."),
        ("data=d.csv", "data = 'd.csv'"),
    ],
)
def test_wrong_settings(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(changed(assignment), source="run.yaml")
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_missing_settings() -> None:
    with pytest.raises(ConfigError, match=r"model is missing. \(3 more\) The base model: a folder"):
        RunConfig.build({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", r"run.yaml:1: not readable as yaml"),
        ("just text", "must hold settings"),
        ("", "must hold settings"),
    ],
)
def test_unreadable_yaml(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "run.yaml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no settings file"):
        read_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize("text", ["train.epochs", "=1", "model.name=1"])
def test_no_assignment(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        assign({"model": "m"}, text)


def test_every_setting_is_explained() -> None:
    for name, kind, _, meaning in describe():
        assert meaning, name
        assert kind, name
