"""Names, arguments, return values and kinds of errors that scripts for PEFT use, most beside the live `peft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import make
from torch import nn
from transformers import BertConfig, BertModel, MambaConfig, MambaForCausalLM

import siliang
from siliang.types import ConfigError, KindError, TargetError

BOTH = (siliang, peft)


class Net(nn.Module):
    """Two linear layers and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin0, self.lin1 = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(self.emb(ids)))


def test_the_names_of_what_is_tuned() -> None:
    found = []
    for library in BOTH:
        model = library.get_peft_model(Net(), library.LoraConfig(target_modules=["lin1"]))
        model.add_adapter("other", library.LoraConfig(target_modules=["lin0", "lin1"]))
        beside = library.LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": [1, 2]})
        rows = library.TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 2])
        of_parameters = library.LoraConfig(target_modules=["lin1"], target_parameters=["lin0.weight"])
        others = [library.get_peft_model(Net(), config) for config in (beside, rows, of_parameters)]
        found.append([(one.targeted_module_names, one.targeted_parameter_names) for one in (model, *others)])
    assert found[0] == found[1]


def test_the_kinds_of_layers_in_their_status() -> None:
    # of some methods, such as IA3, PEFT gives the kind without the method
    found = []
    for library in BOTH:
        configs = [
            library.LoraConfig(target_modules=["lin0", "emb"]),
            library.LoraConfig(target_modules=["lin1"], target_parameters=["lin0.weight"]),
            library.LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": [1]}, modules_to_save=["lin1"]),
            library.VeraConfig(target_modules=["lin0"]),
            library.TrainableTokensConfig(target_modules=["emb"], token_indices=[1]),
        ]
        layers = [library.get_peft_model(Net(), config).get_layer_status() for config in configs]
        found.append([[(one.name, one.module_type) for one in of_one] for of_one in layers])
    assert found[0] == found[1]
    model: Any = siliang.get_peft_model(Net(), siliang.LoraConfig(target_modules=["lin0"]))
    assert model.get_model_status() == siliang.get_model_status(model)
    inside = siliang.get_layer_status(model.get_base_model())  # as transformers holds it, without a PeftModel
    assert [one.module_type for one in inside] == ["lora.Linear"]


def test_no_status_of_prompts() -> None:
    for library in BOTH:
        model = library.get_peft_model(
            make("llama"),
            library.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
            if (library is peft)
            else library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )
        with pytest.raises(TypeError):
            library.get_layer_status(model)


def test_rows_of_a_table_under_their_name() -> None:
    config = siliang.LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": [1, 2]})
    model: Any = siliang.get_peft_model(Net(), config)
    rows = model.base_model.model.emb.token_adapter
    assert rows.token_indices == {"default": [1, 2]} and rows.trainable_tokens_delta["default"].shape == (2, 8)
    assert not hasattr(model.base_model.model.lin0, "token_adapter")


def test_the_parts_of_a_layer_are_a_mapping() -> None:
    found = []
    for library in BOTH:
        model = library.get_peft_model(Net(), library.LoraConfig(target_modules=["lin0"]))
        parts = model.base_model.model.lin0.lora_A
        found.append((list(parts.keys()), [type(part) for part in parts.values()], len(list(parts.items()))))
    assert found[0] == found[1]


# ---- as LoRA ----


def test_what_can_become_lora() -> None:
    for library in BOTH:
        lokr = library.get_peft_model(Net(), library.LoKrConfig(target_modules=["lin0"]))
        assert lokr.supports_lora_conversion()
        prompt = library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        assert not library.get_peft_model(make("llama"), prompt).supports_lora_conversion()
        with pytest.raises(TypeError):
            library.convert_to_lora(Net(), rank=2)


@pytest.mark.parametrize("rank", [4, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_lora_config_and_tensors(rank: float, dtype: torch.dtype) -> None:
    found = []
    for library in BOTH:
        torch.manual_seed(0)
        config = library.LoKrConfig(target_modules=["lin0", "lin1"], r=4, init_weights=False)
        model = library.get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=False)
        state = {key: torch.randn_like(t) for key, t in library.get_peft_model_state_dict(model).items()}
        library.set_peft_model_state_dict(model, state)
        lora, tensors = library.convert_to_lora(model, rank=rank)
        ranks = {path.removeprefix("^").replace("\\", "") for path in lora.rank_pattern}
        found.append((lora.r, lora.lora_alpha, ranks, {key: (t.shape, t.dtype) for key, t in tensors.items()}))
    assert found[0] == found[1]


# ---- configs ----


def test_a_config_takes_its_own_type() -> None:
    own: Any = {"peft_type": "LORA"}
    for library in BOTH:
        config = library.LoraConfig(r=4, **own)
        assert (config.peft_type, config.r, config.peft_version) == ("LORA", 4, "0.21.2")
        assert isinstance(library.LoraConfig.from_peft_type(peft_type="IA3"), library.IA3Config)
    own["peft_version"] = "0.10"
    assert siliang.LoraConfig(**own) == siliang.LoraConfig()
    with pytest.raises(ConfigError, match="peft_type = 'IA3': LoraConfig is for LORA"):
        siliang.LoraConfig(**(own | {"peft_type": "IA3"}))


def test_what_a_file_holds(tmp_path: Path) -> None:
    siliang.LoraConfig(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    assert siliang.LoraConfig.from_json_file(path) == values
    with pytest.warns(UserWarning, match="runtime_config"):
        assert peft.LoraConfig.from_json_file(str(path)) == values


def test_unknown_fields_are_one_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    siliang.LoraConfig(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"foobar": "baz", "spam": 123}))
    assert siliang.PeftConfig.from_pretrained(tmp_path) == siliang.LoraConfig(r=4)
    (said,) = [str(one.message) for one in recwarn]
    assert "unknown fields are ignored: foobar = 'baz', spam = 123." in said


def test_another_revision_is_said() -> None:
    for library in BOTH:
        with pytest.warns(UserWarning, match="revision"):
            model = library.get_peft_model(
                Net(), library.LoraConfig(target_modules=["lin0"], revision="v1"), revision="main"
            )
        assert model.peft_config["default"].revision == "main"


# ---- files ----


def test_the_base_models_tags_are_the_adapters(tmp_path: Path) -> None:
    for library in BOTH:
        base: Any = make("llama")
        base.add_model_tags(["mine"])
        library.get_peft_model(base, library.LoraConfig()).save_pretrained(tmp_path / library.__name__)
        assert {"mine", "transformers"} <= tags_of(tmp_path / library.__name__)
        plain = library.get_peft_model(Net(), library.LoraConfig(target_modules=["lin0"]))
        plain.save_pretrained(tmp_path / f"{library.__name__}-plain")
        tags = tags_of(tmp_path / f"{library.__name__}-plain")
        assert "transformers" not in tags and "lora" in tags


def tags_of(folder: Path) -> set[str]:
    card: Any = ModelCard.load(folder / "README.md")
    return set(card.data.tags)


def test_auto_classes_take_adapters_without_a_task(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base")
    siliang.get_peft_model(base, siliang.LoraConfig()).save_pretrained(tmp_path / "adapter")
    for library in BOTH:
        model = library.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")
        assert isinstance(model, library.PeftModelForFeatureExtraction)
        assert isinstance(model.get_base_model(), BertModel)
    wrong = tmp_path / "adapter" / "adapter_config.json"
    mapping = {"parent_library": "os", "base_model_class": "system"}
    wrong.write_text(json.dumps(json.loads(wrong.read_text()) | {"auto_mapping": mapping}))
    for library in BOTH:
        with pytest.raises(ValueError, match="os"):
            library.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


# ---- refusals ----


@pytest.mark.parametrize(
    "held", [nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.ParameterList([nn.Parameter(torch.ones(2))])]
)
def test_a_list_is_not_saved_whole(held: nn.Module) -> None:
    for library in BOTH:
        model: Any = Net()
        model.held = held
        with pytest.raises(TypeError):
            library.get_peft_model(model, library.LoraConfig(target_modules=["lin0"], modules_to_save=["held"]))


def test_rows_of_a_table_that_is_tuned_otherwise() -> None:
    for library in BOTH:
        config = library.LoraConfig(target_modules=["emb"], trainable_token_indices={"emb": [1]})
        with pytest.raises(TypeError):
            library.get_peft_model(Net(), config)
    assert issubclass(KindError, ConfigError)


@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_layers_that_mambas_kernels_read(name: str) -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    for library in BOTH:
        with pytest.raises(ValueError, match="Mamba"):
            library.get_peft_model(
                MambaForCausalLM(config), library.LoraConfig(task_type="CAUSAL_LM", target_modules=[name])
            )
    with pytest.raises(TargetError, match=f"backbone.layers.0.mixer.{name}' is not called where Mamba's kernels"):
        siliang.get_peft_model(MambaForCausalLM(config), siliang.LoHaConfig(target_modules=[name]))
    model: Any = siliang.get_peft_model(MambaForCausalLM(config), siliang.LoraConfig(target_modules="all-linear"))
    assert not any(path.endswith(("out_proj", "conv1d")) for path in model.targeted_module_names)


# ---- several at once ----


def test_adapters_are_deleted_together_or_not_at_all() -> None:
    model: Any = siliang.get_peft_model(Net(), siliang.LoraConfig(target_modules=["lin0"]), "one")
    model.add_adapter("two", siliang.LoHaConfig(target_modules=["lin1"]))
    model.merge_adapter(["two"])
    for names in (["one", "two"], ["one", "three"]):
        with pytest.raises(ConfigError):
            model.delete_adapter(names)
        assert list(model.peft_config) == ["one", "two"]
    model.unmerge_adapter()
    model.delete_adapter(["one", "two"])
    assert not model.peft_config and isinstance(model.get_base_model().lin0, nn.Linear)


def test_resized_embeddings_are_saved_where_the_base_is_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    base: Any = make("llama")
    base.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    key = "base_model.model.model.embed_tokens.weight"
    for more in (0, 2):
        base = make("llama")
        base.resize_token_embeddings(base.config.vocab_size + more)
        base.name_or_path = "a/b"
        model = siliang.get_peft_model(base, siliang.LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / f"{more}")
        assert (key in load_file(tmp_path / f"{more}" / "adapter_model.safetensors")) == (more > 0)


def test_scalings_can_be_replaced_and_set_again() -> None:
    for library in BOTH:
        model = library.get_peft_model(Net(), library.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
        layer, ids = model.base_model.model.lin0, torch.arange(4)
        before, answer = layer.scaling, model(ids)
        with (
            library.helpers.rescale_adapter_scale(model, 0.5)
            if library is peft
            else library.rescale_adapter_scale(model, 0.5)
        ):
            assert (before["default"], layer.scaling["default"]) == (1.0, 0.5)
            assert not torch.allclose(model(ids), answer)
        assert layer.scaling["default"] == before["default"] == 1.0
        layer.scaling = {"default": 3.0}
        before["default"] = 2.0
        assert layer.scaling["default"] == 3.0
        layer.scaling = before
        assert layer.scaling["default"] == 2.0
        layer.scaling["default"] = 1.0
        assert torch.allclose(model(ids), answer)


def test_a_value_of_a_wrong_kind_is_a_type_error_too() -> None:
    for library in BOTH:
        with pytest.raises(TypeError):
            library.LoraConfig(target_parameters="linear.weight")


def test_a_resized_table_beside_rows_of_it(tmp_path: Path) -> None:
    """PEFT's files have one module more there; both read both."""
    inputs = {"input_ids": torch.arange(2, 8)[None]}
    models: dict[str, Any] = {}
    for library in BOTH:
        base: Any = make("llama")
        torch.manual_seed(0)
        base.resize_token_embeddings(base.config.vocab_size + 2, mean_resizing=False)
        config = library.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[2, 3])
        models[library.__name__] = library.get_peft_model(base, config).eval()
        models[library.__name__].save_pretrained(tmp_path / library.__name__, save_embedding_layers=True)
    wanted = models["peft"](**inputs).logits
    torch.testing.assert_close(models["siliang"](**inputs).logits, wanted)
    files = [load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in models]
    assert files[0] == files[1]
    for library in BOTH:
        for name in models:
            base = make("llama")
            torch.manual_seed(1)  # the new rows are others
            base.resize_token_embeddings(base.config.vocab_size + 2, mean_resizing=False)
            opened = library.PeftModel.from_pretrained(base, tmp_path / name).eval()
            torch.testing.assert_close(opened(**inputs).logits, wanted)


def test_gradients_reach_the_embeddings_for_checkpoints() -> None:
    for library in BOTH:
        base: Any = make("llama")
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["q_proj"]))
        model.prepare_model_for_gradient_checkpointing(model)
        assert base.get_input_embeddings()(torch.arange(3)).requires_grad


def test_files_from_before_a_model_was_renamed(tmp_path: Path) -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Linear(4, 4)

    class New(nn.Module):
        _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {r"^text": "inner.text"}

        def __init__(self) -> None:
            super().__init__()
            self.inner = Old()

    config = siliang.LoraConfig(target_modules=["text"], init_lora_weights=False)
    before: Any = siliang.get_peft_model(Old(), config)
    before.save_pretrained(tmp_path)
    wanted = before.base_model.model.text.lora_A["default"].weight
    ours: Any = siliang.PeftModel.from_pretrained(New(), tmp_path)
    ours.load_adapter(tmp_path, "again")
    for name in ("default", "again"):
        assert torch.equal(ours.base_model.model.inner.text.lora_A[name].weight, wanted), name
