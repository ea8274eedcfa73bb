"""Every script of examples/ as a user runs it, on tiny models."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from scripts import run_script
from tiny import make, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from siliang import PeftModel

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FAST = [
    "--max-steps",
    "20",
    "--batch-size",
    "4",
    "--accumulation",
    "1",
    "--learning-rate",
    "1e-2",
    "--max-length",
    "32",
]


@pytest.fixture(scope="module", autouse=True)
def _no_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


def run(script: str, *arguments: object, folder: Path) -> str:
    """What a script of examples/ prints."""
    return run_script(EXAMPLES / script, *arguments, folder=folder)


def losses(checkpoint: Path) -> list[float]:
    """What the Trainer logged up to a checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def test_bitfit_by_hand_and_by_config(model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path) -> None:
    logged = {}
    for by in ("hand", "config"):
        printed = run(
            "bitfit/bitfit.py",
            *("--model", model_folders["bloom"], "--data", instruction_file, "--by", by, *FAST),
            *("--output", tmp_path / by, "--question", "say one"),
            folder=tmp_path,
        )
        assert "reloaded: the logits differ by at most 0.0\n" in printed
        assert "768" in printed and "29,376" in printed
        logged[by] = losses(tmp_path / by / "checkpoint-20")
    assert logged["hand"] == logged["config"]
    assert logged["hand"][-1] < logged["hand"][0]
    assert sum(t.numel() for t in torch.load(tmp_path / "hand" / "trained.pt").values()) == 768


def test_methods_and_merge(model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    printed = run(
        "methods/train.py",
        *("--model", model_folders["llama"], "--data", instruction_file, *FAST, "--save-steps", 20),
        *("--prompt", "we say one two", "--encoder-hidden-size", 16),
        folder=tmp_path,
    )
    methods = ("soft-prompt", "text-prompt", "p-tuning", "prefix", "lora", "ia3", "qlora")
    assert [line.removeprefix("== ") for line in printed.splitlines() if line.startswith("== ")] == list(methods)
    for method in methods:
        first, last = losses(tmp_path / method / "checkpoint-20")
        assert last < first, method
        model = PeftModel.from_pretrained(make("llama"), tmp_path / method / "checkpoint-20")
        assert not torch.equal(logits(model), logits(model.unload()))

    folder = model_folders["llama"]
    adapter, merged = tmp_path / "lora" / "checkpoint-20", tmp_path / "merged"
    printed = run(
        "methods/merge.py",
        *("--model", folder, "--adapter", adapter, "--output", merged, "--question", "say one", "--new-tokens", 5),
        folder=tmp_path,
    )
    before, after, difference = printed.splitlines()[-3:]
    assert before.split(": ", 1)[1].strip() == after.split(": ", 1)[1].strip()
    assert float(difference.rpartition(" ")[2]) < 1e-6
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert_close(logits(plain), logits(model))
    assert AutoTokenizer.from_pretrained(merged)("say one")["input_ids"]


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (["--dtype", "float16"], "torch.float32"),
        (["--dtype", "float16", "--all-half"], "torch.float16"),
        (["--dtype", "bfloat16", "--all-half"], "torch.bfloat16"),
    ],
    ids=["fp16", "all-fp16", "all-bf16"],
)
def test_half_precision(
    flags: list[str], trained: str, model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    data = ["--model", model_folders["llama"], "--data", instruction_file, "--output", tmp_path / "run"]
    printed = run("half_precision/llama.py", *data, *FAST, *flags, folder=tmp_path)
    first, last = losses(tmp_path / "run" / "checkpoint-20")
    assert last < first
    assert printed.endswith(f"dtypes of what was trained: {trained}\n")


def test_half_precision_with_a_chat_prompt(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    printed = run(
        "half_precision/chatglm3.py",
        *("--model", model_folders["llama"], "--data", instruction_file, "--output", tmp_path / "run", *FAST),
        *("--targets", "q_proj", "v_proj", "--dtype", "bfloat16", "--no-task-type"),
        *("--question", "say one", "--new-tokens", 5),
        folder=tmp_path,
    )
    first, last = losses(tmp_path / "run" / "checkpoint-20")
    assert last < first
    labels = next(line for line in printed.splitlines() if line.startswith("its labels"))
    assert "</s>" in labels and "Human" not in labels
    config = json.loads((tmp_path / "run" / "checkpoint-20" / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_sentiment(tmp_path: Path) -> None:
    make("bert").bert.save_pretrained(tmp_path / "bert")  # type: ignore[operator,union-attr]
    word_tokenizer().save_pretrained(tmp_path / "bert")
    words = {"1": ("good", "bright", "funny", "fast"), "0": ("bad", "dull", "slow", "hated")}
    with (tmp_path / "reviews.csv").open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["label", "review"])
        for noun in ("film", "story", "actor", "world", "we"):
            writer.writerows((k, f"the {noun} was {w}") for k, ws in words.items() for w in ws)
        writer.writerow(["1", ""])  # as in ChnSentiCorp: to be left out
    printed = run(
        "sentiment/compare.py",
        *("--model", tmp_path / "bert", "--data", tmp_path / "reviews.csv", "--batch-size", 8, "--epochs", 12),
        *("--lr", 1e-2),
        folder=tmp_path,
    )
    assert "of the 8 test reviews" in printed
    table = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines()[-5:]}
    assert list(table) == ["full", "prefix-tuning", "prompt-tuning", "p-tuning", "lora"]
    counts = [line.split()[2] for line in printed.splitlines() if line.startswith("trainable params")]
    assert counts[1:] == ["2,626", "706", "25,570", "2,114"]
    epochs = [float(line.split()[3].rstrip(":")) for line in printed.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 5 * 12
    # a random frozen encoder knows nothing that the other four could use: here they run, on real models they learn
    assert table["full"] == 1.0 and epochs[11] < epochs[0] / 2


def test_instructions_in_4_bits(model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, output = model_folders["llama"], tmp_path / "run"
    run(
        "instructions_4bit/train.py",
        *("--model", folder, "--data", instruction_file, "--output", output, "--system", "yes", *FAST),
        *("--max-steps", 40, "--gradient-checkpointing"),
        folder=tmp_path,
    )
    first, last = losses(output / "checkpoint-40")
    assert last < first
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    answers = []
    for adapter in (output, output / "checkpoint-40"):
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=in_4_bits, device_map="cpu")
        model = PeftModel.from_pretrained(base, adapter)
        answers.append(logits(model))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)
    with model.disable_adapter():
        assert not torch.equal(logits(model), answers[0])
