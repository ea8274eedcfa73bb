"""Virtual tokens on models of many families: as in the live `peft` where that runs, or one clear line."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as t
from closeness import assert_close
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import siliang
from siliang.types import ConfigError

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FED: dict[str, Any] = SMALL | {"intermediate_size": 64}
BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
LATENT: dict[str, Any] = FED | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS: dict[str, Callable[[], Any]] = {
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
    ),
    "opt-narrow": lambda: t.OPTForCausalLM(
        t.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64)
    ),
    "bart": lambda: t.BartForCausalLM(t.BartConfig(**BART)),
    "gpt_neo": lambda: t.GPTNeoForCausalLM(
        t.GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            window_size=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        )
    ),
    "roformer": lambda: t.RoFormerForCausalLM(t.RoFormerConfig(**FED, embedding_size=32, is_decoder=True)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL, max_position_embeddings=64)),
    "falcon-grouped": lambda: t.FalconForCausalLM(
        t.FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2, max_position_embeddings=64)
    ),
    "falcon-alibi": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL, alibi=True, multi_query=False)),
    "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(t.DeepseekV2Config(**LATENT)),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**LATENT)),
    "mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
    "electra": lambda: t.ElectraForCausalLM(t.ElectraConfig(**FED, embedding_size=16, is_decoder=True)),
    "t5gemma2-like": lambda: Deaf(t.LlamaConfig(**FED)),
}
KINDS = {"prefix": "PrefixTuningConfig", "prompt": "PromptTuningConfig", "p-tuning": "PromptEncoderConfig"}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*[Pp]osition ids are not supported for parameter efficient tuning.*",
    "ignore:.*position_ids. is not supported for parameter efficient tuning.*",
    "ignore:.*Could not find a config file.*",
)


class Deaf(t.LlamaForCausalLM):
    """It computes its output from the token ids alone."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        size = (inputs_embeds if input_ids is None else input_ids).shape[:2]
        ids = torch.zeros(size, dtype=torch.long)
        return CausalLMOutput(logits=self.lm_head(self.model.embed_tokens(ids)))


def base(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch(left: bool) -> dict[str, torch.Tensor]:
    """Two texts, one of them padded."""
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, : 2 if left else None] = 0
    if not left:
        mask[1] = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def prompted(library: Any, name: str, kind: str, state: dict[str, torch.Tensor] | None = None) -> Any:
    config = getattr(library, KINDS[kind])(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if kind == "p-tuning":
        config.encoder_hidden_size = 8
    model = library.get_peft_model(base(name), config)
    generator = torch.Generator().manual_seed(3)
    for p in model.prompt_encoder.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model.eval()


def two_steps(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and those after a step of training."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    out = model(**inputs)
    out.loss.backward()
    optimizer.step()
    return out.logits.detach(), model(**inputs).logits.detach()


AS_PEFT = [(name, kind) for name in ("opt", "bart", "gpt_neo", "roformer") for kind in KINDS] + [
    (name, kind)
    for name in ("falcon", "falcon-grouped", "falcon-alibi", "deepseek_v2", "deepseek_v3")
    for kind in ("prompt", "p-tuning")
]


@pytest.mark.parametrize(("name", "kind"), AS_PEFT)
@pytest.mark.parametrize("left", [False, True])
def test_as_in_peft(name: str, kind: str, left: bool) -> None:
    inputs = batch(left)
    ours, theirs = (two_steps(prompted(library, name, kind), inputs) for library in (siliang, peft))
    real = inputs["attention_mask"].bool()
    for mine, other in zip(ours, theirs, strict=True):
        pair = mine[:, -7:][real], other[:, -7:][real]
        assert_close(*pair)
    assert (ours[0][:, -7:] - base(name)(**inputs).logits)[real].abs().max() > 1e-3 * float(ours[0].std())
    assert (ours[0] - ours[1])[:, -7:].abs().max() > 0


@pytest.mark.parametrize("name", ["opt", "bart", "gpt_neo"])
def test_prefixes_are_kept_in_generation(name: str) -> None:
    inputs = {k: v for k, v in batch(left=True).items() if k != "labels"}
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = [prompted(library, name, "prefix").generate(**inputs, **settings).tolist() for library in (siliang, peft)]
    assert written[0] == written[1]
    ours = prompted(siliang, name, "prefix")
    assert ours.generate(**inputs, **settings, use_cache=False).tolist() == written[0]


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [
        ("falcon", "prefix", 1),
        ("falcon-grouped", "prefix", 4),
        ("mamba", "prompt", None),
        ("mamba", "p-tuning", None),
        ("electra", "prompt", 4),
        ("opt-narrow", "p-tuning", 4),
    ],
)
def test_where_peft_does_not_run(name: str, kind: str, heads: int | None, tmp_path: Any) -> None:
    model = prompted(siliang, name, kind)
    inputs = batch(left=False)
    before, after = two_steps(model, inputs)
    assert (before - after)[:, -7:].abs().max() > 0
    assert (before[:, -7:] - base(name)(**inputs).logits).abs().max() > 1e-4 * float(before.std())
    assert model.peft_config["default"].num_attention_heads == heads
    model.save_pretrained(tmp_path)
    again = siliang.PeftModel.from_pretrained(base(name), tmp_path)
    assert_close(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("deepseek_v2", "prefix", "A prefix has one size for the keys and values of all layers, and DeepseekV2For"),
        ("deepseek_v3", "prefix", "A prefix has one size for the keys and values of all layers, and DeepseekV3For"),
        ("falcon-alibi", "prefix", "Prefix tuning cannot extend the positions .ALiBi. of FalconForCausalLM"),
        ("mamba", "prefix", "Prefix tuning finds no attention in MambaForCausalLM that it can reach"),
        ("t5gemma2-like", "prompt", "The virtual tokens of PROMPT_TUNING do not reach the output of Deaf"),
    ],
)
def test_models_without_a_place_for_a_prompt_give_one_line(name: str, kind: str, message: str) -> None:
    model: nn.Module = base(name)
    # on meta the check of a run tries it; there a mixture of experts cannot be computed
    for device in ("cpu",) if "deepseek" in name else ("cpu", "meta"):
        model.to(device)
        asked = {n: p.requires_grad for n, p in model.named_parameters()}
        config = getattr(siliang, KINDS[kind])(task_type="CAUSAL_LM", num_virtual_tokens=3)
        with pytest.raises(ConfigError, match=message) as caught:
            siliang.get_peft_model(model, config)
        assert "\n" not in str(caught.value) and " lora" in str(caught.value)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == asked
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert not any(m.training for m in model.modules())


def test_a_width_that_is_not_the_embeddings() -> None:
    config = siliang.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=7)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="token_dim = 7: the model's word embeddings have 32 columns"):
        siliang.get_peft_model(base("opt"), config)


NEAR: dict[str, Any] = FED | {"num_key_value_heads": 2, "sliding_window": 4, "pad_token_id": 0}
WINDOWED: dict[str, Callable[[], Any]] = {
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**NEAR)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**NEAR, head_dim=8)),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**NEAR, head_dim=8, layer_types=["sliding_attention", "full_attention"])
    ),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**NEAR, use_sliding_window=True, max_window_layers=1)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**NEAR, bos_token_id=1, eos_token_id=2)),
    "biogpt": lambda: t.BioGptForCausalLM(t.BioGptConfig(**FED, max_position_embeddings=64)),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "eager") for name in WINDOWED), *((name, "sdpa") for name in WINDOWED if name != "gemma2")],
)
def test_a_prefix_leaves_a_sliding_window_as_in_peft(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """BioGPT has no window, but counts positions over its padding."""
    monkeypatch.setitem(MODELS, name, WINDOWED[name])
    ours, theirs = (prompted(library, name, "prefix") for library in (siliang, peft))
    for model in (ours, theirs):
        model.get_base_model().set_attn_implementation(how)
    whole = batch(False)["input_ids"]
    with torch.no_grad():
        for inputs in (batch(False), batch(True), {"input_ids": whole}, {"input_ids": whole[:, :3]}):
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            found, wanted = (model(**inputs).logits[real] for model in (ours, theirs))
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    more = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    texts = [model.generate(input_ids=whole, **more) for model in (ours, theirs)]
    assert torch.equal(*texts)


def test_a_prefix_of_another_width_is_refused_when_it_is_opened(tmp_path: Any) -> None:
    def wide() -> Any:
        config = t.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
        return t.T5ForConditionalGeneration(config)

    settings: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}
    peft.get_peft_model(wide(), peft.PrefixTuningConfig(**settings)).save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(ConfigError, match=r"made for 4 key/value heads of 8, and T5For.* has 4 of 16.*token_dim=64"):
        siliang.PeftModel.from_pretrained(wide(), tmp_path / "peft")
    siliang.get_peft_model(wide(), siliang.PrefixTuningConfig(**settings)).save_pretrained(tmp_path / "ours")
    ids = torch.tensor([[3, 4]])
    for library in (siliang, peft):
        library.PeftModel.from_pretrained(wide(), str(tmp_path / "ours"))(input_ids=ids, decoder_input_ids=ids)
