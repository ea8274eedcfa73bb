"""X-LoRA beside the live `peft`, and through the rest of siliang."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_all_close, assert_close
from safetensors.torch import load_file, save_file
from tiny import TASK, batch, make
from torch import nn

import siliang
from siliang.config import RunConfig
from siliang.plan.preflight import Planner
from siliang.run_folder import open_run
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import AdapterError, ConfigError, InterruptedRunError, MergeError
from siliang.use.evaluate import evaluate
from siliang.use.merge import merge

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*",
    "ignore:.*Could not find a config file.*",
    "ignore:.*use_cache.*",
    "ignore:.*softmax_topk.*",
)
NETWORK = "internal_xlora_classifier"
CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "deep": {"xlora_depth": 3, "xlora_size": 8, "softmax_temperature": 0.5},
    "by-layer": {"layerwise_scalings": True, "global_scaling_weight": 0.7, "scaling_pass_value": 0.3},
    "top": {"top_k_lora": 1},
    "top-softmax": {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False, "xlora_dropout_p": 0.0},
    "top-two-softmaxes": {"top_k_lora": 2, "enable_softmax_topk": True, "xlora_dropout_p": 0.0},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Three trained LoRA adapters by base model, of different ranks, layers and scalings."""
    found: dict[str, dict[str, str]] = {}
    for base in ("llama", "gpt2", "bert"):
        found[base] = {}
        for i in range(3):
            torch.manual_seed(i)
            settings: dict[str, Any] = {"r": 2 + i, "lora_alpha": 3, "use_rslora": i == 1, "init_lora_weights": False}
            if i == 2 and base == "llama":
                settings |= {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"down_proj": 7}}
            # without a task: a classifier's head would be trained and saved along
            model = siliang.get_peft_model(make(base), siliang.LoraConfig(**settings))
            folder = tmp_path_factory.mktemp("experts") / base / str(i)
            model.save_pretrained(folder)
            found[base][str(i)] = str(folder)
    return found


def base_model(name: str) -> Any:
    model = make(name)
    model.config.use_cache = False
    return model


def pair(case: str, name: str, experts: dict[str, dict[str, str]]) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"task_type": TASK[name], "adapters": experts[name], "hidden_size": 32} | CASES[case]
    ours = siliang.get_peft_model(base_model(name), siliang.XLoraConfig(**settings))
    theirs = peft.get_peft_model(base_model(name), peft.XLoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    network: Any = theirs.base_model.internal_xlora_classifier
    for k, layer in enumerate(m for m in network.layers if isinstance(m, nn.Linear)):
        for kind, tensor in layer.named_parameters():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            shared(ours, k, kind).data.copy_(tensor.data)
    head, there = ours.state_dict(), theirs.state_dict()
    there.update({k: v for k, v in head.items() if k in there and "modules_to_save" in k})
    theirs.load_state_dict(there)
    return ours.eval(), theirs.eval()


def shared(model: Any, k: int, kind: str) -> torch.Tensor:
    return model.injection.adapters["default"].shared[f"{NETWORK}_{k}_{kind}"]


def network_gradients(model: Any) -> dict[str, Any]:
    if isinstance(model, siliang.PeftModel):
        held = model.injection.adapters["default"].shared
        return {key.removeprefix(f"{NETWORK}_"): t.grad for key, t in held.items()}
    layers = [m for m in model.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    return {f"{k}_{kind}": t.grad for k, layer in enumerate(layers) for kind, t in layer.named_parameters()}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_one_expert_is_lora(name: str, experts: dict[str, dict[str, str]]) -> None:
    """PEFT reads the experts of models alone whose paths begin with "model"."""
    base = make(name)
    expert = siliang.PeftModel.from_pretrained(base, experts[name]["1"])
    wanted = expert(**batch(name)).logits
    config = siliang.XLoraConfig(adapters={"a": experts[name]["1"]})
    found = siliang.get_peft_model(expert.unload(), config).eval()
    assert_close(found(**batch(name)).logits, wanted)


@pytest.mark.parametrize("case", CASES)
def test_forward_gradients_and_generation(case: str, experts: dict[str, dict[str, str]]) -> None:
    name = "llama"
    ours, theirs = pair(case, name, experts)
    inputs = batch(name)
    out, there = ours(**inputs), theirs(**inputs)
    assert_close(out.logits, there.logits)
    out.loss.backward()
    there.loss.backward()
    assert_all_close(network_gradients(ours), network_gradients(theirs))
    if case == "one" and TASK[name] == "CAUSAL_LM":
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = ours.generate(input_ids=inputs["input_ids"], **settings)
        assert found.tolist() == theirs.generate(input_ids=inputs["input_ids"], **settings).tolist()
        with pytest.raises(ConfigError, match="cannot compute with a cache"):
            ours.generate(input_ids=inputs["input_ids"], **settings, use_cache=True)
    with ours.disable_adapter():
        if TASK[name] == "CAUSAL_LM":
            assert torch.equal(ours(**inputs).logits, make(name).eval()(**inputs).logits)


def test_scalings_are_shown_and_set(experts: dict[str, dict[str, str]]) -> None:
    inputs, found = batch("llama"), []
    for model in pair("by-layer", "llama", experts):
        seen = []
        with torch.no_grad():
            assert model.get_latest_scalings() is None
            model.enable_scalings_logging()
            model(**inputs)
            model.disable_scalings_logging()
            model.set_topk_lora(2)
            model.set_global_scaling_weight(1.5)
            model.set_scaling_pass_value(None)
            seen.append(model(**inputs).logits)
        assert model.get_global_scaling_weight() == 1.5
        log, buckets = model.get_scalings_log(), model.get_bucketed_scalings_log()
        assert len(log) == 1 and list(buckets) == [inputs["input_ids"].shape[1]]
        assert next(iter(buckets.values()))[0] == [0]
        seen += [log[0], model.get_latest_scalings()]
        model.clear_scalings_log()
        assert not model.get_scalings_log()
        found.append(seen)
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)
    with pytest.raises(ConfigError, match="top_k_lora = 9"):
        pair("one", "llama", experts)[0].set_topk_lora(9)


def test_five_steps(experts: dict[str, dict[str, str]]) -> None:
    losses = []
    for model in pair("by-layer", "llama", experts):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = model(**batch("llama")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    assert_close(torch.stack(losses[0]), torch.stack(losses[1]))


def test_files(experts: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """PEFT's own file lacks the network's layers that have an expert's number; it reads ours."""
    ours, theirs = pair("deep", "llama", experts)
    wanted = ours(**batch("llama")).logits
    ours.save_pretrained(tmp_path / "ours")
    assert_close(siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "ours")(**batch("llama")).logits, wanted)
    there = peft.PeftModel.from_pretrained(base_model("llama"), tmp_path / "ours").eval()
    assert_close(there(**batch("llama")).logits, wanted)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=NETWORK):
        siliang.PeftModel.from_pretrained(make("llama"), tmp_path / "theirs")


def test_names_of_your_own(experts: dict[str, dict[str, str]]) -> None:
    """PEFT knows the experts by their numbers alone."""
    named = {f"expert {i}": folder for i, folder in experts["llama"].items()}
    config = siliang.XLoraConfig(task_type="CAUSAL_LM", adapters=named)
    assert siliang.get_peft_model(make("llama"), config)(**batch("llama")).loss.isfinite()
    assert config.hidden_size is None  # the adapter's own copy has it


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapters": {}}, "XLoraConfig needs adapters"),
        ({"hidden_size": 31}, "hidden_size = 31: the model's is 32"),
        ({"use_trainable_adapters": True}, "the experts stay as they are here"),
        ({"enable_softmax_topk": True}, "enable_softmax_topk needs top_k_lora"),
        ({"top_k_lora": 4}, "top_k_lora = 4: there are 3 adapters"),
        ({"softmax_temperature": 0.0}, r"softmax_temperature = 0.0: must be more than 0"),
        ({"xlora_depth": 65}, "xlora_depth = 65: must be at most 64"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str, experts: dict[str, dict[str, str]]) -> None:
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", "adapters": experts["llama"]} | settings
    with pytest.raises(ConfigError, match=said):
        siliang.get_peft_model(make("llama"), siliang.XLoraConfig(**values))


def test_experts_that_cannot_be(experts: dict[str, dict[str, str]], tmp_path: Path) -> None:
    dora = siliang.get_peft_model(make("llama"), siliang.LoraConfig(task_type="CAUSAL_LM", use_dora=True))
    dora.save_pretrained(tmp_path / "dora")
    for folder, said in (
        (str(tmp_path / "dora"), "'x' has use_dora, and X-LoRA mixes plain LoRA"),
        (experts["gpt2"]["0"], "'x' does not fit transformer.h.0.attn.c_attn: was it trained on another base model"),
    ):
        with pytest.raises(ConfigError, match=said):
            siliang.get_peft_model(make("llama"), siliang.XLoraConfig(task_type="CAUSAL_LM", adapters={"x": folder}))
    former = tmp_path / "former"  # an adapter of each expert's own layers, as models had them
    shutil.copytree(experts["llama"]["0"], former)
    tensors = load_file(former / "adapter_model.safetensors")
    save_file(
        {k.replace("self_attn.", "mlp.experts.3."): t for k, t in tensors.items()}, former / "adapter_model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"'x' has model.layers.0.mlp.experts.3.q_proj, no layer of this model"):
        siliang.get_peft_model(make("llama"), siliang.XLoraConfig(task_type="CAUSAL_LM", adapters={"x": str(former)}))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is neither"):
        siliang.get_peft_model(make("t5"), siliang.XLoraConfig(adapters=experts["llama"]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [0, 1]]),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}),
        ("velora_config", {}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "corda"),
    ],
)
def test_experts_that_only_look_plain(
    setting: str, value: object, experts: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Their tensors are called as plain LoRA's: the config tells them apart. PEFT takes them as plain."""
    folder = tmp_path / "expert"
    shutil.copytree(experts["llama"]["0"], folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {setting: value}))
    config = siliang.XLoraConfig(task_type="CAUSAL_LM", adapters={"x": str(folder)})
    with pytest.raises(ConfigError, match=f"'x' has {setting}.*, and X-LoRA mixes plain LoRA"):
        siliang.get_peft_model(make("llama"), config)


def test_a_softmax_of_a_softmax_is_told() -> None:
    with pytest.warns(UserWarning, match="softmax of the softmax.*set enable_softmax = False"):
        siliang.XLoraConfig(top_k_lora=2, enable_softmax_topk=True)


def test_training(
    experts: dict[str, dict[str, str]], model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "model": str(model_folders["llama"]),
        "task": "causal_lm",
        "method": {"name": "xlora", "adapters": experts["llama"], "layerwise_scalings": True},
        "data": {"train": str(instruction_file), "test_size": 0.2, "max_length": 32},
    }
    steps = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "log_every": 1}
    found = {}
    for name, more in {"packed": {}, "padded": {"packing": False}, "again": {"gradient_checkpointing": True}}.items():
        planner = Planner()
        run = tmp_path / name
        config = RunConfig.build(values | {"train": steps | more, "output": str(run), "accept": ["SL042"]})
        record = train(config, Listener(), planner=planner)
        found[name] = [step.loss for step in record.steps if step.loss is not None]
        assert planner.last_plan is not None and planner.last_plan.trained == record.parameters.trained
        assert evaluate(open_run(run))["loss"] == pytest.approx(record.final["eval_loss"], rel=1e-5)
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-4)
    assert found["packed"] == pytest.approx(found["again"], rel=1e-6)
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 3 and not stopped:
            stopped.append(progress.step)
            signal.raise_signal(signal.SIGTERM)

    config = RunConfig.build(values | {"train": steps, "output": str(tmp_path / "stopped"), "accept": ["SL042"]})
    with pytest.raises(InterruptedRunError):
        train(config, Listener(progress=stop))
    record = train(config, resume=True)
    assert [step.loss for step in record.steps if step.loss is not None] == found["packed"]
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()
    with pytest.raises(MergeError, match="mixed anew for each token"):
        merge(open_run(tmp_path / "packed"), tmp_path / "merged")
