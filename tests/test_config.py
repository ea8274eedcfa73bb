"""The settings: strict, and helpful about it."""

from pathlib import Path
from typing import Any

import pytest

from siliang.config import LAYOUT_NAMES, RunConfig, TrainConfig, assign, describe
from siliang.config.comparison import CompareConfig
from siliang.data.layouts import LAYOUTS
from siliang.safety.safe_yaml import parse_yaml, read_yaml
from siliang.types import ConfigError

LEAST = {"model": "m", "task": "seq_cls", "data": {"train": "d.csv"}, "output": "o"}


def changed(*assignments: str) -> dict[str, object]:
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in LEAST.items()}
    for assignment in assignments:
        assign(values, assignment, RunConfig)
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
    return parse_yaml(text)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.learnin_rate=1", "train.learnin_rate is not a setting. Did you mean 'learning_rate'?"),
        ("learning_rate=1", "learning_rate is not a setting. Use `train.learning_rate=1`."),
        ("trian.epochs=1", "trian is not a setting. Did you mean 'train'?"),
        ("train.epochs=-1", "train.epochs = -1: input should be greater than 0."),
        ("train.batch_size=many", "train.batch_size = 'many'"),
        ("task=translate", "task = 'translate': must be one of"),
        ("method=lorra", "method 'lorra' is not one of lora,"),
        ("method.rank=4", "method.rank is not a setting of lora. Use `method.r=4`."),
        ("method.r=0", "method.r = 0: must be at least 1."),
        ("method.r=2.5", "method.r = 2.5: must be a whole number."),
        ('method.lora_alpha="16"', "method.lora_alpha = '16': must be a number. Write 16 without quotes."),
        ('train.batch_size="16"', "train.batch_size = '16': input should be a valid integer."),
        ("method.r=true", "method.r = True: must be a whole number."),
        (
            "method.rank_pattern={q: '4'}",
            "method.rank_pattern = {'q': '4'}: must be a mapping of names to whole numbers",
        ),
        ("method.target_modules=7", "method.target_modules = 7: must be a list of names or text or null."),
        ("method={name: prompt, num_virtual_tokens: 2.5}", "method.num_virtual_tokens = 2.5: must be a whole number."),
        ("data=d.csv", "data = 'd.csv'"),
    ],
)
def test_wrong_settings(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(changed(assignment), source="run.yaml")
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_missing_settings() -> None:
    with pytest.raises(ConfigError, match=r"model is missing\. The base model: .*\nAlso task is missing\. data is"):
        RunConfig.build({})


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ('revision="12e45"', "12e45"),
        ("revision=12e45", "12e45"),
        ("output=nan", "nan"),
        ("output=123", "123"),
        ("output=2024-01-01", "2024-01-01"),
        ("data.train=2024", "2024"),
        ("data.template=chat", "chat"),
        ("revision=null", None),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=5E-4", 5e-4),
        ("train.epochs=2", 2.0),
    ],
)
def test_what_is_set_is_of_the_settings_kind(assignment: str, value: object) -> None:
    config = RunConfig.build(changed(assignment))
    assert RunConfig.build(read_yaml_text(config.to_yaml())) == config
    *sections, last = assignment.partition("=")[0].split(".")
    section = getattr(config, sections[0]) if sections else config
    assert getattr(section, last) == value and type(getattr(section, last)) is type(value)


@pytest.mark.parametrize("text", ["batch_size: '16'", "packing: 'no'", "epochs: true", "learning_rate: '1e-3'"])
def test_no_value_is_guessed_into_another_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: m\ntask: seq_cls\ndata: {{train: d.csv}}\noutput: o\ntrain: {{{text}}}\n"
    )
    with pytest.raises(ConfigError, match=f"train.{text.split(':')[0]} = .*: input should be a valid"):
        RunConfig.build(read_yaml(tmp_path / "run.yaml"))


def test_a_number_with_an_exponent_is_one_in_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: m\ntask: seq_cls\ndata: {train: d.csv}\noutput: o\n"
        "method: {name: lora, lora_dropout: 5e-2}\ntrain: {learning_rate: 1e-3, weight_decay: -0e1}\n"
    )
    config = RunConfig.build(read_yaml(tmp_path / "run.yaml"))
    assert (config.method.arguments, config.train.learning_rate) == ({"lora_dropout": 0.05}, 1e-3)


def test_names_of_what_is_here_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text,label\n")
    (tmp_path / "t.yaml").write_text("user: '{content}'\nassistant: '{content}'\n")
    method = {"name": "prompt", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}
    values = {
        "model": "base",
        "task": "causal_lm",
        "method": method | {"tokenizer_name_or_path": "base"},
        "data": {
            "train": [Path("*.csv"), {"path": "a.csv", "weight": 2}, "owner/set"],
            "eval": "b.csv",
            "template": "t.yaml",
        },
        "output": "out",
    }
    config = RunConfig.build(values).resolved()
    here = str(tmp_path)
    assert (config.model, config.output) == (f"{here}/base", f"{here}/out")
    assert [s.path for s in config.data.train_sources] == [f"{here}/*.csv", f"{here}/a.csv", "owner/set"]
    assert (config.data.eval, config.data.template) == (f"{here}/b.csv", f"{here}/t.yaml")
    assert config.method.arguments["tokenizer_name_or_path"] == f"{here}/base"
    xlora = RunConfig.build(changed() | {"method": {"name": "xlora", "adapters": {"a": "base", "b": "owner/b"}}})
    assert xlora.resolved().method.arguments["adapters"] == {"a": f"{here}/base", "b": "owner/b"}
    corda = {"name": "lora", "init_lora_weights": "corda", "corda_config": {"cache_file": "a.csv"}}
    found = RunConfig.build(changed() | {"method": corda}).resolved().method.arguments["corda_config"]
    assert found == {"cache_file": f"{here}/a.csv"}
    mpt = {"name": "multitask_prompt_tuning", "prompt_tuning_init": "ONLY_SOURCE_SHARED"}
    mpt |= {"prompt_tuning_init_state_dict_path": "base"}
    found = RunConfig.build(changed() | {"method": mpt}).resolved().method.arguments
    assert found["prompt_tuning_init_state_dict_path"] == f"{here}/base"
    assert config.resolved() == config and config.data.train_sources[1].weight == 2
    assert RunConfig.build(changed("model=owner/model")).resolved().model == "owner/model"


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
        assign({"model": "m"}, text, RunConfig)


def test_every_setting_is_explained() -> None:
    for name, kind, _, meaning in describe(RunConfig):
        assert meaning, name
        assert kind, name


@pytest.mark.parametrize(
    ("value", "budget"),
    [("12GB", 12 * 10**9), ("1GiB", 2**30), (4096, 4096), (4e9, 4 * 10**9), ("auto", "auto"), (None, None)],
)
def test_a_memory_budget_is_a_number_once_it_is_parsed(value: object, budget: object) -> None:
    config = RunConfig.build({**LEAST, "train": {"memory_budget": value}})
    assert config.train.memory_budget == budget and type(config.train.memory_budget) is type(budget)
    assert RunConfig.build(read_yaml_text(config.to_yaml())) == config


@pytest.mark.parametrize("value", ["much", "0GB", 0, -1, True, 1.5, [1]])
def test_what_is_no_memory_budget(value: object) -> None:
    with pytest.raises(ConfigError, match=r"train\.memory_budget.* 12GB") as caught:
        RunConfig.build({**LEAST, "train": {"memory_budget": value}})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("8h", 28800.0), ("1h30m", 5400.0), ("1:30:00", 5400.0), (90, 90.0), (0.5, 0.5), (None, None)],
)
def test_a_time_is_a_number_once_it_is_parsed(value: object, seconds: object) -> None:
    config = RunConfig.build({**LEAST, "train": {"max_time": value}})
    assert config.train.max_time == seconds and type(config.train.max_time) is type(seconds)
    assert RunConfig.build(read_yaml_text(config.to_yaml())) == config


@pytest.mark.parametrize("value", ["soon", "0h", 0, -1, True, [1], float("inf"), float("nan")])
def test_what_is_no_time(value: object) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_time.* 8h") as caught:
        RunConfig.build({**LEAST, "train": {"max_time": value}})
    assert len(str(caught.value).splitlines()) == 1


def test_every_layout_is_read_and_there_is_one_list_of_them() -> None:
    assert set(LAYOUTS) == set(LAYOUT_NAMES)
    for layout in ("auto", *LAYOUT_NAMES):
        RunConfig.build(changed(f"data.layout={layout}"))


@pytest.mark.parametrize(
    "text", ["query: ", "the hotel ", "query:", " a", "one", "find #1 ", "# ", "2024", "true", "[a]"]
)
def test_words_stay_as_they_are(text: str) -> None:
    found = RunConfig.build(changed("task=embedding", f"embedding.query_prompt={text}", "revision=12e45")).embedding
    assert found is not None and found.query_prompt == text
    quoted = RunConfig.build(changed("task=embedding", f'embedding.query_prompt="{text}"')).embedding
    none = RunConfig.build(changed("task=embedding", "embedding.query_prompt=null")).embedding
    assert quoted == found and none is not None and none.query_prompt is None
    assert RunConfig.build(changed("data.train= a.csv ")).data.train == "a.csv"


def test_only_prompts_keep_the_blanks_at_their_ends() -> None:
    """A blank behind the = is of the notation: ' review' is no column of anybody's."""
    texts = {s.name for s in describe(RunConfig) if s.kind in ("str", "str | null")}
    kept = {"embedding.query_prompt", "embedding.document_prompt"}
    assert kept < texts and {"data.columns.text", "train.best", "revision"} < texts
    for name in sorted(texts):
        values: dict[str, object] = {}
        assign(values, f"{name} = f1 ", RunConfig)
        (found,) = flat(values)
        assert found == (" f1 " if name in kept else "f1"), name
    columns = RunConfig.build(changed("data.columns.text = Unnamed: 0", "data.columns.label=#1")).data.columns
    assert (columns.text, columns.label) == ("Unnamed: 0", "#1")


def flat(values: dict[str, object]) -> list[object]:
    """The values of a mapping and of those in it."""
    return [x for v in values.values() for x in (flat(v) if isinstance(v, dict) else [v])]


def test_what_is_no_number_of_layers() -> None:
    both = ["method=lora", "method.target_modules=[]", "method.target_parameters=a.weight,b.weight"]
    assert RunConfig.build(changed(*both)).method.arguments["target_parameters"] == ["a.weight", "b.weight"]
    with pytest.raises(ConfigError, match=r"method\.layers_to_transform = \['a', 'b'\]"):
        RunConfig.build(changed("method.layers_to_transform=a,b"))


@pytest.mark.parametrize(
    ("settings", "rows", "per_epoch", "steps"),
    [
        ({"batch_size": 4, "epochs": 3}, 10, 3, 9),
        ({"batch_size": 4, "gradient_accumulation": 2, "epochs": 1.5}, 17, 3, 5),
        ({"batch_size": 16, "max_steps": 7}, 1, 1, 7),
        ({"batch_size": 5, "epochs": 0.5}, 10, 2, 1),
    ],
)
def test_steps_of_a_run(settings: dict[str, Any], rows: int, per_epoch: int, steps: int) -> None:
    train = TrainConfig(**settings)
    assert (train.steps_per_epoch(rows), train.steps(rows)) == (per_epoch, steps)


def test_what_a_run_writes_to_the_disk() -> None:
    """The adapter once, and each checkpoint with two moments of what is trained."""
    found = [TrainConfig(**settings).disk_bytes(1000) - 2**20 for settings in ({}, {"save_every": 1}, {"best": "f1"})]
    assert found == [4000 * 4, 4000 * 10, 4000 * 13]


def test_all_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(changed("train.epochs=-1", "train.batch_size=many", "data.labels=[1, 2]", "method.r=0"))
    first, second = str(caught.value).splitlines()
    assert first.endswith("method.r = 0: must be at least 1.")
    assert second.startswith("Also data.labels.0 = 1: ") and "labels.1" not in second
    assert "train.epochs = -1: input should be greater than 0. train.batch_size = 'many'" in second
    assert "train.epochs = -1：应大于 0.0。" in caught.value.text.zh.splitlines()[1]
    with pytest.raises(ConfigError, match=r"\nAlso train\.epochs = -1: input should be greater than 0\.$"):
        RunConfig.build(changed("train.foo=1", "train.epochs=-1"))
    with pytest.raises(ConfigError, match=r"model is missing\. .*\nAlso output is missing\.$"):
        RunConfig.build({"task": "seq_cls", "data": {"train": "d"}})
    wrong = [f"train.{name}=0" for name in ("batch_size", "keep", "log_every", "save_every", "eval_every", "max_steps")]
    with pytest.raises(ConfigError, match=r" And 1 more\.$"):
        RunConfig.build(changed(*wrong))
    with pytest.raises(ConfigError, match=r"data\.train = 3: input should be a valid string\.$"):  # of all its kinds
        RunConfig.build({"model": "m", "task": "seq_cls", "data": {"train": 3}, "output": "o"})
    run = {"model": "m", "task": "seq_cls", "data": {"train": "d"}, "output": "o"}
    with pytest.raises(ConfigError, match=r"\nAlso max_new_tokens = 0: "):
        CompareConfig.build({**run, "seeds": 0, "max_new_tokens": 0})
    with pytest.raises(ConfigError, match=r"^config: .* = 0: input should be greater than or equal to 1\.$"):
        CompareConfig.recorded({**run, "seeds": 0, "max_new_tokens": 0})  # an error of a record is one line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.patience=2"], r"train\.patience = 2 needs train\.eval_every: it counts evaluations\."),
        (["train.best=loss"], r"train\.best = 'loss' needs train\.eval_every: it chooses among evaluations\."),
        (["train.patience=2", "train.eval_every=5", "data.test_size=0.0"], r"train\.patience = 2 needs held-out rows"),
    ],
)
def test_what_counts_evaluations_is_refused_before_anything_is_read(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.build(changed(*settings))
    RunConfig.build(changed("train.patience=2", "train.best=loss", "train.eval_every=5"))
    RunConfig.build(changed("train.patience=2", "train.eval_every=5", "data.test_size=0.0", "data.eval=e.csv"))
