"""What is trained: the workloads and their targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from siliang.config import RunConfig
from siliang.types import TaskType

VIRTUAL_TOKENS = 20
SEED = 7
Library = Literal["siliang", "peft", "trl", "unsloth", "swift"]
Layout = Literal["padded", "grouped", "flat"]
Layouts = dict[Library, tuple[Layout, ...]]
Data = Literal["instructions", "reviews", "system", "pairs"]


@dataclass(frozen=True)
class Method:
    """What is tuned, in both libraries' words.

    Attributes:
        label: Its name in records and tables.
        name: In siliang's table of methods.
        peft: PEFT's config class; None where PEFT has no such method, and the peer is plain transformers.
        arguments: Of that config, which both libraries call by the same names.
        quantized: On a base in NF4, double-quantized.
        learning_rate: Where siliang's default will not do for a comparison of losses.
    """

    label: str
    name: str
    peft: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False
    learning_rate: float | None = None


@dataclass(frozen=True)
class Target:
    """What siliang should reach.

    Attributes:
        speed: Times the peer's tokens per second.
        memory: At most so many times the peer's peak above the weights.
        against: The fastest setting of all peers, or the fastest of one layout.
        eta: Share of the machine's own limit.
    """

    speed: float
    memory: float | None = None
    against: Literal["best", "padded", "flat"] = "best"
    eta: float | None = None


@dataclass(frozen=True)
class Workload:
    """A model, data and methods.

    Attributes:
        model: A key of `folders.SHAPES`, or "encoder".
        data: What `folders` makes the rows of.
        rows: 64 batches of them: the Trainer then groups lengths in rounds of 16 batches, and whole rounds are timed.
        batch: Rows of a step.
        gate_batch: Rows of a step whose losses are compared: fewer, since the number changes nothing in the comparison.
        steps: Timed steps: 16 are one round of the length groups; fewer where steps are long and lengths similar.
        search_steps: Of each setting tried.
        layouts: How the peers may lay out a batch, library by library: "padded", "grouped" by length, or "flat", all
            rows in one without padding. Only these libraries are measured.
        excluded: Excluded `layouts` and libraries, with the reason, for the table.
    """

    name: str
    title: str
    model: str
    methods: tuple[Method, ...]
    targets: tuple[Target, ...]
    layouts: Layouts
    task: TaskType = TaskType.CAUSAL_LM
    data: Data = "instructions"
    rows: int = 512
    batch: int = 8
    gate_batch: int = 2
    steps: int = 16
    search_steps: int = 8
    max_length: int = 256
    excluded: str = ""

    @property
    def data_file(self) -> str:
        """The name of the file of its rows."""
        return f"{self.data}-{self.rows}.jsonl"

    def method(self, label: str) -> Method:
        """The method of that label."""
        return next(m for m in self.methods if m.label == label)


def _lora(label: str, rank: int, targets: list[str] | str, *, quantized: bool = False) -> Method:
    arguments = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    return Method(label, "lora", "LoraConfig", arguments, quantized)


_PADDED: Layouts = {"peft": ("padded", "grouped")}
_CAUSAL: Layouts = {
    "peft": ("padded", "grouped"),
    "trl": ("padded", "grouped", "flat"),
    "unsloth": ("padded", "grouped"),
    "swift": ("padded", "grouped"),
}
_BESIDE_UNSLOTH: Layouts = {"peft": ("padded", "grouped"), "unsloth": ("padded", "grouped")}
_NOT_FLAT = (
    "on a CPU Unsloth and ms-swift lay no rows end to end: Unsloth switches packing off, ms-swift's padding_free wants "
    "flash attention; LLaMA-Factory 0.9.5 is not measured: it imports torchaudio, which does not load beside torch "
    "2.13 for CPUs"
)
_PAIRS: Layouts = {"trl": ("padded", "grouped")}
_GPU: Layouts = {"peft": ("padded", "grouped", "flat"), "trl": ("padded", "flat"), "unsloth": ("padded", "flat")}
_PROMPT = {"num_virtual_tokens": VIRTUAL_TOKENS}
_ON_GPU = (_lora("lora", 16, "all-linear"), _lora("qlora", 16, "all-linear", quantized=True))
_GPU_TARGETS = (Target(2.0, 0.4, against="flat"), Target(4.0, against="padded"))

WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload(
            "W1",
            "instructions, Llama 8 x 768",
            "llama",
            (_lora("lora", 8, ["q_proj", "v_proj"]),),
            (Target(3.0, 0.4, eta=0.8),),
            _CAUSAL,
            excluded=_NOT_FLAT,
        ),
        Workload(
            "W2",
            "instructions, BLOOM 8 x 768",
            "bloom",
            (_lora("lora", 8, ["query_key_value"]), Method("bitfit", "bitfit", None)),
            (Target(2.5, 0.4),),
            _BESIDE_UNSLOTH,
            excluded="BLOOM's alibi takes no positions, so rows laid end to end would see each other: no flat layout. "
            "TRL and ms-swift are measured on W1; Unsloth has no BitFit",
        ),
        Workload(
            "W3",
            "reviews, MiniLM-L6",
            "encoder",
            (
                Method("full", "full", None),
                Method("bitfit", "bitfit", None),
                _lora("lora", 8, ["query", "value"]),
                Method(
                    "ia3",
                    "ia3",
                    "IA3Config",
                    {
                        "target_modules": ["key", "value", "output.dense"],
                        "feedforward_modules": ["output.dense"],
                    },
                ),
                # at 3e-2 rounding grows from 6e-8 in step 0 to 4e-2 in step 45: the two would part by chance
                Method("prompt", "prompt_tuning", "PromptTuningConfig", _PROMPT, learning_rate=1e-3),
                Method("p", "p_tuning", "PromptEncoderConfig", _PROMPT | {"encoder_hidden_size": 128}),
                Method("prefix", "prefix_tuning", "PrefixTuningConfig", _PROMPT),
            ),
            (Target(2.5),),
            _PADDED,
            task=TaskType.SEQ_CLS,
            data="reviews",
            rows=2048,
            batch=32,
            gate_batch=8,
            max_length=86,
            excluded="TRL and Unsloth train no classifiers on a CPU; ms-swift was not tried",
        ),
        Workload(
            "W4",
            "W1's model in NF4, double-quantized",
            "llama",
            (_lora("qlora", 8, "all-linear", quantized=True),),
            (Target(1.5, 0.6),),
            _BESIDE_UNSLOTH,
            excluded="TRL and ms-swift are measured on W1",
        ),
        Workload(
            "W6",
            "instructions behind a system prompt of 300 tokens, W1's model",
            "llama",
            (_lora("lora", 8, ["q_proj", "v_proj"]),),
            (Target(3.0),),
            _CAUSAL,
            data="system",
            steps=6,
            search_steps=3,
            max_length=512,
            excluded=_NOT_FLAT,
        ),
        Workload(
            "W7",
            "preference pairs, DPO, W1's model",
            "llama",
            (_lora("lora", 8, ["q_proj", "v_proj"]),),
            (Target(2.0, 0.5),),
            _PAIRS,
            task=TaskType.PREFERENCE,
            data="pairs",
            gate_batch=1,
            steps=4,
            search_steps=2,
            max_length=512,
            excluded="TRL's DPOTrainer lays no rows end to end: it switches padding_free off",
        ),
        *(
            Workload(
                f"W5-{size}",
                f"instructions on CUDA, {shape}'s shape",
                size,
                _ON_GPU,
                _GPU_TARGETS,
                _GPU,
                rows=3072,
                batch=48,  # of 87 tokens each: 4k a step
            )
            for size, shape in (("1b", "Llama-3.2-1B"), ("3b", "Llama-3.2-3B"), ("7b", "Llama-2-7B"))
        ),
    )
}
ON_CPU = ("W1", "W2", "W3", "W4", "W6", "W7")
ON_CUDA = ("W5-1b",)


def run_config(
    workload: Workload,
    method: Method,
    scratch: Path,
    *,
    smoke: bool,
    steps: int,
    log_every: int,
    batch: int | None = None,
    extra: dict[str, Any] | None = None,
) -> RunConfig:
    """The run, of which ours takes everything, and the peer model, data, seed and learning rate.

    Args:
        scratch: Where `make_ready` put models and data.
        batch: Rows of a step; the workload's own if None.
        extra: Settings of siliang's own, such as {"train": {"gradient_checkpointing": True}}.
    """
    train = {
        "max_steps": steps,
        "batch_size": min(4, batch or workload.batch) if smoke else batch or workload.batch,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "seed": SEED,
        "log_every": log_every,
        "learning_rate": method.learning_rate,
    }
    values = {
        "model": str(scratch / workload.model),
        "task": workload.task.value,
        "method": {"name": method.name, **method.arguments},
        "quantization": {"bits": 4, "type": "nf4", "double": True} if method.quantized else None,
        "data": {
            "train": str(scratch / workload.data_file),
            "test_size": 0.0,
            "max_length": 64 if smoke else workload.max_length,
        },
        "train": train | (extra or {}).get("train", {}),
        "output": str(scratch / "runs"),
    }
    return RunConfig.build(values | {k: v for k, v in (extra or {}).items() if k != "train"})
