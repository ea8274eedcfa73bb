"""modules_to_save: one rule for names, PEFT's, in attaching and in files; and ties that merging breaks."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from closeness import assert_close
from safetensors.torch import load_file, save_file
from tiny import ENCODER, VOCABULARY, bart, gpt2, t5
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import siliang
from siliang.types import AdapterError, KindError, TargetError

IDS = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(4))


def llama(*, tied: bool = True) -> Any:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, **sizes, tie_word_embeddings=tied, initializer_range=0.2)
    return LlamaForCausalLM(config)


def distilbert() -> Any:
    sizes: Any = {
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 3,
    }
    config: Any = DistilBertConfig(vocab_size=VOCABULARY, **(sizes | {"initializer_range": 0.2}))
    return DistilBertForSequenceClassification(config)


def masked() -> Any:
    sizes: Any = {key: value for key, value in ENCODER.items() if key != "num_labels"}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, initializer_range=0.2))


def made(model: Any) -> Any:
    torch.manual_seed(1)
    return model().eval()


@torch.no_grad()
def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p += 0.2 * torch.randn(p.shape, generator=generator)


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **more).logits


def trained(library: Any, model: Any, **settings: Any) -> Any:
    found = library.get_peft_model(made(model), library.LoraConfig(**settings))
    shake(found)
    return found


CASES: Any = {
    "head means lm_head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["head"]}, ["head"]),
    "norm means every norm": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, ["norm"]),
    "classifier means pre_classifier": (
        distilbert,
        {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"},
        ["classifier", "score"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_names_mean_what_they_mean_in_peft(case: str, tmp_path: Path) -> None:
    model, settings, names = CASES[case]
    for mine, other in ((siliang, peft), (peft, siliang)):
        folder = tmp_path / mine.__name__
        model_trained = trained(mine, model, **settings)
        expected = answer(model_trained)
        model_trained.save_pretrained(folder)
        assert model_trained.peft_config["default"].modules_to_save == names
        found = answer(other.PeftModel.from_pretrained(made(model), folder))
        assert_close(found, expected)
    files = [load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in ("siliang", "peft")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("model", "settings", "names"),
    [
        # where a target would stand in a saved module, PEFT must be told
        (
            distilbert,
            {"target_modules": ["q_lin", "pre_classifier"], "task_type": "SEQ_CLS"},
            ["classifier", "pre_classifier", "score"],
        ),
        (distilbert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}, ["classifier", "score"]),
        # a name of a module within another saved one is left out: PEFT puts one copy into the other
        (
            masked,
            {"target_modules": ["query", "dense"], "modules_to_save": ["transform", "predictions"]},
            ["predictions"],
        ),
    ],
)
def test_what_is_written_opens_in_peft(model: Any, settings: Any, names: list[str], tmp_path: Path) -> None:
    own = trained(siliang, model, **settings)
    expected = answer(own)
    own.save_pretrained(tmp_path)
    assert own.peft_config["default"].modules_to_save == names
    for library in (siliang, peft):
        found = answer(library.PeftModel.from_pretrained(made(model), tmp_path))
        assert_close(found, expected)


@pytest.mark.parametrize(
    ("model", "lacking", "names"), [(masked, "cls.", ["cls.predictions"]), (distilbert, "pre_classifier", None)]
)
def test_parts_that_the_files_lack_open_in_peft(
    model: Any, lacking: str, names: list[str] | None, tmp_path: Path
) -> None:
    whole = made(model)
    whole.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    kept = {key: t for key, t in tensors.items() if not key.startswith(lacking)}
    save_file(kept, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    task: Any = {"task_type": "SEQ_CLS"} if model is distilbert else {}
    base = type(whole).from_pretrained(tmp_path / "base")
    own = siliang.get_peft_model(base, siliang.LoraConfig(target_modules="all-linear", **task))
    shake(own)
    expected = answer(own)
    own.save_pretrained(tmp_path / "adapter")
    if names:
        assert own.peft_config["default"].modules_to_save == names
    found = answer(peft.PeftModel.from_pretrained(made(model), tmp_path / "adapter"))
    assert_close(found, expected)


def test_a_tensor_that_no_config_names_is_refused(tmp_path: Path) -> None:
    """The output layer is tied: its tensor would go into the embedding."""
    own = trained(siliang, llama, target_modules=["q_proj"])
    own.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stray = {"base_model.model.lm_head.weight": torch.randn(VOCABULARY, 16)}
    save_file(load_file(file) | stray, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"lm_head\.weight is tied to another weight"):
        siliang.PeftModel.from_pretrained(made(llama), tmp_path)


def test_copies_within_copies_of_peft_are_refused(tmp_path: Path) -> None:
    """PEFT computes with the outer copy and writes the inner one, which it cannot read itself."""
    names = ["predictions", "transform"]
    trained(peft, masked, target_modules=["query"], modules_to_save=names).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"cls\.predictions\.transform and a module around it"):
        siliang.PeftModel.from_pretrained(made(masked), tmp_path)


@pytest.mark.parametrize("config", [siliang.BitFitConfig, siliang.PromptTuningConfig])
def test_nested_names_of_other_methods_open_again(config: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {"num_virtual_tokens": 2} if config is siliang.PromptTuningConfig else {}
    own = siliang.get_peft_model(made(masked), config(modules_to_save=["predictions", "transform"], **more))
    shake(own)
    own.save_pretrained(tmp_path)
    expected = answer(own)
    found = answer(siliang.PeftModel.from_pretrained(made(masked), tmp_path))
    assert_close(found, expected)


def test_a_list_of_modules_is_not_saved() -> None:
    with pytest.raises(KindError, match=r"modules_to_save: model\.layers is a list of modules"):
        trained(siliang, llama, target_modules=["q_proj"], modules_to_save=["layers"])


TIES: Any = [
    (bart, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    (bart, {"target_modules": ["q_proj"], "modules_to_save": ["shared"]}),
    (bart, {"target_modules": ["q_proj"], "modules_to_save": ["encoder.embed_tokens"]}),
    (bart, {"target_modules": ["lm_head"]}),
    (bart, {"target_modules": ["shared"]}),
    (t5, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    (t5, {"target_modules": ["q"], "modules_to_save": ["shared"]}),
    (t5, {"target_modules": ["lm_head"]}),
    (t5, {"target_modules": ["shared"]}),
    (llama, {"target_modules": ["lm_head"]}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}),
    (gpt2, {"target_modules": ["wte"]}),
]


@pytest.mark.parametrize(("model", "settings"), TIES, ids=[f"{m.__name__}-{i}" for i, (m, _) in enumerate(TIES)])
def test_a_merged_model_whose_tie_broke_loads_as_it_was(model: Any, settings: Any, tmp_path: Path) -> None:
    own = trained(siliang, model, **settings)
    expected = answer(own)
    merged: Any = own.merge_and_unload()
    assert_close(answer(merged), expected)
    merged.save_pretrained(tmp_path)
    again, loading = type(merged).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert_close(answer(again), expected)
