"""The initialization of a run's adapter, learned from its training data before the first step
(`Method.initialize_from_data`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from siliang.config import RunConfig
from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.data.prepared import PreparedData
from siliang.distributed.ranks import Ranks
from siliang.engine.batches import StepCollator, in_steps
from siliang.engine.order import Order
from siliang.engine.step import Engine
from siliang.hardware import Choice
from siliang.language import Bilingual, both
from siliang.methods import Method
from siliang.methods.config import PeftConfig
from siliang.methods.initialization import InitializationBatch, keep_initial, waiting
from siliang.peft_api.for_tasks import get_peft_model
from siliang.peft_api.model import PeftModel
from siliang.records import Learned
from siliang.tasks import Task
from siliang.types import ConfigError


@dataclass
class TrainingRows:
    """The rows of a run's first epoch, in its order, through its engine: `InitializationData`.

    Attributes:
        rows, tokens: Read so far, each as often as it was read.
    """

    config: RunConfig
    data: PreparedData
    model: PeftModel
    engine: Engine
    precision: Choice
    device: torch.device
    rows: int = 0
    tokens: int = 0

    def batches(self, *, rows: int | None = None, learned: bool = True) -> _Batches:
        return _Batches(self, rows, learned)

    def singles(self, *, tokens: int) -> Iterator[InitializationBatch]:
        read = self.tokens + tokens
        for row in self.order():
            if self.tokens >= read:
                return
            yield _Rows(self, [row], learned=False)

    def order(self) -> list[int]:
        """The numbers of the rows. Those that begin alike are not together: the first ones stand for all."""
        return list(Order.of(self.config, self.data.train, by_beginnings=False))

    def batches_of(self, rows: list[int]) -> list[Batch]:
        """Rows, padded."""
        pad = PadCollator(self.data.tokenizer.pad_token_id or 0)  # what fills gaps does not count
        make = StepCollator(pad, self.engine.task, self.config.train.batch_size, packed=False)
        self.rows += len(rows)
        self.tokens += int(self.data.train.lengths[rows].sum())
        return [batch.to(self.device) for batch in make(self.data.train.__getitems__(rows))["batches"]]

    @property
    def autocast(self) -> partial[torch.autocast]:
        """Makes the context of the computation."""
        return partial(torch.autocast, self.device.type, self.precision.dtype, enabled=self.precision.autocast)


@dataclass(frozen=True)
class _Batches:
    """Batches of the run's size, as often as they are asked for."""

    source: TrainingRows
    rows: int | None
    learned: bool

    def __iter__(self) -> Iterator[InitializationBatch]:
        for rows in in_steps(self.source.order()[: self.rows], self.source.config.train.batch_size):
            yield _Rows(self.source, list(rows), self.learned)


@dataclass
class _Rows:
    """Rows of a run that go through the model at once, or in a few batches of like length."""

    source: TrainingRows
    rows: list[int]
    learned: bool
    _now: Batch | None = field(default=None, init=False)

    def forward(self) -> None:
        engine = self.source.engine
        running = engine.loss if engine.task.step_loss is None else engine.values
        with torch.no_grad(), self.source.autocast():
            for batch in self.source.batches_of(self.rows):
                self._now = batch
                with running(self.source.model, batch):
                    pass

    def backward(self) -> None:
        batches = self.source.batches_of(self.rows)
        weight = float(max(sum(batch.weight for batch in batches), 1))
        self.source.engine.run(self.source.model, batches, weight, autocast=self.source.autocast)

    def rows_of(self, x: Tensor, path: str) -> Tensor:
        assert self._now is not None
        read = self._now.inputs["attention_mask"].bool()
        if x.shape[:-1] != read.shape:  # a decoder's states, a pooled one, those of experts
            return x.flatten(0, -2)
        return x[read & _learned(self._now) if self.learned else read]


def _learned(batch: Batch) -> Tensor:
    """Which tokens are learned, (B, T); all where the labels are not the tokens'."""
    read = batch.inputs["attention_mask"].bool()
    labels = batch.inputs.get("labels")
    if labels is not None and labels.shape == read.shape:
        return labels >= 0
    if batch.targets is None or labels is not None:
        return torch.ones_like(read)
    found = torch.zeros_like(read)  # the state of column j predicts token j + 1
    found[batch.targets[1], batch.targets[2] + 1] = True
    return found


def learns_initialization(config: RunConfig, method: Method) -> bool:
    """Whether the initialization of the run's adapter is learned from data."""
    return method.config is not None and method.uninitialized(method.config(**config.method.arguments)) is not None


def check_whole(config: RunConfig, method: Method, *, sharded: bool) -> None:
    """
    Raises:
        ConfigError: The initialization is to be learned on a model that is sharded.
    """
    if sharded and learns_initialization(config, method):
        init = config.method.arguments.get("init_lora_weights")
        raise ConfigError(
            Bilingual(
                f"method.init_lora_weights = {init}: it is learned on the whole model, and fsdp shards it. "
                "Learn it in a run of one process (train.max_steps=1), and train that adapter further: --adapter.",
                f"method.init_lora_weights = {init}：初始值要在完整的模型上学习，而 fsdp 会切分模型。请先用单进程运行"
                "得到初始值（train.max_steps=1），再用 --adapter 继续训练该适配器。",
            )
        )


@dataclass
class Learner:
    """Learns the initialization of a run's adapter: `engine.attach.Learn`.

    Attributes:
        learned: What it was learned from; None before.
    """

    config: RunConfig
    method: Method
    task: Task
    data: PreparedData
    precision: Choice
    device: torch.device
    ranks: Ranks
    learned: Learned | None = None

    def __call__(self, base: PreTrainedModel, config: PeftConfig, plain: PeftConfig) -> PeftConfig:
        """One rank learns it and broadcasts it."""
        found, kept, self.learned = self.ranks.from_main(lambda: self._learn(base, config, plain))
        for path, initial in kept.items():
            keep_initial(base.get_submodule(path), initial)
        set_seed(self.config.train.seed)  # the others have drawn no numbers
        return found

    def _learn(
        self, base: PreTrainedModel, config: PeftConfig, plain: PeftConfig
    ) -> tuple[PeftConfig, dict[str, object], Learned]:
        started, t = time.perf_counter(), self.config.train
        model = get_peft_model(base, plain)
        torch.nn.Module.to(model, self.device)
        engine = Engine(
            model,
            self.task,
            packing=False,
            memory_budget=t.memory_budget,
            checkpointing=t.gradient_checkpointing,
        )
        rows = TrainingRows(self.config, self.data, model, engine, self.precision, self.device)
        try:
            model.eval()
            found = self.method.initialize_from_data(model, config, model.injection.adapters["default"], rows)
        finally:
            engine.close()
            model.unload()
        seconds = round(time.perf_counter() - started, 3)
        how = str(self.config.method.arguments.get("init_lora_weights"))
        return found, waiting(base), Learned(start=how, rows=rows.rows, tokens=rows.tokens, seconds=seconds)

    def in_words(self) -> str:
        """The line that is printed of it."""
        made, there = self.learned, len(self.data.train)
        assert made is not None
        again = Bilingual("", "")
        if made.rows > there:
            again = Bilingual(f" (the {there:,} training rows, repeatedly)", f"（即反复读取全部 {there:,} 条训练样本）")
        return both(
            f"init       {made.start}: {made.rows:,} rows{again} with {made.tokens:,} tokens were read, "
            f"in {made.seconds:.1f} s",
            f"初始值     {made.start}：读取 {made.rows:,} 条样本{again.zh}，共 {made.tokens:,} 个词元，"
            f"用时 {made.seconds:.1f} 秒",
        )
