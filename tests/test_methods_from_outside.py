"""Two methods that the project does not have, defined here: the core needs no change for them.

`Shared` has a tensor that its layers share, and a term of the loss. `Ranked` has a hook after each step that switches
ranks off, remembers something between steps, and saves no more than the ranks that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny import batch, make
from torch import Tensor, nn

import siliang
from siliang.config import RunConfig
from siliang.engine.method_hooks import after_step, extra_loss
from siliang.methods import METHODS
from siliang.methods.config import CONFIG_CLASSES, LayerConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.layer import BaseForward, Layer, LayerAdapter
from siliang.methods.method import Adapter, Method, Parts, SharedSpec
from siliang.methods.targets import DefaultTargets, queries_and_values
from siliang.models.introspect import features, is_linear
from siliang.train.checks import check_prefix, check_terms
from siliang.train.run import train
from siliang.types import AdapterError, ConfigError

CAUSAL: Any = "CAUSAL_LM"
TARGETS = ["q_proj", "v_proj"]


# ---- y = W x + B (d * A x), with A shared by all layers, and a loss that keeps A small ----


@dataclass(kw_only=True)
class SharedConfig(LayerConfig):
    r: int = 3
    decay: float = 0.5

    peft_type: ClassVar[str] = "SHARED"
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)


class Shared(Method[SharedConfig]):
    name = "shared"
    config = SharedConfig
    learning_rate = 1e-2
    learning_rate_source = "a test"
    trains = "one matrix for all layers"
    default_targets = DefaultTargets(queries_and_values)

    def attach(self, model: nn.Module, config: SharedConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        layers = find_targets(model, config, is_linear, defaults=self.default_targets, outside=saved, lenient=from_file)
        widths = {features(model.get_submodule(path))[0] for path in layers}
        if len(widths) > 1:
            raise ConfigError("the layers of Shared must read the same width")
        shape = (config.r, widths.pop())
        shared = {"shared_A": SharedSpec(shape, lambda device: torch.randn(shape, device=device) / 4)}
        return Parts(layers={path: partial(SharedLayer.make, config.r) for path in layers}, shared=shared)

    def extra_loss(self, adapter: Adapter[SharedConfig]) -> Tensor:
        return adapter.config.decay * adapter.shared["shared_A"].square().sum()


class SharedLayer(LayerAdapter):
    def __init__(self, layer: Layer, name: str, parts: Any, shared: Mapping[str, Tensor]) -> None:
        super().__init__(layer, name, parts)
        self._shared = shared

    @staticmethod
    def make(r: int, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
        out_features = features(layer.base_layer)[1]
        parts = {
            "shared_d": nn.Parameter(torch.ones(r)),
            "shared_B": nn.Parameter(torch.zeros(out_features, r)),
        }
        return SharedLayer(layer, name, parts, shared)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        return base_forward(x) + x @ self._delta().T

    def merged(self) -> dict[str, Tensor]:
        return {"weight": self.layer.base_layer.weight + self._delta()}

    def _delta(self) -> Tensor:
        return (self.part("shared_B") * self.part("shared_d")) @ self._shared["shared_A"]


# ---- y = W x + B (e * A x), with ranks that are switched off while it is trained ----


@dataclass(kw_only=True)
class RankedConfig(LayerConfig):
    r: int = 4
    target_r: int = 1
    at_step: int = 2
    ranks: dict[str, int] = field(default_factory=dict)

    peft_type: ClassVar[str] = "RANKED"


class Ranked(Method[RankedConfig]):
    name = "ranked"
    config = RankedConfig
    learning_rate = 1e-2
    learning_rate_source = "a test"
    trains = "as many ranks as are worth it"

    def attach(self, model: nn.Module, config: RankedConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        layers = find_targets(model, config, is_linear, defaults=DefaultTargets(), outside=saved, lenient=from_file)
        return Parts(layers={path: partial(ranked, config.ranks.get(path, config.r)) for path in layers})

    def after_step(self, adapter: Adapter[RankedConfig], step: int) -> None:
        with torch.no_grad():
            for path, layer in adapter.layers.items():
                e = layer.part("ranked_e")
                assert e.grad is not None  # the hook runs before the gradients are set to zero
                worth = adapter.state.get(path, torch.zeros_like(e))
                adapter.state[path] = 0.5 * worth + (e * e.grad).abs()
                if step >= adapter.config.at_step:
                    least = adapter.state[path].argsort()[: len(e) - adapter.config.target_r]
                    e[least] = 0.0
                    adapter.config.ranks[path] = int(e.count_nonzero())

    def to_file(self, config: RankedConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not config.ranks:
            return tensors
        on = {key.removesuffix("ranked_e"): t != 0 for key, t in tensors.items() if key.endswith("ranked_e")}
        found = {}
        for key, tensor in tensors.items():
            kept = next((mask for prefix, mask in on.items() if key.startswith(prefix)), None)
            found[key] = tensor if kept is None else tensor[:, kept] if key.endswith("ranked_B") else tensor[kept]
        return found


def ranked(r: int, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
    in_features, out_features = features(layer.base_layer)
    shapes = {"ranked_A": (r, in_features), "ranked_e": (r,), "ranked_B": (out_features, r)}
    return RankedLayer(layer, name, {key: nn.Parameter(torch.randn(shape) / 8) for key, shape in shapes.items()})


class RankedLayer(LayerAdapter):
    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        return base_forward(x) + (x @ self.part("ranked_A").T * self.part("ranked_e")) @ self.part("ranked_B").T

    def merged(self) -> dict[str, Tensor]:
        delta = (self.part("ranked_B") * self.part("ranked_e")) @ self.part("ranked_A")
        return {"weight": self.layer.base_layer.weight + delta}


# ---- both ----


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (Shared(), Ranked()):
        monkeypatch.setitem(METHODS, method.name, method)
        monkeypatch.setitem(CONFIG_CLASSES, method.config.peft_type, method.config)


def tune(model: Any, steps: int, first: int = 1) -> list[float]:
    """Trains as a loop does: the terms of the loss once a step, the hooks before the gradients are zeroed."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(first, first + steps):
        loss = model(**batch("llama")).loss
        term = extra_loss(model)
        (loss if term is None else loss + term).backward()
        optimizer.step()
        after_step(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: Any) -> Tensor:
    return model(**{k: v for k, v in batch("llama").items() if k != "labels"}).logits.detach()


CONFIGS = {
    "shared": SharedConfig(task_type=CAUSAL),
    "ranked": RankedConfig(task_type=CAUSAL, target_modules=TARGETS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_saved_loaded_merged(name: str, tmp_path: Path) -> None:
    model: Any = siliang.get_peft_model(make("llama"), CONFIGS[name])
    plain = logits(make("llama").eval())
    losses = tune(model, 4)
    assert losses[-1] < losses[0]
    tuned = logits(model.eval())
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path)
    loaded: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path)
    torch.testing.assert_close(logits(loaded), tuned)
    again = siliang.get_peft_model_state_dict(loaded)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held.keys() == again.keys() and all(torch.equal(held[key], t) for key, t in again.items())
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded), tuned)
    loaded.unmerge_adapter()
    torch.testing.assert_close(logits(loaded), tuned)
    assert torch.equal(logits(loaded.unload()), plain)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged.eval()), tuned)


def test_a_shared_tensor_is_one_parameter_and_one_tensor_of_the_file(tmp_path: Path) -> None:
    model: Any = siliang.get_peft_model(make("llama"), CONFIGS["shared"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names.count("base_model.shared_A.default") == 1
    layers = len(model.injection.adapters["default"].layers)
    assert layers > 2 and len(names) == 1 + 2 * layers
    model.double()
    before = logits(model)
    model.injection.shared_A["default"].data.mul_(2)
    model.injection.adapters["default"].tensors()["base_model.shared_A"].data.mul_(0.5)
    assert torch.equal(logits(model), before)
    model.add_adapter("b", SharedConfig(task_type=CAUSAL, r=2))
    model.set_adapter(["default", "b"])
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "b" / "adapter_model.safetensors")["base_model.shared_A"].shape[0] == 2
    model.set_adapter("default")
    model.delete_adapter("b")
    assert list(model.injection.shared_A) == ["default"]
    model.unload()
    assert not any("shared" in name for name, _ in model.named_modules())


def test_a_term_of_the_loss_is_the_trained_adapters(tmp_path: Path) -> None:
    model: Any = siliang.get_peft_model(make("llama"), SharedConfig(task_type=CAUSAL, decay=0.5))
    A = model.injection.shared_A["default"]
    term = extra_loss(model)
    assert term is not None and torch.equal(term, 0.5 * A.square().sum())
    assert torch.equal(torch.autograd.grad(term, A)[0], A.detach())
    wrapped = nn.Module()
    wrapped.module = model  # as DistributedDataParallel has it
    assert extra_loss(wrapped) is not None
    model.save_pretrained(tmp_path)
    assert extra_loss(siliang.PeftModel.from_pretrained(make("llama"), tmp_path)) is None
    for config in (siliang.LoraConfig(), siliang.PromptTuningConfig(num_virtual_tokens=2)):
        assert extra_loss(siliang.get_peft_model(make("llama"), config)) is None
    assert extra_loss(make("llama")) is None
    after_step(make("llama"), 1)


def test_a_term_of_the_loss_is_refused_where_its_backward_would_be_wrong() -> None:
    shared, ranked, lora = SharedConfig(), RankedConfig(), siliang.LoraConfig()
    assert Shared().adds_to_the_loss(shared) and not Ranked().adds_to_the_loss(ranked)
    assert not METHODS["lora"].adds_to_the_loss(lora)
    assert METHODS["lora"].adds_to_the_loss(siliang.LoraConfig(kasa_config=siliang.KasaConfig()))
    check_terms(Ranked(), ranked, sharded=True)
    check_terms(Shared(), shared, sharded=False)
    check_terms(METHODS["full"], None, sharded=True)
    check_prefix(siliang.PrefixTuningConfig(), 2)
    check_prefix(siliang.LoraConfig(), 3)
    check_prefix(None, 3)
    with pytest.raises(ConfigError, match="prefix tuning does not work with ZeRO-3"):
        check_prefix(siliang.PrefixTuningConfig(), 3)
    with pytest.raises(ConfigError, match=r"shared adds a term to the loss.*strategy=ddp"):
        check_terms(Shared(), shared, sharded=True)


def test_ranks_change_while_it_is_trained(tmp_path: Path) -> None:
    model: Any = siliang.get_peft_model(
        make("llama"), RankedConfig(task_type=CAUSAL, target_modules=TARGETS, at_step=3)
    )
    tune(model, 2)
    config = model.peft_config["default"]
    assert config.ranks == {}
    model.save_pretrained(tmp_path / "checkpoint")
    resumed: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "checkpoint", is_trainable=True)
    for one in (model, resumed):  # what the method remembers is there again
        tune(one, 1, first=3)
    assert config.ranks and set(config.ranks.values()) == {1}
    assert torch.equal(logits(model.eval()), logits(resumed.eval()))
    model.save_pretrained(tmp_path / "end")
    tensors = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if key.endswith(("_A", "_e"))} == {1}
    torch.testing.assert_close(
        logits(siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "end")), logits(model)
    )


def test_a_file_that_asks_for_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    siliang.get_peft_model(make("llama"), CONFIGS["shared"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 3', '"r": 40000000'))
    with pytest.raises(AdapterError, match="the largest tensor of the file has"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


def settings(method: dict[str, Any], model: Path, data: Path, output: Path) -> RunConfig:
    return RunConfig.build(
        {
            "model": str(model),
            "task": "causal_lm",
            "method": method,
            "data": {"train": str(data), "test_size": 0.0, "max_length": 64},
            "train": {
                "max_steps": 4,
                "batch_size": 4,
                "gradient_accumulation": 2,
                "save_every": 3,
                "warmup_fraction": 0,
            },
            "output": str(output),
        }
    )


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("method", [{"name": "shared", "decay": 40.0}, {"name": "ranked", "target_modules": TARGETS}])
def test_a_run_asks_for_them(
    method: dict[str, Any], model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    """A whole run, from settings to adapter: check, plan and loop know the methods from the table."""
    record = train(settings(method, model_folders["llama"], instruction_file, tmp_path / "run"))
    assert record.status == "completed" and record.learning_rate == 1e-2
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    if method["name"] == "ranked":
        assert {t.shape[0] for key, t in tensors.items() if key.endswith("ranked_A")} == {1}
    else:
        train(settings(method | {"decay": 0.0}, model_folders["llama"], instruction_file, tmp_path / "without"))
        without = load_file(tmp_path / "without" / "adapter" / "adapter_model.safetensors")
        assert tensors["base_model.shared_A"].norm() < 0.95 * without["base_model.shared_A"].norm()
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir())
    assert (checkpoint / "siliang_training.safetensors").is_file() == (method["name"] == "ranked")


def test_beside_methods_of_the_project_on_one_layer() -> None:
    model: Any = siliang.get_peft_model(make("llama"), CONFIGS["ranked"])
    model.add_adapter("lora", siliang.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    model.add_adapter("shared", CONFIGS["shared"])
    model.set_adapter(["default", "lora", "shared"])
    tune(model, 2)
    tuned = logits(model.eval())
    torch.testing.assert_close(logits(model.merge_and_unload().eval()), tuned)
