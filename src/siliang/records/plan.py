"""The schema of a plan: what `siliang plan` shows and `--json` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from siliang.records.kept_weights import KeptWeights
from siliang.records.saved import Part, Sentence

SCHEMA_VERSION = 1

Category = Literal["weights", "trained", "gradients", "optimizer", "activations", "frozen", "logits", "workspace"]
CATEGORIES: tuple[Category, ...] = (
    "weights",  # of the base model, frozen or not
    "trained",  # added by the method: adapters, prompts, and the heads that are saved with them
    "gradients",
    "optimizer",
    "activations",  # kept for the backward pass
    "frozen",  # cached outputs of frozen layers
    "logits",  # tensors with a column for each token of the vocabulary, and their gradients
    "workspace",  # short-lived tensors
)


class Change(Part):
    """One setting to change so that a run fits."""

    setting: str
    """Its dotted name in run.yaml."""
    before: str
    after: str
    price: Sentence
    """Its cost, in time or in quality."""


class Fit(Part):
    """The smallest set of changes with which a method fits."""

    changes: list[Change]
    peak_bytes: int
    parts: dict[Category, int]
    time_factor: float
    """Relative to the run's time, from the matrix products that it adds; 1.0 if it adds none."""


class MethodPlan(Part):
    """One method."""

    method: str
    error: Sentence | None = None
    """Why there is no plan: the method does not apply to this model, or its step cannot be made."""
    strategy: Literal["ddp", "fsdp"] | None = None
    """How several devices share the model."""
    trained: int = 0
    total: int = 0
    adapter_bytes: int = 0
    """Size of the saved adapter on disk."""
    loaded_bytes: int = 0
    """The device's tensors before the first step."""
    kept_weights: KeptWeights | None = None
    """The frozen weights that are not converted to fp32; None if all weights are loaded in one format."""
    loading_bytes: int = 0
    """The most on the device while the model is loaded, everything included."""
    peak_bytes: int = 0
    """The most on the device in a step, everything included, with `recomputed_layers`."""
    parts: dict[Category, int] = Field(default_factory=dict)
    """The parts of the step's peak, without the overhead."""
    activations_by_layer: list[int] = Field(default_factory=list)
    overhead_bytes: int = 0
    """The process (CPU) or the context and libraries (CUDA)."""
    evaluate_bytes: int = 0
    generate_bytes: int = 0
    merge_bytes: int = 0
    """Peaks of evaluation, generation and merging, overhead included; 0 if the method or task has none."""
    host_bytes: int = 0
    """The process's main memory, without the device's; includes the model if it is loaded there first."""
    baseline_bytes: int = 0
    """The peak of the same step with PEFT and transformers.Trainer: padded, all logits; 0 if not requested."""
    frozen_bytes: int = 0
    frozen_disk_bytes: int = 0
    """Cached outputs of frozen layers (train.keep_frozen), in main memory and on disk; on a CPU part of the peak."""
    layers: int = 0
    recomputed_layers: int = 0
    """The number of layers whose activations are recomputed, so that the run fits."""
    time_factor: float = 1.0
    """The cost of that, relative to the run's time, from the matrix products that it adds."""
    fits: bool | None = None
    """None if no limit is known."""
    flops_per_token: float = 0.0
    tokens_per_s: float | None = None
    epoch_s: float | None = None
    fit: Fit | None = None
    """How to make it fit, if it does not."""
    batch_rows: int = 0
    batch_tokens: int = 0
    """Of the largest batch, padding included."""
    notes: list[Sentence] = Field(default_factory=list)

    @property
    def needed_bytes(self) -> int:
        """The larger of loading and the steps."""
        return max(self.loading_bytes, self.peak_bytes)

    @property
    def tensor_bytes(self) -> int:
        """The step's peak without the overhead."""
        return self.peak_bytes - self.overhead_bytes


class PlanRecord(Part):
    """The predicted memory and time of a run."""

    schema_version: int = SCHEMA_VERSION
    model: str
    task: str
    device: str
    """cpu or cuda."""
    devices: int = 1
    """Bytes are per device; batches are those of the device with the largest one."""
    memory_bytes: int | None
    """The memory that is free, or that the user gave."""
    memory_source: Literal["free here", "as asked", "unknown"]
    precision: str
    quantization: str
    """none, 4-bit nf4, ..."""
    batch_rows: int
    batch_tokens: int
    """Of the largest batch, padding included."""
    batch_source: Literal["data", "max_length"]
    tokens_per_epoch: int | None = None
    rate: Sentence = ""
    """The source of tokens per second."""
    methods: list[MethodPlan] = Field(default_factory=list)
