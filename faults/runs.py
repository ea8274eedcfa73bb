"""Small runs in separate processes, short enough to be killed many times."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from siliang import files
from siliang.config import RunConfig
from siliang.records import Record
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener, Planner
from siliang.types import SiliangError

WORDS = [f"w{i}" for i in range(60)]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_dropout": 0.1},
    "ia3": {},
    "ln_tuning": {},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4, "prefix_projection": True},
    "bitfit": {},
    "full": {},
}


@dataclass(frozen=True)
class Place:
    """A base model and data."""

    model: Path
    data: Path

    def config(self, output: Path, method: str = "lora", **train_settings: Any) -> RunConfig:
        """A run of 36 steps, three epochs, with dropout, held-out rows, and checkpoints between its log lines."""
        settings = {
            "epochs": 3,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "log_every": 4,
            "eval_every": 7,
            "save_every": 3,
        }
        values = {
            "model": str(self.model),
            "task": "causal_lm",
            "method": {"name": method, **METHODS.get(method, {})},
            "data": {"train": str(self.data), "max_length": 32},
            "train": settings | train_settings,
            "output": str(output),
        }
        return RunConfig.build(values)


def make_place(folder: Path, *, rows: int = 52, dropout: float = 0.1) -> Place:
    """A Llama of two tiny layers, with dropout and biases in its attention, a tokenizer of words, and instructions."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=80,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            attention_dropout=dropout,
            attention_bias=True,  # for BitFit
            **sizes,
        )
    )
    words = {w: i for i, w in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", "Human", "Assistant", ":", *WORDS])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    place = Place(folder / "model", folder / "data.jsonl")
    model.save_pretrained(place.model)
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names).save_pretrained(place.model)
    lines = [
        {"instruction": " ".join(WORDS[i % 40 : i % 40 + 1 + i % 7]), "input": "", "output": WORDS[(3 * i) % 60]}
        for i in range(rows)
    ]
    place.data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return place


@dataclass
class Seen:
    """What was tried.

    Attributes:
        failed: Cases that did not end as they should: the message was not clear, or a saved file was damaged.
        skipped: Cases that this machine does not allow.
    """

    cases: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.cases > 0 and not self.failed

    def see(self, name: str, right: bool, what: object = "") -> None:
        self.cases += 1
        if not right:
            self.failed.append(f"{name}: {what}")


@dataclass
class Ending:
    """How a process ended.

    Attributes:
        code: Its exit code; negative for the signal that killed it.
        output: The lines that the run printed, and those of the error.
    """

    code: int
    output: str


class Child:
    """A run in a forked process, which need not import anything again."""

    def __init__(
        self,
        config: RunConfig,
        *,
        resume: bool = False,
        hook: Callable[[], None] = lambda: None,
        pace_s: float = 0.0,
        planner: Planner | None = None,
    ) -> None:
        """Starts.

        Args:
            hook: Called in the child before the run.
            pace_s: What each step waits.
        """
        self._read, write = os.pipe()
        self._text = b""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: see below
            self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        code = 1
        out = os.fdopen(write, "w", buffering=1)
        try:
            os.close(self._read)
            gc.freeze()  # to look through what the parent holds takes longer than a step, and copies its pages

            def step(progress: Progress) -> None:
                print(f"step {progress.step}", file=out)
                time.sleep(pace_s)

            torch.set_num_threads(1)  # the threads of the parent are not here
            hook()
            listener = Listener(say=lambda line: print(line, file=out), progress=step)
            train(config, listener, resume=resume, planner=planner)
            code = 0
        except SiliangError as error:
            print(f"error[{error.code}]: {error}", file=out)
            code = error.exit_code
        except BaseException:
            traceback.print_exc(file=out)
        finally:
            os._exit(code)

    def wait_for(self, word: str, timeout_s: float = 60.0) -> bool:
        """Waits until the child has printed `word`; returns whether it did before its end."""
        until = time.monotonic() + timeout_s
        while word.encode() not in self._text and time.monotonic() < until:
            if not self._hear(max(0.0, until - time.monotonic())):
                break
        return word.encode() in self._text

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> Ending:
        self.signal(signal.SIGKILL)
        return self.end()

    def end(self, timeout_s: float = 300.0) -> Ending:
        """Waits for the end; a child that hangs is killed."""
        until = time.monotonic() + timeout_s
        while self._hear(max(0.0, until - time.monotonic())):
            if time.monotonic() >= until:
                self.signal(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._read)
        return Ending(os.waitstatus_to_exitcode(status), self._text.decode(errors="replace"))

    def _hear(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([self._read], [], [], timeout_s)
        if not ready:
            return True
        fresh = os.read(self._read, 65536)
        self._text += fresh
        return bool(fresh)


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    hook: Callable[[], None] = lambda: None,
    planner: Planner | None = None,
) -> Ending:
    """Makes a run in a separate process, to its end."""
    return Child(config, resume=resume, hook=hook, planner=planner).end()


def slow_saving(seconds: float = 0.02) -> None:
    """Delays the writing of each file of a checkpoint."""
    flush = files._flush

    def slow(path: Path) -> None:
        time.sleep(seconds)
        flush(path)

    files._flush = slow


def outcome(folder: Path) -> dict[str, Any]:
    """The result of a run: the weights' hashes, the log and the metrics, without timings."""
    record = Record.read(folder)
    part = folder / ("adapter" if (folder / "adapter").is_dir() else "model")
    return {
        "status": record.status,
        "weights": {p.name: files.sha256(p) for p in sorted(part.glob("*.safetensors"))},
        "log": [line.model_dump(exclude={"tokens_per_s"}) for line in record.steps],
        "final": record.final,
        "tokens": record.tokens_trained,
        "best": record.best_step,
    }


def damaged_parts(folder: Path) -> list[str]:
    """The damaged parts of a run folder."""
    found = [f"{p.name}: {d}" for p in folder.glob("checkpoints/checkpoint-*") if (d := files.find_damage(p))]
    parts = [p for p in (folder / "adapter", folder / "model") if p.is_dir()]
    found += [f"{p.name}: {d}" for p in parts if (d := files.find_damage(p))]
    try:
        Record.read(folder)
    except SiliangError as error:
        found.append(str(error))
    return found
