"""A hub cache with stand-ins for the models, adapters, tokenizers and data that Hugging Face PEFT's own tests name.

`python tests/peft_suite/hub.py FOLDER` fills FOLDER; the tests then run with HF_HOME=FOLDER and HF_HUB_OFFLINE=1. Each
model is of the class of the original and about its size, with random weights: tests that expect the numbers of the
originals fail. Adapters are made by the live `peft`.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as tf
from datasets import Dataset, Image, load_dataset
from peft import BOFTConfig, LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

PEFT, HF, TRL = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"

SMALL = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"vocab_size": 32000}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 1024}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MOE = GROUPED | EXPERTS | {"hidden_size": 8, "intermediate_size": 32, "head_dim": 2}
ENCODER = SMALL | {"vocab_size": 1124, "hidden_size": 32, "num_hidden_layers": 5, "intermediate_size": 37}
RELATIVE = ENCODER | {"relative_attention": True, "position_biased_input": False, "pos_att_type": "c2p|p2c"}
GPT2 = {"vocab_size": 1024, "n_embd": 32, "n_layer": 5, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 1103, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
OPT = {"vocab_size": 50265, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_hidden_layers": 5}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 100}
OPT_125M = OPT | {"vocab_size": 1024, "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 256}
OPT_125M |= {"num_hidden_layers": 12, "max_position_embeddings": 2048}
BOTH_SIDES = {"d_model": 16, "vocab_size": 1024, "encoder_layers": 2, "decoder_layers": 2}
BOTH_SIDES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = VISION | {"vocab_size": 1000, "num_hidden_layers": 5, "projection_dim": 32, "max_position_embeddings": 77}
CLIP |= {"bos_token_id": 0, "eos_token_id": 2}
GEMMA4 = GROUPED | {"vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 8, "num_hidden_layers": 4}
GEMMA4 |= {"num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 16, "num_key_value_heads": 1}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
MAMBA = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "intermediate_size": 32}
NEMOTRON = GROUPED | {"layer_types": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8}
NEMOTRON |= {"ssm_state_size": 8, "n_groups": 1}
WHISPER = BOTH_SIDES | {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
RESNET = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3}
LLAVA = {
    "text_config": GROUPED | {"model_type": "llama", "vocab_size": 32064},
    "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 30, "patch_size": 6},
}
QWEN_VL = {
    "text_config": GROUPED
    | {"model_type": "qwen2_5_vl_text"}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "vision_config": {"model_type": "qwen2_5_vl_vision", "hidden_size": 16, "depth": 2, "num_heads": 4}
    | {"intermediate_size": 32, "out_hidden_size": 16, "fullatt_block_indexes": [1]},
}

# class, model type, settings, repositories
MODELS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("OPTForCausalLM", "opt", OPT, (f"{PEFT}/tiny-random-OPTForCausalLM",)),
    ("OPTForCausalLM", "opt", OPT_125M, (f"{PEFT}/opt-125m", "facebook/opt-125m")),
    ("OPTForCausalLM", "opt", OPT | {"vocab_size": 300}, (f"{PEFT}/opt-tokenizer-revision-base",)),
    *(
        ("GPT2LMHeadModel", "gpt2", GPT2, (name,))
        for name in (f"{PEFT}/tiny-random-GPT2LMHeadModel", f"{PEFT}/tiny-random-gpt2", f"{HF}/tiny-random-gpt2")
    ),
    ("GPT2LMHeadModel", "gpt2", {"dtype": "bfloat16"}, ("gpt2",)),  # a test counts its parameters
    ("GPTJForCausalLM", "gptj", GPT2 | {"rotary_dim": 4}, (f"{PEFT}/tiny-random-GPTJForCausalLM",)),
    ("GPTNeoXForCausalLM", "gpt_neox", ENCODER, (f"{PEFT}/tiny-random-GPTNeoXForCausalLM",)),
    (
        "BloomForCausalLM",
        "bloom",
        {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4},
        (f"{PEFT}/tiny-random-BloomForCausalLM",),
    ),
    ("LlamaForCausalLM", "llama", LLAMA, tuple(f"{at}/tiny-random-LlamaForCausalLM" for at in (TRL, PEFT, HF))),
    ("LlamaForSequenceClassification", "llama", GROUPED, (f"{TRL}/tiny-LlamaForSequenceClassification-3.2",)),
    ("MistralForCausalLM", "mistral", GROUPED | {"vocab_size": 32000}, (f"{HF}/tiny-random-MistralForCausalLM",)),
    ("Qwen2ForCausalLM", "qwen2", GROUPED, (f"{PEFT}/tiny-dummy-qwen2",)),
    ("Qwen2ForCausalLM", "qwen2", GROUPED | {"tie_word_embeddings": True}, ("Qwen/Qwen2-0.5B",)),
    ("Qwen3ForCausalLM", "qwen3", GROUPED | {"head_dim": 8}, (f"{TRL}/tiny-Qwen3ForCausalLM",)),
    (
        "Gemma3ForCausalLM",
        "gemma3_text",
        GROUPED | {"vocab_size": 4096, "head_dim": 8, "hidden_size": 32, "num_key_value_heads": 1},
        (f"{HF}/tiny-random-Gemma3ForCausalLM",),
    ),
    ("Gemma4ForCausalLM", "gemma4_text", GEMMA4, (f"{PEFT}/tiny-random-gemma4-E2B",)),
    (
        "Llama4ForCausalLM",
        "llama4_text",
        MOE | {"intermediate_size_mlp": 32, "num_experts_per_tok": 1},
        (f"{TRL}/tiny-Llama4ForCausalLM",),
    ),
    ("GptOssForCausalLM", "gpt_oss", MOE | {"dtype": "bfloat16"}, (f"{TRL}/tiny-GptOssForCausalLM",)),
    (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        GROUPED | EXPERTS | {"head_dim": 8, "moe_intermediate_size": 32},
        (f"{TRL}/tiny-Qwen3MoeForCausalLM", f"{HF}/tiny-qwen3-moe"),
    ),
    ("MixtralForCausalLM", "mixtral", GROUPED | {"num_local_experts": 4}, (f"{HF}/Mixtral-tiny",)),
    ("NemotronHForCausalLM", "nemotron_h", NEMOTRON, (f"{TRL}/tiny-NemotronHForCausalLM-nano",)),
    ("FalconMambaForCausalLM", "falcon_mamba", MAMBA, ("tiiuae/falcon-mamba-tiny-dev",)),
    *(
        ("T5ForConditionalGeneration", "t5", T5, (f"{PEFT}/tiny-random-{name}",))
        for name in ("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration-calibrated")
    ),
    ("T5ForConditionalGeneration", "t5", T5 | {"feed_forward_proj": "gated-gelu"}, ("google/flan-t5-small",)),
    (
        "BartForConditionalGeneration",
        "bart",
        BOTH_SIDES | {"max_position_embeddings": 100, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4},
        (f"{PEFT}/tiny-random-BartForConditionalGeneration",),
    ),
    ("BertModel", "bert", ENCODER, (f"{PEFT}/tiny-random-BertModel", f"{HF}/tiny-random-BertModel")),
    ("RobertaModel", "roberta", ENCODER, (f"{PEFT}/tiny-random-RobertaModel",)),
    ("DebertaModel", "deberta", RELATIVE, (f"{PEFT}/tiny-random-DebertaModel",)),
    ("DebertaV2Model", "deberta-v2", RELATIVE, (f"{PEFT}/tiny-random-DebertaV2Model",)),
    *(
        (
            f"{name}ForSequenceClassification",
            name.lower(),
            ENCODER,
            (f"{PEFT}/tiny-random-{name}ForSequenceClassification",),
        )
        for name in ("Bert", "Roberta")
    ),
    ("CLIPTextModelWithProjection", "clip_text_model", CLIP, (f"{PEFT}/tiny-clip-text-2",)),
    ("ResNetForImageClassification", "resnet", RESNET, (f"{PEFT}/tiny-random-ResNetForImageClassification",)),
    ("LlavaForConditionalGeneration", "llava", LLAVA, (f"{HF}/tiny-random-LlavaForConditionalGeneration",)),
    (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        QWEN_VL,
        (f"{TRL}/tiny-Qwen2_5_VLForConditionalGeneration",),
    ),
    ("WhisperForConditionalGeneration", "whisper", WHISPER, (f"{PEFT}/tiny-whisper",)),
]

OPT_LORA = f"{PEFT}/tiny-random-OPTForCausalLM"
# repository: (base model, class, config)
ADAPTERS: dict[str, tuple[str, str, Any]] = {
    f"{PEFT}/tiny-OPTForCausalLM-lora": (OPT_LORA, "OPTForCausalLM", LoraConfig(task_type="CAUSAL_LM")),
    f"{PEFT}/tiny-opt-lora-revision": (OPT_LORA, "OPTForCausalLM", LoraConfig(task_type="CAUSAL_LM")),
    f"{PEFT}/tiny_OPTForSequenceClassification-lora": (
        OPT_LORA,
        "OPTForSequenceClassification",
        LoraConfig(task_type="SEQ_CLS"),
    ),
    f"{PEFT}/tiny_OPTForQuestionAnswering-lora": (
        OPT_LORA,
        "OPTForQuestionAnswering",
        LoraConfig(task_type="QUESTION_ANS"),
    ),
    f"{PEFT}/tiny_OPTForFeatureExtraction-lora": (OPT_LORA, "OPTModel", LoraConfig(task_type="FEATURE_EXTRACTION")),
    f"{PEFT}/tiny_T5ForSeq2SeqLM-lora": (
        f"{PEFT}/tiny-random-t5",
        "T5ForConditionalGeneration",
        LoraConfig(task_type="SEQ_2_SEQ_LM"),
    ),
    f"{PEFT}/tiny_GPT2ForTokenClassification-lora": (
        f"{PEFT}/tiny-random-gpt2",
        "GPT2ForTokenClassification",
        LoraConfig(task_type="TOKEN_CLS", fan_in_fan_out=True),
    ),
    f"{PEFT}/tiny_WhisperForConditionalGeneration-lora": (
        f"{PEFT}/tiny-whisper",
        "WhisperForConditionalGeneration",
        LoraConfig(target_modules=["q_proj", "v_proj"]),
    ),
    f"{PEFT}/opt-125m-dummy-lora": (f"{PEFT}/opt-125m", "OPTForCausalLM", LoraConfig(init_lora_weights=False)),
    f"{PEFT}/gpt2-lora-random": ("gpt2", "GPT2LMHeadModel", LoraConfig(fan_in_fan_out=True, init_lora_weights=False)),
    f"{PEFT}/tiny-random-BertModel-lora": (f"{HF}/tiny-random-BertModel", "BertLMHeadModel", LoraConfig()),
    f"{PEFT}/test-lora-subfolder": (OPT_LORA, "OPTForCausalLM", LoraConfig()),
    f"{PEFT}/boft-tiny-opt-peft-v0.12": (
        OPT_LORA,
        "OPTForCausalLM",
        BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    ),
    "ybelkada/test-st-lora": (OPT_LORA, "OPTForCausalLM", LoraConfig()),
}
# adapters whose tokenizer has more tokens than the base model has rows
EXTENDED = {
    f"{PEFT}/tiny-random-OPTForCausalLM-extended-vocab": (OPT_LORA, 50300, "main"),
    f"{PEFT}/opt-tokenizer-revision": (f"{PEFT}/opt-tokenizer-revision-base", 310, "my-revision"),
}
REVISIONS = {f"{PEFT}/tiny-random-BertModel": ("v2.0.0",)}  # other weights under another name
RENAMED = {  # repository: (revision, subfolder)
    f"{PEFT}/tiny-opt-lora-revision": ("test", ""),
    f"{PEFT}/tiny-random-BertModel-lora": ("v1.2.3", ""),
    f"{PEFT}/test-lora-subfolder": ("main", "test"),
}


def main(folder: Path) -> None:
    """Writes what is missing."""
    hub = folder / "hub"
    for kind, model_type, settings, names in MODELS:
        for name in names:
            for revision in ("main", *REVISIONS.get(name, ())):
                add(hub, name, partial(save_model, kind=kind, model_type=model_type, settings=settings), revision)
    for name, (base, kind, config) in ADAPTERS.items():
        revision, subfolder = RENAMED.get(name, ("main", ""))
        save = partial(save_adapter, hub=hub, base=base, kind=kind, config=config, subfolder=subfolder)
        add(hub, name, save, revision)
    for name, (base, size, revision) in EXTENDED.items():
        add(hub, name, partial(save_extended, hub=hub, base=base, size=size), revision)
    add(hub, f"{PEFT}/tiny-LlavaForConditionalGeneration", partial(save_llava, hub=hub))
    add(hub, f"{HF}/tiny-sd-pipe", save_stable_diffusion)
    save_data(folder / "datasets")


def add(hub: Path, name: str, save: Callable[[Path], None], revision: str = "main") -> None:
    """A repository, as the hub's cache has it: snapshots/COMMIT, and refs/REVISION with the commit."""
    root = hub / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
    if (root / "refs" / revision).exists():
        return
    torch.manual_seed(int(commit[:8], 16))
    shutil.rmtree(root / "snapshots" / commit, ignore_errors=True)
    (root / "snapshots" / commit).mkdir(parents=True)
    try:
        save(root / "snapshots" / commit)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        shutil.rmtree(root)
        return
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    print(name, revision)


def cached(hub: Path, name: str) -> Path:
    """The folder of a repository that is there."""
    root = hub / f"models--{name.replace('/', '--')}"
    return root / "snapshots" / (root / "refs" / "main").read_text()


def config_of(model_type: str, settings: dict[str, Any]) -> Any:
    return AutoConfig.for_model(model_type, **settings)


def save_model(at: Path, kind: str, model_type: str, settings: dict[str, Any]) -> None:
    config = config_of(model_type, settings)
    model: PreTrainedModel = getattr(tf, kind)(config)
    model.to(getattr(torch, settings.get("dtype", "float32"))).save_pretrained(at)
    tokenizer().save_pretrained(at)
    if kind.startswith("ResNet"):
        tf.ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(at)


def save_adapter(at: Path, hub: Path, base: str, kind: str, config: Any, subfolder: str) -> None:
    model = get_peft_model(getattr(tf, kind).from_pretrained(cached(hub, base)), config)
    config.base_model_name_or_path = base
    model.save_pretrained(at / subfolder)


def save_extended(at: Path, hub: Path, base: str, size: int) -> None:
    model = tf.OPTForCausalLM.from_pretrained(cached(hub, base))
    model.resize_token_embeddings(size)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    config.base_model_name_or_path = base
    adapted.save_pretrained(str(at), save_embedding_layers=True)
    tokenizer(size).save_pretrained(at)


def save_llava(at: Path, hub: Path) -> None:
    words = tokenizer(32064)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    source = cached(hub, f"{HF}/tiny-random-LlavaForConditionalGeneration")
    model = tf.LlavaForConditionalGeneration.from_pretrained(source)
    model.config.image_token_id = words.convert_tokens_to_ids("<image>")
    model.resize_token_embeddings(len(words))
    model.save_pretrained(at)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    tf.LlavaProcessor(images, words, patch_size=6, vision_feature_select_strategy="default").save_pretrained(at)


def save_stable_diffusion(at: Path) -> None:
    diffusers = import_module("diffusers")

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )
    text = tf.CLIPTextModel(config_of("clip_text_model", CLIP))
    words = tokenizer()
    pipe = diffusers.StableDiffusionPipeline(
        vae, text, words, unet, diffusers.PNDMScheduler(skip_prk_steps=True), None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(at)


def tokenizer(size: int = 300) -> PreTrainedTokenizerFast:
    """Each byte is a token; the rest of `size` are words that no text has."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = special + letters + [f"<extra_{n}>" for n in range(size - len(special) - len(letters))]
    built = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def save_data(folder: Path) -> None:
    """The data sets, as `datasets` keeps what it has loaded."""
    from PIL import Image as Picture
    from sklearn.datasets import load_iris

    flowers: Any = load_iris()
    columns = ["SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm"]
    iris = Dataset.from_dict(dict(zip(columns, flowers["data"].T.tolist(), strict=True)))
    quotes = [f"Quote {n}: what is said once is said." for n in range(64)]
    english = Dataset.from_dict({"quote": quotes, "author": ["nobody"] * 64})
    sentences = [f"film {n} is {'good' if n % 2 else 'bad'}" for n in range(32)]
    sst2 = Dataset.from_dict({"sentence": sentences, "label": [n % 2 for n in range(32)], "idx": list(range(32))})
    with tempfile.TemporaryDirectory() as made:
        picture = Path(made) / "cat.png"
        Picture.effect_noise((640, 480), 64).convert("RGB").save(picture)
        pixels = {"bytes": picture.read_bytes(), "path": None}  # the file is gone when the tests run
        cat = Dataset.from_dict({"image": [pixels]}).cast_column("image", Image())
        keep(folder, "huggingface/cats-image", "default", {"test": cat})
    keep(folder, "scikit-learn/iris", "default", {"train": iris})
    keep(folder, "ybelkada/english_quotes_copy", "default", {"train": english})
    keep(folder, "nyu-mll/glue", "sst2", {"train": sst2, "validation": sst2})


def keep(folder: Path, name: str, config: str, splits: dict[str, Dataset]) -> None:
    owner, short = name.split("/")
    at = folder / f"{owner}___{short}" / config / "0.0.0" / hashlib.sha1(name.encode()).hexdigest()
    if at.exists():
        return
    with tempfile.TemporaryDirectory() as made:
        files = {}
        for split, rows in splits.items():
            files[split] = str(Path(made) / f"{split}.parquet")
            rows.to_parquet(files[split])
        load_dataset("parquet", data_files=files, cache_dir=f"{made}/cache")
        (info,) = Path(made, "cache").rglob("dataset_info.json")
        facts = json.loads(info.read_text()) | {"config_name": config, "dataset_name": short}
        for split in splits:
            facts["splits"][split]["dataset_name"] = short
            (info.parent / f"parquet-{split}.arrow").rename(info.parent / f"{short}-{split}.arrow")
        info.write_text(json.dumps(facts))
        shutil.copytree(info.parent, at)
    print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
