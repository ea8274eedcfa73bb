"""New tokens of a run: learned, saved, resumed, opened by siliang and by PEFT, and merged."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from tiny import VOCABULARY, WORDS, make, word_tokenizer, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from siliang.check import gather_input
from siliang.config import RunConfig
from siliang.data.vocabulary import grow_vocabulary
from siliang.models.quantized import count_parameters
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.tasks.adapter_config import adapter_config
from siliang.train.run import train
from siliang.train.start_adapter import filled_in
from siliang.types import ConfigError
from siliang.use.generate import generate
from siliang.use.merge import merge
from tests.data.test_tasks import command, run

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def test_new_tokens_are_learned_and_saved(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"instruction": f"say {w}", "output": f"<new> {w}"} for w in WORDS[:24]]
    data = {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "max_length": 32}
    tokens = [f"<new{i or ''}>" for i in range(90)]  # more than the embedding has room for
    data["add_tokens"] = tokens  # type: ignore[assignment]
    _, measured = run(
        tmp_path, model_folders["llama"], "causal_lm", data, train={"max_steps": 40, "learning_rate": 5e-3}
    )
    opened = open_run(tmp_path / "run")
    number = opened.tokenizer.convert_tokens_to_ids("<new>")
    assert opened.model.get_input_embeddings().weight.shape[0] >= number
    assert measured["loss"] < 3.5  # 4.9 by chance; the old tokens of this random model stay as they are
    prompt = [*opened.tokenizer("Human: say film\n\nAssistant:", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        first = int(opened.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    assert first == number


def settings_of(base: str, whole: bool) -> dict[str, Any]:
    """LoRA, with the rows of the new tokens, or with the whole embeddings."""
    return {"name": "lora", "modules_to_save": [EMBEDDINGS[base]]} if whole else {"name": "lora"}


EMBEDDINGS = {"llama": "embed_tokens", "bloom": "word_embeddings"}


# PEFT's word on a tied embedding that is trained: siliang's merge parts the two
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("base", ["llama", "bloom"])  # the output head apart, and tied to the embedding
def test_a_grown_vocabulary_goes_everywhere(
    base: str, whole: bool, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Trained, saved, opened by siliang and by PEFT, and merged into a plain model folder."""
    rows = [{"instruction": f"say {w}", "output": f"<new> {w}"} for w in WORDS[:24]]
    data = {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "max_length": 32}
    tokens = ["<new>", *(f"<new{i}>" for i in range(90))]
    run(
        tmp_path,
        model_folders[base],
        "causal_lm",
        data | {"add_tokens": tokens},
        train={"max_steps": 10, "learning_rate": 1e-2},
        method=settings_of(base, whole),
    )
    opened = open_run(tmp_path / "run", dtype=torch.float32)
    adapter_file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    n, number = len(opened.tokenizer), opened.tokenizer.convert_tokens_to_ids("<new>")
    assert n > VOCABULARY
    ids = torch.tensor([opened.tokenizer("say <new> film")["input_ids"]])
    assert number in ids
    plain: Any = AutoModelForCausalLM.from_pretrained(model_folders[base])
    old = plain.get_input_embeddings().weight.detach().clone()
    plain.resize_token_embeddings(n)
    with torch.no_grad():
        logits = opened.model(input_ids=ids).logits
        there = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
        assert_close(there(input_ids=ids).logits, logits)
        assert merge(opened, tmp_path / "merged").holds
        merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_close(merged(input_ids=ids).logits, logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == n == merged.config.vocab_size
    for module in (merged.get_input_embeddings(), merged.get_output_embeddings()):
        assert module.weight.shape[0] == n
    new = merged.get_input_embeddings().weight
    assert (new[number] - new[number + 1 :].mean(0)).abs().max() > 0.01  # seen in training, unlike the others
    assert torch.equal(new[:50], old[:50]) is not whole  # old tokens are as they were where rows alone are trained
    tables = sum("embed" in key or "lm_head" in key for key in load_file(adapter_file))
    assert tables == (1 if base == "bloom" and not whole else 2)
    apart = merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight
    assert apart == (whole or base == "llama")


def test_four_new_tokens_cost_four_rows(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """In parameters and in the file, also where the tokenizer has a reserved token that the user names; and resumed,
    with other settings, to the same end.
    """
    rows = [{"instruction": f"say {w}", "output": f"<new1> {w}"} for w in WORDS[:24]]
    tokens = ["<new0>", "<new1>", "dull", "<new2>"]
    data = {"train": str(write_jsonl(tmp_path / "d.jsonl", rows)), "max_length": 32, "add_tokens": tokens}
    base, steps = model_folders["llama"], {"learning_rate": 1e-2, "save_every": 2, "warmup_fraction": 0}
    values = {"model": str(base), "task": "causal_lm", "data": data, "output": str(tmp_path / "plain")}
    config = RunConfig.build(values | {"train": steps | {"max_steps": 4, "schedule": "constant"}})
    width = AutoConfig.from_pretrained(base).hidden_size
    plain = RunConfig.build(values | {"data": data | {"add_tokens": []}})
    counts = [count_parameters(gather_input(one).attached())[0] for one in (config, plain)]
    assert counts[0] - counts[1] == 2 * 4 * width
    train(config)
    part = config.model_copy(update={"output": str(tmp_path / "part")})
    train(part.model_copy(update={"train": part.train.model_copy(update={"max_steps": 2})}))
    train(part, resume=True)
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "part")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    tables = {key: t.shape for key, t in files[0].items() if "lora" not in key}
    assert set(tables.values()) == {(4, width)} and len(tables) == 2
    opened = open_run(tmp_path / "plain")
    ids = opened.tokenizer.convert_tokens_to_ids(tokens)
    saved = json.loads((tmp_path / "plain" / "adapter" / "adapter_config.json").read_text())
    assert saved["trainable_token_indices"] == {"model.embed_tokens": ids, "lm_head": ids}
    assert isinstance(generate(opened, "say film", max_new_tokens=4), str)
    further = RunConfig.build(filled_in({"adapter": str(tmp_path / "plain"), "data": data, "output": "o"}))
    assert count_parameters(gather_input(further).attached())[0] == counts[0]


@pytest.mark.parametrize(
    ("method", "whole"),
    [
        ({"name": "lora", "target_modules": ["q_proj", "lm_head"]}, True),
        ({"name": "lora", "modules_to_save": ["lm_head"]}, True),
        ({"name": "ia3"}, True),
        ({"name": "trainable_tokens"}, False),
        ({"name": "trainable_tokens", "token_indices": [5, 7]}, False),
    ],
)
def test_what_learns_new_tokens(method: dict[str, Any], whole: bool, model_folders: dict[str, Path]) -> None:
    config = RunConfig.build(
        {
            "model": str(model_folders["llama"]),
            "task": "causal_lm",
            "method": method,
            "data": {"train": "-", "add_tokens": ["<new>"]},
            "output": "-",
        }
    )
    found: Any = adapter_config(config, make("llama"), [9])
    assert (
        found.modules_to_save is not None and {"model.embed_tokens", "lm_head"} <= {*found.modules_to_save}
    ) == whole
    assert getattr(found, "trainable_token_indices", None) is None
    if method["name"] == "trainable_tokens":
        assert found.token_indices == sorted([9, *method.get("token_indices", [])])
        assert found.target_modules == ["model.embed_tokens", "lm_head"]


def test_trained_tokens_without_the_new_ones_are_refused(model_folders: dict[str, Path]) -> None:
    values = {
        "model": str(model_folders["llama"]),
        "task": "causal_lm",
        "data": {"train": "-", "add_tokens": ["<new>"]},
    }
    config = RunConfig.build(values | {"output": "-", "method": {"name": "lora", "trainable_token_indices": [9, 3]}})
    with pytest.raises(ConfigError, match=r"lacks new tokens of data\.add_tokens for lm_head"):
        adapter_config(config, make("llama"), [9])
    assert adapter_config(config, make("gpt2"), [9])


def test_a_grown_vocabulary_through_the_commands(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": f"<new> {w}", "label": "ab"[i % 2]} for i, w in enumerate(WORDS[:20])]
    settings = {
        "model": str(model_folders["bert"]),
        "task": "seq_cls",
        "data": {
            "train": str(write_jsonl(tmp_path / "d.jsonl", rows)),
            "max_length": 32,
            "add_tokens": ["<new>", *(f"<new{i}>" for i in range(90))],
        },
        "train": {"max_steps": 2, "batch_size": 8, "log_every": 1},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    config = RunConfig.build(settings)
    assert "not planned" not in command("train", tmp_path / "run.yaml")
    attached = gather_input(config).attached()  # as the run has it, grown and with the embeddings trained
    counts = Record.read(tmp_path / "run").parameters
    assert count_parameters(attached) == (counts.trained, counts.total)
    assert command("predict", tmp_path / "run", "<new> film").endswith("<new> film\n")
    assert "rows 2" in command("eval", tmp_path / "run")


def test_bad_new_tokens() -> None:
    with pytest.raises(ConfigError, match="holds 'a' twice"):
        grow_vocabulary(word_tokenizer(), ["a", "a"])
    with pytest.raises(ConfigError, match="which is not a token"):
        grow_vocabulary(word_tokenizer(), [" "])
