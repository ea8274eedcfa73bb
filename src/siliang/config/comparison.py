"""The settings of a comparison: those of a run, plus the methods, the seeds, the search and the budget."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from siliang import other_names
from siliang.config.describing import Setting, describe
from siliang.config.explaining import explain_value, first_of_each, others_line, path_of
from siliang.config.names import OWN_FIELDS, name_hint
from siliang.config.run import MethodConfig, RunConfig
from siliang.config.section import THE_SETTINGS, Section, Seed
from siliang.language import Bilingual, local, together
from siliang.safety.safe_yaml import dump_yaml
from siliang.secrets import redacted
from siliang.terminal import one_line
from siliang.types import ConfigError, nearest

MAX_NAME = 60  # characters of a folder name: file systems allow 255 bytes
DEFAULT_METHODS = ("full", "bitfit", "lora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning")


class MethodEntry(BaseModel):
    """A method of the comparison: its name, or {name: lora, r: 16, learning_rate: 1e-3, search: {...}}."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    name: str
    """A name of `siliang methods`; prompt, p-tuning and prefix are allowed, too.

    `siliang methods` 中的一个名称；也可写作 prompt、p-tuning、prefix。"""
    label: str = ""
    """The method's name in the table. Default: the name and the settings of this entry.

    在表中的名称。默认由方法名和这一项中的设置拼成。"""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Peak learning rate. None: train.learning_rate, or the method's default.

    峰值学习率。None：用 train.learning_rate，否则用该方法的默认值。"""
    search: dict[str, list[object]] | None = None
    """The values to try for this method, instead of the comparison's `search`.

    这个方法要尝试的取值，代替整个比较的 `search`。"""

    @property
    def arguments(self) -> dict[str, Any]:
        """The given fields of the method's config."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _complete(self) -> MethodEntry:
        self.name = MethodConfig(name=self.name, **self.arguments).name
        self.label = one_line(self.label)  # it names a folder, and lines of records and tables
        if not self.label:
            self.label = " ".join([self.name, *(f"{k}={v}" for k, v in redacted(self.model_extra or {}).items())])
        return self


def _entries(value: object) -> object:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


class CompareSettings(Section):
    """The settings of compare.yaml that a run does not have."""

    methods: Annotated[list[MethodEntry], BeforeValidator(_entries), Field(min_length=1)] = Field(
        default_factory=lambda: [MethodEntry(name=name) for name in DEFAULT_METHODS]
    )
    """The methods: names of `siliang methods`, or mappings such as {name: lora, r: 16, learning_rate: 1e-3}.

    要比较的方法：`siliang methods` 中的名称，或 {name: lora, r: 16, learning_rate: 1e-3} 这样的映射。"""
    seeds: Annotated[int, Field(ge=1, le=1000)] | Annotated[list[Seed], Field(min_length=1, max_length=1000)] = 3
    """The number of seeds, starting at train.seed; or a list of seeds.

    种子的个数，从 train.seed 开始依次取；也可直接列出各个种子。"""
    search: dict[str, list[object]] = Field(default_factory=dict)
    """Settings to search, each with a list of values: learning_rate, or fields of a method's config. Each method tries
    all combinations of the settings it has, with the first seed, on validation rows. Only the chosen combination is
    evaluated on the held-out rows.

    要搜索的设置，每项是取值的列表：learning_rate，或方法配置中的字段。每种方法尝试自己具有的那些项的全部组合，用第一个种
    子，在验证样本上比较。只有选定的组合才在验证集上评估。"""
    validation_size: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """The share of the training rows that the search uses for validation.

    从训练样本中分出多大比例，作为搜索的验证样本。"""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes of training for every run, instead of train.epochs: for each method, the number of steps is measured.

    每次运行训练的分钟数，代替 train.epochs：先测出每种方法在这段时间里能走多少步。"""
    prompts: list[str] = Field(default_factory=list)
    """Texts or instructions that the base model and every method answer. Default: some of the held-out rows.

    让基座模型和每种方法都来回答的文本或指令。默认取自验证集。"""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """The maximum number of tokens of each of these answers, for tasks that generate text.

    在生成文本的任务中，上述每个回答最多的词元数。"""

    @model_validator(mode="after")
    def _consistent(self) -> CompareSettings:
        labels = [slug(entry.label) for entry in self.methods]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ConfigError(
                Bilingual(
                    f"methods has {twice[0]!r} twice: give one of them another setting or another `label`.",
                    f"methods 中 {twice[0]!r} 出现了两次：请给其中一个不同的设置或 `label`。",
                )
            )
        for key in self.search:
            if not any(key in settings_of(entry) for entry in self.methods):
                known = sorted({name for entry in self.methods for name in settings_of(entry)})
                hint = _search_hint(key, known) or nearest(key, known)
                raise ConfigError(
                    Bilingual(
                        f"search.{key} is not a setting of any of the methods.{hint} Allowed: {', '.join(known)}.",
                        f"search.{key} 不是任何所选方法的设置。{hint.zh}可用：{'、'.join(known)}。",
                    )
                )
        for entry in self.methods:
            for key in entry.search or {}:
                if key not in settings_of(entry):
                    own = settings_of(entry)
                    hint = _search_hint(key, own) or nearest(key, own)
                    raise ConfigError(
                        Bilingual(
                            f"search.{key} is not a setting of {entry.name}.{hint}",
                            f"search.{key} 不是 {entry.name} 的设置。{hint.zh}",
                        )
                    )
            for settings in self.choices(entry):
                MethodConfig(name=entry.name, **(entry.arguments | _without_rate(settings)))
        return self

    def choices(self, entry: MethodEntry) -> list[dict[str, object]]:
        """The combinations of settings that the search tries for a method; empty if there are less than two."""
        given = self.search if entry.search is None else entry.search
        own = {key: values for key, values in given.items() if key in settings_of(entry) and values}
        if not own:
            return []
        combinations = [dict(zip(own, values, strict=True)) for values in itertools.product(*own.values())]
        return combinations if len(combinations) > 1 else []


@dataclass(frozen=True)
class CompareConfig:
    """A comparison: `run`, the settings of all runs, and `settings`, those of the comparison."""

    run: RunConfig
    settings: CompareSettings

    @classmethod
    def build(cls, values: Mapping[str, object], *, source: str = THE_SETTINGS) -> CompareConfig:
        """Checks `values` and fills in the defaults.

        Raises:
            ConfigError: A key is unknown (with the nearest names), missing, or has a value that is not allowed.
        """
        return cls._built(values, source, recorded=False)

    @classmethod
    def recorded(cls, values: Mapping[str, object]) -> CompareConfig:
        """The settings of a record, checked as by `build`, but without access to the files that they name.

        Raises:
            ConfigError: A key is unknown or missing, or has a value that is not allowed.
        """
        return cls._built(values, "config", recorded=True)

    @classmethod
    def _built(cls, values: Mapping[str, object], source: str, *, recorded: bool) -> CompareConfig:
        own = set(CompareSettings.model_fields)
        of_a_run = set(RunConfig.model_fields) - {"method", "adapter"}
        if "method" in values:
            raise ConfigError(
                Bilingual(
                    f"{source}: a comparison has `methods`, a list, instead of `method`.",
                    f"{local(source, 'zh')}：比较用 `methods`（列表），不用 `method`。",
                )
            )
        for key in values:
            if key not in own | of_a_run:
                hint = name_hint(key, RunConfig, values[key]) or nearest(key, own | of_a_run)
                wrong = Bilingual(
                    f": {key} is not a setting.{hint} `siliang config` lists them all.",
                    f"：没有 {key} 这个配置项。{local(hint, 'zh')}`siliang config` 列出全部配置项。",
                )
                raise ConfigError(together(source, wrong))
        of_the_runs = {k: v for k, v in values.items() if k in of_a_run}
        run = RunConfig.recorded(of_the_runs) if recorded else RunConfig.build(of_the_runs, source=source)
        if run.data.validation_size is not None:
            raise ConfigError(
                Bilingual(
                    f"{source}: the search sets data.validation_size: use validation_size.",
                    f"{local(source, 'zh')}：data.validation_size 由搜索自己设置：请改用 validation_size。",
                )
            )
        if run.train.trackers:
            raise ConfigError(
                Bilingual(
                    f"{source}: train.trackers has no effect in a comparison. Leave it out; the page has the loss "
                    "curve of each method.",
                    f"{local(source, 'zh')}：train.trackers 在比较中不起作用。请去掉；网页里有每种方法的损失曲线。",
                )
            )
        try:
            settings = CompareSettings.model_validate({k: v for k, v in values.items() if k in own})
        except ValidationError as error:
            wrong = _explain(error, others_too=not recorded)
            raise ConfigError(together(source, Bilingual(": ", "："), wrong)) from None
        return cls(run, settings)

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        given = self.settings.seeds
        return [self.run.train.seed + i for i in range(given)] if isinstance(given, int) else given

    def as_dict(self, *, defaults: bool = True) -> dict[str, object]:
        """The config as a mapping.

        Args:
            defaults: All settings, with absolute paths. False: only settings that differ from their default, as given.
        """
        shown = self.run.resolved() if defaults else self.run
        run = shown.model_dump(mode="json", exclude={"method", "adapter"}, exclude_defaults=not defaults)
        settings = self.settings.model_dump(mode="json", exclude_defaults=not defaults)
        settings["methods"] = [_short(entry) for entry in self.settings.methods]
        output = run.pop("output")
        return {**run, **settings, "seeds": self.settings.seeds, "output": output}

    def to_yaml(self) -> str:
        """The content of compare.yaml."""
        return dump_yaml(self.as_dict())


def slug(label: str) -> str:
    """The folder name of a label."""
    return re.sub(r"[^\w.=-]+", "-", label)[:MAX_NAME].strip("-.") or "method"


def settings_of(entry: MethodEntry) -> set[str]:
    """The settings of a method that can be searched."""
    from siliang.methods import find_method

    config = find_method(entry.name).config
    return {"learning_rate"} | ({f.name for f in dataclasses.fields(config)} - OWN_FIELDS if config else set())


def _search_hint(key: str, known: Iterable[str]) -> Bilingual:
    """A sentence with siliang's name of another tool's setting, for a search; empty if there is none."""
    row = other_names.find(key)
    name = row.setting.rpartition(".")[2] if row is not None else ""
    if name not in known:
        return Bilingual("", "")
    return Bilingual(f" Use `search.{name}`.", f"请用 `search.{name}`。")


def describe_settings() -> list[Setting]:
    """The settings of compare.yaml that a run does not have."""
    shown = {"methods": ("names or mappings", ", ".join(DEFAULT_METHODS)), "search": ("mapping of lists", "{}")}
    return [
        setting._replace(kind=shown[setting.name][0], default=shown[setting.name][1])
        if setting.name in shown
        else setting
        for setting in describe(CompareSettings)
    ]


def _without_rate(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key != "learning_rate"}


def _short(entry: MethodEntry) -> dict[str, object]:
    """An entry without the settings that are not given."""
    return entry.model_dump(mode="json", exclude_none=True)


def _explain(error: ValidationError, *, others_too: bool) -> Bilingual:
    first, *others = [explain_value(one, path_of(one)) for one in first_of_each(error, CompareSettings)]
    return together(first, others_line([], others if others_too else []))
