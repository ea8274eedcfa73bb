"""What bench.scaling computes, compared with a few processes of this machine: bytes sent, seconds of a step.

python -m bench.local_ranks count           bytes that 2 and 4 local processes send, and by the formulae
python -m bench.local_ranks time            seconds of a step on 1, 2 and 4 local processes, and by the model
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.command import train
from bench.scaling import DATA, STRATEGIES, TOKENIZER, Shape, Strategy, imbalance, row_lengths, size, table
from siliang.records import Record

LOCAL = Shape("local", 6, 512, 1408, 8, 8, 6400)
SIZES = (2, 4)
MESSAGE_BYTES = 64 * 2**20
# a separate network, without other traffic; its bytes are printed at the end
APART = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c"]
APART += ['ip link set lo up && "$@"; code=$?; cat /proc/self/net/dev; exit $code', "sh"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    """A strategy with so many batches a step; `settings` of its run."""

    strategy: Strategy
    batches: int = 1

    @property
    def name(self) -> str:
        return f"{self.strategy.name}, {self.batches} batch{'es' if self.batches > 1 else ''}"

    @property
    def settings(self) -> dict[str, Any]:
        method = {"name": "full"} if self.strategy.full else {"name": "lora", "r": 16, "target_modules": "all-linear"}
        kind = self.strategy.name.partition(",")[0]
        if kind.startswith("ZeRO"):
            return {"method": method, "distributed": {"strategy": "deepspeed", "zero_stage": int(kind[-1])}}
        return {"method": method, "distributed": {"strategy": kind}}


def count() -> str:
    """Bytes over the loopback of a private network, of ranks that send in fp32."""
    found: dict[str, list[str]] = {}
    cases = [Case(s, k) for s in STRATEGIES for k in (1, 2) if k == 1 or s.sharded or s.halves]
    if find_spec("deepspeed") is None:
        cases = [c for c in cases if not c.strategy.halves]
        print("deepspeed is not installed: ZeRO is left out", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="siliang-count-") as scratch:
        place = Path(scratch)
        make(place, even=True)
        for case in cases:
            in_fp32 = replace(case.strategy, weight_bytes=4, gradient_bytes=4)
            for ranks in SIZES:
                heard = [sent_bytes(place, case, ranks, steps) for steps in (2, 6)]
                each, paper = (heard[1] - heard[0]) / 4 / ranks, in_fp32.sent(LOCAL, ranks, case.batches, scatter=2)
                found.setdefault(case.name, []).append(f"{size(each)}, {size(paper)} ({each / paper:.3f})")
                print(f"{case.name:<28} {ranks} ranks  {found[case.name][-1]}", file=sys.stderr, flush=True)
    head = ["", *(f"{n} ranks: counted, on fake tensors" for n in SIZES)]
    return table(head, [[name, *cells] for name, cells in found.items()])


def measure(rounds: int) -> str:
    """Seconds of a step on 1, 2 and 4 processes of one thread each, in turn, and by the model."""
    seconds: dict[tuple[str, int], list[float]] = {}
    speed: dict[int, list[float]] = {n: [] for n in SIZES}
    cases = [Case(s) for s in STRATEGIES if not s.halves]
    with tempfile.TemporaryDirectory(prefix="siliang-time-") as scratch:
        place = Path(scratch)
        make(place, even=False)
        for _ in range(rounds):
            for ranks in (1, *SIZES):
                if ranks > 1:
                    speed[ranks].append(loopback_speed(ranks))
                for case in cases if ranks > 1 else cases[::2]:
                    one = case.strategy.full if ranks == 1 else case.name
                    seconds.setdefault((str(one), ranks), []).append(step_seconds(place, case, ranks))
                    print(f"{case.name:<28} {ranks} ranks  {seconds[str(one), ranks][-1]:.3f} s", file=sys.stderr)
    cores, lengths = len(os.sched_getaffinity(0)), row_lengths()
    rows = []
    for case in cases:
        alone = statistics.median(seconds[str(case.strategy.full), 1])
        cells = [f"{alone:.3f} s"]
        for ranks in SIZES:
            in_fp32 = replace(case.strategy, weight_bytes=4, gradient_bytes=4)
            compute = alone / min(ranks, cores) * (1 + imbalance(lengths, ranks, 16 // ranks))
            model = compute + in_fp32.sent(LOCAL, ranks, scatter=2) / statistics.median(speed[ranks])
            took = statistics.median(seconds[case.name, ranks])
            cells.append(f"{took:.3f} s, {model:.3f} s ({took / model:.2f})")
        rows.append([case.name, *cells])
    speeds = ", ".join(f"{n}: {size(statistics.median(speed[n]))}/s" for n in SIZES)
    speed_line = (
        f"{cores} cores; each of 2 or 4 processes sends over the loopback, all-reducing {size(MESSAGE_BYTES)}: {speeds}"
    )
    head = ["", "1 process", *(f"{n}: measured, model" for n in SIZES)]
    return f"{speed_line}\n\n{table(head, rows)}"


def make(place: Path, *, even: bool) -> None:
    """A model with random weights, and rows: as they are, or all of one length."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": LOCAL.vocabulary,
        "hidden_size": LOCAL.hidden,
        "intermediate_size": LOCAL.inner,
        "num_hidden_layers": LOCAL.layers,
        "num_attention_heads": LOCAL.heads,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**values))
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    rows = [r for r in json.loads(DATA.read_text(encoding="utf-8")) if not even or len(r["output"]) > 200]
    (place / "data.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows[:512] if r["output"].strip()), encoding="utf-8"
    )


def trained(
    place: Path, case: Case, ranks: int, steps: int, *, rows: int, length: int, within: Sequence[str] = ()
) -> tuple[Record, str]:
    """`siliang train` on so many ranks, with `rows` rows a step: its record, and what was printed."""
    values = {
        "model": str(place / "model"),
        "task": "causal_lm",
        "data": {"train": str(place / "data.jsonl"), "test_size": 0.0, "max_length": length},
        "train": {
            "max_steps": steps,
            "batch_size": rows // ranks // case.batches,
            "gradient_accumulation": ranks * case.batches,
            "precision": "fp32",
            "log_every": 4,
            "memory_budget": None,
        },
    }
    folder = Path(tempfile.mkdtemp(dir=place)) / "run"
    return train(values | case.settings, folder, ranks=ranks, within=within, env=ONE_THREAD)


def sent_bytes(place: Path, case: Case, ranks: int, steps: int) -> int:
    """By all ranks together, from first to last."""
    _, output = trained(place, case, ranks, steps, rows=16, length=32, within=APART)
    found = re.search(r"lo:(?:\s+\d+){8}\s+(\d+)", output)
    assert found is not None
    return int(found[1])


def step_seconds(place: Path, case: Case, ranks: int) -> float:
    """Of a step, after the first four."""
    record, _ = trained(place, case, ranks, 12, rows=16, length=256)
    speeds = [line.tokens_per_s for line in record.steps if line.tokens_per_s]
    return record.tokens_trained / record.steps[-1].step / statistics.median(speeds[1:])


def loopback_speed(ranks: int) -> float:
    """Bytes/s that each rank sends in a large all-reduce."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = os.environ | ONE_THREAD
    done = subprocess.run([*torchrun, "-m", "bench.local_ranks"], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _reduce() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    message = torch.zeros(MESSAGE_BYTES // 4)
    for _ in range(3):
        dist.all_reduce(message)
    started = time.perf_counter()
    for _ in range(8):
        dist.all_reduce(message)
    took = (time.perf_counter() - started) / 8
    if dist.get_rank() == 0:
        print(2 * (dist.get_world_size() - 1) / dist.get_world_size() * MESSAGE_BYTES / took)
    dist.destroy_process_group()


def main() -> None:
    """Prints what was asked for; one of torchrun's processes makes the reductions that `loopback_speed` times."""
    if "RANK" in os.environ:
        _reduce()
        return
    parser = argparse.ArgumentParser(
        "python -m bench.local_ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("count", "time"))
    parser.add_argument("--rounds", type=int, default=3, help="of time, in turn")
    options = parser.parse_args()
    print(count() if options.what == "count" else measure(options.rounds))


if __name__ == "__main__":
    main()
