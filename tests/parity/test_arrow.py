"""Arrow's router of trained LoRA adapters, compared with the live `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from peft.tuners.lora import ArrowConfig as TheirArrowConfig
from tiny import TASK, batch, make

import siliang
from siliang.config import RunConfig
from siliang.methods.arrow import ArrowLinear
from siliang.types import ConfigError, MergeError

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*Could not find a config file.*")
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query", "dense"]}


def adapter(folder: Path, name: str, seed: int, **settings: Any) -> str:
    """The folder of a LoRA adapter."""
    values: dict[str, Any] = {"r": 3, "lora_alpha": 4 + seed, "init_lora_weights": False}
    values |= {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"} | settings
    base = make(name)  # which sets a seed
    torch.manual_seed(seed)
    model = siliang.get_peft_model(base, siliang.LoraConfig(**values))
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data *= 3  # so that it counts which adapter a token has
    model.save_pretrained(folder / str(seed))
    return str(folder / str(seed))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Five trained LoRA adapters by base model, the last two of them general ones."""
    return {name: [adapter(tmp_path_factory.mktemp(name), name, i) for i in range(5)] for name in TARGETS}


def ours(name: str, folders: list[str], general: list[str] | None = None, dtype: Any = None, **settings: Any) -> Any:
    base = make(name).to(dtype) if dtype is not None else make(name)
    config = siliang.ArrowConfig(**({"rng_seed": 4, "use_gks": general is not None} | settings))
    return siliang.create_arrow_model(base, folders, config, general).eval()


def theirs(name: str, folders: list[str], general: list[str] | None = None, dtype: Any = None, **settings: Any) -> Any:
    base: Any = make(name).to(dtype) if dtype is not None else make(name)
    config = TheirArrowConfig(**({"rng_seed": 4, "use_gks": general is not None} | settings))
    return peft.create_arrow_model(base, folders, config, general).eval()


@torch.no_grad()
def logits(model: Any, name: str = "llama") -> torch.Tensor:
    return model(**batch(name)).logits


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", TARGETS)
def test_forward(name: str, top_k: int, general: bool, adapters: dict[str, list[str]]) -> None:
    settings: dict[str, Any] = {"top_k": top_k, "router_temperature": 0.3}
    folders = adapters[name][:3], (adapters[name][3:] if general else None)
    found, wanted = ours(name, *folders, **settings), theirs(name, *folders, **settings)
    assert_close(logits(found, name), logits(wanted, name))
    with found.disable_adapter():
        plain: Any = make(name).eval()
        assert torch.equal(logits(found, name), logits(plain, name))
    assert (logits(found, name) - logits(plain, name)).abs().max() > 0.02


def test_forward_in_bf16(adapters: dict[str, list[str]]) -> None:
    settings: dict[str, Any] = {"top_k": 2, "dtype": torch.bfloat16}
    found, wanted = ours("llama", adapters["llama"][:3], **settings), theirs("llama", adapters["llama"][:3], **settings)
    assert logits(found).dtype == torch.bfloat16
    assert_close(logits(found), logits(wanted))


def test_pefts_random_vectors(adapters: dict[str, list[str]]) -> None:
    found, wanted = (give("llama", adapters["llama"][:3], rng_seed=None) for give in (ours, theirs))
    torch.manual_seed(1)
    there = logits(wanted)
    torch.manual_seed(1)
    assert_close(logits(found), there)


def test_prototypes_are_first_singular_vectors(adapters: dict[str, list[str]]) -> None:
    model = ours("llama", adapters["llama"][:2], top_k=1)
    logits(model)
    for module in (layer for layer in model.injection.adapters["arrow_router"].layers.values()):
        assert isinstance(module, ArrowLinear) and module._routed is not None
        for v, name in zip(module._routed.prototypes, ("task_0", "task_1"), strict=True):
            delta = module.layer.adapters[name].delta_weight()
            assert v.norm() == pytest.approx(1, abs=1e-5)
            assert (delta @ v).norm() > 0.9 * torch.linalg.matrix_norm(delta, 2)


def test_adapters_are_loaded_later_and_trained(adapters: dict[str, list[str]]) -> None:
    """As if they had been there from the beginning. The adapters themselves stay as they are, also with GenKnowSub."""
    folders, general = adapters["llama"][:3], adapters["llama"][3:]
    wanted = logits(ours("llama", folders, general, top_k=2))
    model = ours("llama", folders[:2], general, top_k=2)
    assert not torch.allclose(logits(model), wanted)
    model.load_adapter(folders[2], "later")
    assert_close(logits(model), wanted)
    model.set_adapter("task_0")
    alone: Any = siliang.PeftModel.from_pretrained(make("llama"), folders[0]).eval()
    assert_close(logits(model), logits(alone))
    model.set_adapter("arrow_router")
    before = logits(model)
    with torch.no_grad():
        for layer in model.injection.adapters["task_1"].layers.values():
            layer.A.neg_().roll(1, 0)
            layer.A[:, ::2] = 3.0
    changed = logits(model)
    model.delete_adapter("task_1")
    model.load_adapter(folders[1], "task_1")
    assert_close(logits(model), before)
    assert not torch.allclose(changed, before)


def test_prototypes_are_computed_once(adapters: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    once = ArrowLinear._prototype
    monkeypatch.setattr(ArrowLinear, "_prototype", lambda self, A, B: (calls.append(0), once(self, A, B))[1])
    model = ours("llama", adapters["llama"][:3])
    assert torch.equal(logits(model), logits(model))
    assert len(calls) == 3 * 4  # layers of two blocks


def test_files_both_ways(adapters: dict[str, list[str]], tmp_path: Path) -> None:
    """A router's file opens beside its adapters here; PEFT's, too. The config and the tensors are PEFT's."""
    folders = adapters["llama"][:3]
    found, wanted = ours("llama", folders, top_k=2), theirs("llama", folders, top_k=2)
    found.save_pretrained(tmp_path / "ours")
    wanted.save_pretrained(tmp_path / "theirs")
    here, there = (tmp_path / own / "arrow_router" for own in ("ours", "theirs"))
    read, order = siliang.PeftConfig.from_pretrained(here), {"target_modules": None}  # PEFT's are a set
    assert (
        isinstance(read, siliang.LoraConfig)
        and read.to_dict() | order == siliang.PeftConfig.from_pretrained(there).to_dict() | order
    )
    names = {"task_adapter_names": ["task_0", "task_1", "task_2"], "gks_adapter_names": []}
    assert read.arrow_config == siliang.ArrowConfig(top_k=2, rng_seed=4, **names)
    opened = peft.PeftConfig.from_pretrained(str(here))
    assert isinstance(opened, peft.LoraConfig) and opened.arrow_config is not None and opened.arrow_config.top_k == 2
    keys = [siliang.load_peft_weights(folder) for folder in (here, there)]
    assert {key: t.shape for key, t in keys[0].items()} == {key: t.shape for key, t in keys[1].items()}
    for folder in (here, there):
        model: Any = siliang.PeftModel.from_pretrained(make("llama"), folders[0], "task_0")
        for i in (1, 2):
            model.load_adapter(folders[i], f"task_{i}")
        model.load_adapter(folder, "arrow_router")
        model.set_adapter("arrow_router")
        assert_close(logits(model.eval()), logits(found))
    alone: Any = siliang.PeftModel.from_pretrained(make("llama"), here)
    with pytest.raises(ConfigError, match="has no trained adapters on its layers"):
        logits(alone)


def test_adapters_on_some_layers(tmp_path: Path) -> None:
    """PEFT's router is on all layers of such names, and fails on those without adapters."""
    targets = r"model.layers.1.self_attn.q_proj"
    folders = [adapter(tmp_path, "llama", i, target_modules=targets) for i in range(2)]
    model = ours("llama", folders, top_k=1)
    assert list(model.injection.adapters["arrow_router"].layers) == ["model.layers.1.self_attn.q_proj"]
    logits(model)


def test_nothing_is_trained_or_merged(adapters: dict[str, list[str]]) -> None:
    folders = adapters["llama"][:2]
    model = ours("llama", folders)
    assert model.get_nb_trainable_parameters()[0] == 0
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="Cannot merge an active Arrow router adapter"):
            merge()
    with pytest.raises(MergeError, match="Cannot merge"):
        siliang.convert_to_lora(model, 2, "arrow_router")
    before = {key: t.clone() for key, t in make("llama").state_dict().items()}
    assert all(torch.equal(t, before[key]) for key, t in model.unload().state_dict().items())
    with pytest.raises(ConfigError, match="Arrow mixes trained adapters, and has nothing to train"):
        siliang.get_peft_model(make("llama"), siliang.LoraConfig(arrow_config=siliang.ArrowConfig()))


def test_a_run_refuses_it() -> None:
    values: dict[str, Any] = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}
    values["method"] = {"name": "lora", "arrow_config": {"top_k": 2, "task_adapter_names": ["a"]}}
    with pytest.raises(
        ConfigError, match=r"method.arrow_config cannot be set: Arrow mixes trained adapters, and has nothing to train"
    ):
        RunConfig.build(values)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 4}, ValueError, "rank mismatch: the ranks of adapters 'task_1' and 'task_0' differ"),
        ({"target_modules": ["q_proj"]}, ValueError, "target_modules mismatch"),
        ({"use_dora": True}, ConfigError, "'task_1' has use_dora, and Arrow mixes plain LoRA"),
        ({"init_lora_weights": "pissa"}, ConfigError, "'task_1' has init_lora_weights = 'pissa'"),
        ({"bias": "all"}, ConfigError, "'task_1' has bias"),
        ({"target_modules": ["embed_tokens"]}, TypeError, "must only target Linear-like layers"),
    ],
)
def test_adapters_that_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, adapters: dict[str, list[str]], tmp_path: Path
) -> None:
    base = make("llama")
    with pytest.raises(error, match=message):
        siliang.create_arrow_model(
            base, [adapters["llama"][0], adapter(tmp_path, "llama", 1, **settings)], siliang.ArrowConfig()
        )
    siliang.get_peft_model(base, siliang.LoraConfig())  # nothing was left on it


def test_an_adapter_that_is_no_plain_lora_and_is_loaded_later(adapters: dict[str, list[str]], tmp_path: Path) -> None:
    model = ours("llama", adapters["llama"][:2])
    model.load_adapter(adapter(tmp_path, "llama", 1, use_dora=True), "dora")
    with pytest.raises(ConfigError, match=r"adapter 'dora' is more than that: delete_adapter\('dora'\)"):
        logits(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arrow_config": {"top_k": 0}}, "arrow_config: top_k = 0: must be more than 0"),
        ({"arrow_config": {"router_temperature": 0.0}}, "router_temperature = 0.0: must be more than 0"),
        ({"arrow_config": {}, "init_lora_weights": "eva"}, "nothing of the router is trained"),
        ({"arrow_config": {}, "lora_bias": True}, "nothing of the router is trained"),
        ({"arrow_config": {}, "use_dora": True}, "each is a LoRA of its own"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        siliang.LoraConfig(**settings)


def test_without_adapters(adapters: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="at least one adapter"):
        siliang.create_arrow_model(make("llama"), [], siliang.ArrowConfig())
    with pytest.raises(ValueError, match="use_gks needs general_adapter_paths"):
        siliang.create_arrow_model(make("llama"), adapters["llama"], siliang.ArrowConfig(use_gks=True))
    with pytest.raises(siliang.SiliangError):
        siliang.create_arrow_model(make("llama"), ["nobody/repository/folder"], siliang.ArrowConfig())
    with pytest.raises(ValueError, match="must be a list of at least one adapter"):
        path: Any = adapters["llama"][0]
        siliang.create_arrow_model(make("llama"), path, siliang.ArrowConfig())
    assert TASK["llama"] == "CAUSAL_LM"


def test_general_adapters_without_genknowsub(adapters: dict[str, list[str]]) -> None:
    paths = adapters["llama"]
    with pytest.warns(UserWarning, match=r"no effect without ArrowConfig\(use_gks=True\)"):
        model = siliang.create_arrow_model(make("llama"), paths[:2], siliang.ArrowConfig(), paths[2:] or paths[:1])
    assert not [name for name in model.peft_config if name.startswith("gks")]


def test_what_is_no_model_with_adapters_and_no_config() -> None:
    model: Any = make("llama")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no adapters: get_peft_model"):
        siliang.replace_lora_weights_loftq(model)
    calls: dict[Any, list[Any]] = {
        siliang.preprocess_corda: [],
        siliang.preprocess_loraga: [lambda: None],
        siliang.get_peft_model: [],
    }
    for function, others in calls.items():
        with pytest.raises(ConfigError, match="str is not a method's config of siliang"):
            function(model, "lora", *others)
