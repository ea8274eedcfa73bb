"""LoRA on experts by their names in transformers 4, where each had layers of its own: files of that time, and new
adapters, compared with the updates added to the weights by hand, and with the live `peft`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import pytest
import torch
from closeness import assert_close, assert_same_losses
from mixtures import former_weights, make_mixture, write_former
from safetensors.torch import load_file, save_file
from stepping import losses_of_steps
from tiny import batch
from torch import Tensor

import siliang
from siliang.models.former_layers import former_layers
from siliang.peft_api.hotswap import hotswap_adapter
from siliang.types import AdapterError, ConfigError, TargetError

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
# of peft: what it does not find in a file, and patterns that it matches with the names of layers alone
pytestmark = pytest.mark.filterwarnings(
    "ignore:Found missing adapter keys", "ignore:The following (rank|alpha)_pattern keys did not match any.*"
)


class Case(NamedTuple):
    """A file of transformers 4.

    Attributes:
        peft: What PEFT 0.21.2 makes of it: "same", "other" results without an error, or an error: "refused".
    """

    model: str
    targets: list[str] | str
    settings: Mapping[str, Any] = MappingProxyType({})
    peft: str = "same"


CASES = {
    "mixtral": Case("mixtral", ["q_proj", "w1", "w2", "w3", "gate"]),
    "one matrix": Case("mixtral", ["w2"]),
    "qwen3_moe": Case("qwen3_moe", ["q_proj", "v_proj", *FEED_FORWARD]),
    "router": Case("qwen3_moe", ["q_proj", "gate"]),
    "pattern": Case("qwen3_moe", r"^(model(?=\.).*\.(q_proj|gate_proj|up_proj|down_proj))$"),
    "olmoe": Case("olmoe", [*FEED_FORWARD, "gate"], {"r": 5, "lora_alpha": 3}),
    # PEFT puts these tensors below a wrapper that is not there, says that they are missing, and computes without them
    "two halves": Case("mixtral", ["w1", "w3"], peft="other"),
    # PEFT doubles alpha, which doubles alpha / r, and not alpha / sqrt(r)
    "rslora": Case("mixtral", ["w1", "w2", "w3"], {"use_rslora": True}, peft="other"),
    # PEFT leaves out the linear layers of these names: the dense ones and those of the shared experts
    "deepseek_v3": Case("deepseek_v3", FEED_FORWARD, peft="other"),
    # whose type is not among those that PEFT has names for
    "qwen2_moe": Case("qwen2_moe", ["q_proj", *FEED_FORWARD, "gate"], peft="refused"),
    # PEFT tries a pattern on names without numbers, and knows one rank alone
    "layer": Case("mixtral", r"model\.layers\.1\..*\.experts\.\d+\.w[123]", peft="refused"),
    "ranks": Case(
        "mixtral", ["v_proj", "w1", "w2", "w3"], {"rank_pattern": {"w1": 2, "w3": 2}, "alpha_pattern": {"w[13]": 8}},
        peft="refused",
    ),
}  # fmt: skip


def written(folder: Path, case: Case) -> Tensor:
    """Writes a file of transformers 4; the logits of the model with it."""
    model = make_mixture(case.model)
    write_former(folder, model, case.targets, **case.settings)
    return out(model).logits


def out(model: Any) -> Any:
    return model(**batch("llama"))


def opened(library: Any, folder: Path, case: Case, **settings: Any) -> Any:
    return library.PeftModel.from_pretrained(make_mixture(case.model), folder, **settings).eval()


def settings_of(model: Any) -> dict[str, Any]:
    """What a config says of the targets."""
    config = model.peft_config["default"]
    names = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
    return {name: set(value) if isinstance(value := getattr(config, name), list) else value for name in names}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_transformers_4(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    expected = written(tmp_path / "former", case)
    assert not torch.allclose(expected, out(make_mixture(case.model)).logits, atol=1e-2)
    here = opened(siliang, tmp_path / "former", case)
    assert_close(out(here).logits, expected)

    here.save_pretrained(tmp_path / "ours")
    assert_close(out(opened(siliang, tmp_path / "ours", case)).logits, expected)
    if case.model != "deepseek_v3":  # of which PEFT leaves out the layers that are called as parts of experts were
        assert_close(out(opened(peft, tmp_path / "ours", case)).logits, expected)

    if case.peft == "refused":
        with pytest.raises((ValueError, RuntimeError)):
            opened(peft, tmp_path / "former", case)
        return
    there = opened(peft, tmp_path / "former", case)
    if case.peft == "other":
        assert not torch.allclose(out(there).logits, expected, atol=1e-3)
        return
    assert_close(out(there).logits, expected)
    assert settings_of(here) == settings_of(there)
    there.save_pretrained(tmp_path / "theirs")
    assert_close(out(opened(siliang, tmp_path / "theirs", case)).logits, expected)
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: t.tolist() for key, t in ours.items()} == {key: t.tolist() for key, t in theirs.items()}


@pytest.mark.parametrize("name", ["mixtral", "pattern"])
def test_trained_further(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    written(tmp_path, case)
    models = [opened(library, tmp_path, case, is_trainable=True) for library in (siliang, peft)]
    losses = [losses_of_steps(model, lambda model: out(model).loss, lr=1e-3) for model in models]
    assert_same_losses(*losses)
    assert losses[0][-1] < losses[0][0]


def test_beside_other_adapters_and_into_one_that_is_there(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    expected = written(tmp_path, case)
    model: Any = siliang.get_peft_model(make_mixture("mixtral"), siliang.LoraConfig(target_modules=["q_proj"]))
    model.load_adapter(tmp_path, "former")
    model.set_adapter("former")
    assert_close(out(model.eval()).logits, expected)
    with torch.no_grad():
        for key, t in model.injection.adapters["former"].tensors().items():
            assert "block_sparse_moe" not in key
            t.zero_()
    model.load_adapter(tmp_path, "former")
    assert_close(out(model).logits, expected)
    with torch.no_grad():
        for t in model.injection.adapters["former"].tensors().values():
            t.zero_()
    siliang.set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"), "former")
    assert_close(out(model).logits, expected)
    merged = model.merge_and_unload()
    assert_close(out(merged).logits, expected)


@pytest.mark.parametrize("name", ["mixtral", "one matrix", "qwen3_moe", "router", "pattern", "two halves"])
def test_new_adapters_by_former_names(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ours, theirs = (
        library.get_peft_model(
            make_mixture(case.model), library.LoraConfig(target_modules=case.targets, r=3, task_type="CAUSAL_LM")
        )
        for library in (siliang, peft)
    )
    assert settings_of(ours) == settings_of(theirs)
    own, there = siliang.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert {key: t.shape for key, t in own.items()} == {key: t.shape for key, t in there.items()}
    assert torch.equal(out(ours).logits, out(make_mixture(case.model)).logits)
    ours.save_pretrained(tmp_path)
    assert settings_of(opened(siliang, tmp_path, case)) == settings_of(ours)


def test_names_of_experts_and_of_layers() -> None:
    """The dense layer and the shared experts have linear layers of these names, which PEFT leaves out."""
    model: Any = siliang.get_peft_model(
        make_mixture("deepseek_v3"), siliang.LoraConfig(target_modules=FEED_FORWARD, exclude_modules=r".*shared.*")
    )
    assert settings_of(model)["target_modules"] == set(FEED_FORWARD)
    assert settings_of(model)["target_parameters"] == {"gate_up_proj", "down_proj"}
    tuned = {key.removeprefix("base_model.model.model.layers.") for key in siliang.get_peft_model_state_dict(model)}
    assert {key.partition(".lora_")[0] for key in tuned} == {
        *(f"0.mlp.{name}" for name in FEED_FORWARD),
        *("1.mlp.experts", "1.mlp.experts.base_layer"),
    }


@pytest.mark.parametrize("model", ["gpt_oss", "llama4"])
def test_experts_that_always_were_one_tensor(model: str) -> None:
    assert not [layer for layer in former_layers(make_mixture(model)) if layer.expert is not None]


def test_former_layers_have_the_rows_that_they_had() -> None:
    for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"):
        model = make_mixture(name)
        expected = dict(former_weights(model))
        found = former_layers(model)
        assert len(found) > 2 * 3 * 4 or name == "deepseek_v3"
        for layer in found:
            W = model.get_parameter(layer.parameter)
            W = W if layer.expert is None else W[layer.expert]
            assert torch.equal(W[layer.start : layer.start + layer.rows], expected[layer.path]), layer
        assert {path for path in expected if ".experts." in path} <= {layer.path for layer in found}


# ---- what is refused ----


@pytest.mark.parametrize("targets", [["q_proj", "up_proj", "down_proj"], r".*\.(up_proj|down_proj)"])
def test_a_part_of_a_tensor_is_refused(targets: list[str] | str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without also targeting gate_proj"):
        peft.get_peft_model(make_mixture("qwen3_moe"), peft.LoraConfig(target_modules=targets))
    message = r"experts.0.up_proj is among the layers and experts.0.gate_proj is not, and they are one tensor in this"
    with pytest.raises(TargetError, match=rf"target_modules: {message} model, .* Name both, or neither."):
        siliang.get_peft_model(make_mixture("qwen3_moe"), siliang.LoraConfig(target_modules=targets))
    case = Case("qwen3_moe", targets)
    written(tmp_path, case)
    with pytest.raises(AdapterError, match=rf"{re.escape(str(tmp_path))}: {message}"):
        opened(siliang, tmp_path, case)


def test_dropout_is_of_no_effect_without_training(tmp_path: Path) -> None:
    case = Case("mixtral", ["w1", "w2", "w3"], {"lora_dropout": 0.1})
    expected = written(tmp_path, case)
    assert_close(out(opened(siliang, tmp_path, case)).logits, expected)
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        opened(peft, tmp_path, case)
    message = r"experts.0.w1 is a part of model.layers.0.mlp.experts.gate_up_proj in this model. target_parameters and"
    with pytest.raises(AdapterError, match=message):
        opened(siliang, tmp_path, case, is_trainable=True)
    with pytest.raises(ConfigError, match=rf"target_modules: {message}"):
        siliang.get_peft_model(
            make_mixture("mixtral"), siliang.LoraConfig(target_modules=["w1", "w2", "w3"], lora_dropout=0.1)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "target_parameters and use_dora do not go together"),
        ({"layers_to_transform": [0]}, "target_parameters and layers_to_transform do not go together"),
        ({"rank_pattern": {"w1": 2}}, "gives parts of one tensor different ranks or scalings"),
        ({"rank_pattern": {"experts.1.w2": 2}}, "gives parts of one tensor different ranks or scalings"),
    ],
)
def test_settings_that_parameters_do_not_have(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    targets = ["w1", "w2", "w3"]
    with pytest.raises(ConfigError, match=message):
        siliang.get_peft_model(make_mixture("mixtral"), siliang.LoraConfig(target_modules=targets, **settings))
    case = Case("mixtral", targets, settings)
    written(tmp_path, case)
    with pytest.raises(AdapterError, match=message):
        opened(siliang, tmp_path, case)


def test_patterns_of_a_new_adapter_have_former_names() -> None:
    """They give the tensors the ranks of all their former layers; a name that means nothing is an error."""
    targets, same = ["v_proj", "w1", "w2", "w3"], {"w1": 2, "w2": 3, "w3": 2}
    config = siliang.LoraConfig(target_modules=targets, rank_pattern=same | {"v_proj": 5}, alpha_pattern=dict(same))
    model = siliang.get_peft_model(make_mixture("mixtral"), config)
    ranks = {name.rpartition("lora_A")[0]: len(p) for name, p in model.named_parameters() if "lora_A" in name}
    assert {len(ranks), *ranks.values()} == {6, 5, 4 * 4, 4 * 3}  # two layers of each, with four experts
    assert set(model.peft_config["default"].rank_pattern) == {"v_proj", r".*\.gate_up_proj", r".*\.down_proj"}
    config = siliang.LoraConfig(target_modules=targets, rank_pattern=same | {"w7": 5})
    with pytest.raises(TargetError, match="'w7' matches none"):
        siliang.get_peft_model(make_mixture("mixtral"), config)


def test_hot_swapping_is_refused(tmp_path: Path) -> None:
    """It is for layers; the message says what takes experts."""
    case = CASES["mixtral"]
    model = siliang.get_peft_model(make_mixture("mixtral"), siliang.LoraConfig(target_modules=case.targets))
    written(tmp_path, case)
    with pytest.raises(ConfigError, match=r"is not plain LoRA .*: use load_adapter"):
        hotswap_adapter(model, tmp_path, "default")


def test_files_that_lack_a_part_or_are_of_another_model(tmp_path: Path) -> None:
    case = CASES["mixtral"]
    written(tmp_path, case)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: t for key, t in tensors.items() if ".experts.2." not in key}, file)
    with pytest.raises(AdapterError, match=r"experts.0.w1 is among the layers and experts.2.w1 is not"):
        opened(siliang, tmp_path, case)
    one = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight"
    save_file({key: t for key, t in tensors.items() if key != one}, file)
    with pytest.raises(AdapterError, match="tensors are missing"):
        opened(siliang, tmp_path, case)
    save_file(tensors | {one: torch.zeros(5, 3)}, file)
    with pytest.raises(
        AdapterError, match=r"experts.2.w3 has A \(3, 16\) and B \(5, 3\), which fit neither the 24 rows"
    ):
        opened(siliang, tmp_path, case)
