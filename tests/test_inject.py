"""Attaching: what is found, what is trained, and that all of it is removed again."""

import pytest
import torch
from tiny import batch, make
from torch import nn

from siliang import BitFitConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from siliang.adapters import attachments
from siliang.adapters.parameter_override import places_of
from siliang.methods import HeadConfig
from siliang.methods.bitfit import is_bias
from siliang.types import ConfigError, TargetError

CONFIGS = {
    "lora": LoraConfig(init_lora_weights=False),
    "lora with biases": LoraConfig(bias="all"),
    "bitfit": BitFitConfig(),
}


def train_a_little(model: nn.Module, name: str) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**batch(name)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["bloom", "gpt2", "bert"])
def test_unload_gives_the_base_back_bit_for_bit(name: str, config: LoraConfig | BitFitConfig) -> None:
    base = make(name)
    base.get_parameter(next(iter(dict(base.named_parameters())))).requires_grad_(False)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    trainable = {n: p.requires_grad for n, p in base.named_parameters()}
    modules = [(n, type(m)) for n, m in base.named_modules()]
    config.task_type = TaskType.SEQ_CLS if name == "bert" else TaskType.CAUSAL_LM
    model = get_peft_model(base, config)
    train_a_little(model, name)
    assert not torch.equal(model(**batch(name)).logits, make(name)(**batch(name)).logits)
    assert model.unload() is base
    assert list(base.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert {n: p.requires_grad for n, p in base.named_parameters()} == trainable
    assert [(n, type(m)) for n, m in base.named_modules()] == modules


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_disable_adapter_is_the_base_model(config: LoraConfig | BitFitConfig) -> None:
    config.task_type = TaskType.CAUSAL_LM
    model = get_peft_model(make("bloom"), config)
    train_a_little(model, "bloom")
    tuned = model(**batch("bloom")).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch("bloom")).logits, make("bloom")(**batch("bloom")).logits)
    assert torch.equal(model(**batch("bloom")).logits, tuned)


def test_bitfit_trains_every_bias_and_nothing_else() -> None:
    model = get_peft_model(make("bloom"), BitFitConfig(task_type=TaskType.CAUSAL_LM))
    for name, p in model.named_parameters():
        assert p.requires_grad == is_bias(name), name


def test_the_model_is_searched_once_for_all_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a parameter is held was looked up for each bias, through all modules of the model."""
    searched: list[nn.Module] = []
    monkeypatch.setattr(attachments, "places_of", lambda model: searched.append(model) or places_of(model))
    model = get_peft_model(make("bloom"), BitFitConfig())
    assert len(searched) == 1 and sum(p.requires_grad for p in model.parameters()) > 10


def test_what_is_a_bias() -> None:
    assert all(map(is_bias, ["bias", "a.bias", "lstm.bias_ih_l0", "attention.in_proj_bias"]))
    assert not any(map(is_bias, ["weight", "block.relative_attention_bias.weight", "biased.weight"]))


def test_bitfit_without_biases_names_what_to_use() -> None:
    base = make("llama")
    with pytest.raises(TargetError, match=r"has none.*Use LoRA"):
        get_peft_model(base, BitFitConfig())
    assert all(p.requires_grad for p in base.parameters())


def test_bitfit_merges_into_the_biases() -> None:
    model = get_peft_model(make("bloom"), BitFitConfig(task_type=TaskType.CAUSAL_LM))
    train_a_little(model, "bloom")
    tuned = model(**batch("bloom")).logits
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(make("bloom").state_dict())
    assert torch.equal(merged(**batch("bloom")).logits, tuned)


def test_head_alone() -> None:
    model = get_peft_model(make("bert"), HeadConfig(task_type=TaskType.SEQ_CLS))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    }
    with pytest.raises(TargetError, match="needs a head"):
        get_peft_model(make("llama"), HeadConfig(task_type=TaskType.CAUSAL_LM))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_poj", "v_proj"], "'q_poj' matches no module of LlamaForCausalLM. Did you mean 'q_proj'"),
        (["nothing"], "Layers that can be tuned: down_proj, embed_tokens, gate_proj"),
        (r".*\.nothing", "matches no module"),
        ("(", "not a regular expression"),
        (["self_attn"], "is a LlamaAttention, which LORA cannot wrap"),
    ],
)
def test_targets_that_cannot_be(targets: list[str] | str, message: str) -> None:
    base = make("llama")
    with pytest.raises(TargetError) as caught:
        get_peft_model(base, LoraConfig(target_modules=targets))
    assert message in str(caught.value)
    assert type(base.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    assert all(p.requires_grad for p in base.parameters())


def test_all_linear_leaves_the_heads_out() -> None:
    config = LoraConfig(target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    names = [n for n, _ in get_peft_model(make("bert"), config).named_parameters() if "lora_A" in n]
    assert names and not any("classifier" in n for n in names)
    llama = get_peft_model(make("llama"), LoraConfig(target_modules="all-linear"))
    assert not any("lm_head.lora_A" in n for n, _ in llama.named_parameters())


def test_exclude_modules() -> None:
    model = get_peft_model(make("llama"), LoraConfig(exclude_modules=["layers.0.self_attn.q_proj"]))
    names = [n for n, _ in model.named_parameters() if "lora_A" in n]
    assert len(names) == 3 and not any("layers.0.self_attn.q_proj" in n for n in names)


def test_unknown_model_type_asks_for_targets() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(TargetError, match="No default target_modules"):
        get_peft_model(mlp, LoraConfig())
    model = get_peft_model(mlp, LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 4)
    assert model(x).shape == (3, 2)
    assert model.peft_config["default"].auto_mapping == {
        "base_model_class": "Sequential",
        "parent_library": "torch.nn.modules.container",
    }


def test_modules_to_save_that_are_not_there() -> None:
    with pytest.raises(TargetError, match=r"modules_to_save: 'lm_heed'.*Did you mean 'lm_head'"):
        get_peft_model(make("llama"), LoraConfig(modules_to_save=["lm_heed"]))


def test_two_adapters_take_turns() -> None:
    model = get_peft_model(make("bloom"), LoraConfig(task_type=TaskType.CAUSAL_LM, init_lora_weights=False))
    first = model(**batch("bloom")).logits
    model.add_adapter("second", LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, init_lora_weights=False))
    assert torch.equal(model(**batch("bloom")).logits, first)
    model.set_adapter("second")
    assert not torch.equal(model(**batch("bloom")).logits, first)
    assert all("second" in n for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    assert torch.equal(model(**batch("bloom")).logits, first)
    with pytest.raises(ConfigError, match="Did you mean 'second'"):
        model.set_adapter("secnd")


def test_generate() -> None:
    model = get_peft_model(make("llama"), LoraConfig(task_type=TaskType.CAUSAL_LM))
    inputs = batch("llama")
    written = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
    )
    assert written.shape[0] == 3 and 11 < written.shape[1] <= 15


def test_a_second_get_peft_model_is_refused() -> None:
    model = get_peft_model(make("llama"), LoraConfig())
    with pytest.raises(ConfigError, match="has adapters already"):
        PeftModel(model, LoraConfig())
