"""The machine's own limit: the matrix products that a step requires, and nothing else.

For T tokens of a step: every linear layer W (in, out) of the blocks takes x W and dX = dY W^T, and dW = x^T dY only
where W is trained; the output head the same on the tokens that carry a label alone; LoRA's A and B three each;
attention two products forward and four backward for each sequence, half of that where it is causal. In the lowest
block the gradient ends at query, key and value unless something below is trained.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from bench.steps import own_name
from siliang.check.input import gather_input
from siliang.hardware import machine
from siliang.train.types import Run
from siliang.types import TaskType

MIN_RUN_TIME_S = 0.05  # of each product
BUCKET = 16  # lengths of sequences are rounded up to a multiple: fewer shapes to measure
LOWEST = re.compile(
    r"\.0\.(self_attn|self_attention|attention\.self)\.(q_proj|k_proj|v_proj|query|key|value|query_key_value)$"
)
ONCE_A_ROW = ("pooler", "classifier", "score")  # layers that see one vector of each row

Product = tuple[int, int, int, int]  # (B, M, K, N): B products (M, K) x (K, N), of bmm where B > 1


def limit_seconds(run: Run, tokens: float, device: torch.device, *, min_run_time_s: float = MIN_RUN_TIME_S) -> float:
    """Seconds of the required products of a mean step of `tokens` tokens, in the run's number format."""
    found, dtype = products(run, tokens), run.precision.dtype
    return sum(times * _seconds(product, dtype, device, min_run_time_s) for product, times in found.items())


def products(run: Run, tokens: float) -> dict[Product, float]:
    """The required products of a mean step, and how often each is needed."""
    config, table = run.config, run.train_set
    rows = config.train.batch_size
    virtual = int(config.method.arguments.get("num_virtual_tokens", 0))
    prefix = config.method.name == "prefix_tuning"  # adds keys and values, and no tokens
    own = 0 if prefix else virtual
    T = round(tokens + rows * own)
    learned = round(tokens * float(table.learned.sum()) / float(table.lengths.sum()))
    trained = {own_name(n): tuple(p.shape) for n, p in run.model.named_parameters() if p.requires_grad}
    below = config.method.name in ("full", "bitfit", "prompt_tuning", "p_tuning")
    skeleton = gather_input(config, machine()).skeleton()
    head = skeleton.get_output_embeddings()
    counts: Counter[Product] = Counter()
    for name, layer in skeleton.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        M = learned if layer is head else rows if any(part in name for part in ONCE_A_ROW) else T
        K, N = layer.in_features, layer.out_features
        counts[1, M, K, N] += 1
        if below or not LOWEST.search(f".{name}"):
            counts[1, M, N, K] += 1
        if f"{name}.weight" in trained:
            counts[1, K, M, N] += 1
    for name, shape in trained.items():
        if "lora_A" in name or "lora_B" in name:
            out, inner = shape
            counts += Counter([(1, T, inner, out), (1, T, out, inner), (1, inner, T, out)])
    result: dict[Product, float] = {product: float(times) for product, times in counts.items() if product[1]}
    for product, times in _attention(run, tokens, own, virtual).items():
        result[product] = result.get(product, 0.0) + times
    return result


def _attention(run: Run, tokens: float, own: int, virtual: int) -> dict[Product, float]:
    """The products of attention, for sequences as long as the data's.

    Args:
        own: Virtual tokens that are queries too.
        virtual: Virtual tokens that are keys.
    """
    text: Any = run.model.config.get_text_config()
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    d = getattr(text, "head_dim", None) or text.hidden_size // heads
    lengths = run.train_set.lengths
    sequences = tokens / float(lengths.mean())
    share = 0.5 if run.config.task is TaskType.CAUSAL_LM else 1.0
    sizes, numbers = np.unique(-(-lengths // BUCKET) * BUCKET, return_counts=True)
    found: dict[Product, float] = {}
    for size, number in zip(sizes.tolist(), numbers.tolist(), strict=True):
        q, k = size + own, size + virtual
        times = sequences * number / len(lengths) * layers * share
        # Q K^T and dO V^T; P V and dS K; P^T dO and dS^T Q
        for product in ((heads, q, d, k), (heads, q, k, d), (heads, k, q, d)):
            found[product] = found.get(product, 0.0) + 2 * times
    return found


def _seconds(product: Product, dtype: torch.dtype, device: torch.device, min_run_time_s: float) -> float:
    B, M, K, N = product
    a, b = torch.randn(B, M, K, device=device, dtype=dtype), torch.randn(B, K, N, device=device, dtype=dtype)
    values = {"f": torch.bmm, "a": a, "b": b} if B > 1 else {"f": torch.mm, "a": a[0], "b": b[0]}
    timer = Timer("f(a, b)", globals=values, num_threads=torch.get_num_threads())
    with torch.no_grad():
        return timer.blocked_autorange(min_run_time=min_run_time_s).median
