"""Good folders, made once, from which a stranger's are made by changing something."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from faults.commands import run
from siliang import LoraConfig, get_peft_model

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "<s>", "</s>", "[UNK]", "Human", "Assistant", ":"]
METHODS = ("lora", "ia3", "ln_tuning", "prompt_tuning", "p_tuning", "prefix_tuning", "bitfit", "full")
TASKS = ("seq_cls", "token_cls", "question_ans", "seq_2_seq_lm")
RUNS = (*METHODS, *TASKS)
MODULES = "modules.json"  # the names of those that the runs import
# what is not needed to show what a folder does, and takes time
QUICK = ("accept=[SL002,SL003,SL006,SL010,SL012]", "data.max_length=32", "train.batch_size=4", "train.max_steps=2")


def make_bases(folder: Path, runs: Sequence[str] = RUNS, *, sets: bool = True) -> None:
    """Base models, data, an adapter, a run of each method and task, data sets and a comparison.

    In a forked process each: what training starts stays there. Modules that it imports are imported here afterwards, so
    that the cases' processes need not.

    Args:
        runs: Only these.
        sets: Data sets and a comparison too.
    """
    if not (folder / MODULES).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        modules: set[str] = set()
        for part in (_models, *map(_maker, runs), _adapter, *((_data_sets, _comparison) if sets else ())):
            modules |= _apart(part, folder)
            _import(modules)  # the next has them already
        (folder / MODULES).write_text(json.dumps(sorted(modules)))
    _import(set(json.loads((folder / MODULES).read_text())))


def _import(modules: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(modules - sys.modules.keys()):
            try:
                import_module(name)
            except Exception:  # a part of a package that cannot be imported alone
                continue


def _apart(make: Callable[[Path], None], folder: Path) -> set[str]:
    """Makes something in a forked process; the names of the modules that were imported for it."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        code = 1
        try:
            torch.set_num_threads(1)
            os.chdir(folder)
            make(folder)
            names = [n for n, m in list(sys.modules.items()) if getattr(m, "__spec__", None) and n != "__main__"]
            with os.fdopen(write, "w") as out:
                json.dump(names, out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"{make} did not work")
    return set(json.loads(text))


def word_tokenizer() -> Any:
    """Words to numbers."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


def tiny_llama() -> Any:
    """Two layers."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=80, bos_token_id=1, eos_token_id=2, **sizes, **heads)).eval()


TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m['role'] == 'user' else '' }}{{ m['content'] }}"
    "{{ '</s>' if m['role'] == 'assistant' else ' : ' }}{% endfor %}"
)


def _models(folder: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_llama().save_pretrained(folder / "llama")
    encoder: dict[str, Any] = {
        "num_labels": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    bert: Any = BertForSequenceClassification(
        BertConfig(vocab_size=80, hidden_size=32, intermediate_size=64, **encoder)
    )
    bert.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
    }
    t5: Any = T5ForConditionalGeneration(T5Config(vocab_size=80, **sizes))
    t5.save_pretrained(folder / "t5")
    for name in ("llama", "bert", "t5"):
        tokenizer.save_pretrained(folder / name)
    _rows(folder)


def _rows(folder: Path) -> None:
    n = range(24)
    rows: dict[str, list[dict[str, Any]]] = {
        "causal_lm": [{"instruction": WORDS[i], "input": "", "output": WORDS[2 * i]} for i in n],
        "seq_cls": [{"text": f"{WORDS[i % 7]} {WORDS[i % 2]}", "label": ("bad", "good")[i % 2]} for i in n],
        "token_cls": [{"tokens": [WORDS[i], WORDS[1]], "tags": ["O", ("B-X", "O")[i % 2]]} for i in n],
        "seq_2_seq_lm": [{"source": WORDS[i], "target": WORDS[2 * i]} for i in n],
        "question_ans": [
            {
                "question": f"w1 {WORDS[i]}",
                "context": f"w1 w2 {WORDS[i]} w3",
                "answers": {"text": [WORDS[i]], "answer_start": [6]},
            }
            for i in n
        ],
    }
    for task, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


def _adapter(folder: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(folder / "adapter")


def _data_sets(folder: Path) -> None:
    from datasets import load_dataset

    lines = (folder / "seq_cls.jsonl").read_text()
    for name in ("set", "plain_set"):
        (folder / name / "data").mkdir(parents=True)
        (folder / name / "data" / "train.jsonl").write_text(lines)
        (folder / name / "data" / "test.jsonl").write_text(lines)
    (folder / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train.jsonl\n"
        "  - split: test\n    path: data/test.jsonl\n---\n# Reviews\n"
    )
    saved: Any = load_dataset("json", data_files=str(folder / "seq_cls.jsonl"), cache_dir=str(folder / "cache"))
    saved.save_to_disk(str(folder / "saved_set"))
    shutil.rmtree(folder / "cache", ignore_errors=True)


def _comparison(folder: Path) -> None:
    flags = ("--model", folder / "bert", "--data", folder / "seq_cls.jsonl", "--task", "seq_cls")
    sets = [part for s in QUICK for part in ("--set", s)]
    done = run("compare", *flags, "--methods", "lora,bitfit", "--seeds", "1", "--output", folder / "comparison", *sets)
    if done.code:
        raise RuntimeError(done.err)
    done = run("report", folder / "comparison")
    if done.code:
        raise RuntimeError(done.err)


def _maker(name: str) -> Callable[[Path], None]:
    """A finished run with two checkpoints, of a method on the Llama, or of a task with LoRA."""

    def make(folder: Path) -> None:
        task = name if name in TASKS else "causal_lm"
        method = name if name in METHODS else "lora"
        base = "t5" if task == "seq_2_seq_lm" else "llama" if task == "causal_lm" else "bert"
        flags = ("--model", folder / base, "--data", folder / f"{task}.jsonl", "--task", task, "--method", method)
        sets = [part for s in (*QUICK, "train.save_every=1") for part in ("--set", s)]
        done = run("train", *flags, "--output", folder / name, *sets)
        if done.code:
            raise RuntimeError(done.out + done.err)

    return make
