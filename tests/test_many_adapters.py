"""Several adapters on one model: none sees another, and the last call decides what computes."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ENCODER, VOCABULARY, Plain, batch, make
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import siliang
from siliang.adapters.injection import Injection
from siliang.adapters.modules_to_save import ModulesToSaveWrapper
from siliang.types import AdapterError, ConfigError, MergeError, TargetError

SIZES: Any = ENCODER | {"initializer_range": 0.2}  # so that attention tells tokens apart
Lora, LN, IA3, BitFit = siliang.LoraConfig, siliang.LNTuningConfig, siliang.IA3Config, siliang.BitFitConfig
IDS = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(4))


def bert(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model: Any = BertForSequenceClassification(BertConfig(**SIZES))
    return model.to(dtype).eval()


def causal(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Any:
    torch.manual_seed(1)
    settings: Any = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    settings |= {"initializer_range": 0.2, "pad_token_id": 0}
    config = LlamaConfig(**settings, num_attention_heads=2, tie_word_embeddings=tied)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


@torch.no_grad()
def shake(model: Any, seed: int = 0, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=generator).to(p)


@torch.no_grad()
def answer(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    return model(input_ids=ids % 64, **more).logits


def near(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> bool:
    """Close within `share` of the spread of the expected values."""
    scale = expected.detach().abs().max().item()
    return found.shape == expected.shape and (found - expected).detach().abs().max().item() <= share * scale


def state(model: Any) -> dict[str, Any]:
    """All that must not change when something is refused."""
    whole: dict[str, Any] = {k: v.clone() for k, v in model.state_dict().items()}
    whole |= {f"{n} trained": p.requires_grad for n, p in model.named_parameters()}
    whole["adapters"] = (list(model.peft_config), model.active_adapters, model.injection.merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole["answer"] = answer(model)
    return whole


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )


def is_base(plain: Any, fresh: Any) -> bool:
    """Bit for bit the same parameters under the same names, of the same classes, with `requires_grad` as before."""
    return (
        same(dict(plain.state_dict()), dict(fresh.state_dict()))
        and [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
        and all(p.requires_grad for p in plain.parameters())
    )


def trained(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# ---- one adapter saves what another tunes within ----

PAIRS: dict[str, tuple[Any, Any]] = {
    "pooler, all-linear": (
        Lora(target_modules=["query"], modules_to_save=["pooler"]),
        Lora(target_modules="all-linear"),
    ),
    "LN within a block": (
        LN(target_modules=["attention.output.LayerNorm"], modules_to_save=["layer.1.output"]),
        LN(target_modules=["LayerNorm"]),
    ),
    "bias=all": (Lora(target_modules=["query"], modules_to_save=["pooler"]), Lora(target_modules=["key"], bias="all")),
    "lora_only": (
        Lora(target_modules=["query"], modules_to_save=["pooler"]),
        Lora(target_modules=["pooler.dense"], bias="lora_only"),
    ),
    "BitFit": (Lora(target_modules=["query"], modules_to_save=["pooler"]), BitFit()),
    "two BitFits": (BitFit(modules_to_save=["pooler"]), BitFit()),
    "a head, BitFit": (Lora(target_modules=["query"], task_type="SEQ_CLS"), BitFit()),  # type: ignore[arg-type]
    "a saved layer, LoRA on it": (
        Lora(target_modules=["query"], modules_to_save=["classifier"]),
        Lora(target_modules=["classifier", "value"]),
    ),
    "saved within saved": (
        Lora(target_modules=["query"], modules_to_save=["pooler.dense"]),
        Lora(target_modules=["query"], modules_to_save=["pooler"]),
    ),
    "DoRA, IA3 elsewhere": (
        Lora(target_modules=["query"], use_dora=True, modules_to_save=["pooler"]),
        IA3(target_modules=["key", "pooler.dense"], feedforward_modules=[]),
    ),
    "bias=all, LN": (Lora(target_modules=["query"], bias="all"), LN(target_modules=["LayerNorm"])),
    "bias=all, other targets": (Lora(target_modules=["query"], bias="all"), Lora(target_modules=["key"], bias="all")),
}


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("pair", PAIRS)
def test_adapters_that_share_modules(pair: str, turned: bool, tmp_path: Path) -> None:
    """Each computes, is saved and merges as if it were alone, in either order; unload is bit for bit."""
    configs = dict(zip(("one", "two"), PAIRS[pair], strict=True))
    alone, keys = {}, {}
    for name, config in configs.items():
        model = siliang.get_peft_model(bert(), config, adapter_name=name)
        shake(model, len(alone))
        alone[name] = answer(model.eval())
        model.save_pretrained(tmp_path / "alone")
        keys[name] = load_file(tmp_path / "alone" / name / "adapter_model.safetensors")
    first, second = ("two", "one") if turned else ("one", "two")
    model = siliang.PeftModel.from_pretrained(bert(), tmp_path / "alone" / first, adapter_name=first)
    model.load_adapter(tmp_path / "alone" / second, second)
    for active in (second, first):
        model.set_adapter(active)
        assert near(answer(model), alone[active], 1e-6)
        model.save_pretrained(tmp_path / active)
        for name in configs:  # whichever is active
            assert same(load_file(tmp_path / active / name / "adapter_model.safetensors"), keys[name])
        with model.disable_adapter():
            assert torch.equal(answer(model), answer(bert()))
    other = copy.deepcopy(model)
    assert near(answer(other.merge_and_unload(adapter_names=[second])), alone[second])
    model.delete_adapter(second)
    assert near(answer(model), alone[first], 1e-6)
    assert is_base(model.unload(), bert())


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_of_adapters_that_share_modules(pair: str) -> None:
    model = siliang.get_peft_model(bert(), PAIRS[pair][0], adapter_name="one")
    model.add_adapter("two", PAIRS[pair][1])
    alone = {"__base__": answer(bert())}
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        shake(model.train(), seed)
        alone[name] = answer(model.eval())
    ids, rows = IDS[[0, 0, 1, 0, 1, 1]], ["two", "one", "__base__", "__base__", "one", "two"]
    expected = torch.stack([alone[n][int(not torch.equal(i, IDS[0]))] for n, i in zip(rows, ids, strict=True)])
    for active in ("one", "two"):
        model.set_adapter(active)
        try:
            found = answer(model, ids, adapter_names=rows)
        except ConfigError as error:
            assert "a batch of their own" in str(error)
            assert "ias" in pair or "itFit" in pair or pair == "lora_only"
        else:
            assert near(found, expected)
        for name, its in alone.items():  # one for all is right for any kind
            assert near(answer(model, adapter_names=[name] * 2), its)
        assert near(answer(model), alone[active], 1e-6)


def test_files_of_peft_with_names_that_other_adapters_made(tmp_path: Path) -> None:
    """With two adapters on a model peft writes "base_layer" into names of biases that are not targets of the one."""
    model: Any = peft.get_peft_model(
        bert(), peft.LoraConfig(target_modules=["query"], bias="all"), adapter_name="one"
    ).eval()
    model.add_adapter("two", peft.LoraConfig(target_modules=["key"]))
    shake(model)
    model.save_pretrained(str(tmp_path))
    assert any("key.base_layer.bias" in key for key in load_file(tmp_path / "one" / "adapter_model.safetensors"))
    ours = siliang.PeftModel.from_pretrained(bert(), tmp_path / "one")
    assert near(answer(ours), answer(model))


# ---- copies and starts are the base's ----

STARTS: dict[str, tuple[Any, Any, bool]] = {
    "BitFit active, saved pooler": (BitFit(), Lora(target_modules=["query"], modules_to_save=["pooler"]), False),
    "LoRA merged, saved pooler": (
        Lora(target_modules=["pooler.dense"]),
        Lora(target_modules=["query"], modules_to_save=["pooler"]),
        True,
    ),
    "bias=all active, bias=all": (
        Lora(target_modules=["query"], bias="all"),
        Lora(target_modules=["query"], bias="all"),
        False,
    ),
    "LoRA merged, DoRA": (Lora(target_modules=["query"]), Lora(target_modules=["query"], use_dora=True), True),
    "LN active, LN": (LN(target_modules=["LayerNorm"]), LN(target_modules=["LayerNorm"]), False),
    "LN merged, LN": (LN(target_modules=["LayerNorm"]), LN(target_modules=["LayerNorm"]), True),
    "LN merged, BitFit": (LN(target_modules=["LayerNorm"]), BitFit(), True),
} | {
    f"LoRA merged, {init}": (
        Lora(target_modules=["query"]),
        Lora(target_modules=["query"], init_lora_weights=init),
        True,
    )
    for init in ("pissa", "olora")
}


@pytest.mark.parametrize("case", STARTS)
def test_a_new_adapter_starts_from_the_base(case: str, tmp_path: Path) -> None:
    first, second, merge = STARTS[case]
    model: Any = siliang.get_peft_model(bert(), first, adapter_name="one")
    shake(model)
    one = answer(model.eval())
    if merge:
        model.merge_adapter()
        with pytest.warns(UserWarning, match="merged adapters"):
            model.add_adapter("two", second)
        assert model.injection.merged == ()
    else:
        model.add_adapter("two", second)
    assert near(answer(model), one, 1e-6)
    model.set_adapter("two")
    assert near(answer(model), answer(bert()), 1e-5)
    fresh = siliang.get_peft_model(bert(), second)
    if second.peft_type != "LORA" or second.init_lora_weights is not True:
        start, expected = siliang.get_peft_model_state_dict(model, adapter_name="two"), fresh.state_dict()
        assert start.keys() == siliang.get_peft_model_state_dict(fresh).keys() and expected
        assert same(start, siliang.get_peft_model_state_dict(fresh))
    model.set_adapter("one")
    assert near(answer(model), one, 1e-6)
    assert is_base(model.unload(), bert())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_two_that_take_out_of_the_weight_add_up(init: str) -> None:
    """Both residuals count: W + (s B A - s B0 A0) of each, as peft computes it."""
    models: dict[Any, Any] = {}
    for library in (siliang, peft):
        config = library.LoraConfig(target_modules=["query"], r=4, init_lora_weights=init)
        models[library] = library.get_peft_model(bert(), config, adapter_name="one").eval()
        models[library].add_adapter("two", library.LoraConfig(target_modules=["query"], r=2))
    models[siliang].set_adapter(["one", "two"])
    models[peft].base_model.set_adapter(["one", "two"])
    shake(models[siliang], size=0.05)
    for name in ("one", "two"):
        tensors = siliang.get_peft_model_state_dict(models[siliang], adapter_name=name)
        peft.set_peft_model_state_dict(models[peft], tensors, adapter_name=name)
    assert near(answer(models[siliang]), answer(models[peft]), 1e-3)
    both = Lora(target_modules=["query"], r=4, init_lora_weights=init)
    model: Any = siliang.get_peft_model(bert(), both, adapter_name="a")
    model.add_adapter("b", both)
    model.set_adapter(["a", "b"])
    assert near(answer(model.eval()), answer(bert()), 1e-5)
    shake(model, size=0.05)
    tuned = answer(model)
    model.merge_adapter()
    assert near(answer(model), tuned)
    model.unmerge_adapter()
    assert torch.equal(answer(model), tuned)


# ---- an inactive adapter trains nothing ----


def test_what_requires_gradients(tmp_path: Path) -> None:
    config = Lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    siliang.get_peft_model(causal(), config).save_pretrained(tmp_path)
    model: Any = siliang.get_peft_model(causal(), config, adapter_name="a")
    before, count = trained(model), model.get_nb_trainable_parameters()[0]
    model.add_adapter("b", config)
    model.load_adapter(tmp_path, "c")
    assert trained(model) == before and model.get_nb_trainable_parameters()[0] == count
    model.load_adapter(tmp_path, "d", is_trainable=True)
    new = trained(model) - before
    assert before < trained(model) and any("modules_to_save.d" in n for n in new) and all(".d." in n for n in new)
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(True)
    model.set_adapter("b")
    assert norm.requires_grad and all(".b." in n or "norm" in n for n in trained(model))
    assert len(trained(model)) == len(before) + 1
    with model.disable_adapter():
        pass
    assert norm.requires_grad and len(trained(model)) == len(before) + 1
    model.set_adapter("c")  # loaded for inference: frozen stays frozen
    assert trained(model) == {"base_model.model.model.norm.weight"}
    model.set_adapter("d", inference_mode=True)
    assert trained(model) == {"base_model.model.model.norm.weight"}


@pytest.mark.parametrize(
    "config", [BitFit(), LN(target_modules=["LayerNorm"]), Lora(target_modules=["query"], bias="all")]
)
def test_a_second_adapter_does_not_count(config: Any) -> None:
    model = siliang.get_peft_model(bert(), config)
    count = model.get_nb_trainable_parameters()[0]
    model.add_adapter("b", config)
    assert model.get_nb_trainable_parameters()[0] == count
    model.set_adapter("b")
    assert model.get_nb_trainable_parameters()[0] == count


def test_a_config_that_was_saved_by_itself_is_trained(tmp_path: Path) -> None:
    Lora(target_modules=["query"]).save_pretrained(tmp_path)
    assert trained(siliang.get_peft_model(bert(), Lora.from_pretrained(tmp_path)))


# ---- rows ----


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_rows_beside_one_that_changes_the_base_weight(init: str) -> None:
    model: Any = siliang.get_peft_model(causal(), Lora(target_modules=["q_proj"], init_lora_weights=init), "p")
    model.add_adapter("l", Lora(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    shake(model, size=0.05)
    alone = {"__base__": answer(causal())}
    for name in ("p", "l"):
        model.set_adapter(name)
        alone[name] = answer(model.eval())
    ids, rows = IDS[[0, 0, 0, 1]], ["l", "__base__", "p", "p"]
    for active in ("p", "l"):
        model.set_adapter(active)
        found = answer(model, ids, adapter_names=rows)
        assert near(found, torch.stack([alone[n][i] for n, i in zip(rows, (0, 0, 0, 1), strict=True)]))
        assert near(answer(model), alone[active], 1e-6)


def test_rows_that_are_no_rows() -> None:
    config = Lora(target_modules=["q_proj"], init_lora_weights=False)
    model: Any = siliang.get_peft_model(causal(), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    before = state(model)
    for names in (["a"], ["a", "b", "a"], ["b"] * 4, []):
        with pytest.raises(ConfigError, match="adapter_names"):
            answer(model, adapter_names=names)
        with pytest.raises(ConfigError, match="adapter_names"):
            model.generate(IDS, adapter_names=names, max_new_tokens=2)
    with pytest.raises(ConfigError, match="must be a list"):
        answer(model, adapter_names="a")
    model.train()
    with pytest.raises(ConfigError, match=r"call eval\(\)"):
        answer(model, adapter_names=["a", "b"])
    model.eval()
    assert same(before, state(model))
    with model.disable_adapter():
        assert torch.equal(answer(model, adapter_names=["a", "b"]), answer(causal()))
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        answer(model, adapter_names=["a", "b"])


def test_rows_do_not_see_the_active_ones_biases() -> None:
    config = Lora(target_modules=["query"], init_lora_weights=False)
    model: Any = siliang.get_peft_model(bert(), BitFit(), adapter_name="bitfit").eval()
    shake(model)
    for name in ("a", "b"):
        model.add_adapter(name, config)
    model.set_adapter("a")
    alone = answer(model)
    model.set_adapter("bitfit")
    found = answer(model, adapter_names=["a", "__base__"])
    assert near(found[:1], alone[:1]) and near(found[1:], answer(bert())[1:])


def test_rows_of_a_layer_whose_input_is_flattened() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            return self.inner(inputs_embeds.flatten(0, 1)).view_as(inputs_embeds)

    torch.manual_seed(0)
    config = Lora(target_modules=["inner"], init_lora_weights=False)
    model: Any = siliang.get_peft_model(Flat(), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    x = torch.randn(2, 3, 4)
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = model(inputs_embeds=x)
    found = model(inputs_embeds=x, adapter_names=["b", "a"])
    assert near(found, torch.stack([alone["b"][0], alone["a"][1]]))
    picked = siliang.get_peft_model(nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4)), Lora(target_modules=["1"])).eval()
    picked.add_adapter("b", Lora(target_modules=["1"]))
    with pytest.raises(ConfigError, match="of which row each place is cannot be known"):
        picked(torch.randn(2, 2, 2, 4), adapter_names=["default", "b"])


# ---- merged ----


@pytest.fixture
def two() -> Iterator[dict[Any, Any]]:
    """The same two adapters in both libraries, "a" active."""
    models: dict[Any, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (siliang, peft):
            config = library.LoraConfig(target_modules=["query"], init_lora_weights=False)
            models[library] = library.get_peft_model(bert(), config, adapter_name="a").eval()
            models[library].add_adapter("b", config)
        for name in ("a", "b"):
            tensors = siliang.get_peft_model_state_dict(models[siliang], adapter_name=name)
            peft.set_peft_model_state_dict(models[peft], tensors, adapter_name=name)
        yield models


OPERATIONS: dict[str, Any] = {
    "set_adapter": lambda m: m.set_adapter("b"),
    "set_adapter, the merged": lambda m: m.set_adapter("a"),
    "add_adapter": lambda m: m.add_adapter("c", copy.deepcopy(m.peft_config["a"])),
    "delete_adapter, another": lambda m: m.delete_adapter("b"),
    "merge_adapter, again": lambda m: m.merge_adapter(),
    "merge_adapter, another": lambda m: m.merge_adapter(["b"]),
    "unmerge_adapter": lambda m: m.unmerge_adapter(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("active", ["a", "b"])
def test_merged_and_then(two: dict[Any, Any], operation: str, active: str) -> None:
    for model in two.values():
        model.set_adapter(active)
        model.merge_adapter(["a"])
    assert near(answer(two[siliang]), answer(two[peft]))  # a layer with merged ones computes with these alone
    for model in two.values():
        OPERATIONS[operation](model)
    assert near(answer(two[siliang]), answer(two[peft]))
    assert two[siliang].active_adapters == two[peft].active_adapters
    assert is_base(two[siliang].unload(), bert())


@pytest.mark.parametrize("names", [None, ["a"], ["b"], ["a", "b"]])
@pytest.mark.parametrize("active", ["a", "b"])
def test_merged_and_then_for_good(two: dict[Any, Any], names: list[str] | None, active: str) -> None:
    answers = {}
    for library, model in two.items():
        model.set_adapter(active)
        model.merge_adapter(["a"])
        answers[library] = answer(model.merge_and_unload(adapter_names=names))
    assert near(answers[siliang], answers[peft])


def test_a_merged_adapter_is_not_deleted(two: dict[Any, Any]) -> None:
    model = two[siliang]
    model.merge_adapter(["a"])
    before = state(model)
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        model.delete_adapter("a")
    assert same(before, state(model))


def test_deleting_the_active_one(two: dict[Any, Any]) -> None:
    for model in two.values():
        model.add_adapter("aa", copy.deepcopy(model.peft_config["a"]))
        model.set_adapter("b")
        model.delete_adapter("b")
        assert (model.active_adapter, model.active_adapters) == ("a", ["a"])
    assert near(answer(two[siliang]), answer(two[peft]))
    ours = two[siliang]
    assert all(".a." in n for n in trained(ours)) and trained(ours)
    with pytest.warns(UserWarning, match="aa is the active one"):
        ours.delete_adapter("a")
    ours.delete_adapter("aa")
    assert ours.active_adapter is None and ours.active_adapters == []
    with pytest.raises(ConfigError, match="No adapter is active"):
        _ = ours.active_peft_config
    with ours.disable_adapter():
        assert ours.active_adapter is None
    assert torch.equal(answer(ours), answer(bert()))


def test_disabled(two: dict[Any, Any]) -> None:
    model = two[siliang]
    merged = answer(model)
    with model.disable_adapter():
        assert model.active_adapter == "a" and model.active_adapters == ["a"]
        with model.disable_adapter():
            pass
        assert torch.equal(answer(model), answer(bert()))
        model.set_adapter("b")
        assert torch.equal(answer(model), answer(bert()))
    assert model.active_adapters == ["b"] and not near(answer(model), merged)
    model.merge_adapter()
    merged = answer(model)
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(bert()))
    assert torch.equal(answer(model), merged)


def test_saving_while_merged(tmp_path: Path) -> None:
    """A bias that is trained and merged into is saved as it was trained."""
    model: Any = siliang.get_peft_model(bert(), BitFit(), adapter_name="bitfit")
    shake(model)
    model.add_adapter("ia3", IA3(target_modules=["query"], feedforward_modules=[], init_ia3_weights=False))
    model.set_adapter(["bitfit", "ia3"])
    before = siliang.get_peft_model_state_dict(model, adapter_name="bitfit")
    tuned = answer(model.eval())
    model.merge_adapter()
    assert same(siliang.get_peft_model_state_dict(model, adapter_name="bitfit"), before)
    assert near(answer(model), tuned)
    merged: Any = copy.deepcopy(model).merge_and_unload()
    assert near(answer(merged), tuned)
    model.unmerge_adapter()
    assert torch.equal(answer(model), tuned)
    assert is_base(model.unload(), bert())


# ---- refused before anything is changed ----

TOGETHER: dict[str, Any] = {
    "heads": Lora(target_modules=["query"], modules_to_save=["classifier"]),
    "norms": LN(target_modules=["LayerNorm"]),
    "biases": Lora(target_modules=["query"], bias="lora_only"),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_adapters_that_cannot_be_active_together(what: str) -> None:
    model: Any = siliang.get_peft_model(bert(), TOGETHER[what], adapter_name="a").eval()
    shake(model)
    model.add_adapter("b", TOGETHER[what])
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ConfigError, match=r"'a' and 'b' cannot be active together|'b' and 'a'"):
        model.set_adapter(["a", "b"])
    assert same(before, state(model))
    with pytest.raises(MergeError, match="cannot be active together"):
        model.merge_adapter(["b"])
    with pytest.raises(MergeError, match="cannot be active together"):
        model.merge_and_unload(adapter_names=["b"])
    assert same(before, state(model))
    with pytest.raises(ConfigError, match="'nobody' is not there"):
        model.set_adapter(["a", "nobody"])
    with pytest.raises(ConfigError, match="named twice"):
        model.set_adapter(["a", "a"])
    assert same(before, state(model))


def test_prompts_are_not_active_together() -> None:
    config = siliang.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    model: Any = siliang.get_peft_model(causal(), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    before = state(model)
    with pytest.raises(ConfigError, match="Only one prompt"):
        model.set_adapter(["a", "b"])
    assert same(before, state(model))
    with pytest.warns(UserWarning, match="b is the active one"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and answer(model).shape[1] == IDS.shape[1] + 3


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Lora(target_modules=["key", "word_embeddings"], lora_bias=True), "embedding"),
        (Lora(target_modules=["key"], modules_to_save=["nothing"]), "matches no module"),
        (siliang.PromptTuningConfig(num_virtual_tokens=3, token_dim=7), "word embeddings have"),
    ],
)
def test_an_adapter_that_cannot_be_added_leaves_nothing(second: Any, message: str) -> None:
    model: Any = siliang.get_peft_model(bert(), Lora(target_modules=["query"], init_lora_weights=False)).eval()
    model.merge_adapter()
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("b", second)
    assert same(before, state(model))
    model.unload()
    with pytest.raises(ConfigError):
        siliang.get_peft_model(model.get_base_model(), Lora(target_modules=["key", "word_embeddings"], lora_bias=True))
    assert is_base(model.get_base_model(), bert())


def test_an_adapter_that_cannot_be_loaded_leaves_nothing(tmp_path: Path) -> None:
    config = Lora(target_modules=["query"], init_lora_weights=False, modules_to_save=["pooler"])
    siliang.get_peft_model(bert(), config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "adapter_model.safetensors")
    model: Any = siliang.get_peft_model(bert(), Lora(target_modules=["pooler.dense"], init_lora_weights=False)).eval()
    model.merge_adapter()
    before = state(model)
    with pytest.raises(AdapterError, match="are missing"):
        model.load_adapter(tmp_path, "b")
    assert same(before, state(model))


def test_one_base_is_held_once() -> None:
    for config in (BitFit(), Lora(target_modules=["query"])):
        base = bert()
        model = siliang.get_peft_model(base, config)
        with pytest.raises(ConfigError, match="has adapters already"):
            siliang.get_peft_model(base, config)
        siliang.get_peft_model(model.unload(), config)


# ---- 16 bits ----

HALF: dict[str, Any] = {
    "a norm": Lora(target_modules=["q_proj"], modules_to_save=["norm"]),
    "the head": Lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "a block": Lora(target_modules=["q_proj"], modules_to_save=["layers.1"]),
    "the embedding": Lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", HALF)
def test_saved_modules_on_a_16_bit_base(what: str, dtype: torch.dtype) -> None:
    model: Any = siliang.get_peft_model(causal(dtype), HALF[what])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.train()(input_ids=IDS % 64, labels=IDS % 64).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    shake(model, size=0.05)
    tuned = answer(model.eval())
    assert tuned.dtype == dtype
    mixed = answer(model, adapter_names=["default", "__base__"], use_cache=False)
    assert near(mixed[:1], tuned[:1], 2e-2)
    merged: Any = model.merge_and_unload(safe_merge=True)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert near(answer(merged), tuned, 5e-2)


@pytest.mark.parametrize("config", [Lora(target_modules=["query"], bias="all", task_type="SEQ_CLS"), BitFit()])  # type: ignore[arg-type]
def test_biases_of_a_16_bit_base_are_trained_in_fp32(config: Any, tmp_path: Path) -> None:
    model: Any = siliang.get_peft_model(bert(torch.bfloat16), config)
    biases = {n: p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert {p.dtype for p in biases.values()} == {torch.float32}
    optimizer = torch.optim.Adam(biases.values(), lr=1e-5)
    before = {n: p.detach().clone() for n, p in biases.items()}
    inputs = {k: v for k, v in batch("bert").items() if k != "labels"}
    for _ in range(3):
        model(**inputs).logits[:, 0].float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [(p - before[n]).abs().max().item() for n, p in biases.items() if "LayerNorm" in n]
    assert min(moved) > 1.5e-5  # in bf16 steps of 1e-5 beside a value of 0.01 round away
    shake(model, size=0.1)
    tuned = answer(model.eval())
    assert tuned.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = siliang.PeftModel.from_pretrained(bert(torch.bfloat16), tmp_path)
    assert near(answer(again), tuned, 1e-6)
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(bert(torch.bfloat16)))
    wide = copy.deepcopy(model).float()
    with wide.disable_adapter():
        assert near(answer(wide), answer(bert(torch.bfloat16).float()), 1e-6)
    merged: Any = copy.deepcopy(model).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and near(answer(merged), tuned, 5e-2)
    assert is_base(model.unload(), bert(torch.bfloat16))


def test_dora_beside_trained_biases_in_16_bits() -> None:
    config = Lora(target_modules=["query"], use_dora=True, bias="lora_only", init_lora_weights=False)
    model = siliang.get_peft_model(bert(torch.bfloat16), config).eval()
    assert answer(model).dtype == torch.bfloat16


# ---- modules ----


def test_a_saved_module_is_called_as_the_model_calls_it() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.b.out_features == 3
            return self.b(input=self.a(x))

    torch.manual_seed(0)
    config = Lora(target_modules=["a"], modules_to_save=["b"])
    model: Any = siliang.get_peft_model(Keywords(), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    with torch.no_grad():
        model.base_model.model.b.modules_to_save["b"].bias.add_(1.0)
    x = torch.randn(4, 8)
    mixed = model(x, adapter_names=["a", "b", "b", "a"])
    torch.testing.assert_close(mixed - model(x), torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None].expand(4, 3))


def test_a_missing_attribute_does_not_recurse(monkeypatch: pytest.MonkeyPatch) -> None:
    made = siliang.PeftModel.__new__(siliang.PeftModel)
    assert not hasattr(made, "anything")
    inner = Injection.__new__(Injection)
    assert not hasattr(inner, "anything")
    saved = ModulesToSaveWrapper.__new__(ModulesToSaveWrapper)
    assert not hasattr(saved, "anything")


def test_a_quantized_module_is_not_copied() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = Plain()
    base.last = bnb.nn.Linear4bit(16, 3)
    base.last.weight = bnb.nn.Params4bit(torch.randn(3, 16), requires_grad=False).to("cpu")
    with pytest.raises(ConfigError, match="last is quantized"):
        siliang.get_peft_model(base, Lora(target_modules=["first"], modules_to_save=["last"]))


@pytest.mark.parametrize("library", [siliang, peft])
def test_padding_has_no_gradient(library: Any) -> None:
    config = library.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = library.get_peft_model(causal(), config)
    ids = (IDS % 64).clone()
    ids[:, :2] = 0
    model(input_ids=ids).logits.sum().backward()
    gradient = next(p.grad for n, p in model.named_parameters() if "lora_embedding_A" in n)
    assert gradient[:, 0].abs().max() == 0 and gradient[:, int(ids[0, 3])].abs().max() > 0


# ---- a larger vocabulary ----


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [70, 60])
def test_resized_embeddings(tied: bool, saved: list[str] | None, size: int, tmp_path: Path) -> None:
    config = Lora(target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    model: Any = siliang.get_peft_model(causal(tied=tied), config)
    shake(model)
    ids = IDS % 60
    before, plain = answer(model.eval(), ids), answer(causal(tied=tied), ids)
    flags = trained(model)
    returned = model.resize_token_embeddings(size, mean_resizing=False)
    assert returned.weight.shape[0] == size == model.config.vocab_size == model.get_base_model().vocab_size
    assert trained(model) == flags
    n = min(size, 64)
    assert near(answer(model, ids)[..., :n], before[..., :n], 1e-6) and answer(model, ids).shape[-1] == size
    with model.disable_adapter():
        assert near(answer(model, ids)[..., :n], plain[..., :n], 1e-6) and answer(model, ids).shape[-1] == size
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    model.save_pretrained(tmp_path)
    base = causal(tied=tied)
    base.resize_token_embeddings(size, mean_resizing=False)
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    assert near(answer(siliang.PeftModel.from_pretrained(base, tmp_path), ids), answer(model, ids), 1e-6)
    merged: Any = copy.deepcopy(model).merge_and_unload()
    assert near(answer(merged, ids), answer(model, ids))
    plain_again: Any = model.unload()
    assert plain_again.config.vocab_size == size
    assert (plain_again.lm_head.weight is plain_again.model.embed_tokens.weight) == tied


def test_embeddings_that_are_tuned_are_not_resized() -> None:
    model: Any = siliang.get_peft_model(causal(), Lora(target_modules=["embed_tokens"])).eval()
    before = state(model)
    with pytest.raises(ConfigError, match="resize the embeddings before"):
        model.resize_token_embeddings(70)
    assert same(before, state(model))
    with pytest.raises(ConfigError, match="no embeddings"):
        siliang.get_peft_model(Plain(), Lora(target_modules=["first"])).resize_token_embeddings(70)


# ---- arguments ----


def test_arguments_of_saving(tmp_path: Path) -> None:
    model: Any = siliang.get_peft_model(causal(), Lora(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    written = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == written
    with torch.no_grad():
        shake(model)
    with pytest.raises(ConfigError, match="siliang writes safetensors only"):
        model.save_pretrained(tmp_path, False)  # as in peft the second is safe_serialization
    model.save_pretrained(tmp_path, True)
    assert near(answer(siliang.PeftModel.from_pretrained(causal(), tmp_path)), answer(model), 1e-6)
    assert near(answer(peft.PeftModel.from_pretrained(causal(), str(tmp_path))), answer(model))
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    with pytest.raises(TypeError, match="max_shard_size"):
        model.save_pretrained(tmp_path, max_shard_size="1GB")
    with pytest.raises(ConfigError, match="'b' is not there"):
        model.save_pretrained(tmp_path / "no", selected_adapters=["default", "b"])
    with pytest.raises(ConfigError, match="must be True, False or 'auto'"):
        model.save_pretrained(tmp_path / "no", save_embedding_layers="yes")
    assert not (tmp_path / "no").exists()
    model.save_pretrained(tmp_path / "all", save_embedding_layers=True)
    keys = load_file(tmp_path / "all" / "adapter_model.safetensors").keys()
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= keys
    assert near(answer(siliang.PeftModel.from_pretrained(causal(), tmp_path / "all")), answer(model), 1e-6)


def test_embeddings_that_the_base_folder_lacks_are_saved(tmp_path: Path) -> None:
    causal().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    base.resize_token_embeddings(70, mean_resizing=False)
    model: Any = siliang.get_peft_model(base, Lora(target_modules=["q_proj"], init_lora_weights=False)).eval()
    for wanted, there in (("auto", True), (False, False)):
        model.save_pretrained(tmp_path, save_embedding_layers=wanted)
        keys = load_file(tmp_path / "adapter_model.safetensors").keys()
        assert any("embed_tokens" in key for key in keys) == there


@pytest.mark.parametrize("config", [BitFit(), Lora(target_modules=["query"], modules_to_save=["pooler"], bias="all")])
def test_a_state_that_was_gathered(config: Any, tmp_path: Path) -> None:
    model: Any = siliang.get_peft_model(bert(), config).eval()
    doubled = {key: 2 * t for key, t in model.state_dict().items()}
    found = siliang.get_peft_model_state_dict(model, doubled, "default")
    live = siliang.get_peft_model_state_dict(model)
    assert found.keys() == live.keys() and all(torch.equal(t, 2 * live[key]) for key, t in found.items())
    model.save_pretrained(tmp_path, state_dict=doubled)
    assert same(load_file(tmp_path / "adapter_model.safetensors"), dict(sorted(found.items())))
    with pytest.raises(AdapterError, match="state_dict lacks"):
        siliang.get_peft_model_state_dict(model, {})
    wrapped = nn.Module()
    wrapped._orig_mod = model  # what torch.compile gives
    assert same(siliang.get_peft_model_state_dict(wrapped, None, "default", True), live)  # type: ignore[arg-type]


def test_a_prompt_from_a_gathered_state() -> None:
    config = siliang.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    model: Any = siliang.get_peft_model(causal(), config).eval()
    other: Any = copy.deepcopy(model)
    shake(other)
    found = siliang.get_peft_model_state_dict(model, other.state_dict())
    assert near(found["prompt_embeddings"], siliang.get_peft_model_state_dict(other)["prompt_embeddings"], 1e-6)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"layer.0.attention.self.query": 2}}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_plain_lora_from_one_that_changed_the_weight(init: str, settings: Any, tmp_path: Path) -> None:
    config = Lora(target_modules=["query"], r=4, init_lora_weights=init, modules_to_save=["pooler"], **settings)
    model: Any = siliang.get_peft_model(bert(), config)
    model.save_pretrained(tmp_path / "start")
    shake(model, size=0.05)
    tuned = answer(model.eval())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    plain: Any = siliang.PeftModel.from_pretrained(bert(), tmp_path / "plain")
    assert plain.peft_config["default"].r == 8 and plain.peft_config["default"].init_lora_weights is True
    assert near(answer(plain), tuned)
    assert near(answer(peft.PeftModel.from_pretrained(bert(), str(tmp_path / "plain"))), tuned)
    ia3 = siliang.get_peft_model(bert(), IA3(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="Only LoRA"):
        ia3.save_pretrained(tmp_path / "no", path_initial_model_for_weight_conversion=tmp_path / "start")


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    siliang.get_peft_model(bert(), Lora(target_modules=["query"])).merge_and_unload()
    assert not capsys.readouterr().err
    siliang.get_peft_model(bert(), Lora(target_modules=["query"])).merge_and_unload(True)
    assert "Unloading and merging model: 100%" in capsys.readouterr().err


def test_biases_that_are_tied_are_one() -> None:
    """BERT's language model names its output bias twice."""
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    base = BertForMaskedLM(BertConfig(**SIZES)).eval()
    model: Any = siliang.get_peft_model(base, Lora(target_modules=["query"], bias="all"))
    shake(model)
    tuned = answer(model.eval())
    tensors = siliang.get_peft_model_state_dict(model)
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(model).unload(), peft.LoraConfig(target_modules=["query"], bias="all")
    )
    their_keys = peft.get_peft_model_state_dict(theirs)
    assert {k for k in their_keys if "decoder" not in k} == {k for k in tensors if "decoder" not in k}
    siliang.set_peft_model_state_dict(model, {**their_keys, **tensors})
    assert near(answer(model), tuned, 1e-6)


def test_parked_parameters_move_with_the_model() -> None:
    model: Any = siliang.get_peft_model(bert(), BitFit(), adapter_name="a")
    model.add_adapter("b", Lora(target_modules=["query"], init_lora_weights="pissa"))
    model.merge_adapter(["b"])
    model.double()
    model.unmerge_adapter()
    for name in ("a", "b"):
        model.set_adapter(name)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {p.dtype for p in model.unload().parameters()} == {torch.float64}


def test_rows_with_beams_of_an_encoder_decoder() -> None:
    """Encoder-decoders: the encoder sees each row once, the decoder each beam."""
    config = Lora(target_modules=["q", "v"], init_lora_weights=False)
    model: Any = siliang.get_peft_model(make("t5"), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    ids = batch("t5")["input_ids"]
    settings: Any = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "min_new_tokens": 4}
    together = model.generate(ids, adapter_names=["a", "__base__", "b"], **settings)
    model.set_adapter("b")
    assert together[2].tolist() == model.generate(ids[2:], **settings)[0].tolist()
    with model.disable_adapter():
        assert together[1].tolist() == model.generate(ids[1:2], **settings)[0].tolist()


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("family", ["llama", "bert", "deberta"])
def test_prompts_pickle(config: str, family: str) -> None:
    task: Any = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    own = siliang.get_peft_model(make(family), getattr(siliang, config)(task_type=task, num_virtual_tokens=3)).eval()
    expected = answer(own)
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(own)), torch.load(file, weights_only=False)):
        assert near(answer(again), expected)
        assert not near(answer(again.unload()), expected)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_prompts_need_word_embeddings(config: str) -> None:
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    with pytest.raises(ConfigError, match="need a transformers model with word embeddings"):
        siliang.get_peft_model(model, getattr(siliang, config)(num_virtual_tokens=3, task_type="SEQ_CLS"))


def test_the_base_model_itself_is_resized() -> None:
    base = causal()
    own = siliang.get_peft_model(base, Lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    shake(own)
    expected = answer(own)
    embeddings: Any = own.get_base_model().resize_token_embeddings(68)  # type: ignore[operator]
    assert len(embeddings.weight) == 68
    assert near(answer(own)[..., :64], expected)
    assert "resize_token_embeddings" not in vars(own.unload())
    tuned: Any = siliang.get_peft_model(causal(), Lora(target_modules=["embed_tokens"])).get_base_model()
    with pytest.raises(ConfigError, match="resize the embeddings before attaching"):
        tuned.resize_token_embeddings(68)


def test_the_base_requires_gradients_as_before() -> None:
    for end in ("unload", "merge_and_unload"):
        base = causal()
        base.model.norm.weight.requires_grad_(False)
        before = {name: p.requires_grad for name, p in base.named_parameters()}
        plain: Any = getattr(siliang.get_peft_model(base, Lora(target_modules=["q_proj", "lm_head"])), end)()
        assert {name: p.requires_grad for name, p in plain.named_parameters()} == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(), r"peft's class: import siliang's: from siliang import LoraConfig\."),
        (peft.TinyLoraConfig(), r"peft's class: siliang does not have that method\."),
        (Lora(target_modules=[]), "target_modules is empty"),
        (Lora(target_modules=""), "target_modules is empty"),
        (
            Lora(target_modules=["q_proj"], modules_to_save=["q_proj"]),
            r"modules_to_save .* holds all that target_modules",
        ),
        (
            Lora(target_modules="all-linear", modules_to_save=["model"]),
            r"modules_to_save \(model\) holds all that target_modules",
        ),
        (
            Lora(target_modules=".*mlp.*"),
            r"is a LlamaMLP, which LORA cannot wrap\. End the pattern with the layers' own",
        ),
        (Lora(target_modules=".*"), r"the whole model is a LlamaForCausalLM, which LORA cannot wrap\. End the pattern"),
    ],
)
def test_errors_of_configs_that_cannot_work(config: Any, message: str) -> None:
    with pytest.raises((ConfigError, TargetError), match=message):
        siliang.get_peft_model(causal(), config)


def test_the_model_has_adapters_of_peft_already() -> None:
    with pytest.raises(ConfigError, match=r"adapters of peft on it: take them off first, with its unload"):
        siliang.get_peft_model(peft.get_peft_model(causal(), peft.LoraConfig(target_modules=["q_proj"])), Lora())
    with pytest.raises(AdapterError, match=r"peft_type 'lora' is not a method of siliang .* Write 'LORA'\."):
        siliang.get_peft_config({"peft_type": "lora"})
