"""What siliang assumes of transformers, torch and bitsandbytes, tried on tiny models; a failure is one line."""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TASK, make
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.activations import NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from siliang import PrefixTuningConfig, get_peft_model
from siliang.distributed.sharding import fake_mesh, ignore_frozen_in_ddp
from siliang.engine.fused import fused_form
from siliang.engine.patches import attention_implementation, checkpoint_layers, register_attention
from siliang.engine.step import Engine
from siliang.memory.track import on_storage_resize
from siliang.models import introspect, weights
from siliang.models.base_config import load_config
from siliang.models.invented import invented_modules
from siliang.models.load import load_model
from siliang.models.quantized import empty_quantized, float_weight, is_quantized, keep_as_stored
from siliang.plan.fake import fake_mode
from siliang.tasks import CAUSAL_LM, SEQ_CLS, TASKS
from siliang.types import TaskType

DECODERS = ("llama", "bloom", "gpt2", "qwen2")
ENCODERS = ("bert", "roberta", "deberta", "deberta_v2")
IDS = torch.arange(3, 9).view(1, 6)


def changed(library: str, what: str) -> None:
    pytest.fail(f"{library} {version(library)}: {what}", pytrace=False)


# ---- names ----


def test_names_of_classes() -> None:
    found = {
        "Conv1D": introspect.is_transposed(Conv1D(4, 2)) and introspect.features(Conv1D(4, 2)) == (2, 4),
        "BloomAttention": any(introspect.is_bloom_attention(m) for m in make("bloom").modules()),
        "DisentangledSelfAttention": all(
            any(introspect.is_disentangled_attention(m) for m in make(name).modules())
            for name in ("deberta", "deberta_v2")
        ),
        "LlamaRMSNorm": introspect.is_rms_norm(LlamaRMSNorm) and introspect.rms_eps(LlamaRMSNorm(4, eps=0.5)) == 0.5,
        "NewGELUActivation": introspect.is_gelu(NewGELUActivation) and introspect.is_gelu(BloomGelu),
        "LayerNorm": sum(introspect.is_norm(m) for m in make("bert").modules()) == 5,
    }
    for name, known in found.items():
        if not known:
            changed("transformers", f"{name} is not recognized any more")


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_stack_of_layers(name: str) -> None:
    try:
        count = len(introspect.layer_stack(make(name)))
    except introspect.NoLayerStackError as error:
        changed("transformers", str(error))
    else:
        if count != 2:
            changed("transformers", f"{name} has {count} layers that can recompute, and 2 blocks")


@pytest.mark.parametrize("name", [*DECODERS, "bert", "roberta", "t5", "bart"])
def test_attentions_ask_a_cache(name: str) -> None:
    """Prefix tuning hands each attention a cache of its own."""
    host, attentions = introspect.attention_host(make(name))
    layers = 4 if name in ("t5", "bart") else 2  # with those that look at the source
    if len(attentions) != layers or not introspect.takes_tokens(host):
        changed("transformers", f"{len(attentions)} attentions of {name} take a cache, and not {layers}")
    for attention in attentions:
        named = introspect.parameters_of(attention)
        if introspect.mask_argument(attention) not in named:
            changed("transformers", f"{type(attention).__name__} calls its mask by another name")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["llama", "bloom", "bart"])
def test_caches_are_handed_over_without_a_warning(name: str) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=2, task_type=TASK[name])
    model = get_peft_model(make(name), config).train()
    more = {"decoder_input_ids": IDS} if name == "bart" else {}
    try:
        model(IDS, **more).logits.sum().backward()
        model.eval().generate(input_ids=IDS, max_new_tokens=2)
    except Warning as warning:
        changed("transformers", f"prefix tuning of {name} warns: {warning}")


@pytest.mark.parametrize("kind", [LlamaRMSNorm, BloomGelu, NewGELUActivation])
def test_fused_modules_compute_what_these_classes_do(kind: type[nn.Module]) -> None:
    if fused_form(kind) is None:
        changed("transformers", f"{kind.__name__} computes something else than its fused form")


# ---- packed rows ----


def test_attention_goes_through_the_registered_function() -> None:
    model: Any = make("llama")
    seen: list[str] = []

    def attend(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        seen.append(type(module).__name__)
        return query.transpose(1, 2).contiguous(), None

    register_attention("contract", attend)
    before = model.config._attn_implementation
    with torch.no_grad(), attention_implementation(model.config, "contract"):
        model(IDS)
    if len(seen) != 2:
        changed("transformers", "attentions do not ask config._attn_implementation for their function at each call")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", [*DECODERS, "bert", "roberta"])
def test_packed_rows(name: str) -> None:
    """As padded ones, in BLOOM with an attention of our own."""
    model = make(name)
    engine = Engine(model, TASKS[TaskType(TASK[name])])
    if engine.padding is None:
        changed("transformers", f"{name}: {engine.notes[0]}")


def test_what_bloom_attention_holds() -> None:
    attention = next(m for m in make("bloom").modules() if isinstance(m, BloomAttention))
    for name in ("inv_norm_factor", "beta", "num_heads", "attention_dropout", "hidden_dropout", "layer_idx"):
        if not hasattr(attention, name):
            changed("transformers", f"BloomAttention has no {name}")


# ---- recomputing ----


@pytest.mark.parametrize("name", ["llama", "bloom", "bert"])
def test_checkpointing_is_turned_on_and_off(name: str) -> None:
    model = make(name).train()
    layers, calls = introspect.transformer_layers(model), list[int]()
    part = next(m for m in layers[0].modules() if isinstance(m, nn.Linear))
    part.register_forward_hook(lambda *_: calls.append(1))
    undo = checkpoint_layers(model)
    model(IDS)[0].sum().backward()
    if len(calls) != 2:
        changed("transformers", f"a layer of {name} runs {len(calls)} times a step with checkpointing, and not twice")
    undo()
    calls.clear()
    model(IDS)[0].sum().backward()
    if len(calls) != 1:
        changed("transformers", f"checkpointing of {name} stays on: another attribute than patches.CHECKPOINTING says")


# ---- loading ----


def test_weights_are_made_by_the_function_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    made: list[int] = []
    ours = weights._materialize

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(weights, "_materialize", counted)
    load_model(str(tmp_path), CAUSAL_LM.model, dtype=torch.bfloat16)
    if not made:
        changed("transformers", "from_pretrained does not make weights with core_model_loading._materialize_copy")


def test_weights_that_files_lack_are_marked(tmp_path: Path) -> None:
    model: Any = make("bert")
    model.bert.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), SEQ_CLS.model, dtype=torch.float32, labels=["a", "b"])
    if invented_modules(loaded) != ["classifier"]:
        changed("transformers", "_is_hf_initialized does not tell read weights from new ones")


def test_files_name_no_code(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    path = tmp_path / "config.json"
    named = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel"}
    for part in ({}, {"_attn_implementation_internal": "someone/kernel"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | named | part))
        config = load_config(str(tmp_path))
        if "someone/kernel" in (config._attn_implementation, *map(str, vars(config).values())):
            changed("transformers", "a config keeps the attention that its file names in another attribute")


@pytest.mark.filterwarnings("ignore:.*has an adapter in the model's folder")
def test_an_adapter_in_the_folder_is_left_aside(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    model = load_model(str(tmp_path), CAUSAL_LM.model, dtype=torch.float32)
    if any("lora" in name for name, _ in model.named_parameters()) or model._hf_peft_config_loaded:
        changed("transformers", "from_pretrained takes an adapter that lies beside a model")


# ---- who asks for PEFT's classes ----


def test_trainers_know_a_model_of_siliang() -> None:
    import accelerate.utils
    from transformers import trainer, trainer_utils

    plain = make("llama")
    model = get_peft_model(make("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type=TASK["llama"]))
    for module, name in (
        (trainer_utils, "_is_peft_model"),
        (trainer, "_is_peft_model"),
        (accelerate.utils, "is_peft_model"),
    ):
        asked = vars(module)[name]
        if not asked(model) or asked(plain):
            changed(module.__name__.partition(".")[0], f"{module.__name__}.{name} is not what trainers ask")
    if trainer_utils.unwrap_peft_model(model) is not model.get_base_model():
        changed("transformers", "unwrap_peft_model does not ask _is_peft_model")


# ---- torch ----


def test_fsdp_frees_and_allocates_weights_by_resizing() -> None:
    seen: list[int] = []
    with fake_mesh(2) as mesh:
        assert mesh is not None
        model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
        with on_storage_resize(lambda storage: seen.append(storage.nbytes())):
            model(torch.randn(2, 8)).sum().backward()
    if not seen or 0 not in seen or max(seen) < 256:
        changed("torch", "FSDP frees no weights through UntypedStorage.resize_: the plan counts them as held")


def test_ddp_leaves_out_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ignore_frozen_in_ddp(model)
    group = fake_mesh(2)
    with group:
        left_out = DistributedDataParallel(model).parameters_to_ignore
    if left_out != {"0.weight", "0.bias"}:
        changed("torch", "DDP does not leave out what _set_params_and_buffers_to_ignore_for_model names")


def test_fake_ranks() -> None:
    with fake_mesh(2) as mesh:
        assert mesh is not None
        if mesh.size() != 2:
            changed("torch", f"a group of 2 fake ranks has {mesh.size()}")


def test_models_without_memory() -> None:
    with fake_mode():
        model: Any = make("llama")
        out = model(torch.ones(1, 4, dtype=torch.long)).logits
    if type(out).__name__ != "FakeTensor" or out.shape != (1, 4, 120):
        changed("torch", "a model within FakeTensorMode has real tensors")


# ---- bitsandbytes ----


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers(bits: int) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    plain, library = nn.Linear(64, 64), vars(bitsandbytes)["nn"]
    if bits == 4:
        layer = library.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = library.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    layer(torch.randn(2, 64))
    off = float((float_weight(layer) - plain.weight.detach()).abs().max())
    if not is_quantized(layer) or not 0 < off < 0.05:
        changed("bitsandbytes", f"a weight of {bits} bits is not read back as it is (off by {off:.2g})")
    keep_as_stored(nn.ModuleList([layer]))
    settings = {"kind": "nf4", "double": True, "compute_dtype": torch.float32, "storage": torch.uint8}
    with fake_mode():
        fake = empty_quantized(nn.Linear(64, 64), bits=bits, **settings)  # type: ignore[arg-type]
        out = fake(torch.randn(2, 64, requires_grad=True))
    if out.shape != (2, 64):
        changed("bitsandbytes", f"a layer of {bits} bits does not run on fake tensors")
