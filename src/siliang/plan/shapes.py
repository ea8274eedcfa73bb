"""Known models, which can be planned by name without files and without a network: the tutorials' and common ones.

Each entry has the settings of the model's config.json that determine shapes. `parameters` is the published number, or
the number in the released weights; the tests count it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from siliang.config import RunConfig
from siliang.language import Bilingual
from siliang.models.base_config import load_config
from siliang.models.extra import CHATGLM
from siliang.tasks import CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, Task

Settings = dict[str, object]


@dataclass(frozen=True)
class Shape:
    """A model without weights.

    Attributes:
        kind: transformers' model_type.
        parameters: Number of parameters of the released model.
        settings: The config's settings that differ from the defaults of its class.
        task: The task that it is most often trained for.
    """

    kind: str
    parameters: int
    settings: Settings
    task: Task = CAUSAL_LM

    def config(self) -> PretrainedConfig:
        """A new config of this shape."""
        if self.kind == CHATGLM:
            from siliang.models.chatglm3 import ChatGLMConfig

            return ChatGLMConfig(**self.settings)
        return AutoConfig.for_model(self.kind, **self.settings)


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more: object) -> Settings:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "head_dim": hidden // heads,
        "tie_word_embeddings": False,
        **more,
    }


def _bloom(hidden: int, layers: int, heads: int, vocabulary: int = 250880) -> Settings:
    return {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocabulary}


_LLAMA3: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
_TIED: Settings = {"tie_word_embeddings": True}
_ENCODER = SEQ_CLS

SHAPES: dict[str, Shape] = {
    # models of the tutorials
    "bloom-1b4-zh": Shape("bloom", 1_303_111_680, _bloom(2048, 24, 16, 46145)),
    "Llama-2-7b": Shape("llama", 6_738_415_616, _llama(4096, 11008, 32, 32, 32, 32000)),
    "chatglm3-6b": Shape("chatglm", 6_243_584_000, {}),
    "chinese-roberta-wwm-ext": Shape("bert", 102_267_648, {"vocab_size": 21128}, _ENCODER),
    # common models
    "bloom-560m": Shape("bloom", 559_214_592, _bloom(1024, 24, 16)),
    "bloom-7b1": Shape("bloom", 7_069_016_064, _bloom(4096, 30, 32)),
    "gpt2": Shape("gpt2", 124_439_808, {}),
    "Llama-2-13b": Shape("llama", 13_015_864_320, _llama(5120, 13824, 40, 40, 40, 32000)),
    "Llama-3.1-8B": Shape("llama", 8_030_261_248, _llama(4096, 14336, 32, 32, 8, 128256, **_LLAMA3)),
    "Llama-3.2-1B": Shape("llama", 1_235_814_400, _llama(2048, 8192, 16, 32, 8, 128256, **_LLAMA3, **_TIED)),
    "Llama-3.2-3B": Shape("llama", 3_212_749_824, _llama(3072, 8192, 28, 24, 8, 128256, **_LLAMA3, **_TIED)),
    "Mistral-7B-v0.3": Shape("mistral", 7_248_023_552, _llama(4096, 14336, 32, 32, 8, 32768, sliding_window=None)),
    "Qwen2.5-0.5B": Shape("qwen2", 494_032_768, _llama(896, 4864, 24, 14, 2, 151936, **_TIED)),
    "Qwen2.5-1.5B": Shape("qwen2", 1_543_714_304, _llama(1536, 8960, 28, 12, 2, 151936, **_TIED)),
    "Qwen2.5-7B": Shape("qwen2", 7_615_616_512, _llama(3584, 18944, 28, 28, 4, 152064)),
    "Qwen3-0.6B": Shape("qwen3", 596_049_920, _llama(1024, 3072, 28, 16, 8, 151936, **(_TIED | {"head_dim": 128}))),
    "Qwen3-1.7B": Shape("qwen3", 1_720_574_976, _llama(2048, 6144, 28, 16, 8, 151936, **_TIED)),
    "Qwen3-4B": Shape("qwen3", 4_022_468_096, _llama(2560, 9728, 36, 32, 8, 151936, **(_TIED | {"head_dim": 128}))),
    "Qwen3-8B": Shape("qwen3", 8_190_735_360, _llama(4096, 12288, 36, 32, 8, 151936)),
    "glm-4-9b": Shape("glm", 9_399_951_360, _llama(4096, 13696, 40, 32, 2, 151552, attention_bias=True, head_dim=128)),
    "bert-base-uncased": Shape("bert", 109_482_240, {}, _ENCODER),
    "bert-base-chinese": Shape("bert", 102_267_648, {"vocab_size": 21128}, _ENCODER),
    "roberta-base": Shape(
        "roberta",
        124_645_632,
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1},
        _ENCODER,
    ),
    "MiniLM-L6": Shape(
        "bert",
        22_713_216,
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        _ENCODER,
    ),
    "t5-small": Shape("t5", 60_506_624, {"decoder_start_token_id": 0}, SEQ_2_SEQ_LM),
    "t5-base": Shape(
        "t5",
        222_903_552,
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
        SEQ_2_SEQ_LM,
    ),
}


def shape_of(name: str) -> Shape | None:
    """The known model of this name; None where a folder has it, for the folder is the model, as in training."""
    return None if Path(name).is_dir() else SHAPES.get(name)


def model_config(config: RunConfig) -> PretrainedConfig:
    """The base model's config: from its folder, from the table of shapes, or from the hub.

    Raises:
        ModelError: There is no such model.
    """
    shape = shape_of(config.model)
    return shape.config() if shape else load_config(config.model, revision=config.revision)


def shape_name(name: str) -> str:
    """A shape's name in the table's case; any other name unchanged."""
    return next((known for known in SHAPES if known.lower() == name.lower() and not Path(name).is_dir()), name)


def meant_by(name: str) -> list[Bilingual]:
    """Says that the folder is meant where a known model has the same name; empty otherwise."""
    if name not in SHAPES or shape_of(name) is not None:
        return []
    return [
        Bilingual(
            f"{name} is planned as the folder {Path(name).absolute()}, not as the known model of that name.",
            f"{name} 按文件夹 {Path(name).absolute()} 预估，而不是同名的已知模型。",
        )
    ]


def task_of(name: str, config: PretrainedConfig) -> Task:
    """The task that a model of this name or config is most often trained for."""
    if (shape := shape_of(name)) is not None:
        return shape.task
    if getattr(config, "is_encoder_decoder", False):
        return SEQ_2_SEQ_LM
    architecture = (getattr(config, "architectures", None) or [""])[0]
    writes = architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    return CAUSAL_LM if writes else SEQ_CLS
