"""Published parameter counts, on the meta device: no weights are needed. Sources: the tutorials that siliang began
from, and print_trainable_parameters() outputs published for bloom-1b4-zh, Llama-2-7B and chinese-roberta-wwm-ext.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from siliang import (
    BitFitConfig,
    HeadConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from siliang.methods import METHODS
from siliang.models.quantized import count_parameters


def bloom_1b4_zh() -> nn.Module:
    with torch.device("meta"):
        return BloomForCausalLM(BloomConfig(vocab_size=46145, hidden_size=2048, n_layer=24, n_head=16))


def llama_2_7b() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                tie_word_embeddings=False,
            )
        )


def chinese_roberta() -> nn.Module:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(vocab_size=21128))


def test_bloom_1b4_zh_itself() -> None:
    assert sum(p.numel() for p in bloom_1b4_zh().parameters()) == 1_303_111_680


def test_bitfit_on_bloom_1b4_zh_adds_nothing() -> None:
    model = get_peft_model(bloom_1b4_zh(), BitFitConfig(task_type=TaskType.CAUSAL_LM))
    assert model.get_nb_trainable_parameters() == (544_768, 1_303_111_680)


@pytest.mark.parametrize(
    ("targets", "trained", "total"),
    [
        (None, 1_572_864, 1_304_684_544),
        (["query_key_value", "dense_4h_to_h"], 3_538_944, 1_306_650_624),
    ],
)
def test_lora_on_bloom_1b4_zh(targets: list[str] | None, trained: int, total: int) -> None:
    model = get_peft_model(bloom_1b4_zh(), LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=targets))
    assert model.get_nb_trainable_parameters() == (trained, total)


def test_lora_by_regex_with_saved_embeddings() -> None:
    config = LoraConfig(target_modules=r".*\.1.*query_key_value", modules_to_save=["word_embeddings"])
    assert get_peft_model(bloom_1b4_zh(), config).get_nb_trainable_parameters() == (95_225_856, 1_398_337_536)


def test_lora_on_llama_2_7b(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(llama_2_7b(), LoraConfig(task_type=TaskType.CAUSAL_LM))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622\n"


def test_lora_on_chinese_roberta_counts_the_classifier_once_or_twice() -> None:
    model = get_peft_model(chinese_roberta(), LoraConfig(task_type=TaskType.SEQ_CLS, lora_alpha=16, lora_dropout=0.1))
    trained, total = model.get_nb_trainable_parameters()
    assert (trained, total) == (296_450, 102_565_636)
    # the tutorial's PEFT 0.2 counted the model without the original of the copied classifier
    original = sum(p.numel() for n, p in model.named_parameters() if "original_module" in n)
    assert total - original == 102_564_098
    assert isinstance(model, PeftModel)


P_TUNING = {"num_virtual_tokens": 10, "encoder_hidden_size": 2048}
ON_BLOOM = {
    "prompt": (PromptTuningConfig(num_virtual_tokens=10), 20_480),
    "prompt, 7 tokens": (PromptTuningConfig(num_virtual_tokens=7), 14_336),
    "P-tuning, MLP": (PromptEncoderConfig(**P_TUNING), 12_609_536),
    "P-tuning, LSTM": (PromptEncoderConfig(**P_TUNING, encoder_reparameterization_type="LSTM"), 193_030_144),  # type: ignore[arg-type]
    "prefix": (PrefixTuningConfig(num_virtual_tokens=10), 983_040),
    "prefix, projected": (PrefixTuningConfig(num_virtual_tokens=10, prefix_projection=True), 205_641_728),
    "IA3": (IA3Config(), 344_064),
    "LoRA and embeddings": (
        LoraConfig(target_modules=r".*\.1.*query_key_value", modules_to_save=["word_embeddings"]),
        95_225_856,
    ),
}


@pytest.mark.parametrize("name", ON_BLOOM)
def test_every_method_on_bloom_1b4_zh(name: str) -> None:
    config, trained = ON_BLOOM[name]
    config.task_type = TaskType.CAUSAL_LM
    model = get_peft_model(bloom_1b4_zh(), config)
    assert model.get_nb_trainable_parameters() == (trained, 1_303_111_680 + trained)


ON_ROBERTA = {
    "prefix": (PrefixTuningConfig(num_virtual_tokens=20), 370_178),
    "prompt": (PromptTuningConfig(num_virtual_tokens=20), 16_898),
    "P-tuning": (PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=128), 230_914),
    "LoRA": (LoraConfig(), 296_450),
}


@pytest.mark.parametrize("name", ON_ROBERTA)
def test_every_method_on_chinese_roberta(name: str) -> None:
    config, trained = ON_ROBERTA[name]
    config.task_type = TaskType.SEQ_CLS
    model = chinese_roberta()
    assert count_parameters(model)[1] == 102_269_186  # full fine-tuning
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == trained


# ---- the figures of docs/methods.md ----

DOC = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
MODELS = (bloom_1b4_zh, llama_2_7b, chinese_roberta)
LSTM = {"encoder_reparameterization_type": "LSTM", "num_virtual_tokens": 10}
COUNTED: dict[str, PeftConfig] = {
    "`lora`, r=8": LoraConfig(),
    "`lora`, r=8, all-linear": LoraConfig(target_modules="all-linear"),
    "`lora`, r=8, use_dora": LoraConfig(use_dora=True),
    "`ia3`": IA3Config(),
    "`ln_tuning`": LNTuningConfig(),
    "`bitfit`": BitFitConfig(),
    "`prompt_tuning`, 20 tokens": PromptTuningConfig(num_virtual_tokens=20),
    "`p_tuning`, MLP, 20 tokens, hidden 128": PromptEncoderConfig(num_virtual_tokens=20, encoder_hidden_size=128),
    "`p_tuning`, LSTM, 10 tokens": PromptEncoderConfig(**LSTM),  # type: ignore[arg-type]
    "`prefix_tuning`, 20 tokens": PrefixTuningConfig(num_virtual_tokens=20),
    "`prefix_tuning`, 10 tokens, projected": PrefixTuningConfig(num_virtual_tokens=10, prefix_projection=True),
    "`head`": HeadConfig(),
}


@pytest.mark.parametrize("row", COUNTED)
def test_counts_in_the_document(row: str) -> None:
    table = DOC[DOC.index("## Trained parameters") :]
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    figures = [cell.strip() for cell in line.strip("|").split("|")][1:]
    for make, figure in zip(MODELS, figures, strict=True):
        if not figure[:1].isdigit():
            continue  # no biases, no head
        COUNTED[row].task_type = "SEQ_CLS" if make is chinese_roberta else "CAUSAL_LM"  # type: ignore[assignment]
        assert f"{get_peft_model(make(), COUNTED[row]).get_nb_trainable_parameters()[0]:,}" == figure


def test_learning_rates_in_the_document() -> None:
    table = DOC[DOC.index("## Learning rates") : DOC.index("## Compared")]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")]
    assert [(name.strip("`"), float(rate), source) for name, rate, source in rows] == [
        (m.name, m.learning_rate, m.learning_rate_source) for m in METHODS.values()
    ]
