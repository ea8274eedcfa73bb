"""What each of several processes holds and takes, on this machine.

python -m bench.ranks memory      resident memory of each process under ddp and fsdp, and the plan's
python -m bench.ranks adapters    a step under fsdp, the adapter replicated or sharded like the base, alternately
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.command import train
from siliang import LoraConfig, get_peft_model
from siliang.data.collate import PadCollator
from siliang.distributed.sharding import average_gradients, rank_mesh, shard
from siliang.engine.batches import StepCollator
from siliang.engine.step import Engine
from siliang.tasks import CAUSAL_LM
from siliang.types import TaskType

ROWS, LENGTH, VOCABULARY = 8, 64, 4096
STEPS, ROUNDS = 6, 5


def llama(hidden: int, layers: int) -> Any:
    """A Llama whose layers outweigh its embeddings, with weights of no meaning."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def write_model(folder: Path, hidden: int, layers: int) -> int:
    """Saves it with a tokenizer of one word a token; its weights' bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    model = AutoModelForCausalLM.from_config(llama(hidden, layers))
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def memory(folder: Path) -> None:
    """Trains with 1, 2 and 4 processes under both strategies, and prints what each held."""
    weights = write_model(folder / "model", 1024, 8)
    print(f"weights {weights / 1e6:,.0f} MB, LoRA on q and v, a step of {ROWS} rows of {LENGTH} tokens, fp32")
    rows = [" ".join(f"w{4 + (17 * i + j) % 4000}" for j in range(LENGTH - 2)) for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    print("strategy  processes  predicted  measured, each process (MB)")
    for strategy, ranks in (("ddp", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)):
        settings = {
            "model": str(folder / "model"),
            "task": "causal_lm",
            "method": "lora",
            "data": {"train": str(folder / "rows.jsonl"), "max_length": LENGTH},
            "train": {"batch_size": ROWS, "max_steps": 4},
            "distributed": {"strategy": strategy},
        }
        try:
            record, _ = train(settings, folder / f"{strategy}-{ranks}", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
        except RuntimeError as error:
            print(f"{strategy:<8}  {ranks:>9}  {error}")
            continue
        found = record.memory
        each = found.peak_bytes_by_rank or [found.peak_bytes]
        print(
            f"{strategy:<8}  {ranks:>9}  {(found.predicted_bytes or 0) / 1e6:9,.0f}  "
            + "  ".join(f"{nbytes / 1e6:,.0f}" for nbytes in each),
            flush=True,
        )


def adapters(folder: Path, ranks: int = 2) -> None:
    """Seconds of a step both ways, alternately."""
    with ProcessPoolExecutor(ranks, multiprocessing.get_context("spawn")) as pool:
        found, *_ = pool.map(partial(_time_rank, folder / uuid.uuid4().hex, ranks), range(ranks))
    for name, seconds in found.items():
        shown = "  ".join(f"{1000 * s:,.0f}" for s in seconds)
        print(f"adapter {name:<10} {1000 * statistics.median(seconds):7,.0f} ms a step  ({shown})")
    print(f"sharded / replicated = {statistics.median(found['sharded']) / statistics.median(found['replicated']):.3f}")


def _time_rank(meeting: Path, ranks: int, rank: int) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    device = torch.device("cpu")
    row = {"input_ids": list(range(4, 4 + LENGTH)), "labels": list(range(4, 4 + LENGTH))}
    batches = StepCollator(PadCollator(0), CAUSAL_LM, ROWS, packed=True)([dict(row) for _ in range(ROWS)])
    steps = {}
    for name, too in (("replicated", False), ("sharded", True)):
        torch.manual_seed(0)
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=16, target_modules="all-linear")
        model: Any = get_peft_model(AutoModelForCausalLM.from_config(llama(512, 8)), config)
        shard(model, rank_mesh(device), device, trained_too=too)
        engine = Engine(model, CAUSAL_LM)
        model.train()

        def step(model: Any = model, engine: Engine = engine) -> None:
            engine.run(model, batches["batches"], float(ROWS * (LENGTH - 1)))
            average_gradients(model)
            model.zero_grad()

        step()
        steps[name] = step
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            found[name].append((time.perf_counter() - start) / STEPS)
    dist.destroy_process_group()
    return found


def main() -> None:
    """Prints one of the two."""
    parser = argparse.ArgumentParser("python -m bench.ranks", description=__doc__)
    parser.add_argument("what", choices=("memory", "adapters"))
    with tempfile.TemporaryDirectory() as folder:
        {"memory": memory, "adapters": adapters}[parser.parse_args().what](Path(folder))


if __name__ == "__main__":
    main()
