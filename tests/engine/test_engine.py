"""Steps through the engine against the plain model's own loss, on padded rows: values and every gradient."""

from typing import Any

import pytest
import torch
from closeness import assert_all_close, assert_close
from stepping import gradients, padded, rows_for
from tiny import TASK, VOCABULARY, make, without_dropout
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM3VLTextConfig,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

import siliang
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.engine.padding import NotPackableError, attend
from siliang.engine.step import Engine
from siliang.models.chatglm3 import ChatGLMConfig, ChatGLMForConditionalGeneration
from siliang.models.checkpointing import enable_checkpointing
from siliang.models.introspect import transformer_layers
from siliang.ops.layout import Layout
from siliang.tasks import CAUSAL_LM, TASKS, Task
from siliang.types import ConfigError, TaskType

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
METHODS: dict[str, Any] = {
    "full": None,
    "lora": siliang.LoraConfig(init_lora_weights=False),
    "lora_bias_head": siliang.LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0),
    "ia3": siliang.IA3Config(init_ia3_weights=False),
    "ln_tuning": siliang.LNTuningConfig(),
    "prompt_tuning": siliang.PromptTuningConfig(num_virtual_tokens=3),
    "p_tuning": siliang.PromptEncoderConfig(num_virtual_tokens=3),
    "prefix_tuning": siliang.PrefixTuningConfig(num_virtual_tokens=3),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    if name == "mistral":  # whose window is shorter than the rows
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4))
    if name == "granite":
        return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0))
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0))
    if name == "chatglm3":
        return ChatGLMForConditionalGeneration(
            ChatGLMConfig(
                padded_vocab_size=VOCABULARY,
                hidden_size=32,
                ffn_hidden_size=48,
                num_layers=2,
                num_attention_heads=4,
                multi_query_group_num=2,
                kv_channels=8,
                initializer_range=0.2,
            )
        )
    return make(name)


def task_of(name: str) -> Task:
    return TASKS[TaskType(TASK.get(name, "CAUSAL_LM"))]


def plain(model: nn.Module, task: Task) -> Tensor:
    """The mean loss as transformers computes it, of one padded batch."""
    batch = padded(rows_for(task))
    return model(**batch).loss


def engine_step(model: nn.Module, task: Task, *, packing: bool, rows_at_once: int) -> tuple[Tensor, Engine]:
    """The same of our step, backward included."""
    engine = Engine(model, task, packing=packing)
    collate = StepCollator(PadCollator(0), task, rows_at_once, packed=engine.padding is not None)
    batches = collate(rows_for(task))["batches"]
    weight = sum(b.weight for b in batches)
    total = torch.zeros(())
    for batch in batches:
        with engine.loss(model, batch) as loss:
            (loss / weight).backward()
        total += loss.detach() / weight
    if engine.padding:
        engine.padding.close()
    return total, engine


def compare(name: str, method: str, *, checkpointing: bool = False) -> tuple[Engine, Engine]:
    task = task_of(name)
    model = model_of(name)
    config = METHODS[method]
    if name == "granite":  # which PEFT knows no targets of
        config = siliang.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    if config is not None:
        config = type(config)(**vars(config) | {"task_type": task.adapter_type})
        model = siliang.get_peft_model(model, config)
    without_dropout(model)
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    expected = plain(model, task)
    expected.backward()
    wanted = gradients(model)
    assert wanted
    engines = []
    for packing, rows_at_once in ((True, 8), (False, 2), (True, 2)):
        found, engine = engine_step(model, task, packing=packing, rows_at_once=rows_at_once)
        assert_close(found, expected.detach())
        assert_all_close(gradients(model), wanted)
        engines.append(engine)
    return engines[0], engines[1]


MIXTURE: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}

CHOSEN_BLOCKS = MiniMaxM3VLTextConfig(
    **SHAPE,
    num_local_experts=2,
    num_experts_per_tok=1,
    index_head_dim=16,
    index_n_heads=2,
    index_block_size=4,
    index_topk_blocks=2,
    index_local_blocks=1,
    layer_types=["minimax_m3_sparse"] * 2,
    mlp_layer_types=["dense"] * 2,
)


@pytest.mark.parametrize(
    ("config", "is_packed"),
    [
        (
            Llama4TextConfig(
                **SHAPE,
                intermediate_size_mlp=64,
                head_dim=8,
                moe_layers=[],
                attention_chunk_size=8,
                layer_types=["chunked_attention", "full_attention"],
            ),
            False,
        ),
        (Qwen2MoeConfig(**SHAPE, **MIXTURE, sliding_window=8, use_sliding_window=True, max_window_layers=1), False),
        (Qwen2MoeConfig(**SHAPE, **MIXTURE, sliding_window=8, use_sliding_window=False), True),
        (PhimoeConfig(**SHAPE, num_local_experts=2, sliding_window=8), False),
        (PhimoeConfig(**SHAPE, num_local_experts=2, sliding_window=None), True),
        (CHOSEN_BLOCKS, False),
        (MistralConfig(**SHAPE, sliding_window=8), True),
        (Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8), True),
    ],
    ids=["chunks", "mask-by-layer", "no-window", "mask", "no-mask", "blocks", "attention", "attention-by-layer"],
)
def test_what_packed_rows_would_lose(config: Any, is_packed: bool) -> None:
    """Packed rows have no masks, and the trial's rows are too short to show a window, or which blocks are chosen."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    engine = Engine(model, CAUSAL_LM)
    assert (engine.padding is not None) == is_packed
    if not is_packed:
        why = "some of its layers see windows or chunks of 8 tokens, which their masks alone know"
        if config is CHOSEN_BLOCKS:
            why = "MiniMaxM3VLAttention gives its attention block_indices, which is not known here"
        assert engine.notes[0] == f"packing is off: {why}"
    rows = rows_for(CAUSAL_LM, (30, 9, 21))
    expected = sum(
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        * sum(label != -100 for label in row["labels"][1:])
        for row in rows
    )
    (batch,) = StepCollator(PadCollator(0), CAUSAL_LM, 3, packed=is_packed)(rows)["batches"]
    with torch.no_grad(), engine.loss(model, batch) as loss:
        assert_close(loss, expected)


class Capped(LlamaForCausalLM):
    """Caps its logits, by a setting that nobody knows."""

    in_place = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.in_place:
            output.logits.div_(30).tanh_().mul_(30)
        else:
            output.logits = 30 * torch.tanh(output.logits / 30)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_that_small_logits_do_not_show(dtype: torch.dtype) -> None:
    """A trained model's logits are large; those of a trial may be near 0, where a cap does nothing."""
    torch.manual_seed(0)
    for in_place in (False, True):
        capped = Capped(LlamaConfig(**SHAPE)).eval().to(dtype)
        capped.in_place = in_place
        note = Engine(capped, CAUSAL_LM).notes[-1]
        assert note == "the loss takes all logits: its logits are changed after the output layer"
    model: Any = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**SHAPE | {"num_hidden_layers": 3}, logits_soft_cap=30.0)
    )
    engine = Engine(model.eval().to(dtype), CAUSAL_LM)
    assert not [note for note in engine.notes if "logits" in note]
    model.lm_head.weight.data *= 200
    (row,) = rows_for(CAUSAL_LM, (21,))
    (batch,) = StepCollator(PadCollator(0), CAUSAL_LM, 1, packed=engine.padding is not None)([row])["batches"]
    with torch.no_grad(), engine.loss(model, batch) as loss:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        assert float(logits.abs().max()) > 20
        assert float(loss) == pytest.approx(float(expected), rel=1e-6 if dtype == torch.float32 else 1e-2)


def test_a_model_without_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """JetMoE's layers are of the class that can, and the model says that it does not support it."""
    model = make("llama")
    assert len(Engine(model, CAUSAL_LM).recompute.layers) == 2
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert not Engine(model, CAUSAL_LM).recompute.layers
    assert len(transformer_layers(model)) == 2  # for rates by layer, and for shards
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM does not support gradient checkpointing"):
        enable_checkpointing(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "bert"])
def test_a_step_is_the_plain_step(name: str, method: str) -> None:
    on, off = compare(name, method)
    assert on.padding is not None and not on.notes
    assert off.padding is None and not off.notes


@pytest.mark.parametrize("name", ["qwen2", "roberta", "mistral", "chatglm3", "granite", "gemma2"])
def test_other_families(name: str) -> None:
    on, _ = compare(name, "lora")
    # Gemma 2 caps the scores inside of its attention, which ours does not do: it goes padded, and says so
    assert (on.padding is None) == (name == "gemma2") == bool(on.notes)


def test_a_prefix_before_a_window() -> None:
    on, _ = compare("mistral", "prefix_tuning")
    assert on.padding is not None


@pytest.mark.parametrize("name", ["deberta", "t5", "bart"])
def test_what_cannot_be_packed_goes_padded_and_says_so(name: str) -> None:
    on, _ = compare(name, "lora")
    assert on.padding is None and on.notes[0].startswith("packing is off: ")


@pytest.mark.parametrize("method", ["lora", "full", "prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("name", ["llama", "bloom", "bert"])
def test_with_gradient_checkpointing(name: str, method: str) -> None:
    on, _ = compare(name, method, checkpointing=True)
    assert on.padding is not None


def test_tokens_at_once_and_rows_at_once() -> None:
    task = CAUSAL_LM
    rows = rows_for(task, (30, 20, 10, 10, 5, 3))
    batches = StepCollator(PadCollator(0), task, 3, tokens_at_once=30)(rows)["batches"]
    assert [b.lengths for b in batches] == [(30,), (20, 10), (10, 5, 3)]
    padded = StepCollator(PadCollator(0), task, 8, tokens_at_once=40, packed=False)(
        rows_for(task, (30, 20, 10, 10, 5, 3))
    )
    assert [b.lengths for b in padded["batches"]] == [(30,), (20, 10), (10, 5, 3)]
    assert padded["rows"] == [0, 1, 2, 3, 4, 5]


def test_the_model_is_itself_again_afterwards() -> None:
    model = model_of("bloom")
    before = plain(model.eval(), CAUSAL_LM)
    engine = Engine(model, CAUSAL_LM)
    assert_close(plain(model, CAUSAL_LM), before)
    assert engine.padding is not None
    engine.padding.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_a_window_to_both_sides_is_refused() -> None:
    """The trial's rows are shorter than any window, and would not show that ours looks back alone."""
    encoder = nn.Module()
    encoder.is_causal = False  # type: ignore[assignment]
    layout = Layout.of((3, 2), 3, torch.device("cpu"))
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(NotPackableError, match="window to both sides"):
        attend(encoder, q, q, q, layout, sliding_window=128)
