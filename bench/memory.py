"""Predicted and measured bytes at the peak of a step: by the plan on fake tensors, and by torch's allocator.

python -m bench.memory            the table of docs/memory.md: every method, model, layout and format
python -m bench.memory --only llama lora
python -m bench.memory --jobs 2   two cases at a time
python -m bench.memory --ranks 2  the same on each of two processes, which share the weights
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from siliang.config import QuantizationConfig, RunConfig
from siliang.distributed.sharding import average_gradients, fake_mesh, is_sharded, rank_mesh, reshard, shard
from siliang.engine.attach import attach
from siliang.engine.batches import SEPARATE
from siliang.engine.step import Engine
from siliang.hardware import Choice, find_device
from siliang.methods import METHODS, find_method
from siliang.methods.lora_config import LoraConfig
from siliang.models.chatglm3 import ChatGLMConfig
from siliang.models.load import load_model
from siliang.peft_api.data_initializations import preprocess_corda, preprocess_loraga
from siliang.peft_api.model import PeftModel
from siliang.plan import FakeRun
from siliang.plan.device import Device
from siliang.plan.fake_run import collator_of
from siliang.plan.rows import synthetic_row
from siliang.run_folder import weight_dtype
from siliang.tasks import CAUSAL_LM, EMBEDDING, RERANKER, SEQ_2_SEQ_LM, SEQ_CLS, Task, task_of
from siliang.types import SiliangError, TaskType

MODELS: dict[str, tuple[Task, Callable[[], Any]]] = {
    "llama": (
        CAUSAL_LM,
        lambda: AutoConfig.for_model(
            "llama",
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=2048,
        ),
    ),
    "bloom": (
        CAUSAL_LM,
        lambda: AutoConfig.for_model("bloom", hidden_size=256, n_layer=4, n_head=8, vocab_size=2048),
    ),
    "bert": (
        SEQ_CLS,
        lambda: AutoConfig.for_model(
            "bert",
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            vocab_size=2048,
        ),
    ),
    "t5": (
        SEQ_2_SEQ_LM,
        lambda: AutoConfig.for_model(
            "t5", d_model=256, d_ff=1024, d_kv=32, num_layers=3, num_heads=8, vocab_size=2048, decoder_start_token_id=0
        ),
    ),
    "chatglm": (
        CAUSAL_LM,
        lambda: ChatGLMConfig(
            hidden_size=256,
            ffn_hidden_size=704,
            num_layers=4,
            num_attention_heads=8,
            kv_channels=32,
            multi_query_group_num=2,
            padded_vocab_size=2048,
        ),
    ),
}
# those of the table; the others have layers of their own kinds
OF_THE_TABLE = tuple(MODELS)
MODELS |= {
    "mixtral": (
        CAUSAL_LM,
        lambda: AutoConfig.for_model(
            "mixtral",
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=2048,
        ),
    ),
    "qwen3_moe": (
        CAUSAL_LM,
        lambda: AutoConfig.for_model(
            "qwen3_moe",
            hidden_size=256,
            intermediate_size=384,
            moe_intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            vocab_size=2048,
        ),
    ),
    "convbert": (
        SEQ_CLS,
        lambda: AutoConfig.for_model(
            "convbert",
            hidden_size=256,
            embedding_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            vocab_size=2048,
        ),
    ),
}
# tasks of texts that belong together
MODELS |= {
    "embedder": (EMBEDDING, MODELS["bert"][1]),
    "embedder-llama": (EMBEDDING, MODELS["llama"][1]),
    "reranker": (
        RERANKER,
        lambda: AutoConfig.for_model("bert", hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_labels=1),
    ),
}
# what labels of a text are, beside one of several classes
PROBLEMS = {f"bert-{problem}": problem for problem in ("several_labels", "number", "ordered")}
MODELS |= dict.fromkeys(PROBLEMS, MODELS["bert"])
# what a run of the task embedding takes from its base model's folder
POOLED = {"pooling": "mean", "query_prompt": "", "document_prompt": ""}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# of a method, by a name
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "experts": EXPERTS,
    "pointwise": {"target_modules": ["pointwise"]},
    "pointwise-dora": {"target_modules": ["pointwise"], "use_dora": True},
    **{
        start: {"init_lora_weights": start}
        for start in ("pissa", "olora", "loftq", "orthogonal", "mica", "eva", "corda", "lora_ga")
    },
}
LENGTHS = (192, 192, 160, 128, 128, 96, 64, 64)
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
FORMATS = ("fp32", "bf16", "nf4")  # and int8, and kept (fp32 with weights kept in bf16), which the table has not
STEPS_OF_RANKS = 10


@dataclass(frozen=True)
class Case:
    """One cell of the table.

    Attributes:
        shared: The rows have their first 48 tokens in common.
    """

    model: str
    method: str
    checkpointing: bool
    packing: bool
    kind: str
    ranks: int = 1
    settings: str = ""
    shared: bool = False

    def __str__(self) -> str:
        settings = self.settings or ("shared" if self.shared else "")
        return f"{self.model:<8} {self.method:<14} {self.layout} {self.layers:<10} {self.kind} {settings}".rstrip()

    @property
    def layout(self) -> str:
        return "packed" if self.packing else "padded"

    @property
    def layers(self) -> str:
        """What becomes of their activations."""
        return "recomputed" if self.checkpointing else "kept"

    @property
    def precision(self) -> Choice:
        return Choice("bf16" if self.kind == "bf16" else "fp32", "as asked")

    @property
    def quantization(self) -> QuantizationConfig | None:
        if self.kind not in ("nf4", "int8"):
            return None
        return QuantizationConfig(bits=4 if self.kind == "nf4" else 8, compute_dtype="fp32")

    def config(self, model: Path | None = None) -> RunConfig:
        """The run that is measured.

        Args:
            model: The folder of its model, where the plan reads it.
        """
        return RunConfig.build(
            {
                "model": str(model or self.model),
                "task": MODELS[self.model][0].title,
                "method": {"name": self.method}
                | ({"num_virtual_tokens": 20} if self.method in PROMPTS else {})
                | SETTINGS[self.settings],
                "data": {"train": "-"},
                "train": {"packing": self.packing, "batch_size": len(LENGTHS), "memory_budget": None},
                "distributed": {"strategy": "fsdp" if model is None else "auto"},
                "classification": {"problem": PROBLEMS[self.model]} if self.model in PROBLEMS else None,
                "embedding": POOLED if MODELS[self.model][0] is EMBEDDING else None,
                "output": "-",
            }
        )

    def rows(self) -> list[dict[str, Any]]:
        """Rows of several lengths."""
        rows = [synthetic_row(self.config(), n) for n in LENGTHS]
        if self.shared:
            for i, row in enumerate(rows):
                row["input_ids"] = [1] * 48 + [2 + i] * (len(row["input_ids"]) - 48)
        return rows


def cases(ranks: int = 1) -> Iterator[Case]:
    """All combinations."""
    layouts = product((False, True), (True, False))
    for model, method, (checkpointing, packing), kind in product(OF_THE_TABLE, METHODS, layouts, FORMATS):
        if kind == "nf4" and method == "full":
            continue
        yield Case(model, method, checkpointing, packing, kind, ranks)


def predict(case: Case, folder: Path) -> int:
    """Planned bytes of tensors at the peak.

    Args:
        folder: For models that are made.
    """
    device = Device("cpu", None, "unknown", case.precision, 0, 0, here=True)
    config = MODELS[case.model][1]()
    config.num_labels = task_of(case.config()).model.outputs or 2
    with fake_mesh(case.ranks) as mesh:
        saved = save_model(case, folder) if case.kind == "kept" else None
        fake_run = FakeRun(case.config(saved), config, device, quantization=case.quantization, mesh=mesh)
        fake_run.shares = fake_run.engine.shares if case.shared else SEPARATE
        batches = fake_run.batches(case.rows())
        return fake_run.measure(batches, recomputed=fake_run.layers if case.checkpointing else 0).peaks["train"].nbytes


def save_model(case: Case, folder: Path) -> Path:
    """Random weights of the case's model, where they are not there yet."""
    task, make = MODELS[case.model]
    dtype = torch.bfloat16 if case.kind == "kept" else torch.float32
    saved = folder / f"{case.model}-{dtype}"
    if not saved.is_dir():
        getattr(transformers, task.model.auto_class).from_config(make(), dtype=dtype).save_pretrained(saved)
    return saved


def measure(case: Case, folder: Path) -> int:
    """Bytes of tensors at the peak of a real second step, as torch's allocator reports them.

    Of several ranks, those of the one that has most, each at its least of `STEPS_OF_RANKS` steps: a rank that waits for
    another holds a layer's whole weights for longer, at times (docs/log.md). Every rank has all of the rows.
    """
    saved = save_model(case, folder)
    if case.ranks == 1:
        return _measure(case, saved, None)
    meeting = folder / uuid.uuid4().hex
    with ProcessPoolExecutor(case.ranks, get_context("spawn")) as pool:
        return max(pool.map(partial(_measure_rank, case, saved, meeting), range(case.ranks)))


def _measure_rank(case: Case, saved: Path, meeting: Path, rank: int) -> int:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=case.ranks)
    try:
        return _measure(case, saved, rank_mesh(find_device()))
    finally:
        dist.destroy_process_group()


def _measure(case: Case, saved: Path, mesh: DeviceMesh | None) -> int:
    config, method = case.config(), find_method(case.method)
    task = task_of(config)
    labels = ["a", "b"] if task.name is SEQ_CLS.name and task.model.outputs is None else None
    model = load_model(
        str(saved),
        task.model,
        dtype=weight_dtype(method, case.precision),
        labels=labels,
        quantization=case.quantization,
        shardable=True,
        device=find_device(),
        kept=torch.bfloat16 if case.kind == "kept" else None,
    )
    _learn_start(model, case)
    model, _, _ = attach(model, method, config, case.precision)
    if mesh is not None:
        shard(model, mesh, find_device())
    engine = Engine(model, task, packing=case.packing, checkpointing=case.checkpointing)
    reshard(model)
    gc.collect()
    held_bytes = sum(_bytes(t) for t in _held(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    model.train()
    shares = engine.shares if case.shared else SEPARATE
    collate = collator_of(case.config(), model, packed=engine.padding is not None, shares=shares)
    batches = collate([dict(row) for row in case.rows()])["batches"]
    weight = float(sum(batch.weight for batch in batches))
    autocast = partial(torch.autocast, "cpu", case.precision.dtype, enabled=case.precision.autocast)

    def step() -> None:
        engine.run(model, batches, weight, autocast=autocast)
        if is_sharded(model):
            average_gradients(model)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    held_bytes += sum(_bytes(x) for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    held_bytes += sum(x.nbytes for batch in batches for x in (*batch.inputs.values(), *_some(batch.targets)))
    peaks = []
    for _ in range(1 if mesh is None else STEPS_OF_RANKS):
        with allocations() as found:
            step()
        peaks.append(found.peak_bytes)
    engine.close()
    return held_bytes + min(peaks)


def _learn_start(model: Any, case: Case) -> None:
    """Learns a start that changes the base weights, of random tokens."""
    start = SETTINGS[case.settings].get("init_lora_weights")
    if start not in ("corda", "lora_ga"):
        return
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, **SETTINGS[case.settings])
    ids = torch.randint(model.config.vocab_size, (4, max(LENGTHS)), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        if torch.is_grad_enabled():  # CorDA reads inputs alone
            loss.backward()

    if start == "corda":
        preprocess_corda(model, config, run)
    else:
        preprocess_loraga(model, config, run)
    model.zero_grad()


class Allocations:
    """What torch's CPU allocator gave out and took back."""

    peak_bytes = 0


class allocations:  # noqa: N801 - a context, written as one
    """Within the block the allocator's own reports are read: `peak_bytes` is the most above the start."""

    def __enter__(self) -> Allocations:
        self.found = Allocations()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self.found

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events: Any = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        reports = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
        live = 0
        for _, _, nbytes in reports:
            live += nbytes
            self.found.peak_bytes = max(self.found.peak_bytes, live)


def _bytes(x: torch.Tensor) -> int:
    return (x.to_local() if isinstance(x, DTensor) else x).untyped_storage().nbytes()


def _some(x: torch.Tensor | None) -> list[torch.Tensor]:
    return [] if x is None else [x]


def _held(model: torch.nn.Module) -> list[torch.Tensor]:
    from siliang.models.quantized import held_tensors

    # a start that changes the base weight keeps that as well
    parked = model.injection.attachments.parked_parameters() if isinstance(model, PeftModel) else ()
    every = (*held_tensors(model), *parked)
    unique = {(t.to_local() if isinstance(t, DTensor) else t).data_ptr(): t for t in every}
    return list(unique.values())


@dataclass(frozen=True)
class Result:
    """A case, made; or why it cannot be."""

    case: Case
    predicted: int = 0
    measured: int = 0
    refused: str = ""

    @property
    def off(self) -> float:
        """Share of what was measured."""
        return self.predicted / self.measured - 1 if self.measured else 0.0

    def __str__(self) -> str:
        if self.refused:
            return f"{self.case}  {self.refused}"
        return (
            f"{self.case}  predicted {self.predicted / 1e6:8.2f} MB  measured {self.measured / 1e6:8.2f} MB  "
            f"{100 * self.off:+6.2f}%"
        )


def compare(case: Case, folder: Path) -> Result:
    """Plans the case and makes it."""
    try:
        planned = predict(case, folder)
    except SiliangError as error:
        return Result(case, refused=str(error).partition("\n")[0][:150])
    return Result(case, planned, measure(case, folder))


def table(results: list[Result]) -> str:
    """In Markdown, a row for each method of a model."""
    columns = sorted({_column(r.case) for r in results}, key=[_column(c) for c in cases()].index)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for r in results:
        cell = "" if r.refused else f"{r.measured / 1e6:,.0f} MB {100 * r.off:+.2f}%"
        rows.setdefault((r.case.model, r.case.method), {})[_column(r.case)] = cell
    lines = [f"| model | method | {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * len(columns)}"]
    for (model, method), cells in rows.items():
        if any(cells.values()):
            lines.append(f"| {model} | {method} | {' | '.join(cells.get(c, '') for c in columns)} |")
    return "\n".join(lines)


def _column(case: Case) -> str:
    return f"{case.kind}, {case.layout}, {case.layers}"


def main() -> int:
    """Prints each case as it is made, and the table; returns 1 where a prediction is off by more than 2%."""
    parser = argparse.ArgumentParser("python -m bench.memory", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="words that a case must have")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the weights")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    options = parser.parse_args()
    asked = [case for case in cases(options.ranks) if all(word in str(case).split() for word in options.only)]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in asked:
            save_model(case, Path(folder))
        # for new processes; torch.set_num_threads does not reach bitsandbytes' threads
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            for result in pool.map(compare, asked, repeat(Path(folder))):
                print(result, flush=True)
                results.append(result)
    worst = max((abs(r.off) for r in results), default=0.0)
    made = sum(not r.refused for r in results)
    print(f"\n{table(results)}\n\n{made} combinations, the worst is off by {100 * worst:.2f}%")
    return 1 if worst > 0.02 else 0


if __name__ == "__main__":
    sys.exit(main())
