"""A base model in 4 and 8 bits under adapters, with bitsandbytes on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_all_close, assert_close
from tiny import batch, make, word_tokenizer, write_jsonl

import siliang
from siliang.config import QuantizationConfig, RunConfig
from siliang.hardware import Choice
from siliang.models.load import load_model
from siliang.models.quantized import float_weight
from siliang.plan import plan
from siliang.plan.device import Device
from siliang.tasks import CAUSAL_LM, TASKS
from siliang.train.run import train
from siliang.types import ConfigError, MergeError, TaskType
from tests.engine.test_prompt_sharing import assert_shares, prompts_behind

bitsandbytes = pytest.importorskip("bitsandbytes")

METHODS: dict[str, Any] = {
    "lora": siliang.LoraConfig(target_modules="all-linear", init_lora_weights=False),
    "dora": siliang.LoraConfig(use_dora=True, init_lora_weights=False),
    "alora": siliang.LoraConfig(alora_invocation_tokens=batch("bloom")["input_ids"][0][2:4].tolist()),
    "velora": siliang.LoraConfig(velora_config=siliang.VeloraConfig(num_groups=8)),
    "bdlora": siliang.LoraConfig(use_bdlora=siliang.BdLoraConfig(target_modules_bd_a=["query"], nblocks=2)),
    "ia3": siliang.IA3Config(init_ia3_weights=False),
    "miss": siliang.MissConfig(init_weights=False, r=8),
    "miss_bat": siliang.MissConfig(init_weights="bat", r=8),
    "lokr": siliang.LoKrConfig(init_weights=False, r=4),
    "fourierft": siliang.FourierFTConfig(n_frequency=40),
    "c3a": siliang.C3AConfig(block_size=8),
    "shira": siliang.ShiraConfig(init_weights=False, r=4),
    "hira": siliang.HiraConfig(init_weights=False, r=8),
    "vera": siliang.VeraConfig(r=8),
    "adalora": siliang.AdaLoraConfig(init_lora_weights=False, total_step=10),
    "delora": siliang.DeloraConfig(r=4),
    "gralora": siliang.GraloraConfig(r=8),
    "randlora": siliang.RandLoraConfig(r=8, randlora_alpha=8),
    "vblora": siliang.VBLoRAConfig(num_vectors=16, vector_length=16, init_vector_bank_bound=0.5),
    "lily": siliang.LilyConfig(init_weights=False, r=8),
    "waveft": siliang.WaveFTConfig(n_frequency=100),
    "poly": siliang.PolyConfig(init_weights=False, r=4),
    "ln_tuning": siliang.LNTuningConfig(),
    "prompt_tuning": siliang.PromptTuningConfig(num_virtual_tokens=4),
    "p_tuning": siliang.PromptEncoderConfig(num_virtual_tokens=4),
    "adaption_prompt": siliang.AdaptionPromptConfig(adapter_len=4),
    "prefix_tuning": siliang.PrefixTuningConfig(num_virtual_tokens=4),
    "bitfit": siliang.BitFitConfig(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose layers are wide enough for blocks of 64."""
    made = {}
    for name in ("llama", "bloom", "bert"):
        made[name] = tmp_path_factory.mktemp("models") / name
        make(name).save_pretrained(made[name])  # type: ignore[operator]
        word_tokenizer().save_pretrained(made[name])
    return made


def load(folder: Path, task: str = "CAUSAL_LM", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return load_model(
        str(folder), TASKS[TaskType(task)].model, dtype=dtype, quantization=QuantizationConfig(**settings)
    )


WAYS = [(method, bits, dtype) for method in METHODS for bits in (4, 8) for dtype in (torch.float32, torch.bfloat16)]
# in `make test` every method on 4 bits, and on the others one of each family; all of them in `make test-long`
FAMILIES = ("lora", "loha", "oft", "vera", "ia3", "bitfit", "prefix_tuning")


@pytest.mark.parametrize(
    ("method", "bits", "dtype"),
    [
        way if way[1:] == (4, torch.float32) or way[0] in FAMILIES else pytest.param(*way, marks=pytest.mark.long)
        for way in WAYS
    ],
)
def test_every_method_trains(method: str, bits: int, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    compute = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    name = "llama" if method == "adaption_prompt" else "bloom"
    base = load(folders[name], dtype=dtype, bits=bits, compute_dtype=compute)
    stored = {n: p.data.clone() for n, p in base.named_parameters() if not p.is_floating_point()}
    assert len(stored) == {"bloom": 8, "llama": 14}[name]  # four or seven linear layers a block, and no head
    config = METHODS[method]
    config.task_type = "CAUSAL_LM"
    model: Any = siliang.get_peft_model(base, config)
    rate = 1e-1 if method == "c3a" else 1e-2  # C3A's own: its steps are small
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(6):
        loss = model(**batch(name)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-4
    assert all(torch.equal(model.unload().get_parameter(n), p) for n, p in stored.items())


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_an_adapter_computes_as_on_the_dequantized_weights(method: str, folders: dict[str, Path]) -> None:
    """The same base with its linear layers replaced by what 4 bits give back: same outputs, same gradients."""
    four: Any = load(folders["llama"], compute_dtype="fp32")
    plain: Any = make("llama")
    with torch.no_grad():
        for name, module in four.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                plain.get_submodule(name).weight.copy_(float_weight(module))
    config = METHODS[method]
    models = [siliang.get_peft_model(base, config) for base in (four, plain)]
    models[1].load_state_dict(
        {n: p for n, p in models[0].state_dict().items() if "_l." in n or "lora_" in n}, strict=False
    )
    out = []
    for model in models:
        result = model(**batch("llama"))
        result.loss.backward()
        out.append((result.logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert_close(out[0][0], out[1][0])
    assert_all_close(out[0][1], out[1][1])


def test_heads_and_output_layers_keep_their_bits(folders: dict[str, Path]) -> None:
    assert type(load(folders["llama"]).lm_head) is torch.nn.Linear
    classifier = load(folders["bert"], "SEQ_CLS")
    assert type(classifier.classifier) is torch.nn.Linear
    assert isinstance(classifier.bert.encoder.layer[0].attention.self.query, bitsandbytes.nn.Linear4bit)
    model = siliang.get_peft_model(classifier, siliang.LoraConfig(task_type=TaskType.SEQ_CLS))
    model(**batch("bert")).loss.backward()


@pytest.mark.parametrize(("bits", "method"), [(4, "lora"), (8, "ia3"), (4, "prefix_tuning")])
def test_texts_behind_one_beginning(bits: int, method: str, folders: dict[str, Path]) -> None:
    base = load(folders["llama"], bits=bits, compute_dtype="fp32")
    config = type(METHODS[method])(**vars(METHODS[method]) | {"task_type": "CAUSAL_LM"})
    assert_shares(siliang.get_peft_model(base, config).eval(), prompts_behind(35))


def test_no_merging_into_four_bits(folders: dict[str, Path]) -> None:
    model = siliang.get_peft_model(load(folders["llama"]), METHODS["lora"])
    with pytest.raises(MergeError, match="load the base model in 16 bits"):
        model.merge_and_unload()
    assert model.active_adapters == ["default"]
    with pytest.raises(ConfigError, match="not a quantized one"):
        siliang.get_peft_model(load(folders["llama"]), siliang.LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match=r"kasa_config changes the base weight: .* not quantized"):
        siliang.get_peft_model(load(folders["llama"]), siliang.LoraConfig(r=4, kasa_config=siliang.KasaConfig()))


def test_an_evaluation_between_two_steps_changes_nothing(folders: dict[str, Path]) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes would pack the weights in eval mode, and gradients would be gone."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    users_own = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=four_bits)
    for base in (load(folders["llama"], dtype=torch.bfloat16, compute_dtype="bf16"), users_own):
        model: Any = siliang.get_peft_model(base, METHODS["lora"])
        gradients = []
        for _ in range(2):
            model.train()
            model(**batch("llama")).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
            model.zero_grad()
            with torch.no_grad():
                model.eval()(**batch("llama"))
        assert all(torch.equal(g, gradients[1][n]) and g.any() for n, g in gradients[0].items())


def test_preparing_copies_nothing_to_fp32(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], dtype=torch.bfloat16, compute_dtype="bf16")
    before = {n: p.dtype for n, p in model.named_parameters()}
    model = siliang.prepare_model_for_kbit_training(model)
    assert {n: p.dtype for n, p in model.named_parameters()} == before
    tuned: Any = siliang.get_peft_model(model, METHODS["lora"])
    tuned.train()
    tuned(**batch("llama")).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_a_run_in_four_bits_merges_into_its_base(folders: dict[str, Path], tmp_path: Path) -> None:
    """siliang train on 4 bits, predict on them, merge into the whole base model."""
    from siliang.records import Record
    from siliang.run_folder import open_run
    from siliang.train.run import train
    from siliang.use.merge import merge

    rows = [{"instruction": f"say {w}", "output": w} for w in ("one", "two", "three", "four", "five", "six")]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    config = RunConfig.build(
        {
            "model": str(folders["llama"]),
            "task": "causal_lm",
            "method": "lora",
            "quantization": {"bits": 4},
            "data": {"train": str(data), "test_size": 0.0, "max_length": 32},
            "train": {"max_steps": 3, "batch_size": 2},
            "output": str(tmp_path / "run"),
        }
    )
    train(config)
    assert Record.read(tmp_path / "run").config["quantization"]["type"] == "nf4"
    opened = open_run(tmp_path / "run")
    assert opened.model.get_base_model().is_quantized
    proof = merge(open_run(tmp_path / "run", quantized=False), tmp_path / "merged")
    assert proof.holds
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(ConfigError, match="full fine-tuning needs all its bits"):
        train(RunConfig.build(config.model_dump() | {"method": "full", "output": str(tmp_path / "full")}))


@pytest.mark.parametrize("config", [siliang.OSFConfig(), siliang.LNTuningConfig(target_modules=["q_proj"])])
def test_refused_on_a_quantized_base(config: Any, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="load the base model without quantization"):
        siliang.get_peft_model(load(folders["llama"]), config)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "lora", "init_lora_weights": "corda"}, "'corda' starts from a base model in 16 or 32 bits"),
        ({"name": "lora", "init_lora_weights": "lora_ga"}, "'lora_ga' starts from a base model in 16 or 32 bits"),
        ({"name": "lora", "init_lora_weights": "pissa_niter_2"}, "'pissa_niter_2' starts from a base model"),
        ({"name": "lora", "kasa_config": {}}, "kasa_config changes the base weight"),
        ({"name": "osf"}, "OSF splits the base model's own weights"),
    ],
)
def test_refused_before_anything_is_read_or_planned(method: dict[str, Any], words: str, tmp_path: Path) -> None:
    settings = {"task": "causal_lm", "method": method, "quantization": {"bits": 8}, "output": str(tmp_path / "run")}
    config = RunConfig.build(settings | {"model": "nowhere", "data": {"train": "nothing.jsonl"}})
    with pytest.raises(ConfigError, match=rf"^quantization\.bits = 8: .*{words}"):
        train(config)
    device = Device("cpu", None, "as asked", Choice("fp32", "as asked"), 0, 0, here=True)
    known = config.model_copy(update={"model": "Llama-3.2-1B"})
    (planned,) = plan(known, device, with_data=False, timed=False).methods
    assert planned.error is not None and words in planned.error and "\n" not in planned.error


def test_compute_dtype_is_not_fp32_where_16_bits_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    from siliang import hardware
    from siliang.models.load import _quantized

    cpu = torch.device("cpu")
    for native, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "has_bf16", lambda device, native=native: native)
        made = _quantized(QuantizationConfig(), CAUSAL_LM.model, cpu, shardable=False)["quantization_config"]
        assert made.bnb_4bit_compute_dtype is wanted
