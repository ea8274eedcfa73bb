"""What a method can tune other than linear layers: rows of an embedding table, also of a tied one; and by methods that
the project does not have: parameters computed from others; experts' weights, which are not modules; a prompt
whose method keeps something between steps.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch, make
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import siliang
from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.adapters.files import TRAINING_NAME, load_tensors
from siliang.adapters.training_state import TrainingState
from siliang.config import RunConfig
from siliang.engine.method_hooks import after_step
from siliang.methods import METHODS
from siliang.methods.computed import ComputedParameters
from siliang.methods.config import CONFIG_CLASSES, LayerConfig, PeftConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.layer import Layer, LayerAdapter
from siliang.methods.method import Adapter, Method, Parts
from siliang.methods.p_tuning import PromptEncoderConfig, PTuning
from siliang.methods.targets import DefaultTargets
from siliang.methods.trainable_tokens import TrainableTokensConfig
from siliang.models.introspect import features, is_linear
from siliang.ops.masked_ce import masked_cross_entropy
from siliang.train.run import train
from siliang.types import AdapterError, ConfigError
from siliang.weight_files import read_adapter

CAUSAL: Any = "CAUSAL_LM"


# ---- W' = diag(d) W, computed ----


@dataclass(kw_only=True)
class ScaledConfig(LayerConfig):
    peft_type: ClassVar[str] = "SCALED"


class Scaled(Method[ScaledConfig]):
    name = "scaled"
    config = ScaledConfig
    learning_rate = 1e-2
    learning_rate_source = "a test"
    trains = "a factor for each output"

    def attach(self, model: nn.Module, config: ScaledConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        layers = find_targets(model, config, is_linear, defaults=DefaultTargets(), outside=saved, lenient=from_file)
        return Parts(layers=dict.fromkeys(layers, scaled))


def scaled(layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
    return ScaledLayer(layer, name, {"scaled_d": nn.Parameter(torch.rand(features(layer.base_layer)[1]) + 0.5)})


class ScaledLayer(ComputedParameters):
    def functions(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {"weight": lambda W_OI: self.part("scaled_d")[:, None] * W_OI}


# ---- W' = W + B A for each expert, where the weights of all experts are one tensor (E, O, I) ----


@dataclass(kw_only=True)
class ExpertsConfig(PeftConfig):
    r: int = 2
    target_parameters: list[str] = field(default_factory=lambda: ["gate_up_proj", "down_proj"])

    peft_type: ClassVar[str] = "EXPERTS"


class Experts(Method[ExpertsConfig]):
    name = "experts"
    config = ExpertsConfig
    learning_rate = 1e-2
    learning_rate_source = "a test"
    trains = "experts' weights"

    def attach(self, model: nn.Module, config: ExpertsConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        wanted = config.target_parameters
        paths = [path for path, module in model.named_modules() if set(wanted) <= module._parameters.keys()]
        return Parts(layers={path: partial(experts, config.r, wanted) for path in paths})


def experts(r: int, wanted: list[str], layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
    parts = {}
    for key in wanted:
        E, O, I = layer.base_layer.get_parameter(key).shape  # noqa: E741, the equation's letters
        parts[f"{key}_A"] = nn.Parameter(torch.randn(E, r, I) / 8)
        parts[f"{key}_B"] = nn.Parameter(torch.randn(E, O, r) / 8)
    return ExpertsLayer(layer, name, parts, wanted)


class ExpertsLayer(ComputedParameters):
    def __init__(self, layer: Layer, name: str, parts: Mapping[str, nn.Parameter], wanted: list[str]) -> None:
        super().__init__(layer, name, parts)
        self._wanted = wanted

    def functions(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {key: partial(self._tuned, key) for key in self._wanted}

    def _tuned(self, key: str, W_EOI: Tensor) -> Tensor:
        return W_EOI + self.part(f"{key}_B") @ self.part(f"{key}_A")


# ---- all of them ----


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (Scaled(), Experts(), Pulled()):
        monkeypatch.setitem(METHODS, method.name, method)
        monkeypatch.setitem(CONFIG_CLASSES, method.config.peft_type, method.config)


def mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=batch("llama")["input_ids"].max().item() + 8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config).eval()


def model_of(name: str) -> Any:
    return mixtral() if name == "mixtral" else make(name)


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    return model(**batch("t5" if name == "t5" else "llama")).logits


def trained(model: Any, name: str, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        loss = model(**batch("t5" if name == "t5" else "llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ROWS = [*dict.fromkeys([3, *batch("llama")["input_ids"][0].tolist(), *batch("t5")["input_ids"][0].tolist()])][:6]
CASES: dict[str, tuple[str, PeftConfig]] = {
    "rows": ("llama", TrainableTokensConfig(task_type=CAUSAL, token_indices=ROWS)),
    "rows of a tied table": ("gpt2", TrainableTokensConfig(task_type=CAUSAL, token_indices=ROWS)),
    "rows of T5": ("t5", TrainableTokensConfig(task_type="SEQ_2_SEQ_LM", token_indices=ROWS)),
    "computed": ("llama", ScaledConfig(task_type=CAUSAL, target_modules=["q_proj", "down_proj"])),
    "computed, transposed": ("gpt2", ScaledConfig(task_type=CAUSAL, target_modules=["c_attn"])),
    "experts": ("mixtral", ExpertsConfig(task_type=CAUSAL)),
}


@pytest.mark.parametrize("case", CASES)
def test_trained_saved_loaded_merged(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    plain = logits(model_of(name), name)
    model: Any = siliang.get_peft_model(model_of(name), config)
    losses = trained(model, name)
    assert losses[-1] < losses[0]
    tuned = logits(model.eval(), name)
    assert not torch.allclose(tuned, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), plain)
    pickle.loads(pickle.dumps(model.injection.adapters["default"].parts))
    model.save_pretrained(tmp_path)
    loaded: Any = siliang.PeftModel.from_pretrained(model_of(name), tmp_path)
    torch.testing.assert_close(logits(loaded, name), tuned)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, name), tuned, rtol=1e-4, atol=1e-5)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded.unload(), name), plain)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged.eval(), name), tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["rows", "rows of a tied table", "experts", "computed"])
def test_batches_that_mix_adapters(case: str) -> None:
    name, config = CASES[case]
    model: Any = siliang.get_peft_model(model_of(name), config).eval()
    for p in model.injection.adapters["default"].parameters():
        p.data.add_(0.1)
    whole = logits(model, name)
    with model.disable_adapter():
        plain = logits(model, name)
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    mixed = model(**inputs, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([whole[0], plain[1], whole[2]]))


def test_rows_of_a_tied_table_are_one_parameter_and_stay_tied() -> None:
    base: Any = make("gpt2")
    model: Any = siliang.get_peft_model(base, TrainableTokensConfig(task_type=CAUSAL, token_indices=ROWS))
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 1
    (P,) = model.injection.adapters["default"].parameters()
    assert P.shape == (len(ROWS), base.config.hidden_size)
    # the loss on labelled rows takes the head's own parameters into account
    hidden = torch.randn(6, base.config.hidden_size)
    labels = torch.tensor([*ROWS[:4], 1, 2])
    loss = masked_cross_entropy(hidden, base.lm_head, labels)
    (found,) = torch.autograd.grad(loss, P)
    (wanted,) = torch.autograd.grad(masked_cross_entropy(hidden, base.lm_head, labels, impl="reference"), P)
    torch.testing.assert_close(found, wanted)
    trained(model, "gpt2")
    merged: Any = model.merge_and_unload()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.config.tie_word_embeddings


def test_rows_beside_lora_and_other_rows() -> None:
    model: Any = siliang.get_peft_model(make("gpt2"), TrainableTokensConfig(task_type=CAUSAL, token_indices=[3, 4]))
    model.add_adapter("others", TrainableTokensConfig(task_type=CAUSAL, token_indices=[5]))
    model.add_adapter("lora", siliang.LoraConfig(target_modules=["c_attn", "wte"], init_lora_weights=False))
    model.add_adapter("same", TrainableTokensConfig(task_type=CAUSAL, token_indices=[9, 4]))
    model.set_adapter(["lora", "default", "others"])
    trained(model, "gpt2")
    tuned = logits(model.eval(), "gpt2")
    with pytest.raises(ConfigError, match=r"'default' and 'same' cannot be active together: each has a row 4 of"):
        model.set_adapter(["default", "same"])
    torch.testing.assert_close(logits(model.merge_and_unload().eval(), "gpt2"), tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "token_indices is empty"),
        ([3, 3], "each named once"),
        ([10**6], "has no row 1000000"),
        ([-1], "has no row -1"),
    ],
)
def test_rows_that_are_not_there(tokens: list[int], message: str) -> None:
    base = make("llama")
    with pytest.raises(ConfigError, match=message):
        siliang.get_peft_model(base, TrainableTokensConfig(task_type=CAUSAL, token_indices=tokens))
    assert not any("trainable" in key for key, _ in base.named_parameters())


def test_a_file_of_fewer_rows_is_refused(tmp_path: Path) -> None:
    config = TrainableTokensConfig(task_type=CAUSAL, token_indices=[3, 4])
    siliang.get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("4\n", "4,\n5\n"))
    with pytest.raises(AdapterError, match=r"has shape \(2, .*the model needs \(3,"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path)


def test_a_computed_weight_beside_another_adapter_is_refused() -> None:
    config = CASES["computed"][1]
    model: Any = siliang.get_peft_model(make("llama"), config)
    model.add_adapter("lora", siliang.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="cannot be active together"):
        model.set_adapter(["lora", "default"])


def test_a_computed_weight_on_a_quantized_layer() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4").to("cpu")
    layer = AdaptedLayer(base)
    adapter = scaled(layer, "a", {})
    layer.add_adapter(adapter)
    layer.activate(("a",), disabled=False)
    x = torch.randn(3, 64)
    expected = (base(x) - base.bias) * adapter.part("scaled_d") + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


# ---- a prompt through an encoder, which is pulled towards where it has been ----


@dataclass(kw_only=True)
class PulledConfig(siliang.PromptEncoderConfig):
    peft_type: ClassVar[str] = "PULLED"


class Pulled(PTuning):
    """The method keeps a moving average of E between steps, under the name that E has in the prompt."""

    name = "pulled"
    config = PulledConfig

    @torch.no_grad()
    def after_step(self, adapter: Adapter[PromptEncoderConfig], step: int) -> None:
        assert adapter.prompt is not None
        E = adapter.prompt.embedding.weight
        mean = adapter.state.get("embedding.weight", torch.zeros_like(E)).lerp(E, 0.5)
        adapter.state["embedding.weight"] = mean
        E.lerp_(mean, 0.3)


def pulled(model: Any, first: int, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(first, first + steps):
        model(**batch("llama")).loss.backward()
        optimizer.step()
        after_step(model, step)
        optimizer.zero_grad()


@pytest.mark.parametrize("flat", [False, True])
def test_a_prompt_and_a_state_are_resumed(flat: bool, tmp_path: Path) -> None:
    """To the same bits, also where PEFT's file gave the prompt alone."""
    model: Any = siliang.get_peft_model(make("llama"), PulledConfig(task_type=CAUSAL, num_virtual_tokens=4))
    if flat:
        model.save_pretrained(tmp_path / "plain")
        (tmp_path / "plain" / TRAINING_NAME).unlink()
        model = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "plain", is_trainable=True)
    pulled(model, 1, 2)
    model.save_pretrained(tmp_path / "part")
    again: Any = siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "part", is_trainable=True)
    for one in (model, again):
        pulled(one, 3, 2)
    ours, theirs = (one.injection.adapters["default"].training_state() for one in (model, again))
    assert ours.state.keys() == theirs.state.keys() == {"embedding.weight"}
    assert ours.prompt.keys() == theirs.prompt.keys() and bool(ours.prompt) is not flat
    for own, other in ((ours.state, theirs.state), (ours.prompt, theirs.prompt)):
        assert all(torch.equal(own[key], other[key]) for key in own)
    assert torch.equal(logits(model.eval(), "llama"), logits(again.eval(), "llama"))
    load_tensors(  # as a checkpoint is: what it does not have is forgotten
        again.injection, "default", read_adapter(tmp_path / "part"), source="", training=TrainingState()
    )
    assert not again.injection.adapters["default"].state


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_run_with_a_prompt_and_a_state_is_resumed(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    def run(name: str, steps: int, *, resume: bool = False) -> dict[str, Tensor]:
        train(
            RunConfig.build(
                {
                    "model": str(model_folders["llama"]),
                    "task": "causal_lm",
                    "method": {"name": "pulled", "num_virtual_tokens": 4},
                    "data": {"train": str(instruction_file), "test_size": 0.0, "max_length": 64},
                    "train": {
                        "max_steps": steps,
                        "batch_size": 4,
                        "save_every": 2,
                        "warmup_fraction": 0,
                        "schedule": "constant",
                    },
                    "output": str(tmp_path / name),
                }
            ),
            resume=resume,
        )
        folder = tmp_path / name / "adapter"
        return load_file(folder / "adapter_model.safetensors") | load_file(folder / TRAINING_NAME)

    whole = run("whole", 4)
    run("part", 2)
    ended = run("part", 4, resume=True)
    assert whole.keys() == ended.keys() and all(torch.equal(whole[key], ended[key]) for key in whole)


@pytest.mark.parametrize("method", ["pulled", "scaled"])
def test_a_training_file_with_unknown_keys_is_refused(method: str, tmp_path: Path) -> None:
    config = PulledConfig(task_type=CAUSAL, num_virtual_tokens=4) if method == "pulled" else CASES["computed"][1]
    model: Any = siliang.get_peft_model(make("llama"), config)
    model.save_pretrained(tmp_path)
    path = tmp_path / TRAINING_NAME
    held = load_file(path) if path.is_file() else {}
    save_file({**held, "stray": torch.zeros(2)}, path)
    with pytest.raises(AdapterError, match=r"siliang_training\.safetensors does not fit: .* has no place for stray"):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    if method == "pulled":
        held.pop("mlp_head.0.bias")
        save_file({**held, "embedding.weight": torch.zeros(4, 64)}, path)
        with pytest.raises(AdapterError, match=r"does not fit: mlp_head\.0\.bias, which makes the prompt, is missing"):
            siliang.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
