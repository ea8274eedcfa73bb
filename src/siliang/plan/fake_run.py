"""A run on fake tensors: its model, its method and its engine, measured under different settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from siliang.config import MethodConfig, QuantizationConfig, RunConfig
from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.distributed.sharding import shard
from siliang.engine.attach import attach
from siliang.engine.batches import EVERYWHERE, SEPARATE, Sharing, StepCollator, lengths_of, most_tokens
from siliang.engine.step import Engine
from siliang.hardware import Choice
from siliang.language import Bilingual
from siliang.methods import find_method, method_of
from siliang.models.invented import mark_invented
from siliang.models.positions import Positions
from siliang.models.quantized import held_tensors, quantized_sizes
from siliang.models.weights import passing_bytes
from siliang.ops.place import planned_for
from siliang.ops.stored import StoredWeight
from siliang.peft_api.model import PeftModel
from siliang.peft_api.saved import AdapterToSave
from siliang.plan.device import Device
from siliang.plan.fake import fake_mode, keep_stored, make_fake_base, to_fake
from siliang.plan.rows import cut, synthetic_row
from siliang.plan.steps import Measured, Phase, baseline_step, measure
from siliang.run_folder import kept_format, kept_weights, weight_dtype
from siliang.tasks import task_of
from siliang.train.checks import check_quantization
from siliang.types import ConfigError, DataError
from siliang.units import show_bytes


@dataclass(frozen=True)
class Baseline:
    """The step of PEFT with transformers.Trainer, for comparison: padded, with all logits.

    Attributes:
        attention: transformers' attn_implementation.
    """

    attention: Literal["eager", "sdpa"] = "sdpa"


class FakeRun:
    """A run's model on fake tensors.

    Attributes:
        trained: Number of trained parameters.
        total: Number of all parameters.
        trained_bytes: Size of the trained parameters.
        adapter_bytes: Size of what is saved: the adapter, or the whole model.
        kept_weights: The frozen weights that stay in the format of the model's files.
        loading_bytes: Peak of the model's tensors during loading. Of several ranks, each loads the whole model, one
            after another.
        loads_on_host: The model is loaded into main memory, also for a GPU.
        learning_bytes: Memory of learning the initialization from data, without the model's, before the first step.
        layers: Number of layers that can recompute.
        packed: Batches have no padding.
        shares: Whether batches share their beginnings: of rows of the data, and not of synthetic ones, which are equal.
        notes: Features that the engine has switched off.
    """

    def __init__(
        self,
        config: RunConfig,
        base_config: PretrainedConfig,
        device: Device,
        *,
        method: MethodConfig | None = None,
        quantization: QuantizationConfig | None = None,
        baseline: Baseline | None = None,
        new_tokens: int = 0,
        invented: Sequence[str] = (),
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Makes the model, attaches the method, and makes the engine.

        Args:
            base_config: The base model's config, with the number of classes.
            method: The method, instead of the config's own.
            new_tokens: Number of tokens added to the vocabulary.
            invented: Modules that the model's files lack, which are therefore trained.
            mesh: The run's ranks, which share the model as `distributed.strategy` says.

        Raises:
            SiliangError: The method does not apply to the model.
        """
        self._layers_share: float | None = None  # of a step's floating-point operations
        self._config = config.model_copy(update={"method": method or config.method, "quantization": quantization})
        self._device, self._baseline, self.precision = device, baseline, device.precision
        method_row = find_method(self._config.method.name)
        check_quantization(self._config, method_row)
        task_of(config).check_settings(config.train)
        with fake_mode() as self._mode:
            dtype = weight_dtype(method_row, device.precision)
            base = make_fake_base(
                base_config,
                task_of(config).model,
                dtype=dtype,
                quantization=quantization,
                shardable=config.distributed.strategy == "fsdp",
                compute_dtype=self._product_dtype(quantization),
                attention=baseline.attention if baseline else None,
            )
            mark_invented(base, list(invented))
            if (kept := kept_format(self._config, method_row, dtype, device.kind)) and baseline is None:
                keep_stored(base, kept)
            self.loading_bytes = self._loading_bytes(base, dtype, new_tokens)
            if task_of(config).model.needs_padding_token and getattr(base.config, "pad_token_id", None) is None:
                base.config.pad_token_id = 0  # the run takes the tokenizer's
            if new_tokens:
                size = base.config.get_text_config().vocab_size + new_tokens
                base.resize_token_embeddings(size, mean_resizing=False)  # fake embeddings have no mean
            positions = self._positions(base)
            if any(limit is not None and limit < 1 for limit in (positions.reads, positions.writes)):
                raise ConfigError(
                    Bilingual(
                        f"method.num_virtual_tokens = {positions.virtual:,} leaves no position for a row: lower it.",
                        f"method.num_virtual_tokens = {positions.virtual:,} 没有给样本留下位置：请减小。",
                    )
                )
            self.model, self.trained, self.total = attach(base, method_row, self._config, device.precision)
            self.kept_weights = kept_weights(self.model)
            self.trained_bytes = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
            self.adapter_bytes = self._saved_bytes(resized=bool(new_tokens))
            sharded = config.distributed.strategy == "fsdp"
            if mesh is not None and sharded:
                shard(self.model, mesh, torch.device("cpu"))
            self.engine = Engine(
                self.model,
                task_of(config),
                packing=config.train.packing and baseline is None,
                share=EVERYWHERE if config.train.share_beginnings and baseline is None else SEPARATE,
                memory_budget=None,
                keep_frozen=config.train.keep_frozen and baseline is None and mesh is None,
                comparing=False,
                label_smoothing=config.train.label_smoothing,
                neftune_alpha=config.train.neftune_alpha,
            )
            if baseline is None and config.train.memory_budget is not None and self.engine.recompute.layers:
                self.engine.recompute.fix(0)  # layers that may recompute keep their input, as the run's do
        self.loads_on_host = quantization is None and device.kind == "cuda"
        self.packed = self.engine.padding is not None
        self.shares = SEPARATE
        self.layers = len(self.engine.recompute.layers)
        self.notes = self.engine.notes
        self.learning_bytes = self._learning_bytes()
        self.method = self._config.method.name
        self._in_buckets = mesh is not None and not sharded

    def collator(self, batch_size: int | None = None) -> StepCollator:
        """The collator that splits rows into batches as in the run."""
        limit, device = self._config.train.tokens_at_once, self._device
        most = None if self._baseline else most_tokens(limit, device.kind, device.precision.dtype)
        return collator_of(
            self._config, self.model, batch_size, tokens_at_once=most, packed=self.packed, shares=self.shares
        )

    def batches(self, rows: list[dict[str, Any]], batch_size: int | None = None) -> list[Batch]:
        """The first two batches of a step, which are the longest: after two, the peak does not grow."""
        if self._baseline is not None:
            collator = self.collator(batch_size)
            size = collator.rows_at_once
            return collator([dict(row) for row in rows[:size]])["batches"]
        return self.collator(batch_size)([dict(row) for row in rows])["batches"][:2]

    def shortened(self, rows: list[dict[str, Any]], *, longest: int | None = None) -> list[dict[str, Any]]:
        """The rows, cut to the model's positions less those of the method's virtual tokens; adds a note if it cuts.

        Args:
            longest: Tokens of the longest row of the data; None without data. Rows of the data are never cut.

        Raises:
            DataError: A row of the data is longer than the model can read.
        """
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        positions = self._positions(base)
        most = positions.reads
        if most is None or max(length for row in rows for length in lengths_of(row)) <= most:
            return rows
        if longest is not None:
            limit = positions.in_words(most)
            raise DataError(
                Bilingual(
                    f"a row has {longest:,} tokens, the model {limit}",
                    f"有样本长 {longest:,} 个词元，而模型有 {limit.zh}",
                )
            )
        limit = positions.in_words(most)
        self.notes.append(
            Bilingual(f"rows of {most:,} tokens: the model has {limit}", f"样本按 {most:,} 个词元计：模型有 {limit.zh}")
        )
        return [cut(row, most) for row in rows]

    def _positions(self, base: nn.Module) -> Positions:
        virtual = int(self._config.method.arguments.get("num_virtual_tokens") or 0)
        config = find_method(self._config.method.name).config
        return Positions.of(base, virtual=virtual, prefix=config is not None and config.is_prefix)

    def measure(
        self,
        batches: list[Batch],
        *,
        recomputed: int = 0,
        phases: tuple[Phase, ...] = ("train",),
    ) -> Measured:
        """Measures the phases on these batches, with `recomputed` layers recomputing their activations."""
        with self._mode, planned_for(self._device.kind):
            fake_batches = [to_fake(self._mode, batch) for batch in batches]
            if recomputed or self.engine.recompute.recomputed:
                self.engine.recompute.fix(recomputed)
            measured = measure(
                self.model,
                self.engine,
                fake_batches,
                self._device.precision,
                self._config.train,
                block_bytes=self._device.block_bytes,
                phases=phases,
                step=baseline_step if self._baseline else None,
                in_buckets=self._in_buckets,
            )
        if not recomputed and measured.flops:
            self._layers_share = measured.layer_flops / measured.flops
        return measured

    def time_factor(self, recomputed: int) -> float:
        """Time of a step with `recomputed` layers, relative to none, by its floating-point operations."""
        if not recomputed:
            return 1.0
        if self._layers_share is None:
            rows = [synthetic_row(self._config, 64)]
            base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            if (most := self._positions(base).reads) is not None:
                rows = [cut(row, most) for row in rows]
            measured = self.measure(self.batches(rows))
            self._layers_share = measured.layer_flops / measured.flops
        return 1.0 + self._layers_share * recomputed / self.layers

    def _product_dtype(self, quantization: QuantizationConfig | None) -> torch.dtype:
        """The dtype in which quantized weights are multiplied."""
        if quantization is None or quantization.compute_dtype == "auto":
            return self._device.best.dtype
        return Choice(quantization.compute_dtype, "").dtype

    def _loading_bytes(self, base: PreTrainedModel, dtype: torch.dtype, new_tokens: int) -> int:
        bits = self._config.quantization.bits if self._config.quantization is not None else None
        sizes = (
            [p.numel() for p in base.parameters() if not isinstance(p, StoredWeight)]
            if bits is None
            else quantized_sizes(base)
        )
        cuda = self._device.kind == "cuda"
        passing = passing_bytes(max(sizes, default=0), bits=bits, itemsize=dtype.itemsize, cuda=cuda)
        if new_tokens:  # the new embeddings besides the old ones, and an fp32 copy for their mean
            ends = (base.get_input_embeddings(), base.get_output_embeddings())
            weight = max((w for end in ends if isinstance(w := getattr(end, "weight", None), Tensor)), key=Tensor.numel)
            passing = max(passing, weight.nbytes + weight.numel() * (4 if weight.dtype == torch.float32 else 8))
        return sum({x.untyped_storage()._cdata: x.nbytes for x in held_tensors(base)}.values()) + passing

    def _learning_bytes(self) -> int:
        """The memory of an initialization from data, which is noted: the steps' peak is without it."""
        if not isinstance(self.model, PeftModel):
            return 0
        adapter = self.model.injection.adapters["default"]
        found = method_of(adapter.config).initialization_bytes(adapter)
        if found:
            size = show_bytes(found)
            self.notes.append(
                Bilingual(
                    f"learning the initialization from data takes {size} more than the model and a batch, before the "
                    "first step",
                    f"训练前从数据学习初始值，除模型和一个批次外还需 {size}",
                )
            )
        return found

    @torch.no_grad()
    def _saved_bytes(self, *, resized: bool) -> int:
        """A file may hold more than what is trained, such as indices and resized embeddings, or less: a prompt without
        its encoder."""
        if not isinstance(self.model, PeftModel):
            return self.trained_bytes
        tensors = self.model.adapter_state("default", save_embedding_layers=True if resized else "auto")
        adapter, config = self.model.injection.adapters["default"], self.model.peft_config["default"]
        saved = AdapterToSave.of(adapter, config, tensors, initial=None, to_resume=False)
        return sum(t.nbytes for t in saved.tensors.values())


def collator_of(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    batch_size: int | None = None,
    *,
    tokens_at_once: int | None = None,
    packed: bool,
    shares: Sharing = SEPARATE,
) -> StepCollator:
    """A run's collator without a tokenizer; the padding token is that of the model's config."""
    t, pad = config.train, getattr(model.config, "pad_token_id", None)
    return StepCollator(
        PadCollator(pad if isinstance(pad, int) and pad >= 0 else 0),
        task_of(config),
        batch_size or t.batch_size,
        tokens_at_once,
        packed=packed,
        shares=shares,
    )
