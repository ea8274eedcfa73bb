"""Configs of methods: what their fields may be in Python, in run.yaml and in files, PEFT's among them; and which layers
they mean.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from tiny import make
from torch import nn

import siliang
from siliang.config import RunConfig
from siliang.safety.safe_yaml import parse_yaml
from siliang.types import AdapterError, ConfigError, TargetError

KINDS = ("LoraConfig", "IA3Config", "LNTuningConfig", "PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig")


def saved_by_peft(kind: str, settings: dict[str, Any], folder: Path) -> Any:
    getattr(peft, kind)(**settings).save_pretrained(str(folder))
    return siliang.PeftConfig.from_pretrained(folder)  # PeftConfig, which finds the class itself


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in KINDS),
        ("LoraConfig", {"layers_to_transform": [], "target_modules": ["q_proj"]}),
        ("LoraConfig", {"layers_to_transform": 1, "layers_pattern": "layers", "target_modules": ["q_proj"]}),
        ("LoraConfig", {"layers_pattern": [], "target_modules": {"q_proj", "v_proj"}}),
        ("LoraConfig", {"init_lora_weights": "OLoRA"}),
        ("LoraConfig", {"init_lora_weights": "Gaussian"}),
        ("LoraConfig", {"init_lora_weights": "pissa_niter_0"}),
        ("LoraConfig", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 2}}),
        ("LoraConfig", {"init_lora_weights": "orthogonal"}),
        ("LoraConfig", {"init_lora_weights": "mica"}),
        ("LoraConfig", {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}),
        ("LoraConfig", {"megatron_core": None, "qalora_group_size": 8, "layer_replication": []}),
        ("LoraConfig", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4.5}, "lora_alpha": 2.5}),
        ("LoraConfig", {"modules_to_save": [], "exclude_modules": [], "auto_mapping": {"unsloth_fixed": True}}),
        ("LoraConfig", {"lora_dropout": 0, "task_type": "CAUSAL_LM", "revision": "main"}),
        ("IA3Config", {"target_modules": "a|b", "feedforward_modules": "b", "fan_in_fan_out": True}),
        ("IA3Config", {"target_modules": {"a", "b"}, "feedforward_modules": [], "init_ia3_weights": False}),
        ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 3}),
        (
            "PromptTuningConfig",
            {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "good or bad",
                "tokenizer_name_or_path": "somewhere",
                "tokenizer_kwargs": {"use_fast": True},
            },
        ),
        ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_dropout": 0}),
        ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 9, "init_weights": "zero"}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_writes_is_read(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = saved_by_peft(kind, settings, tmp_path)
    assert type(config).__name__ == kind
    for name, value in settings.items():
        if name in ("init_lora_weights", "eva_config", *config.UNSUPPORTED):
            continue
        found = getattr(config, name)
        assert (set(found) if isinstance(value, set) else found) == value
    (tmp_path / "again").mkdir()
    config.save_pretrained(tmp_path / "again")  # and peft reads what siliang wrote
    assert type(peft.PeftConfig.from_pretrained(str(tmp_path / "again"))).__name__ == kind


def test_starts_of_other_cases_are_known() -> None:
    assert siliang.LoraConfig(init_lora_weights="OLoRA").init_lora_weights == "olora"
    assert siliang.PromptTuningConfig(prompt_tuning_init="random").prompt_tuning_init == "RANDOM"  # type: ignore[arg-type]
    assert siliang.LoraConfig(task_type="causal_lm").task_type == "CAUSAL_LM"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config = .* siliang does not support it"),
        ({"use_qalora": True}, "use_qalora = True changes what LORA computes"),
        ({"r": "8"}, "r = '8': must be a whole number. Write 8 without quotes."),
        ({"use_dora": 1}, "use_dora = 1: must be true or false."),
        ({"rank_pattern": {"q": 2.0}}, "rank_pattern = {'q': 2.0}: must be a mapping of names to whole numbers"),
        ({"bias": "lora-only"}, "bias = 'lora-only': must be .* Did you mean 'lora_only'"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias do not go together"),
    ],
)
def test_what_a_file_may_not_hold(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    siliang.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(AdapterError, match=message) as caught:
        siliang.LoraConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_config_makes_an_adapter_that_trains(kind: str, tmp_path: Path) -> None:
    settings = {} if kind in KINDS[:3] else {"num_virtual_tokens": 4}
    config = getattr(siliang, kind)(task_type="CAUSAL_LM", **settings)
    config.save_pretrained(tmp_path)
    again = getattr(siliang, kind).from_pretrained(tmp_path)
    assert again == config and not again.inference_mode
    trained = siliang.get_peft_model(make("llama"), again).get_nb_trainable_parameters()
    assert trained == siliang.get_peft_model(make("llama"), config).get_nb_trainable_parameters()
    assert trained[0] > 0
    # an adapter's own config is not to be trained, as PEFT writes it
    siliang.get_peft_model(make("llama"), config).save_pretrained(tmp_path / "adapter")
    assert siliang.PeftConfig.from_pretrained(tmp_path / "adapter").inference_mode


WRONG = [
    ("lora", {"lora_alpha": "16"}, "lora_alpha = '16': must be a number. Write 16 without quotes."),
    ("lora", {"lora_alpha": float("nan")}, "lora_alpha = nan: must be a number."),
    ("lora", {"r": 8.5}, "r = 8.5: must be a whole number."),
    ("lora", {"r": True}, "r = True: must be a whole number."),
    ("lora", {"rank_pattern": {"q": "4"}}, "rank_pattern = {'q': '4'}: must be a mapping of names to whole numbers."),
    ("lora", {"rank_pattern": {"q": 0}}, "rank_pattern: 'q' = 0: must be at least 1."),
    ("lora", {"target_modules": 7}, "target_modules = 7: must be a list of names or text or null."),
    ("lora", {"target_modules": ["q", 7]}, "target_modules = ['q', 7]: must be a list of names or text or null."),
    ("lora", {"use_rslora": "yes"}, "use_rslora = 'yes': must be true or false."),
    ("lora", {"layers_to_transform": [True]}, "layers_to_transform = [True]: must be a list of whole numbers or"),
    ("lora", {"layers_to_transform": [0], "target_modules": ".*q"}, "layers_to_transform is for target_modules by"),
    ("lora", {"init_lora_weights": "pisa"}, "Did you mean 'pissa'?"),
    ("lora", {"modules_to_save": "classifier"}, "modules_to_save = 'classifier': must be a list of names."),
    ("miss", {"r": 0}, "r = 0: must be at least 1."),
    ("miss", {"miss_dropout": 1.0}, "miss_dropout = 1.0: must be at least 0 and less than 1."),
    ("miss", {"init_weights": "bats"}, "init_weights = 'bats': must be true or false or 'bat' or 'mini'."),
    ("hira", {"init_weights": "gauss"}, "init_weights = 'gauss': must be true or false or 'gaussian'."),
    ("hira", {"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' = 0: must be 1 to"),
    ("lokr", {"decompose_factor": 0}, "decompose_factor = 0: must be -1 or at least 1."),
    ("lokr", {"rank_dropout": 1.0}, "rank_dropout = 1.0: must be at least 0 and less than 1."),
    ("fourierft", {"n_frequency": 0}, "n_frequency = 0: must be at least 1."),
    ("fourierft", {"n_frequency_pattern": {"q_proj": 0}}, "n_frequency_pattern: 'q_proj' = 0: must be 1 to"),
    ("c3a", {"block_size": 0}, "block_size = 0: must be at least 1."),
    (
        "c3a",
        {"init_weights": "zero"},
        "init_weights = 'zero': must be true or false or 'gaussian', 'kaiming_",
    ),
    ("shira", {"random_seed": 1.5}, "random_seed = 1.5: must be a whole number."),
    ("ia3", {"init_ia3_weights": 0}, "init_ia3_weights = 0: must be true or false."),
    ("prompt_tuning", {"num_virtual_tokens": 2.5}, "num_virtual_tokens = 2.5: must be a whole number."),
    ("prompt_tuning", {"prompt_tuning_init": "TXT"}, "must be one of RANDOM, TEXT, SAMPLE_VOCAB. Did you mean 'TEXT'?"),
    ("p_tuning", {"encoder_dropout": 1}, "encoder_dropout = 1: must be at least 0 and less than 1."),
    ("p_tuning", {"encoder_num_layers": 0}, "encoder_num_layers = 0: must be at least 1."),
    ("prefix_tuning", {"prefix_projection": "true"}, "prefix_projection = 'true': must be true or false."),
    ("prefix_tuning", {"init_weights": "one"}, "init_weights = 'one': must be 'zero'."),
]


@pytest.mark.parametrize(("method", "settings", "message"), WRONG)
def test_wrong_values_in_python_and_in_a_run(method: str, settings: dict[str, Any], message: str) -> None:
    from siliang.methods import METHODS

    kind: Any = METHODS[method].config
    with pytest.raises(ConfigError) as caught:
        kind(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    values = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(values | {"method": {"name": method, **settings}})
    assert message in str(caught.value) and "method." in str(caught.value)


def test_numbers_as_people_write_them() -> None:
    written = "{name: lora, r: 4, lora_alpha: 16, lora_dropout: 5e-2, rank_pattern: {q_proj: 2}}"
    values = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}
    config = RunConfig.build(values | {"method": parse_yaml(written)})
    assert config.method.arguments["lora_dropout"] == 0.05
    made = siliang.LoraConfig(r=np.int64(4), lora_alpha=np.float32(2.5), layers_to_transform=range(2))  # type: ignore[arg-type]
    assert (type(made.r), made.lora_alpha, made.layers_to_transform) == (int, 2.5, [0, 1])
    assert json.loads(made.to_json())["r"] == 4


# ---- which layers ----


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3)])


class Mixture(nn.Module):
    """Two layers of three experts each."""

    def __init__(self, outer: str) -> None:
        super().__init__()
        self.model = nn.Module()
        setattr(self.model, outer, nn.ModuleList([Expert(), Expert()]))


def tuned(model: nn.Module, config: siliang.LoraConfig) -> list[str]:
    injection = siliang.get_peft_model(model, config).injection
    return sorted(
        n.partition(".lora_A")[0].removeprefix("model.") for n, _ in injection.named_parameters() if ".lora_A" in n
    )


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_layers_are_the_models_and_not_the_experts(pattern: str | None) -> None:
    config: dict[str, Any] = {"target_modules": ["q", "w1"], "layers_to_transform": [1], "layers_pattern": pattern}
    ours = tuned(Mixture("layers"), siliang.LoraConfig(**config))
    assert ours == [*(f"model.layers.1.experts.{i}.w1" for i in range(3)), "model.layers.1.q"]
    theirs = peft.get_peft_model(Mixture("layers"), peft.LoraConfig(**config))
    names = {n.partition(".lora_A")[0].removeprefix("base_model.model.") for n in theirs.state_dict() if ".lora_A" in n}
    assert set(ours) == names


def test_layers_of_a_list_in_a_list_and_of_a_list_at_the_root() -> None:
    config: dict[str, Any] = {"target_modules": ["q"], "layers_to_transform": 1, "r": 2}
    root = nn.ModuleDict({"layers": nn.ModuleList([Expert(), Expert()])})
    assert tuned(root, siliang.LoraConfig(**config)) == ["layers.1.q"]
    nested = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleList([Expert()]), nn.ModuleList([Expert(), Expert()])])})
    assert tuned(nested, siliang.LoraConfig(**config)) == ["blocks.1.0.q", "blocks.1.1.q"]
    assert len(tuned(make("t5"), siliang.LoraConfig(target_modules=["q"], layers_to_transform=[1]))) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": [1, 7]}, "the model has no layer 7: they go from 0 to 1"),
        ({"layers_to_transform": [-1]}, "the model has no layer -1: they go from 0 to 1"),
        ({"layers_to_transform": [0], "layers_pattern": "layer"}, "layers_pattern: 'layer' .* Did you mean 'layers'?"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: 'q_prj' matches none .* Did you mean 'q_proj'?"),
        ({"alpha_pattern": {"k_proj": 2}}, "alpha_pattern: 'k_proj' matches none of the layers that are tuned"),
        ({"exclude_modules": ["lm_heed"]}, "exclude_modules: 'lm_heed' matches no module .* Did you mean 'lm_head'?"),
        ({"exclude_modules": ".*lm_heed"}, "exclude_modules: '.*lm_heed' matches no module"),
    ],
)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules", "ignore:The following .* keys did not match")
def test_targets_that_match_nothing_are_errors(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make("llama")
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(TargetError, match=message):
        siliang.get_peft_model(model, siliang.LoraConfig(**settings))
    assert [n for n, _ in model.named_modules()] == before
    # in a file it is as PEFT left it
    peft_settings = {"target_modules": ["q_proj"], "layers_to_transform": [0]} | settings
    if "layers_pattern" not in settings and settings.get("layers_to_transform") != [-1]:
        peft.get_peft_model(make("llama"), peft.LoraConfig(**peft_settings)).save_pretrained(str(tmp_path))
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


def test_feedforward_modules_that_are_not_there() -> None:
    config = siliang.IA3Config(target_modules=".*q_proj", feedforward_modules=".*dwn_proj")
    with pytest.raises(TargetError, match=r"feedforward_modules: '.*dwn_proj' matches no module"):
        siliang.get_peft_model(make("llama"), config)


def test_a_rank_pattern_of_a_file_may_match_no_layer(tmp_path: Path) -> None:
    config = siliang.LoraConfig(r=512, rank_pattern={"q_proj": 2, "v_proj": 3}, init_lora_weights=False)
    model = siliang.get_peft_model(make("llama"), config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    again = siliang.PeftModel.from_pretrained(make("llama"), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


class Unknown(nn.Module):
    """A model of some type, with linear layers in it."""

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": model_type})()
        self.some, self.other, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)


@pytest.mark.parametrize("model_type", ["no such type", "gpt2", "phi"])
def test_where_no_targets_are_usual_the_error_names_all_linear(model_type: str) -> None:
    for kind in (siliang.LoraConfig, siliang.IA3Config):
        with pytest.raises(TargetError, match=r"set target_modules: all-linear, or name some.*: other, some\."):
            siliang.get_peft_model(Unknown(model_type), kind())
        model = siliang.get_peft_model(Unknown(model_type), kind(target_modules="all-linear"))
        assert model.peft_config["default"].target_modules == ["other", "some"]  # type: ignore[attr-defined]
    model = siliang.get_peft_model(Unknown(model_type), siliang.LNTuningConfig())
    assert model.peft_config["default"].target_modules == ["norm"]  # type: ignore[attr-defined]


# ---- what the file says is what was trained ----


def filled(model: Any) -> Any:
    """The model with an adapter in which nothing is zero."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def assert_same(model: Any, reference: torch.Tensor) -> None:
    found = logits(model.eval())
    assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"q_proj": 11, "layers.0.self_attn.q_proj": 1}},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 11}},
        {"alpha_pattern": {".*v_proj": 3, "layers.1.*": 5, ".*": 2.5}, "use_rslora": True},
        {"rank_pattern": {"q_proj": 3, "layers.0.self_attn.q_proj": 1}},
        {"rank_pattern": {r".*\.[qv]_proj": 3, ".*": 5}, "alpha_pattern": {"v_proj": 3, "model.*": 1}},
    ],
)
def test_patterns_that_overlap_are_the_same_in_any_order_of_the_file(settings: dict[str, Any], tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 2, **settings}
    model = filled(siliang.get_peft_model(make("llama"), siliang.LoraConfig(**config)))
    wanted = logits(model)
    assert_same(filled(peft.get_peft_model(make("llama"), peft.LoraConfig(**config))), wanted)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make("llama"), str(tmp_path / "ours"))
    assert_same(theirs, wanted)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")
    assert_same(again, wanted)
    model.peft_config["default"].save_pretrained(tmp_path / "config")  # type: ignore[operator]
    made = siliang.get_peft_model(make("llama"), siliang.LoraConfig.from_pretrained(tmp_path / "config"))
    assert_same(filled(made), wanted)


def test_a_rank_that_was_changed_in_the_file_is_named(tmp_path: Path) -> None:
    siliang.get_peft_model(make("llama"), siliang.LoraConfig(r=4)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}))
    with pytest.raises(AdapterError, match=r"rank is 4, and its adapter_config.json has 2 .*rank_pattern changed"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_proj": 2, "(": 5}}, r"rank_pattern: '\(' is not a regular .* at position 0\.$"),
        ({"alpha_pattern": {"v[": 5}}, r"alpha_pattern: 'v\[' is not a regular .* at position 1\.$"),
        ({"exclude_modules": "a|("}, r"exclude_modules: 'a\|\(' is not a regular .* at position 2\.$"),
        (
            {"layers_to_transform": [0], "layers_pattern": "("},
            r"layers_pattern: '\(' is not a regular .* position 0\.$",
        ),
    ],
)
def test_what_is_no_regular_expression_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(target_modules=["q_proj"], **settings))


class Nested(nn.Module):
    """Layers whose names are numbers, and an `out` that is not a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]), nn.ModuleList([nn.Linear(4, 4)])])
        self.out = nn.Linear(4, 4)
        self.side = nn.ModuleDict({"out": nn.Dropout(0.0)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.side["out"](self.out(self.blocks[1][0](self.blocks[0][0](x))))  # type: ignore[index]


def root() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))


@pytest.mark.parametrize("model", [Nested, root])
def test_all_linear_is_stored_under_names_that_mean_just_these(model: Any, tmp_path: Path) -> None:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return model()

    ours = filled(siliang.get_peft_model(seeded(), siliang.LoraConfig(target_modules="all-linear")))
    x = torch.ones(2, 4)
    ours.save_pretrained(tmp_path)
    for library in (siliang, peft):
        again = library.PeftModel.from_pretrained(seeded(), str(tmp_path)).eval()
        assert torch.allclose(again(x), ours(x), rtol=1e-5, atol=0)
        names = {n.partition(".lora_A")[0] for n in again.state_dict() if ".lora_A." in n}
        assert len(names) == sum(type(m) is nn.Linear for m in model().modules())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_rank_above_a_layers_width_is_opened(start: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "r": 40,
        "target_modules": ["q_proj", "v_proj"],
        "init_lora_weights": start,
    }  # width 32, and 16
    for library, name in ((siliang, "ours"), (peft, "theirs")):
        model = library.get_peft_model(make("llama"), library.LoraConfig(**config)).eval()
        for p in (p for n, p in model.named_parameters() if "lora_B" in n):
            p.data += 0.1
        model.save_pretrained(str(tmp_path / name))
        for other in (siliang, peft):
            assert_same(other.PeftModel.from_pretrained(make("llama"), str(tmp_path / name)), logits(model))
    config["init_lora_weights"] = "pissa_niter_4"
    with pytest.raises(ConfigError, match="'pissa_niter_4': r = 40, and a layer has 32 rows or columns"):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(**config))


@pytest.mark.filterwarnings("ignore:The configuration file contains a `runtime_config`")
def test_what_is_empty_in_a_file_is_off_as_in_peft(tmp_path: Path) -> None:
    model = filled(siliang.get_peft_model(make("llama"), siliang.LoraConfig(r=2)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    nothing = dict.fromkeys(("init_lora_weights", "use_rslora", "use_dora", "inference_mode", "fan_in_fan_out"))
    path.write_text(json.dumps(saved | nothing | {"lora_dropout": 1.0, "runtime_config": {}}))
    for library in (siliang, peft):
        assert_same(library.PeftModel.from_pretrained(make("llama"), str(tmp_path)), logits(model))
    trained = siliang.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True).train()
    reference = logits(make("llama"))
    found = trained(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()  # all of A's input is dropped
    found.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in trained.parameters() if p.grad is not None)
    with pytest.raises(ConfigError, match="less than 1, or nothing is trained"):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(lora_dropout=1.0))


SPARSE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


def test_all_linear_warns_which_experts_it_leaves_out() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    few: dict[str, Any] = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    for model, count in (
        (MixtralForCausalLM(MixtralConfig(**SPARSE, num_local_experts=2)), 4),
        (Qwen2MoeForCausalLM(Qwen2MoeConfig(**SPARSE, **few, num_experts_per_tok=1)), 8),
    ):
        message = r"leaves out experts\.down_proj, experts\.gate_up_proj, gate\.weight, which .* target_parameters to"
        with pytest.warns(UserWarning, match=message) as caught:
            names = tuned(model, siliang.LoraConfig(target_modules="all-linear"))
        assert len(names) == count and len(caught) == 1
    with pytest.raises(
        TargetError, match=r"'model.layers.0.mlp.gate' is a MixtralTopKRouter and no linear layer, which"
    ):
        siliang.get_peft_model(
            MixtralForCausalLM(MixtralConfig(**SPARSE)), siliang.LoHaConfig(target_modules=["q_proj", "gate"])
        )
