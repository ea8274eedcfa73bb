"""ChatGLM3's architecture: as the original computes, and at home in transformers, PEFT and siliang."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from closeness import assert_all_close, assert_close
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import siliang
from siliang import LoraConfig, TaskType, get_peft_model
from siliang.models.base_config import load_config
from siliang.models.chatglm3 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel
from siliang.models.chatglm3.model import CACHE, RotaryEmbedding
from siliang.models.checkpointing import enable_checkpointing
from siliang.models.load import load_model
from siliang.tasks import CAUSAL_LM, SEQ_CLS
from siliang.types import ModelError

# what the published config.json says beside the shape
PUBLISHED = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "layernorm_epsilon": 1e-05,
    "model_type": "chatglm",
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPE = {
    "num_layers": 2,
    "padded_vocab_size": 120,
    "vocab_size": 120,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
}


def config(**changes: Any) -> ChatGLMConfig:
    return ChatGLMConfig(**(SHAPE | changes))


@pytest.fixture
def model() -> ChatGLMForConditionalGeneration:
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(config(initializer_range=0.2)).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def published(model: ChatGLMForConditionalGeneration, tmp_path: Path) -> Path:
    """A folder as it is published: fp16, remote code named, frequencies among the weights."""
    folder = tmp_path / "chatglm3-6b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED | SHAPE))
    tensors = {name: t.half() for name, t in model.state_dict().items()}
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.full((2,), 7.0).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- as the original computes ----


@pytest.fixture
def golden(shared: Path, tmp_path: Path) -> tuple[ChatGLMModel, dict[str, Tensor]]:
    source = shared / "golden" / "glm3"
    shutil.copy(source / "config.json", tmp_path / "config.json")
    shutil.copy(source / "weights.safetensors", tmp_path / "model.safetensors")
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, ChatGLMModel)
    assert not any(info.values())
    return model.eval(), load_file(source / "expected.safetensors")


@pytest.mark.shared
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden_hidden_states_in_one_pass(golden: tuple[ChatGLMModel, dict[str, Tensor]], attention: str) -> None:
    model, expected = golden
    model.set_attn_implementation(attention)
    found = model(expected["input_ids"], use_cache=False).last_hidden_state
    assert_close(found, expected["last_hidden_state"])


@pytest.mark.shared
@pytest.mark.parametrize("first", [1, 3])
def test_golden_hidden_states_step_by_step(golden: tuple[ChatGLMModel, dict[str, Tensor]], first: int) -> None:
    model, expected = golden
    ids = expected["input_ids"]
    steps = [ids[:, :first], *ids[:, first:].split(1, dim=1)]
    found, cache = [], None
    for step in steps:
        out = model(step, **{CACHE: cache}, use_cache=True)
        found.append(out.last_hidden_state)
        cache = out[CACHE]
    assert_close(torch.cat(found, dim=1), expected["last_hidden_state"])


def test_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    tuned = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM))
    assert tuned.get_nb_trainable_parameters() == (1_949_696, 6_245_533_696)
    assert tuned.peft_config["default"].target_modules == ["query_key_value"]


def test_rope_ratio_stretches_the_base() -> None:
    positions = torch.tensor([[0, 31_999]])
    cos, sin = RotaryEmbedding(config(kv_channels=128, rope_ratio=50))(positions, torch.float32)
    angles = 31_999 * 500_000.0 ** (-2 * torch.arange(32, dtype=torch.float64) / 64)
    torch.testing.assert_close(cos[0, 1].double(), angles.cos(), atol=2e-3, rtol=0)  # fp32 angles up to 32,000
    torch.testing.assert_close(sin[0, 1].double(), angles.sin(), atol=2e-3, rtol=0)


# ---- at home in transformers ----


def test_sdpa_equals_eager(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    logits = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert_close(*logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: ChatGLMForConditionalGeneration, ids: Tensor, side: str) -> None:
    gap = torch.zeros(1, 3, dtype=torch.long)
    parts = [gap, ids[:1, :6]] if side == "left" else [ids[:1, :6], gap]
    batch = torch.cat([torch.cat(parts, dim=1), ids[1:]])
    mask = torch.ones_like(batch)
    mask[0, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[0, :6] = 1
    found = model(batch, attention_mask=mask).logits
    assert_close(found[0][mask[0].bool()], model(ids[:1, :6]).logits[0])
    assert_close(found[1], model(ids[1:]).logits[0])


def test_a_left_padded_row_counts_from_its_own_first_token(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = torch.stack([torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5]), torch.arange(9)])
    given = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, given, atol=0, rtol=0)


def test_packed_rows_do_not_see_each_other(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    packed = torch.cat([ids[0, :5], ids[1]])[None]
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    found = model(packed, position_ids=positions, use_cache=False).logits[0]
    assert_close(found[:5], model(ids[:1, :5]).logits[0])
    assert_close(found[5:], model(ids[1:]).logits[0])


def test_greedy_generation_with_the_cache_equals_full_passes(
    model: ChatGLMForConditionalGeneration, ids: Tensor
) -> None:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for row, skipped in ((0, 3), (1, 0)):
        text = ids[row : row + 1, skipped:]
        for _ in range(8):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert found[row, skipped:].tolist() == text[0].tolist()


def test_a_static_cache_answers_alike(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = [
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        ).tolist()
        for cache in ("dynamic", "static")
    ]
    assert found[0] == found[1]


def test_generation_stops_at_the_end_token(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    free = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:].tolist()
    stop = free[3]
    found = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=stop, pad_token_id=0)[0, 9:]
    assert found.tolist() == free[: free.index(stop) + 1]


def test_a_chat_model_also_stops_where_it_hands_over() -> None:
    with torch.device("meta"):
        chat = ChatGLMForConditionalGeneration(ChatGLMConfig(num_layers=1))
    assert chat.generation_config is not None
    assert chat.generation_config.eos_token_id == [2, 64795, 64797]


def test_logits_to_keep(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    whole = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_the_loss_is_that_of_the_next_token(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(ids, labels=labels)
    wanted = nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert_close(out.loss, wanted)
    halved = model(ids, labels=labels, num_items_in_batch=torch.tensor(20)).loss  # of 10 labelled tokens
    assert_close(halved, wanted / 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    model: ChatGLMForConditionalGeneration, ids: Tensor, reentrant: bool
) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    enable_checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    assert model.transformer.encoder.layers[1].gradient_checkpointing
    again = gradients()
    assert plain.keys() == again.keys() == dict(model.named_parameters()).keys()
    assert_all_close(again, plain)


def test_hidden_states_and_attentions(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 3
    assert [a.shape for a in out.attentions] == [(2, 4, 9, 9)] * 2
    assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 9))


def test_half_precision_keeps_the_frequencies(model: ChatGLMForConditionalGeneration, ids: Tensor) -> None:
    whole = model(ids).logits
    half = model.bfloat16()(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().max() < 0.05 * whole.abs().max()


def test_resizing_the_embedding(model: ChatGLMForConditionalGeneration) -> None:
    model.resize_token_embeddings(128, mean_resizing=False)
    assert (model.config.padded_vocab_size, model.config.vocab_size) == (128, 128)
    assert model(torch.tensor([[127]])).logits.shape == (1, 1, 128)


# ---- folders ----


def test_the_published_folder_opens_without_its_code(
    published: Path, model: ChatGLMForConditionalGeneration, ids: Tensor
) -> None:
    opened = load_model(str(published), CAUSAL_LM.model, dtype=torch.float32)
    assert type(opened) is ChatGLMForConditionalGeneration
    assert_close(opened(ids).logits, model.half().float()(ids).logits)


told_to_trust = pytest.param(
    True,
    marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.5"), reason="older transformers prefer the folder's code"
    ),
)


@pytest.mark.parametrize("trust", [None, False, told_to_trust])
def test_the_auto_classes_never_ask_for_remote_code(published: Path, trust: bool | None) -> None:
    assert isinstance(AutoConfig.from_pretrained(published, trust_remote_code=trust), ChatGLMConfig)
    for auto, name in (
        (AutoModel, "ChatGLMModel"),
        (AutoModelForCausalLM, "ChatGLMForConditionalGeneration"),
        (AutoModelForSequenceClassification, "ChatGLMForSequenceClassification"),
    ):
        opened, info = auto.from_pretrained(published, trust_remote_code=trust, output_loading_info=True)
        assert type(opened).__name__ == name
        assert opened.dtype == torch.float16
        assert not info["unexpected_keys"]
        assert info["missing_keys"] == ({"score.weight"} if "Classification" in name else set())


def test_what_is_saved_has_the_published_layout(published: Path, ids: Tensor, tmp_path: Path) -> None:
    opened = load_model(str(published), CAUSAL_LM.model, dtype=torch.float32)
    opened.save_pretrained(tmp_path / "again")
    block = "transformer.encoder.layers.{}."
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == {
        "transformer.embedding.word_embeddings.weight",
        "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
        *(
            block.format(i) + name
            for i in (0, 1)
            for name in (
                "input_layernorm.weight",
                "self_attention.query_key_value.weight",
                "self_attention.query_key_value.bias",
                "self_attention.dense.weight",
                "post_attention_layernorm.weight",
                "mlp.dense_h_to_4h.weight",
                "mlp.dense_4h_to_h.weight",
            )
        ),
    }
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    kept = (PUBLISHED | SHAPE).keys() - {"_name_or_path", "architectures", "torch_dtype", "vocab_size", "auto_map"}
    assert {key: written[key] for key in kept} == {key: (PUBLISHED | SHAPE)[key] for key in kept}
    again = load_model(str(tmp_path / "again"), CAUSAL_LM.model, dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, opened(ids).logits, atol=0, rtol=0)


def test_blocks_are_spread_whole_over_devices(published: Path, ids: Tensor, tmp_path: Path) -> None:
    whole = load_model(str(published), CAUSAL_LM.model, dtype=torch.float32)
    spread: Any = AutoModelForCausalLM.from_pretrained(
        published,
        dtype=torch.float32,
        device_map={
            "transformer.embedding": "cpu",
            "transformer.rotary_pos_emb": "cpu",
            "transformer.encoder.layers.0": "cpu",
            "transformer.encoder.layers.1": "disk",
            "transformer.encoder.final_layernorm": "cpu",
            "transformer.output_layer": "cpu",
        },
        offload_folder=tmp_path / "offload",
    )
    assert_close(spread(ids).logits, whole(ids).logits)
    assert spread._no_split_modules >= {"GLMBlock"}


def test_transformers_finds_the_usual_names_in_the_config() -> None:
    found = config()
    assert found.num_hidden_layers == 2
    assert found.vocab_size == 120
    assert found.num_key_value_heads == 2
    assert found.head_dim == 8
    assert found.intermediate_size == 48
    assert found.max_position_embeddings == 8192
    assert config(multi_query_attention=False).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        ({"rmsnorm": False}, "rmsnorm=False is not supported"),
        ({"post_layer_norm": False}, "post_layer_norm=False"),
        ({"quantization_bit": 4}, "Load the fp16 weights"),
        ({"pre_seq_len": 128}, "P-tuning v2"),
        ({"position_encoding_2d": True}, "first ChatGLM-6B"),
        ({"multi_query_group_num": 3}, "must be a multiple"),
    ],
)
def test_other_architectures_are_refused(published: Path, change: dict[str, Any], said: str) -> None:
    (published / "config.json").write_text(json.dumps(PUBLISHED | SHAPE | change))
    with pytest.raises(ModelError, match=said):
        load_config(str(published))


# ---- tuned ----

peft_still_says = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@peft_still_says
def test_an_adapter_of_siliang_gives_the_same_logits_in_peft(published: Path, ids: Tensor, tmp_path: Path) -> None:
    ours = get_peft_model(
        load_model(str(published), CAUSAL_LM.model, dtype=torch.float32), LoraConfig(task_type=TaskType.CAUSAL_LM)
    )
    torch.manual_seed(2)
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    ours.eval().save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight" in keys
    base = load_model(str(published), CAUSAL_LM.model, dtype=torch.float32)
    before = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    wanted = ours(ids).logits
    assert_close(theirs(input_ids=ids).logits, wanted)
    assert (wanted - before).abs().max() > 0.01


@peft_still_says
def test_an_adapter_of_peft_gives_the_same_logits_in_siliang(published: Path, ids: Tensor, tmp_path: Path) -> None:
    base = load_model(str(published), CAUSAL_LM.model, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    assert theirs.get_nb_trainable_parameters()[0] == 2 * 8 * (32 + 64)
    theirs.save_pretrained(tmp_path / "adapter")
    again = load_model(str(published), CAUSAL_LM.model, dtype=torch.float32)
    ours = siliang.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@peft_still_says
def test_peft_sizes_a_prefix_by_the_heads_of_keys_and_values(
    model: ChatGLMForConditionalGeneration, ids: Tensor
) -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, prefix)
    assert tuned.get_nb_trainable_parameters()[0] == 4 * 2 * 2 * (2 * 8)
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tuned.parameters() if p.requires_grad)


def test_lora_lowers_the_loss_under_gradient_checkpointing(published: Path, ids: Tensor) -> None:
    model = get_peft_model(
        load_model(str(published), CAUSAL_LM.model, dtype=torch.float32), LoraConfig(task_type=TaskType.CAUSAL_LM)
    )
    model.train()
    enable_checkpointing(model, use_reentrant=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_classes_are_read_off_the_last_token(published: Path, ids: Tensor) -> None:
    model = load_model(str(published), SEQ_CLS.model, dtype=torch.float32, labels=["bad", "good", "dull"])
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids], dim=1)
    found = model(padded, attention_mask=(padded != 0).long()).logits
    assert_close(found, model(ids).logits)
    tuned = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS))
    assert tuned.peft_config["default"].modules_to_save == ["classifier", "score"]


def test_lora_on_four_bits(published: Path, ids: Tensor) -> None:
    pytest.importorskip("bitsandbytes")
    model: Any = AutoModelForCausalLM.from_pretrained(
        published,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    block = model.transformer.encoder.layers[0]
    for linear in (block.self_attention.query_key_value, block.self_attention.dense, block.mlp.dense_h_to_4h):
        assert type(linear).__name__ == "Linear4bit"
    assert type(model.transformer.output_layer) is nn.Linear
    tuned = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM))
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
