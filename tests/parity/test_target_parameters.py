"""LoRA on parameters that are no layer's (`target_parameters`), compared with the live `peft`: the experts of mixtures,
stored (E, O, I) and (E, I, O), routers, and parameters of two dimensions.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close, assert_same_losses
from mixtures import MODELS, make_mixture
from stepping import losses_of_steps
from tiny import batch, make
from torch import nn

import siliang
from siliang.methods.lora_parameters import from_nested_keys, to_nested_keys
from siliang.types import ConfigError, TargetError

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS}),
    "one of them": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}),
    "router": ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight", "down_proj"]}),
    "ranks": (
        "mixtral",
        {
            "target_modules": ["v_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {r".*\.gate_up_proj": 6, "v_proj": 2},
            "alpha_pattern": {"layers.1.mlp.experts.down_proj": 20},
            "use_rslora": True,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {"target_modules": [], "target_parameters": EXPERTS}),
    "deepseek_v3": ("deepseek_v3", {"target_modules": ["q_b_proj"], "target_parameters": EXPERTS}),
    "gpt_oss": ("gpt_oss", {"target_modules": [], "target_parameters": EXPERTS}),
    "biases": ("gpt_oss", {"target_modules": [], "target_parameters": ["gate_up_proj_bias", *EXPERTS]}),
    "llama4": ("llama4", {"target_modules": [], "target_parameters": EXPERTS}),
    "a linear layer": ("llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
    "a transposed layer": ("gpt2", {"target_modules": [], "target_parameters": ["c_attn.weight"]}),
    "an embedding": ("llama", {"target_modules": [], "target_parameters": ["embed_tokens.weight"]}),
}

# of peft, which matches patterns with the names of layers alone, and uses them for parameters too
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any.*")


def model_of(name: str, seed: int = 0) -> Any:
    return make_mixture(name, seed) if name in MODELS else make(name, seed)


def configs(case: str, **settings: Any) -> tuple[Any, Any]:
    """The same config of both libraries."""
    values = {"task_type": "CAUSAL_LM", "r": 3, "init_lora_weights": False} | CASES[case][1] | settings
    return siliang.LoraConfig(**copy.deepcopy(values)), peft.LoraConfig(**copy.deepcopy(values))


def pair(case: str, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """The same adapter on the same base in both libraries."""
    ours_config, theirs_config = configs(case, **settings)
    name = CASES[case][0]
    ours = siliang.get_peft_model(model_of(name, seed), ours_config)
    theirs = peft.get_peft_model(model_of(name, seed), theirs_config)
    own: dict[str, Any] = siliang.get_peft_model_state_dict(ours)
    there: dict[str, Any] = peft.get_peft_model_state_dict(theirs)
    assert {key: t.shape for key, t in own.items()} == {key: t.shape for key, t in there.items()}
    peft.set_peft_model_state_dict(theirs, own)
    return ours.eval(), theirs.eval()


def trained(model: Any) -> dict[str, Any]:
    """What is trained, by PEFT's names."""
    return {to_nested_keys(name): p for name, p in model.named_parameters() if p.requires_grad}


def out(model: Any) -> Any:
    return model(**batch("llama"))


@pytest.mark.parametrize("case", CASES)
def test_names_forward_and_gradients(case: str) -> None:
    ours, theirs = pair(case)
    assert trained(ours).keys() == trained(theirs).keys()
    here, there = out(ours), out(theirs)
    assert_close(here.logits, there.logits)
    here.loss.backward()
    there.loss.backward()
    # an expert that no token reaches has no gradient
    assert_all_close(
        {name: p.grad for name, p in trained(ours).items()}, {name: p.grad for name, p in trained(theirs).items()}
    )
    with ours.disable_adapter():
        assert torch.equal(out(ours).logits, out(model_of(CASES[case][0])).logits)


@pytest.mark.parametrize("case", ["ranks", "gpt_oss", "deepseek_v3", "a linear layer"])
def test_five_steps(case: str) -> None:
    losses = [losses_of_steps(model, lambda model: out(model).loss, lr=1e-3) for model in pair(case)]
    assert_same_losses(*losses)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(case: str, tmp_path: Path) -> None:
    ours, theirs = pair(case)
    wanted, name = out(theirs).logits, CASES[case][0]
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "ours").eval()
    here = siliang.PeftModel.from_pretrained(model_of(name), tmp_path / "theirs")
    assert_close(out(there).logits, wanted)
    assert_close(out(here).logits, wanted)


@pytest.mark.parametrize("case", CASES)
def test_merge(case: str) -> None:
    ours, theirs = pair(case)
    plain = {key: t.clone() for key, t in model_of(CASES[case][0]).state_dict().items()}
    tuned = out(ours).logits
    ours.merge_adapter()
    assert_close(out(ours).logits, tuned)
    ours.unmerge_adapter()
    assert torch.equal(out(ours).logits, tuned)
    merged, there = ours.merge_and_unload(safe_merge=True), theirs.merge_and_unload()
    assert_all_close(dict(merged.state_dict()), dict(there.state_dict()))
    assert any(not torch.equal(t, plain[key]) for key, t in merged.state_dict().items())


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
def test_several_are_added(case: str) -> None:
    ours, theirs = pair(case)
    for model, config in zip((ours, theirs), configs(case, r=2), strict=True):
        model.add_adapter("other", config)
    other = siliang.get_peft_model_state_dict(ours, adapter_name="other")
    peft.set_peft_model_state_dict(theirs, other, adapter_name="other")
    alone = out(ours).logits
    ours.set_adapter(["default", "other"])
    theirs.base_model.set_adapter(["default", "other"])
    both = out(ours).logits
    assert_close(both, out(theirs).logits)
    assert not torch.allclose(both, alone)
    # a batch that mixes them, which PEFT refuses here
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    ours.set_adapter("other")
    second = ours(**inputs).logits
    mixed = ours(**inputs, adapter_names=["default", "other", "default"]).logits
    assert_close(mixed, torch.stack([alone[0], second[1], alone[2]]))
    merged = ours.merge_and_unload(adapter_names=["default", "other"])
    assert_close(out(merged).logits, both)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
def test_bf16_error_budget(case: str) -> None:
    """Against fp32 truth, our error on a bf16 base may not exceed that of peft."""
    errors = {siliang: 0.0, peft: 0.0}
    for seed in range(6):
        ours, theirs = pair(case, seed)
        with torch.no_grad():
            truth = out(theirs).logits
            for library, config in zip(errors, configs(case), strict=True):
                model: Any = library.get_peft_model(model_of(CASES[case][0], seed).to(torch.bfloat16), config)  # type: ignore[attr-defined]
                library.set_peft_model_state_dict(model, siliang.get_peft_model_state_dict(ours))  # type: ignore[attr-defined]
                errors[library] += (out(model.eval()).logits.float() - truth).abs().mean().item()
    assert errors[siliang] <= errors[peft] * 1.05


def test_what_peft_makes_of_all_linear_on_mixtral_is_read(tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(
        model_of("mixtral"),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    )
    assert theirs.peft_config["default"].target_parameters == {"gate.weight", "gate_up_proj", "down_proj"}
    theirs.save_pretrained(tmp_path)
    here: Any = siliang.PeftModel.from_pretrained(model_of("mixtral"), tmp_path)
    assert_close(out(here).logits, out(theirs.eval()).logits)
    layer = here.base_model.model.model.layers[0].mlp.experts
    assert layer.r == {"default": 8} and layer.scaling == {"default": 1.0}
    # on this model PEFT takes None for no layers, where it means the usual ones on others, and here
    settings: dict[str, Any] = {"target_parameters": ["down_proj"]}
    usual = siliang.get_peft_model(model_of("mixtral"), siliang.LoraConfig(**settings))
    assert usual.peft_config["default"].target_modules == ["q_proj", "v_proj"]  # type: ignore[attr-defined]
    alone: Any = peft.get_peft_model(model_of("mixtral"), peft.LoraConfig(**settings))
    assert not alone.peft_config["default"].target_modules


def test_one_expert_that_is_stored_transposed() -> None:
    """PEFT adds (O, I) to (1, I, O): the shapes do not fit, or the sum is wrong where O = I."""

    class Expert(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(1, 6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.W[0]

    base = nn.Sequential(nn.Linear(6, 6), Expert())
    x = torch.randn(3, 6)
    plain = base(x)
    config = siliang.LoraConfig(target_modules=[], target_parameters=["1.W"], init_lora_weights=False)
    model: Any = siliang.get_peft_model(base, config)
    A, B = (p for p in model.parameters() if p.requires_grad)
    assert_close(model(x), plain + base[0](x) @ A.T @ B.T)


def test_a_parameter_that_is_read_and_not_called() -> None:
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(TargetError, match=r"self_attn.out_proj.weight cannot be tuned: the attention around it"):
        siliang.get_peft_model(
            base, siliang.LoraConfig(target_modules=[], target_parameters=["self_attn.out_proj.weight"])
        )


def test_keys() -> None:
    for ours, theirs in (
        ("a.experts.lora_A.weight", "a.experts.lora_A.weight"),
        ("a.experts.base_layer_lora_B.weight", "a.experts.base_layer.lora_B.weight"),
        ("a.experts.base_layer_base_layer_lora_A.weight", "a.experts.base_layer.base_layer.lora_A.weight"),
    ):
        assert to_nested_keys(ours) == theirs and from_nested_keys(theirs) == ours


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "and lora_dropout do not go together: lora_dropout does not work on parameters that"),
        ({"use_dora": True}, "target_parameters and use_dora do not go together"),
        ({"init_lora_weights": "pissa"}, "target_parameters and init_lora_weights = 'pissa' do not go together"),
        ({"layers_to_transform": [0]}, "target_parameters and layers_to_transform do not go together"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        siliang.LoraConfig(target_parameters=["down_proj"], **settings)


@pytest.mark.parametrize(
    ("names", "modules", "message"),
    [
        (["experts.down_porj"], [], r"'experts.down_porj' matches no parameter of Mixtral.* Did you mean 'down_proj'"),
        (["norm.weight"], [], r"norm.weight cannot be tuned: it has 1 dimensions, and LoRA needs 2 or 3"),
        (["q_proj.weight"], ["q_proj"], r"q_proj.weight is a part of .*q_proj, which target_modules names too"),
    ],
)
def test_parameters_that_cannot_be_tuned(names: list[str], modules: list[str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        siliang.get_peft_model(model_of("mixtral"), siliang.LoraConfig(target_modules=modules, target_parameters=names))
